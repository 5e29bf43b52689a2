"""Sources: folders, lists, digits, and whatever is wrong with them."""

import hashlib
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from balms_cli.config import MakeLTConfig
from balms_cli.data.sources import Source, open_source, split_test
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter

from .data_helpers import Listener, picture, tree


def open_(source: Path | str, **options: object) -> Source:
    return open_source(MakeLTConfig(source=str(source), **options), Reporter())


def sizes(source: Source) -> dict[str, int]:
    labels = [label for _, label in source.train]
    return {name: labels.count(label) for label, name in enumerate(source.classes)}


# ---- folders


def test_split_folder_head_first_ties_by_name(tmp_path: Path) -> None:
    counts = {"train/zebra": 2, "train/ant": 2, "train/big one": 5, "test/ant": 1, "test/big one": 2}
    source = open_(tree(tmp_path / "my photos", counts))
    assert list(sizes(source).items()) == [("big one", 5), ("ant", 2), ("zebra", 2)]
    assert source.test == [("test/big one/00.png", 0), ("test/big one/01.png", 0), ("test/ant/00.png", 1)]
    assert (source.kind, source.name, source.root, source.known) == (
        "folder", "my photos", str((tmp_path / "my photos").resolve()), False,
    )  # fmt: skip


def test_any_name_nested_folders_hidden_files_and_case(tmp_path: Path) -> None:
    root = tmp_path / "p"
    named = ("日本 語/a b.PNG", "日本 語/deep/er/ü.jpeg", "plain/x.JpG")
    for key in (*named, "plain/.hidden.png", ".git/y.png", "plain/n.txt"):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(b"")
    picture(root / "stray.png")
    source = open_(root)
    assert source.classes == ["日本 語", "plain"]
    assert [key for key, _ in source.train] == list(named)


def test_a_class_that_is_called_train(tmp_path: Path) -> None:
    assert sizes(open_(tree(tmp_path, {"train": 3, "bus": 2}))) == {"train": 3, "bus": 2}


def test_a_test_split_of_twenty_percent(tmp_path: Path) -> None:
    source = split_test(open_(tree(tmp_path, {"a": 20, "b": 6, "c": 3, "d": 2, "e": 1})), 0.2)
    tested = [label for _, label in source.test]
    assert [tested.count(c) for c in range(5)] == [4, 1, 1, 0, 0]
    assert sizes(source) == {"a": 16, "b": 5, "c": 2, "d": 2, "e": 1}
    assert not {key for key, _ in source.train} & {key for key, _ in source.test}
    by_hash = sorted((f"a/{i:02d}.png" for i in range(20)), key=lambda key: hashlib.sha256(f"0\0a\0{key}".encode()).digest())
    assert [key for key, label in source.test if label == 0] == by_hash[:4]  # on every machine, whatever the run's seed
    greedy = split_test(open_(tmp_path), 0.99)
    assert min(sizes(greedy).values()) == 1  # something stays for training, whatever the fraction


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/a": 1, "train/b": 1, "test/c": 1}, "test class 'c' has no training images"),
        ({"train/a": 1, "train/none": 0, "test/a": 1}, "class 'none' has no images: .*; put images there, or remove"),
        ({"a": 1, "none": 0}, r"class 'none' has no images: .*p/none is .*; put images there, or remove the folder$"),
        ({}, "holds no class folders"),
    ],
)
def test_bad_folders(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(DataError, match=message):
        open_(tree(tmp_path / "p", counts))


def test_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {"a": 2, "b": 1})
    outside = tree(tmp_path / "outside", {"x": 1})
    (root / "a" / "inner.png").symlink_to(root / "b" / "00.png")
    (root / "a" / "escape.png").symlink_to(outside / "x" / "00.png")
    (root / "b" / "loop").symlink_to(root / "b")
    (root / "b" / "away").symlink_to(outside / "x")
    source = open_(root)
    assert sizes(source) == {"a": 3, "b": 1}
    assert dict(source.bad) == dict.fromkeys(("a/escape.png", "b/away"), "a link that leaves the folder")


