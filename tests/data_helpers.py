"""Real files for the data tests: small images, folders, archives, and a web server on this machine."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from balms_cli.data.known import Archive
from balms_cli.reporter import Reporter


class Listener(Reporter):
    """Remembers what a stage said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.tables: list[tuple[str, list[str], list[list[Any]]]] = []
        self.charts: list[tuple[list[str], list[float]]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.tables.append((title, columns, rows))

    def bars(self, title: str, labels: list[str], values: list[float], texts: list[str]) -> None:
        self.charts.append((labels, values))


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    """A small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 100, 50)).save(path, **options)
    return path


def tree(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """``root/NAME/00.png`` and so on, as many as ``counts`` says; the names may hold slashes."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(root / name / f"{i:02d}{suffix}", i)
    return root


def fake_cifar(folder: Path, train: int = 12, test: int = 4, classes: int = 2) -> tuple[Archive, Path, np.ndarray]:
    """An archive in CIFAR's official form, with the md5 sums that it really has.

    Returns: its description, the tar.gz, and the training pixels uint8 [train, 3, 32, 32] in file order.
    """
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    files, pixels = {}, {}
    for name, count in (("data_batch_1", train), ("test_batch", test)):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        pixels[name] = data.reshape(-1, 3, 32, 32)
        labels = [i % classes for i in range(count)]
        names = [f"thing_s_{i // 2:06d}.png" for i in range(count)]  # the same name in every class: keys must tell them
        files[name] = pickle.dumps({"data": data, "labels": labels, "filenames": names}, protocol=2)
    tar = folder / "fake-python.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"fake-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    archive = Archive(
        "fake", [f"c{i}" for i in range(classes)], "http://127.0.0.1:9/fake-python.tar.gz",
        hashlib.md5(tar.read_bytes()).hexdigest(), "fake-batches",
        (("data_batch_1", md5["data_batch_1"]),), (("test_batch", md5["test_batch"]),), "labels",
    )  # fmt: skip
    return archive, tar, pixels["data_batch_1"]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.honours_range else 0
        content = server.content
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked and server.honours_range else 200)
        if asked and server.honours_range:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = len(content)
        if server.breaks > 0:
            server.breaks -= 1
            stop = start + (len(content) - start) // 2
        self.wfile.write(content[start:stop])

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def web_server(content: bytes, *, breaks: int = 0, honours_range: bool = True) -> Iterator[Any]:
    """Serves ``content`` on the loopback; the first ``breaks`` answers end midway. ``ranges``: what was asked for."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.content, server.breaks, server.honours_range, server.ranges = content, breaks, honours_range, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
