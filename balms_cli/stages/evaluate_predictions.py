"""``balms evaluate --predictions FILE``: what each run says of each scored image, for figures of one's own.

Rows go to the disk as they are made, a part at a time: logits may be large, and no second copy of them is held.
Shapes: N images of the split, C classes.
"""

import csv
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.aside import inert, is_plain, printable, write_error
from ..engine.run_dir import check_place
from ..errors import ConfigError

_ROWS = 1_000_000  # logits that are turned into text or bytes at once


def check_file(file: Path, *, overwrite: bool) -> None:
    """Refuse a place for the file before anything is scored. Raises ConfigError (exit 2)."""
    if file.suffix.lower() not in (".csv", ".npz") or not is_plain(file.name):
        raise ConfigError(f"--predictions {printable(str(file))}: name a file that ends in .csv or .npz")
    try:
        if file.is_dir():
            raise ConfigError(f"--predictions {file} is a folder; name a file in it: {file / 'predictions.csv'}")
        if file.exists() and not overwrite:
            raise ConfigError(f"--predictions {file} is there already; choose another name, or --overwrite")
        if not file.parent.is_dir():
            raise ConfigError(f"--predictions {file}: there is no folder {file.parent}; make it, or choose another place")
    except OSError as error:
        raise write_error(error, file) from None
    check_place(file.parent)


@contextmanager
def writing(file: Path, runs: list[str], classes: list[str]) -> Iterator[Callable[..., None]]:
    """A file that appears when the block ends well, and leaves nothing where it does not. ``runs``: their folders' paths.

    Yields what takes a run's rows: ``add(run, keys, labels_N, logits_NC, order)``, where ``order`` [C] names the columns of
    ``logits_NC`` in the order of ``classes``, as ``labels_N`` counts them. Raises: ConfigError or DataError (see
    :func:`balms_cli.data.aside.write_error`).
    """
    aside, out = file.with_name(f".new-{os.getpid()}-{file.name}"), None

    def add(*of: Any) -> None:
        with _told(file):
            out.add(*of)

    try:
        with _told(file):
            out = (_Csv if file.suffix.lower() == ".csv" else _Npz)(aside, runs, classes)
        yield add
        with _told(file):
            out.close()
            with aside.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(aside, file)
    finally:
        with suppress(OSError):
            if out is not None:
                out.close()
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, file) from error


def _parts(logits_NC: torch.Tensor, order: list[int]) -> Iterator[np.ndarray]:
    """Rows as float32 with the columns in ``order``, some at a time."""
    for part_BC in logits_NC.split(max(1, _ROWS // logits_NC.shape[1])):
        yield part_BC[:, order].float().numpy()


class _Csv:
    """A line an image: ``run`` (of several), ``key``, ``label``, ``predicted``, and the logits, a column a class.

    Nine digits give a float32 back as it was. A name that a spreadsheet would run as a formula has an apostrophe before it.
    """

    def __init__(self, place: Path, runs: list[str], classes: list[str]):
        self.file = place.open("w", encoding="utf-8", newline="")
        self.rows = csv.writer(self.file, lineterminator="\n")
        self.runs, self.names = runs, [inert(name) for name in classes]
        self.rows.writerow([*(["run"] if len(runs) > 1 else []), "key", "label", "predicted", *self.names])

    def add(self, run: int, keys: list[str], labels_N: np.ndarray, logits_NC: torch.Tensor, order: list[int]) -> None:
        which = [inert(printable(self.runs[run]))] if len(self.runs) > 1 else []
        given: Iterable[tuple[str, int]] = zip(keys, labels_N.tolist(), strict=True)
        for part_BC in _parts(logits_NC, order):
            for row_C, best in zip(part_BC, part_BC.argmax(1).tolist(), strict=True):
                key, label = next(given)
                numbers = (f"{value:.9g}" for value in row_C.tolist())
                self.rows.writerow([*which, inert(printable(key)), self.names[label], self.names[best], *numbers])

    def close(self) -> None:
        self.file.close()


class _Npz:
    """``logits`` float32 [N, C], ``labels`` int64 [N], ``keys`` str [N] and ``classes`` str [C]; of several runs ``runs``
    str [R], and ``logits_0``, ``labels_0``, ``keys_0`` and so on in their order. Opens with ``allow_pickle=False``."""

    def __init__(self, place: Path, runs: list[str], classes: list[str]):
        self.zip, self.several = zipfile.ZipFile(place, "w"), len(runs) > 1
        self._array("classes", np.array(classes))
        if self.several:
            self._array("runs", np.array([printable(run) for run in runs]))

    def add(self, run: int, keys: list[str], labels_N: np.ndarray, logits_NC: torch.Tensor, order: list[int]) -> None:
        end = f"_{run}" if self.several else ""
        self._array(f"labels{end}", labels_N.astype(np.int64))
        self._array(f"keys{end}", np.array(keys))
        head = {"descr": "<f4", "fortran_order": False, "shape": (len(logits_NC), len(order))}
        with self._entry(f"logits{end}") as entry:
            np.lib.format.write_array_header_1_0(entry, head)
            for part_BC in _parts(logits_NC, order):
                entry.write(np.ascontiguousarray(part_BC, "<f4").data)

    def _array(self, name: str, array: np.ndarray) -> None:
        with self._entry(name) as entry:
            np.lib.format.write_array(entry, array, allow_pickle=False)

    def _entry(self, name: str) -> Any:
        return self.zip.open(f"{name}.npy", "w", force_zip64=True)

    def close(self) -> None:
        self.zip.close()
