"""What the frozen part of a detector says of every training image, computed once and kept on disk.

Tuning the box classifier changes nothing beneath it, so the regions of an image and their features can be had from files
instead of a network. A view is one augmented look at an image: its rows are the regions that training would sample there.
The cache is a folder of safetensors shards, SHARD_VIEWS views each, with ``features`` [R, D] float16, ``labels`` [R] int32
(0 is background) and ``starts`` [V + 1] int64, the row at which each view begins. A shard is written aside and moved into
place, so a run that was killed leaves whole shards behind, and the next one makes those that are missing. Rows are a
function of the view alone: several processes each make shards of their own, and the cache is the same. A run that finds
another one at the same cache waits for it, by a lock that the system takes off a process that ends, however it ends.

Shapes: R regions, D features, V views.
"""

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.aside import lock, remove_half_written, replace_file, write_error
from ..data.bank import size_text
from ..engine.run_dir import check_place
from ..errors import BalmsError, DataError
from ..reporter import Reporter

SHARD_VIEWS = 16
_OPEN = 64  # shards held open
_LARGEST = torch.finfo(torch.float16).max
_SLACK = 4096  # bytes of a shard beside its rows, at most

Regions = tuple[Tensor, Tensor]  # features [R, D] and labels [R]


class RegionCache:
    """The cache in ``folder``, whole or under way: ``views`` views of at most ``rows`` regions x ``features`` features."""

    def __init__(self, folder: Path, *, views: int, rows: int, features: int, categories: int):
        self.folder, self.views, self.rows, self.features, self.categories = folder, views, rows, features, categories
        self.shards = -(-views // SHARD_VIEWS)
        self._open: OrderedDict[int, tuple] = OrderedDict()

    # How large

    def bytes(self, shards: int | None = None) -> int:
        """What these many shards (default: all) take at most: a view may have fewer regions than it could."""
        shards = self.shards if shards is None else shards
        row = 2 * self.features + 4
        return min(self.views, shards * SHARD_VIEWS) * (self.rows * row + 8) + shards * _SLACK

    def free(self) -> int | None:
        """Bytes free where the cache is to lie. None: unknown."""
        folder = self.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            return None

    def describe(self) -> str:
        """How large the cache is, and how much room there is for it."""
        free = self.free()
        room = "" if free is None else f" ({size_text(free)} free)"
        return (f"{self.views:,} views x {self.rows:,} regions x {self.features:,} features, at most "
                f"{size_text(self.bytes())} on disk{room}")  # fmt: skip

    def check_space(self, shards: int) -> None:
        """Raises DataError (exit 3) where the disk is too small for this many more shards."""
        needed, free = self.bytes(shards), self.free()
        if free is not None and needed > free:
            raise DataError(f"the feature cache needs up to {size_text(needed)} and {self.folder.parent} has "
                            f"{size_text(free)} free: free some space, lower --set views=..., or leave out "
                            "--cache")  # fmt: skip

    # Writing

    def missing(self) -> list[int]:
        """The shards that are still to be written: not there, damaged, or of another shape."""
        return [number for number in range(self.shards) if self._starts(number) is None]

    def shard(self, number: int) -> range:
        """The views of a shard."""
        return range(number * SHARD_VIEWS, min((number + 1) * SHARD_VIEWS, self.views))

    @contextmanager
    def held(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """To write within: the folder is there, and this run's alone. Another one that holds it is waited for, after a call of
        ``waiting``; what is missing may be less then. Raises ConfigError or DataError where the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_place(self.folder)
        except (OSError, BalmsError) as error:
            told = error if isinstance(error, BalmsError) else write_error(error, self.folder)
            raise type(told)(f"{told}, or leave out --cache") from None
        with ExitStack() as held:
            with suppress(OSError):  # Windows opens no folder
                folder = os.open(self.folder, os.O_RDONLY)
                held.callback(os.close, folder)
                if lock(folder, waiting):
                    remove_half_written(self.folder)
            yield

    def write(self, number: int, views: list[Regions]) -> None:
        """A shard, from the regions of its views in order. Features above what float16 holds are cut to it."""
        rows_V = torch.tensor([len(labels_R) for _, labels_R in views])
        features_RD = torch.cat([f_RD.cpu() for f_RD, _ in views]).clamp(-_LARGEST, _LARGEST).half()
        labels_R = torch.cat([labels_R.cpu() for _, labels_R in views]).int()
        starts_V = torch.cat([torch.zeros(1, dtype=torch.int64), rows_V.cumsum(0)])
        replace_file(self._path(number), save({"features": features_RD, "labels": labels_R, "starts": starts_V}))

    # Reading

    def read(self, view: int) -> Regions:
        """Features [R, D] float16 and labels [R] int64 of a view. Raises DataError (exit 3) where its shard is gone."""
        number, place = divmod(view, SHARD_VIEWS)
        try:
            file, starts = self._opened(number)
            rows = slice(starts[place], starts[place + 1])
            return file.get_slice("features")[rows], file.get_slice("labels")[rows].long()
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self._path(number)} cannot be read any more ({error}): run the same command again") from None

    def _opened(self, number: int) -> tuple:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)
            file = safe_open(self._path(number), "pt")
            self._open[number] = (file, file.get_tensor("starts").tolist())
        return self._open[number]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def _starts(self, number: int) -> list[int] | None:
        """Where each view of a shard begins; None where it is not a whole shard of this cache."""
        count = len(self.shard(number))
        try:
            with safe_open(self._path(number), "pt") as file:  # checks that the file is as long as its header says
                if set(file.keys()) != {"features", "labels", "starts"}:
                    return None
                features, labels, starts = (file.get_slice(name) for name in ("features", "labels", "starts"))
                kinds = [x.get_dtype() for x in (features, labels, starts)]
                if kinds != ["F16", "I32", "I64"] or starts.get_shape() != [count + 1]:
                    return None
                places = file.get_tensor("starts")
                rows_V, total = places.diff(), int(places[-1])
                if features.get_shape() != [total, self.features] or labels.get_shape() != [total]:
                    return None
                if places[0] != 0 or rows_V.min() < 0 or rows_V.max() > self.rows:
                    return None
                labels_R = file.get_tensor("labels")
                if total and not 0 <= labels_R.min() <= labels_R.max() <= self.categories:
                    return None
                return places.tolist()
        except (OSError, SafetensorError):
            return None


def fill(cache: RegionCache, shards: list[int], regions: Callable[[int], Regions], reporter: Reporter) -> None:
    """Write ``shards``. ``regions(k)``: the regions of the k-th of their views, asked for in order."""
    if not shards:
        return
    k, total = 0, sum(len(cache.shard(number)) for number in shards)
    with reporter.task("features", total, unit="image") as task:
        for number in shards:
            views = []
            for _ in cache.shard(number):
                views.append(regions(k))
                k += 1
                task.advance()
            cache.write(number, views)