def test_of_several_links_to_a_folder_the_first_by_name_counts(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train/a": 1, "train/b": 1, "more": 2})
    for i in (5, 3, 9, 1, 7, 2, 8, 4, 6):
        (root / "train/a" / f"l{i}").symlink_to(root / "more")
    keys = [key.removeprefix("train/") for key, _ in open_(root).train]
    assert keys == ["a/00.png", "a/l1/00.png", "a/l1/01.png", "b/00.png"]


def test_a_class_of_which_nothing_may_be_read(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {"a": 1, "b": 0})
    (root / "b" / "out.png").symlink_to(picture(tmp_path / "out.png"))
    source = open_(root)  # the whole data set's bad images are told together, not the first class's alone
    assert source.bad == [("b/out.png", "a link that leaves the folder")] and sizes(source) == {"a": 1, "b": 0}


@pytest.mark.skipif(os.name != "posix", reason="needs file names that are bytes")
def test_names_that_no_text_file_can_hold(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {"a": 1})
    for name in (b"new\nline.png", b"\xff.png"):
        try:
            (root / "a" / os.fsdecode(name)).write_bytes(b"")
        except OSError:
            pytest.skip("this file system takes no such names")
    assert sorted(key for key, _ in open_(root).bad) == ["a/new\nline.png", "a/\udcff.png"]


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'cifar10'"):
        open_("cifar-10")
    with pytest.raises(DataError, match="no such source"):
        open_("~nobody-of-that-name/photos")
    for name in ("x" * 300, "x" * 300 + ".tar"):
        with pytest.raises(DataError, match=r"cannot read x+.*: File name too long"):
            open_(name)


def test_pictures_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path / "p", {"train/a": 2, "train/b": 2, "train/c": 2, "more/a": 1})
    for key in ("train/a/1.heic", "train/a/deep/2.HEIC", "train/b/3.heif", "train/b/n.txt", "train/b/.hidden", "train/4.heic"):
        (root / key).parent.mkdir(exist_ok=True)
        (root / key).write_bytes(b"")
    listener = Listener()
    source = open_source(MakeLTConfig(source=str(root)), listener)
    assert list(sizes(source).values()) == [2, 2, 2]
    assert listener.warnings == ["left out, as they cannot be decoded here: 2 .heic, 1 .heif; convert them to JPEG or PNG"]
    assert listener.notes == ["passed over: files that are no images by name (1 .txt); 1 image outside class folders; "
                              "beside train and test: more"]  # fmt: skip
    for i in range(2):
        (root / f"train/c/0{i}.png").rename(root / f"train/c/{i}.heic")
    with pytest.raises(DataError, match=r"class 'c' has no images: left out, .* 2 \.heic; convert"):
        open_(root)


def test_classes_that_are_called_as_splits_are(tmp_path: Path) -> None:
    listener = Listener()
    root = tree(tmp_path / "p", {"Train/cat": 3, "Train/dog": 2, "Valid/cat": 1})
    assert open_source(MakeLTConfig(source=str(root)), listener).classes == ["Train", "Valid"]
    assert "called Train, Valid: if these are splits, name their folders train, val and test" in listener.warnings[0]
    listener.warnings.clear()
    open_source(MakeLTConfig(source=str(tree(tmp_path / "q", {"train": 3, "bus": 2}))), listener)
    assert listener.warnings == []


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.xz", "tgz"])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, ending: str) -> None:
    tree(tmp_path / "p", {"a": 1})
    form = {"zip": "zip", "tar.xz": "xztar"}.get(ending, "gztar")
    made = Path(shutil.make_archive(str(tmp_path / "made"), form, tmp_path / "p")).rename(tmp_path / f"photos.{ending}")
    with pytest.raises(DataError, match=r"photos\.\w+(\.\w+)? is an archive: unpack it and name what is in it: a folder"):
        open_(made)
    with pytest.raises(DataError, match=r"to read cifar10 from it, name cifar10 with --data-root"):
        open_(made.rename(tmp_path / ("cifar10.zip" if ending == "zip" else "cifar-10-python.tar.gz")))


def test_a_folder_of_archives_alone(tmp_path: Path) -> None:
    (tmp_path / "Photos.ZIP").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no class folders; .*; Photos\.ZIP in it is an archive: unpack it"):
        open_(tmp_path)


