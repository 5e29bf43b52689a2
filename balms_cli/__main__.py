"""``python -m balms_cli``: the same as ``balms``; what torchrun starts."""

from .cli.app import main

if __name__ == "__main__":
    main()
