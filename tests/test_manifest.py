"""Manifests: round trip, a stranger's manifest, writing whole or not at all."""

import errno
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from balms_cli.cli.inputs import find_manifest
from balms_cli.data import aside
from balms_cli.data.index import index_sha256
from balms_cli.data.manifest import Manifest, Split, find_manifests, newest_manifest
from balms_cli.errors import ConfigError, DataError
from balms_cli.reporter import Reporter


def make(name: str = "m", created: str = "2026-01-01T00:00:00.000001+00:00", root: str = "/nowhere") -> Manifest:
    train = Split(["a/1 x.png", 'a/ü,"2".png', "b/日本.png"], np.array([0, 0, 1]))
    splits = {"train": train, "test": Split(["b/9.png"], np.array([1]))}
    manifest = Manifest(
        path=Path(), name=name, source={"kind": "folder", "name": "f", "root": root}, classes=["a", "b"],
        class_counts=[2, 1], splits=splits, profile="as-is", imbalance=None, imbalance_factor=2.0, seed=0, sha256="",
        image_size=[8, 8], skipped=[{"path": "q", "reason": "truncated"}], untested=["a"], created=created,
    )  # fmt: skip
    return replace(manifest, sha256=index_sha256(manifest.classes, manifest.index_texts()))


def test_round_trip(tmp_path: Path) -> None:
    manifest = make()
    manifest.save(tmp_path / "new" / "m")
    for place in (tmp_path / "new" / "m", tmp_path / "new" / "m" / "manifest.json"):
        back = Manifest.load(place)
        assert back.path == tmp_path / "new" / "m"
        header = "name source classes class_counts imbalance imbalance_factor sha256 image_size skipped untested created"
        for name in header.split():
            assert getattr(back, name) == getattr(manifest, name), name
        assert back.splits["train"].keys == manifest.splits["train"].keys
        assert back.splits["train"].labels.tolist() == [0, 0, 1]
        assert back.splits["train"].labels.dtype == np.int64
        assert len(back.splits["test"]) == 1
    assert sorted(os.listdir(tmp_path / "new" / "m")) == ["manifest.json", "test.csv", "train.csv"]
    assert (tmp_path / "new" / "m" / "train.csv").read_text().startswith("image,label\n")


def test_the_folder_is_as_open_as_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    make().save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_sha_does_not_depend_on_the_root() -> None:
    assert make(root="/here").sha256 == make(root="/there").sha256


def rewrite(folder: Path, *, train: str | None = None, **changes: object) -> None:
    """Change a manifest as a stranger could: with a hash that is right."""
    if train is not None:
        (folder / "train.csv").write_text(train, newline="")
    document = json.loads((folder / "manifest.json").read_text())
    document |= changes
    if "sha256" not in changes:
        texts = {split: (folder / f"{split}.csv").read_text() for split in document["splits"]}
        document["sha256"] = index_sha256(document["classes"], texts)
    (folder / "manifest.json").write_text(json.dumps(document))


STRANGERS = [
    ({"train": "image,label\n../../etc/passwd,0\nb,0\nc,1\n"}, "leads out"),
    ({"train": "image,label\n/etc/passwd,0\nb,0\nc,1\n"}, "leads out"),
    ({"train": "image,label\na/\x1b[2J,0\nb,0\nc,1\n"}, "leads out"),
    ({"train": "image,label\na,0\nb,0\nc,7\n"}, "label 7 is out of range 0..1"),
    ({"train": "image,label\na,0\nb,0\nc,-1\n"}, "line 4: expected"),
    ({"train": "image,label\na,0\nb,0\nc,99999999999999999999\n"}, "out of range"),
    ({"train": "image,label\na,0\na,0\nc,1\n"}, "listed twice"),
    ({"train": "image,label\na,0\nb,0\nc\n"}, "expected 'image,label'"),
    ({"train": "a,0\nb,0\nc,1\n"}, "first line"),
    ({"train": "image,label\na,0\nb,1\nc,1\n"}, "do not agree"),
    ({"train": "image,label\na,1\nb,1\nc,1\n", "class_counts": [0, 3]}, "class 'a' has no training image"),
    ({"class_counts": [1, 2]}, "do not agree"),
    ({"sha256": "0" * 64}, "sha256 differs"),
    ({"classes": ["a", "a"]}, "differ from each other"),
    ({"classes": ["a", "\x1b[2J"]}, "control character"),
    ({"version": 2}, "format version 2"),
    ({"format": "other"}, "not a manifest"),
    ({"splits": {"train": 3}}, "'train' and 'test'"),
    ({"splits": {"train": 3, "test": 1, "../x": 1}, "sha256": "0"}, "splits"),
    ({"image_size": [1]}, "image_size"),
    ({"options": ["--seed", 3]}, "options"),
    ({"source": {"kind": "ftp", "name": "f", "root": "/"}}, "source.kind"),
]


