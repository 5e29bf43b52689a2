"""Index files: the quick way to read and write one is the careful way's equal, and takes nothing that it refuses."""

import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest

from balms_cli.data.index import Split, _parse_any, _parse_plain, index_sha256, index_text, is_safe_key, parse_index
from balms_cli.errors import DataError

FILE = Path("train.csv")


def by_writer(split: Split) -> str:
    stream = io.StringIO()
    rows = zip(split.keys, split.labels.tolist(), strict=True)
    csv.writer(stream, lineterminator="\n").writerows([["image", "label"], *rows])
    return stream.getvalue()


@pytest.mark.parametrize("keys", [[], ["a.png"], ["a/b c.png", "\u00fc/\u65e5.png"], ["a,b.png", "c.png"], ['say "x".png'],
                                  ["..a/x.png", "b"], ["x:\\\\y", "z"], ["a/@1+2/b.tar"]])  # fmt: skip
def test_text_is_that_of_the_csv_module_and_comes_back(keys):
    split = Split(keys, np.arange(len(keys), dtype=np.int64))
    assert index_text(split) == by_writer(split)
    if all(map(is_safe_key, keys)):
        found = parse_index(index_text(split), FILE, 5)
        assert (found.keys, found.labels.tolist(), found.labels.dtype) == (keys, list(range(len(keys))), np.int64)


def test_both_readers_agree_on_any_text():
    rng, quick, refused = random.Random(0), 0, 0
    names = ["a", "b/c", "x.png", "d e", "\u00fc", "", "/", "..", "a,b", '"q"', "\u2028", "\t", ":\\", "a\rb"]
    ends = [",0\n", ",1\n", ",2\n", ",02\n", ",0\n", ",1\n", ",3\n", ",-1\n", "\n", ",", ",99999999999\n", ",\u0663\n", ",0"]
    for _ in range(20_000):
        lines = ["".join(rng.choices(names, weights=[9] * 5 + [1] * 9, k=rng.randint(1, 3)))
                 + rng.choices(ends, weights=[9] * 6 + [1] * 7)[0] for _ in range(rng.randint(0, 4))]  # fmt: skip
        text = rng.choice(("image,label\n",) * 9 + ("image,label\r\n", "")) + "".join(lines)
        plain = _parse_plain(text, 3)
        if plain is not None:
            quick += 1
            careful = _parse_any(text, FILE, 3)
            assert plain.keys == careful.keys and plain.labels.tolist() == careful.labels.tolist(), text
            assert all(map(is_safe_key, plain.keys))
        else:
            try:
                _parse_any(text, FILE, 3)
            except DataError:
                refused += 1
    assert quick > 2000 and refused > 2000


@pytest.mark.parametrize("body", ["a,b,3\n7\n", "a,3\n", "a,-1\n", "a,0\na,0\n", "../a,0\n", "/a,0\n", "a/,0\n", ",0\n",
                                  "a,0\nb\n", "a\x00,0\n", "a,\u0663\n", "a,00000000009\n", f"a,{'0' * 5000}\n"])  # fmt: skip
def test_what_is_refused(body):
    with pytest.raises(DataError, match=r"train\.csv"):
        parse_index("image,label\n" + body, FILE, 3)


def test_the_hash_knows_where_a_part_ends():
    assert index_sha256(["x"], {"a": "bc"}) != index_sha256(["x"], {"ab": "c"})
    assert index_sha256(["x", "y"], {}) != index_sha256(["y", "x"], {})
    assert index_sha256(["x"], {"a": "1", "b": "2"}) == index_sha256(["x"], {"b": "2", "a": "1"})
