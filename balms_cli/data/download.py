"""One file over HTTP with the standard library: progress, resume, checksum, one clear line without a network."""

import hashlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..reporter import Reporter
from .aside import write_error

CONNECT_SECONDS = 10.0  # one connection attempt, and the longest silence while reading
GIVE_UP_SECONDS = 15.0  # name look-up and all addresses of a server together: a user without a network waits no longer
ATTEMPTS = 5  # a connection that breaks off is taken up again while each attempt brings new bytes
_CHUNK = 1 << 18


def fetch(url: str, target: Path, md5: str, reporter: Reporter, *, hint: str) -> None:
    """Download ``url`` to ``target``; a partial ``target.part`` is continued (HTTP Range).

    The file appears only when its md5 is right; one with a wrong md5 is removed. ``hint`` ends every error message.
    Raises: DataError (no network, refused, broken off, wrong md5, full disk), ConfigError (unwritable cache).
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"cannot download {url}: only http and https are spoken; {hint}")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        reporter.note(f"downloading {url} to {target}")
        _download(url, part, reporter, hint)
        with open(part, "rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise DataError(f"{url} has md5 {found}, expected {md5}: damaged on the way or another file; {hint}")
        os.replace(part, target)
    except OSError as error:
        raise write_error(error, target) from None


def _download(url: str, part: Path, reporter: Reporter, hint: str) -> None:
    """Bring ``part`` to its full length, over several connections if need be."""
    for attempt in range(ATTEMPTS):
        start = part.stat().st_size if part.exists() else 0
        response = _connect(url, start, hint)
        if response is None:  # the server has no byte past `start`: complete, or of another file; the md5 will tell
            return
        with response:
            total = _receive(response, part, start, reporter)
        size = part.stat().st_size
        if size == total or total is None:
            return
        if size <= start:
            break
        reporter.note(f"the connection broke off at {size / 1e6:.0f} MB, going on ({attempt + 1})")
    raise DataError(f"the download of {url} broke off; what arrived is kept: run again to go on; or {hint}")


def _receive(response: Any, part: Path, start: int, reporter: Reporter) -> int | None:
    """Append the body to ``part``, or begin anew where the server ignores the range. Returns: full length, bytes."""
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    length = response.headers.get("Content-Length")
    start = start if resumed else 0
    total = start + int(length) if length and length.isdigit() else None
    with open(part, "ab" if resumed else "wb") as sink, reporter.task("download", total or 0, unit="byte") as task:
        task.advance(start)
        while True:
            try:
                block = response.read(_CHUNK)
            except (OSError, http.client.HTTPException):  # silence or a reset: what has arrived is kept
                return total if total is not None else -1
            if not block:
                return total
            sink.write(block)
            task.advance(len(block))


def _connect(url: str, start: int, hint: str) -> Any:
    """Open ``url`` from byte ``start`` on, or raise within GIVE_UP_SECONDS. None: there is nothing from there on (416).

    In a thread of its own, as neither a name look-up nor a server with many dead addresses obeys a timeout.
    """
    headers = {"User-Agent": "balms", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=CONNECT_SECONDS))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(GIVE_UP_SECONDS)
    answer = result[0] if result else TimeoutError(f"no answer within {GIVE_UP_SECONDS:.0f} s")
    if not isinstance(answer, Exception):
        return answer
    if isinstance(answer, urllib.error.HTTPError):
        with suppress(OSError):
            answer.close()
        if answer.code == 416 and start:
            return None
        raise DataError(f"cannot download {url}: the server says {answer.code} {answer.reason}; {hint}")
    reason = getattr(answer, "reason", None) or answer
    raise DataError(f"cannot download {url}: {getattr(reason, 'strerror', None) or reason}; {hint}")