@pytest.mark.parametrize(("changes", "message"), STRANGERS)
def test_a_strangers_manifest(tmp_path: Path, changes: dict, message: str) -> None:
    make().save(tmp_path / "m")
    rewrite(tmp_path / "m", **changes)
    with pytest.raises(DataError, match=message) as caught:
        Manifest.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"", b"[" * 100_000, b"null"])
def test_not_a_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make one with balms make-lt"):
        Manifest.load(tmp_path / "gone")
    make().save(tmp_path / "m")
    (tmp_path / "m" / "test.csv").unlink()
    with pytest.raises(DataError, match=r"test\.csv does not exist"):
        Manifest.load(tmp_path / "m")


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(self: Path, *args: object, **options: object) -> int:
        if self.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="No space left on device"):
        make().save(tmp_path / "a" / "b" / "m")
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("old").save(tmp_path / "m")
    real = os.rename

    def fail(source: str | Path, target: str | Path) -> None:
        if ".new-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DataError, match="Input/output error"):
        make("new").save(tmp_path / "m", overwrite=True)
    assert Manifest.load(tmp_path / "m").name == "old"
    assert os.listdir(tmp_path) == ["m"]


def test_a_folder_that_cannot_be_moved_aside_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("old").save(tmp_path / "m")

    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ConfigError, match="Operation not permitted"):
        make("new").save(tmp_path / "m", overwrite=True)
    assert Manifest.load(tmp_path / "m").name == "old"
    assert os.listdir(tmp_path) == ["m"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "m", tmp_path / "file" / "a" / "b", Path("/proc/balms-test/m")):
        with pytest.raises(ConfigError, match="cannot write") as caught:
            make().save(place)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is a file"):
        make().save(tmp_path / "file")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            make().save(tmp_path / "m")
    finally:
        tmp_path.chmod(0o700)


def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(aside.tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match="Read-only file system"):
        make().save(tmp_path / "deep" / "m")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_a_manifest_and_nothing_else(tmp_path: Path) -> None:
    make("old").save(tmp_path / "m")
    with pytest.raises(ConfigError, match="--overwrite"):
        make("new").save(tmp_path / "m")
    make("new").save(tmp_path / "m", overwrite=True)
    assert Manifest.load(tmp_path / "m").name == "new"
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        make("third").save(tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "thesis.tex").exists()


def test_find_newest_first(tmp_path: Path) -> None:
    assert find_manifests(tmp_path) == []
    assert newest_manifest(tmp_path / "gone") is None
    make("old", "2026-01-01T00:00:00.000001+00:00").save(tmp_path / "data" / "z")
    make("new", "2026-01-01T00:00:00.000002+00:00").save(tmp_path / "data" / "a")
    make("east", "2026-01-01T01:00:00.000000+02:00").save(tmp_path / "data" / "b")  # an hour before the others
    make("half").save(tmp_path / "data" / ".new-x")
    make("before time", "0001-01-01T00:00:00+14:00").save(tmp_path / "data" / "c")
    (tmp_path / "data" / "broken").mkdir()
    (tmp_path / "data" / "broken" / "manifest.json").write_text("{")
    found = find_manifests(tmp_path)
    assert [header.name for header in found] == ["new", "old", "east"]
    assert (found[0].classes, found[0].images) == (2, 3)
    assert newest_manifest(tmp_path) == tmp_path / "data" / "a"


def test_splits_come_in_one_order_whatever_the_file_says(tmp_path: Path) -> None:
    make().save(tmp_path / "m")
    rewrite(tmp_path / "m", splits={"test": 1, "train": 3})
    assert list(Manifest.load(tmp_path / "m").splits) == ["train", "test"]  # audit counts the first one's images


def test_a_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*too long"):
        Manifest.load("x" * 300)


@pytest.mark.parametrize(("stdin", "message"), [
    ("", "printed no path"), ('{"runs": []}', "list of runs is empty"), ('{"runs": 3}', "no JSON of a balms stage"),
    ("a\nb\n", "one data set is needed, stdin names 2"), ('{"runs": [{"run": "a"}, {"run": "b"}]}', "stdin names 2"),
])  # fmt: skip
def test_what_stdin_may_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdin: str, message: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(DataError, match=message):
        find_manifest("-", tmp_path, Reporter())


def test_a_folder_of_images_is_told_to_be_made_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "my photos").mkdir()
    with pytest.raises(DataError, match=r"balms make-lt '.*my photos' --as-is"):
        find_manifest(str(tmp_path / "my photos"), tmp_path, Reporter())
