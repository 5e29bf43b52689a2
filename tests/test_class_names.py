"""Names of classes: the forms in which ImageNet, Places365 and iNaturalist give them, and what does not fit."""

import json
from pathlib import Path

import pytest

from balms_cli.config import MakeLTConfig
from balms_cli.data import class_names
from balms_cli.data.manifest import Manifest
from balms_cli.data.sources import open_source
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter
from balms_cli.stages.make_lt import run

from .data_helpers import picture, tree

SYNSETS = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\nn03126707 crane\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def shown(source: Path, **options: object) -> list[str]:
    found = open_source(MakeLTConfig(source=str(source), **{k: str(v) for k, v in options.items()}), Reporter())
    return [found.names[one] for one in found.classes]


@pytest.mark.parametrize(("text", "names"), [
    (SYNSETS, {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus", "n02012849": "crane",
               "n03126707": "crane"}),
    ("/a/airfield 0\r\n/a/apartment_building/outdoor 1\r\n/z/zen_garden 2\r\n",
     {"0": "airfield", "1": "apartment_building/outdoor", "2": "zen_garden"}),
    ("0: tench\n1: goldfish, 2 of them\n", {"0": "tench", "1": "goldfish, 2 of them"}),
    ("tench\n\ngreat white shark\n", {"0": "tench", "1": "great white shark"}),
    ('[{"id": 5, "name": "Aves x", "supercategory": "Aves"}, {"id": 0, "name": "b"}]', {"5": "Aves x", "0": "b"}),
    ('{"images": [], "categories": [{"id": 3, "name": "c"}]}', {"3": "c"}),
    ('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', {"0": "tench", "1": "goldfish"}),
    ('["a", "b"]', {"0": "a", "1": "b"}),
    ("cat " + "9" * 5000, {"0": "cat " + "9" * 5000}), ("9" * 5000 + " cat", {"0": "9" * 5000 + " cat"}),  # no ids, so names
])  # fmt: skip
def test_forms(tmp_path, text, names):
    assert class_names.read(write(tmp_path / "names", text)) == names


@pytest.mark.parametrize(("text", "message"), [
    ("", "names no classes"), ("{", "not valid JSON"), ('{"a": 1}', "expected a list"),
    ('[{"id": true, "name": "x"}]', "expected"),
    ("n01440764 a\nn01440764 b\n", "names class 'n01440764' twice"), ('["a", ""]', "class '1' is empty"),
    ('["a\\u001b[31m"]', "control character"), ("[" * 5000, "not valid JSON"),
])  # fmt: skip
def test_files_that_are_none(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        class_names.read(write(tmp_path / "names", text))
    assert "\n" not in str(caught.value)


def test_a_names_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="--names takes a file"):
        class_names.read(tmp_path / "gone")
    (tmp_path / "b").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="UTF-8"):
        class_names.read(tmp_path / "b")


def test_imagenet_lt_list_and_folder_have_the_same_names(tmp_path):
    names = write(tmp_path / "synset_words.txt", SYNSETS)
    ids = [line.split()[0] for line in SYNSETS.splitlines()]
    lines = [f"train/{one}/{one}_{i}.JPEG {c}" for c, one in enumerate(ids) for i in range(4 - c)]
    expected = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane (n02012849)", "crane (n03126707)"]
    assert shown(write(tmp_path / "ImageNet_LT_train.txt", "\n".join(lines)), names=names) == expected
    assert shown(tree(tmp_path / "im", {f"train/{one}": 4 - c for c, one in enumerate(ids)}), names=names) == expected


def test_a_list_that_numbers_synsets_in_another_order_is_refused(tmp_path):
    names = write(tmp_path / "synset_words.txt", SYNSETS)
    swapped = "train/n01443537/n01443537_1.JPEG 0\ntrain/n01440764/n01440764_1.JPEG 1\n"
    with pytest.raises(DataError, match=r"class 0 has images of synset n01443537.*number 0 .*n01440764"):
        shown(write(tmp_path / "train.txt", swapped), names=names)
    assert shown(write(tmp_path / "plain.txt", "a.png 0\nb.png 1\n"), names=names)[0] == "tench, Tinca tinca"


def test_inaturalist_list_and_folder(tmp_path):
    names = write(tmp_path / "categories.json", json.dumps(
        [{"id": i, "name": f"Species {i}", "supercategory": "Aves"} for i in range(12)]))  # fmt: skip
    lines = [f"train_val2018/Aves/{c}/{i}.jpg {c}" for c in range(12) for i in range(12 - c)]
    expected = [f"Species {i}" for i in range(12)]
    assert shown(write(tmp_path / "iNaturalist18_train.txt", "\n".join(lines)), names=names) == expected
    root = tree(tmp_path / "2018", {f"Aves/{c}": 12 - c for c in range(12)})
    found = open_source(MakeLTConfig(source=str(root), names=str(names), leaf_classes=True), Reporter())
    assert [found.names[one] for one in found.classes] == expected


def test_a_class_without_a_name_is_named(tmp_path):
    names = write(tmp_path / "names.txt", "one\ntwo\n")
    with pytest.raises(DataError, match=r"class '2' has no name in .*names 2 classes, such as '0'"):
        shown(write(tmp_path / "a.txt", "a.png 0\nb.png 1\nc.png 2\n"), names=names)
    with pytest.raises(DataError, match="class 'cat' has no name"):
        shown(tree(tmp_path / "p", {"cat": 1}), names=names)


def test_names_change_nothing_but_the_names(tmp_path):
    file = write(tmp_path / "a.txt", "".join(f"{c}-{i}.png {c}\n" for c in range(3) for i in range(20 - c)))
    for c in range(3):
        for i in range(20 - c):
            picture(tmp_path / f"{c}-{i}.png")
    names = write(tmp_path / "names.txt", "zebra\nyak\nant\n")
    plain = run(MakeLTConfig(source=str(file), imbalance=5), tmp_path / "ws").manifest
    named = Manifest.load(run(MakeLTConfig(source=str(file), imbalance=5, names=str(names)), tmp_path / "ws").path)
    assert named.classes == ["zebra", "yak", "ant"] and plain.classes == ["0", "1", "2"]
    assert [part.keys for part in named.splits.values()] == [part.keys for part in plain.splits.values()]


def test_the_command_line_and_audit(balms, tmp_path):
    root = tree(tmp_path / "p", {"train/n01440764": 5, "train/n02012849": 4, "val/n01440764": 1, "val/n02012849": 1})
    names = write(tmp_path / "synset_words.txt", SYNSETS)
    done = balms("make-lt", root, "--as-is", "--names", names, "--json")
    assert json.loads(done.out)["classes"] == ["tench, Tinca tinca", "crane"]
    assert json.loads(done.out)["splits"] == {"train": 9, "test": 2} and "test split: val" in done.err
    told = json.loads(balms("audit", root, "--names", names, "--json").out)
    assert [one["name"] for one in told["per_class"]] == ["tench, Tinca tinca", "crane"]
    assert told["splits"] == {"train": 9, "test": 2}
    assert balms("make-lt", root, "--as-is", "--names", tmp_path / "gone").code == 3
    for command in ("make-lt", "audit"):
        done = balms(command, "digits", "--names", names)
        assert done.code == 2 and "leave out --names" in done.err


def test_names_that_are_one_even_with_their_ids(tmp_path):
    file = write(tmp_path / "names", '{"0": "crane", "1": "crane", "2": "crane (0)"}')
    source = write(tmp_path / "l.txt", "a 0\nb 1\nc 2\n")
    with pytest.raises(DataError, match="one name to several classes"):
        shown(source, names=file)
