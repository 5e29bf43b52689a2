"""Names of classes from a synset or category file, for sources that number their classes or name them by synset.

Read are: ``synset_words.txt`` and ``LOC_synset_mapping.txt`` of ImageNet (``n01440764 tench, Tinca tinca``),
``categories_places365.txt`` (``/a/airfield 0``), iNaturalist's ``categories.json`` (a list of ``{"id", "name"}``, alone or
under ``categories``), a JSON object from id to name (or to ``[synset, name]``), and plain text of one name a line.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import DataError
from .aside import is_plain, printable

MAX_BYTES = 256 << 20  # iNaturalist's train2018.json, whose categories are read too, takes 120 MB
_SYNSET = re.compile(r"n[0-9]{8}")
_IN_PATH = re.compile(r"(?:^|/)(n[0-9]{8})(?=[/_.])")
_LETTER = re.compile(r"/?[a-z]/(?=.)")  # Places365 sorts its categories by their first letter


def read(path: Path) -> dict[str, str]:
    """Id to name, in the file's order. Raises: DataError (exit 3) for a file that is none of the forms."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is too large for a file of class names")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; --names takes a file of class names") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file in UTF-8: --names takes a file of class names") from None
    pairs = _from_json(path, text) if text.lstrip()[:1] in ("{", "[") else _from_lines(text)
    if not pairs:
        raise DataError(f"{path} names no classes")
    for key, name in pairs:
        if not name or not is_plain(name):
            raise DataError(f"{path}: the name of class '{printable(key)}' is empty or holds a control character")
    again = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if again:
        raise DataError(f"{path} names class '{printable(again[0])}' twice")
    return dict(pairs)


def _from_json(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("categories"), list):
        found = found["categories"]
    if isinstance(found, list):
        if all(isinstance(one, str) for one in found):
            return [(str(i), one.strip()) for i, one in enumerate(found)]
        if all(isinstance(one, dict) and _is_id(one.get("id")) and isinstance(one.get("name"), str) for one in found):
            return [(str(one["id"]), one["name"].strip()) for one in found]
    elif isinstance(found, dict):
        names = {key: one[1] if isinstance(one, list) and len(one) == 2 else one for key, one in found.items()}
        if all(isinstance(one, str) for one in names.values()):
            return [(key, one.strip()) for key, one in names.items()]
    raise DataError(f"{path}: expected a list of {{'id', 'name'}}, a list of names, or an object from id to name")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _from_lines(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    first = [line.split(maxsplit=1) for line in lines]
    last = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(parts) == 2 and _SYNSET.fullmatch(parts[0]) for parts in first):
        return [(parts[0], parts[1]) for parts in first]
    if all(len(parts) == 2 and re.fullmatch(r"[0-9]{1,9}", parts[1]) for parts in last):
        return [(str(int(parts[1])), _LETTER.sub("", parts[0], count=1)) for parts in last]
    if all(len(parts) == 2 and re.fullmatch(r"[0-9]{1,9}[:,]?", parts[0]) for parts in first):
        return [(str(int(parts[0].rstrip(":,"))), parts[1]) for parts in first]
    return [(str(i), line) for i, line in enumerate(lines)]


def match(names: dict[str, str], classes: list[str], samples: list[str | None], file: Path) -> dict[str, str]:
    """Class of the source to the name shown, for every class.

    ``samples``: the key of one image a class, in which a synset may stand: ImageNet's lists number the synsets in their
    order, and where the paths show synsets, a list in another order is refused. A name that two classes have gets their
    ids (ImageNet has two cranes). Raises: DataError where a class has no name, or a name does not fit.
    """
    synsets = all(_SYNSET.fullmatch(key) for key in names)
    order = sorted(names) if synsets else []
    known = set(names.values())
    ids: dict[str, str | None] = {}
    for one, sample in zip(classes, samples, strict=True):
        last = one.rpartition("/")[2]
        bare = str(int(last)) if last.isascii() and last.isdigit() and len(last) < 10 else last
        ids[one] = next((key for key in (one, last, bare) if key in names), None)
        if ids[one] is None and synsets and one.isascii() and one.isdigit() and int(one) < len(order):
            ids[one] = order[int(one)]
            shown = _IN_PATH.search(sample or "")
            if shown and shown[1] != ids[one]:
                raise DataError(f"class {one} has images of synset {shown[1]}, such as {printable(sample or '')}, but number "
                                f"{one} of {file.name} is {ids[one]}: the list numbers its classes in another way")  # fmt: skip
        if ids[one] is None and one not in known and _LETTER.sub("", one, count=1) not in known:
            raise DataError(f"class '{printable(one)}' has no name in {file}: it names {len(names)} classes, such as "
                            f"'{printable(next(iter(names)))}'")  # fmt: skip
    found = {one: _LETTER.sub("", one, count=1) if key is None else names[key] for one, key in ids.items()}
    times = Counter(found.values())
    found = {one: name if times[name] == 1 else f"{name} ({ids[one] or one})" for one, name in found.items()}
    if len(set(found.values())) < len(found):
        raise DataError(f"{file} gives one name to several classes, even with their ids beside it")
    return found
