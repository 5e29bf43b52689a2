"""Images without labels: the files and folders that a user names, found and read ahead while earlier ones are worked on.

Nothing here holds more than a few batches of images, and the file names of one folder at a time.
"""

import os
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image

from .decode import BadImage, read_image
from .feed import AHEAD
from .folders import EXTENSIONS, is_inside
from .images import default_workers, resampling

Found = tuple[str, str | None]  # a path, and why it is not to be read
Read = tuple[str, np.ndarray | str]  # a path, and its pixels uint8 [3, size, size] or why there are none


def find_images(paths: Iterable[str], passed: Counter[str] | None = None) -> Iterator[Found]:
    """Files as they are named; the images in a folder at any depth, sorted by name folder by folder.

    In a folder, hidden files are passed over, other file types counted by their ending in ``passed``, and links that lead
    out of it refused. A folder that is reached twice (links within) is read once.
    """
    passed = Counter() if passed is None else passed
    for path in paths:
        if os.path.isdir(path):
            yield from _walk(path, passed)
        else:
            yield path, None


def _walk(top: str, passed: Counter[str]) -> Iterator[Found]:
    root = os.path.realpath(top)
    seen: set[str] = set()
    folders: list[tuple[str, str, Iterator[str]]] = [("", "", iter([top]))]  # open ones: path, real path, names to come
    while folders:
        folder, real_folder, names = folders[-1]
        name = next(names, None)
        if name is None:
            folders.pop()
            continue
        path = os.path.join(folder, name)
        is_folder, ending = os.path.isdir(path), os.path.splitext(name)[1].lower()
        if not is_folder and ending not in EXTENSIONS:
            passed[ending] += 1
            continue
        real = os.path.realpath(path) if path == top or os.path.islink(path) else os.path.join(real_folder, name)
        if not is_inside(real, root):
            yield path, "a link that leaves the folder"
        elif not is_folder:
            yield path, None
        elif real not in seen:
            seen.add(real)
            try:
                folders.append((path, real, iter(sorted(name for name in os.listdir(path) if not name.startswith(".")))))
            except OSError as error:
                yield path, error.strerror or str(error)


def read_batches(found: Iterable[Found], size: int, batch_size: int, workers: int | None = None, *, kind: str | None = None
                 ) -> Iterator[list[Read]]:  # fmt: skip
    """Pixels in the order of ``found``, exactly those that training reads from the same file, ``batch_size`` at a time.

    ``workers``: decoder threads (default: one a processor, 8 at most; 0: the caller reads). AHEAD batches are read ahead.
    ``kind``: of the source that was trained on.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF and the like; what matters is checked, see decode.py
    found, resample, workers = iter(found), resampling(kind), default_workers() if workers is None else workers
    if workers == 0:
        while batch := list(islice(found, batch_size)):
            yield [(path, _read(path, problem, size, resample)) for path, problem in batch]
        return
    pool = ThreadPoolExecutor(workers, "balms-decode")
    pending: deque[list[tuple[str, Future]]] = deque()
    try:
        while True:
            while len(pending) <= AHEAD and (batch := list(islice(found, batch_size))):
                pending.append([(path, pool.submit(_read, path, problem, size, resample)) for path, problem in batch])
            if not pending:
                return
            yield [(path, pixels.result()) for path, pixels in pending.popleft()]
    finally:  # Ctrl-C, or nobody wants more
        pool.shutdown(wait=False, cancel_futures=True)


def _read(path: str, problem: str | None, size: int, resample: Image.Resampling) -> np.ndarray | str:
    try:
        return problem or read_image(path, size, resample=resample)
    except BadImage as error:
        return str(error)
