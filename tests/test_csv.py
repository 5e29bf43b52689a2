"""CSV lists: columns, splits, quoting, and what is refused."""

import csv
from pathlib import Path

import pytest

from balms_cli.config import MakeLTConfig
from balms_cli.data.sources import Source, open_source
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter

from .data_helpers import picture, tree


def open_(path: Path, **options: object) -> Source:
    return open_source(MakeLTConfig(source=str(path), **options), Reporter())


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def named(source: Source, split: str) -> list[tuple[str, str]]:
    return [(key, source.classes[label]) for key, label in getattr(source, split)]


def test_every_split_and_any_name(tmp_path):
    rows = [("a, b/ü \"1\".png", "big cat", "train"), ("x.png", "dog", "Train"), ("y.png", "dog", "training"),
            ("t.png", "big cat", "test"), ("v.png", "dog", "valid")]  # fmt: skip
    with open(tmp_path / "all.csv", "w", newline="", encoding="utf-8") as stream:  # the standard library's own quoting
        csv.writer(stream).writerows([("path", "label", "split"), *rows])
    source = open_(tmp_path / "all.csv")
    assert (source.kind, source.name, source.root) == ("list", "all", str(tmp_path.resolve()))
    assert named(source, "train") == [("x.png", "dog"), ("y.png", "dog"), ('a, b/ü "1".png', "big cat")]
    assert named(source, "test") == [("t.png", "big cat")] and named(source, "val") == [("v.png", "dog")]


def test_excel_ends_lines_its_own_way_and_other_columns_are_passed_over(tmp_path):
    source = open_(write(tmp_path / "a.csv", "\ufeffid,Image,Label\r\n7,x.png,3\r\n\r\n8,y.png,03\r\n9,z.png,0\r\n1,w.png,1\r\n"
                                             "2,u.png,2\r\n"))  # fmt: skip
    assert named(source, "train")[:2] == [("x.png", "3"), ("y.png", "3")] and len(source.train) == 5
    assert source.test is None


def test_a_validation_split_alone_is_the_test_split(tmp_path):
    source = open_(write(tmp_path / "a.csv", "path,label,split\nx,a,train\ny,a,val\n"))
    assert named(source, "test") == [("y", "a")] and source.val is None


def test_siblings_and_the_images_elsewhere(tmp_path):
    write(tmp_path / "my_test.csv", "path,label\nt.png,a\n")
    images = tree(tmp_path / "else where", {"deep": 2})
    source = open_(write(tmp_path / "my_train.csv", "path,label\ndeep/00.png,a\n"), images=str(images))
    assert source.root == str(images.resolve())
    assert named(source, "train") == [("deep/00.png", "a")] and named(source, "test") == [("t.png", "a")]
    with pytest.raises(DataError, match="--images names it"):
        open_(tmp_path / "my_train.csv", images=str(tmp_path / "gone"))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(DataError, match="--images names it"):
        open_(tmp_path / "my_train.csv", images=str(tmp_path / "circle"))


@pytest.mark.parametrize(("text", "message"), [
    ("x.png,a\ny.png,b\n", r"first line must name the columns.*'path' is missing"),
    ("path,kind\nx.png,a\n", "'label' is missing"),
    ("", "first line must name the columns"),
    ("path,label\n", "lists no training images"),
    ("path,label,split\nx,a,test\n", "lists no training images"),
    ("path,label,split\nx,a,later\n", r"a\.csv line 2: split 'later' is none of train, val, test"),
    ("path,label\nx,a,b\n", r"a\.csv line 2: 3 cells where the header has 2"),
    ("path,label\nx,\n", r"a\.csv line 2: path or label is empty"),
    ('path,label\n"x\ny",a\n', "control character"),
    ("path,label\n../up.png,a\n", r"a\.csv line 2: '\.\./up\.png' leads out"),
    ("path,label\n/etc/passwd,a\n", "leads out"),
    ("path,label\nx,a\n./x,b\n", r"line 3: 'x' is already listed in line 2, as 'a' and not 'b'"),
    ("path,label\nx,0\ny,2\n", r"class 1 has no images in a\.csv"),
    ("path,label,split\nx,a,train\ny,b,test\n", r"test class 'b' in a\.csv line 3 has no training images"),
    ("path,label\n" + "x" * 200_000 + ",a\n", "field larger than field limit"),
])  # fmt: skip
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        open_(write(tmp_path / "a.csv", text))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match="UTF-8"):
        open_(tmp_path / "a.csv")


def test_links_out_of_the_root_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/l.png").symlink_to(picture(tmp_path / "out.png"))
    source = open_(write(tmp_path / "in/a.csv", "path,label\nl.png,a\nb.png,a\n"))
    assert source.bad == [("l.png", "a link that leaves the folder")] and named(source, "train") == [("b.png", "a")]


def test_the_command_line_and_audit(balms, tmp_path):
    tree(tmp_path / "p", {"cat": 6, "dog": 4})
    rows = [f"p/{name}/{i:02d}.png,{name}" for name, n in (("cat", 6), ("dog", 4)) for i in range(n)]
    file = write(tmp_path / "a.csv", "\n".join(["path,label", *rows]))
    done = balms("make-lt", file, "--as-is", "--json")
    assert done.code == 0 and '"dog"' in done.out
    assert balms("audit", file, "--json").code == 0
    assert balms("make-lt", tmp_path / "p", "--images", tmp_path, "--as-is").code == 2
    assert balms("make-lt", file, "--leaf-classes", "--as-is").code == 2
    write(file, "\n".join(["path,label", *rows, "p/cat/00.png,dog"]))
    done = balms("make-lt", file, "--as-is")
    assert done.code == 3 and "already listed" in done.err
    told = balms("audit", file, "--json")
    assert told.code == 0 and "already listed" in told.out  # a finding there, not the end