def test_a_list_that_begins_as_an_archive_does(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("BZh/1.png 0\nPK/1.png 1\n")
    assert len(open_(tmp_path / "list").train) == 2


# ---- lists


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_list_with_integer_labels(tmp_path: Path) -> None:
    text = "# a comment\r\n\r\nx/one two.png 1\r\ny.png\t0\r\nz.png   1\r\n./x/../w.png 02\r\n"
    source = open_(write(tmp_path / "all.txt", text))
    assert source.classes == ["1", "0", "2"]  # head first, ties by number
    assert source.train == [("x/one two.png", 0), ("z.png", 0), ("y.png", 1), ("w.png", 2)]
    assert (source.kind, source.name, source.test) == ("list", "all", None)
    source = open_(write(tmp_path / "many.txt", "".join(f"{i}.png {i}\n" for i in range(12))))
    assert source.classes == [str(i) for i in range(12)]  # 10 after 9


def test_list_with_names_its_sibling_and_absolute_paths(tmp_path: Path) -> None:
    write(tmp_path / "my_test.txt", "t.png cat\n")
    source = open_(write(tmp_path / "my_train.txt", f"\ufeffa.png cat\nb.png 7\n{tmp_path}/c.png cat\n"))
    assert source.classes == ["cat", "7"]
    assert source.train == [("a.png", 0), ("c.png", 0), ("b.png", 1)]
    assert source.test == [("t.png", 0)]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a 0\nb 2\n", None, r"class 1 has no images in train\.txt"),
        ("a 1\nb 2\n", None, r"class 0 has no images .* all of 0\.\.2; count from 0, or write names"),
        ("a 0\nb 999999999\n", None, "class 1 has no images"),
        ("a 0\nb -1\n", None, r"label -1 in train\.txt line 2 is out of range"),
        ("a 0\nb 1\nc 2\nd 3\ne 4\n", "# x\n\nf 7\n", r"label 7 in test\.txt line 3 is out of range 0\.\.4"),
        ("a 0\n", "f cat\n", r"label cat in test\.txt line 1 is out of range"),
        ("a dog\n", "f cat\n", r"test class 'cat' in test\.txt line 1 has no training images"),
        ("a 0\nlonely\n", None, r"train\.txt line 2: expected 'path label'"),
        ("a 0\n../up.png 0\n", None, r"train\.txt line 2: .* leads out"),
        ("a 0\nx/../../up.png 0\n", None, "leads out"),
        ("/etc/passwd 0\n", None, r"train\.txt line 1: '/etc/passwd' leads out of .*; --images names the folder"),
        ("./ 0\n", None, "leads out"),
        ("a 0\n./a 0\n", None, "'a' is already listed in line 1"),
        ("# nothing\n", None, "lists no images"),
        ("a\x00b 0\n", None, "expected 'path label'"),
    ],
)
def test_bad_lists(tmp_path: Path, train: str, test: str | None, message: str) -> None:
    if test is not None:
        write(tmp_path / "test.txt", test)
    with pytest.raises(DataError, match=message) as caught:
        open_(write(tmp_path / "train.txt", train))
    assert "\n" not in str(caught.value)


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor a text file"):
        open_(picture(tmp_path / "photo.png"))


def test_list_link_escape_and_shared_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "l.png").symlink_to(picture(tmp_path / "out.png"))
    write(tmp_path / "in" / "test.txt", "b 0\n")
    listener = Listener()
    path = write(tmp_path / "in" / "train.txt", "l.png 0\nb 0\n")
    source = open_source(MakeLTConfig(source=str(path)), listener)
    assert source.bad == [("l.png", "a link that leaves the folder")]
    assert source.train == [("b", 0)]
    assert any("1 images are in the training and in the test list" in line for line in listener.warnings)


def test_absolute_paths_by_way_of_a_link_to_the_root(tmp_path: Path) -> None:
    tree(tmp_path / "in", {"a": 1})
    (tmp_path / "way").symlink_to(tmp_path / "in")
    source = open_(write(tmp_path / "in" / "l.txt", f"{tmp_path}/way/a/00.png 0\n{tmp_path}/in/b.png 0\n"))
    assert source.train == [("a/00.png", 0), ("b.png", 0)]


def test_a_list_that_leads_too_deep(tmp_path: Path) -> None:
    source = open_(write(tmp_path / "l.txt", f"{'d/' * 101}x.png 0\n{'d/' * 100}x.png 0\n"))
    assert source.bad == [("d/" * 101 + "x.png", "more than 100 folders deep")] and len(source.train) == 1


# ---- digits


def test_digits_split() -> None:
    source = open_("digits")
    assert source.known and len(source.train) + len(source.test) == 1797
    tested = [label for _, label in source.test]
    assert [tested.count(c) for c in range(10)] == [50] * 10
    assert list(sizes(source).values()) == [128, 132, 127, 133, 131, 132, 131, 129, 124, 130]  # UCI's counts less 50
    assert open_("digits", seed=7).test == source.test


def test_a_long_list_takes_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "all.txt", "".join(f"f/{i}.png {i % 50}\n" for i in range(20_000)))
    tracemalloc.start()
    assert len(open_(path).train) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
