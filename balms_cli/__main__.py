"""What ``balms`` and ``python -m balms_cli`` begin with, torchrun too: Ctrl-C is heard while the rest is imported."""

import sys


def main() -> None:
    try:
        from .cli import app

        app.main()
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("error: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
