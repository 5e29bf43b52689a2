"""Folders as torchvision lays them out: what its own classes read is what is listed here."""

import json
from collections import Counter
from pathlib import Path

import pytest

from balms_cli.config import MakeLTConfig
from balms_cli.data.sources import Source, open_source
from balms_cli.errors import DataError
from balms_cli.stages.make_lt import run

from .data_helpers import Listener, picture, tree


def open_(source: Path, listener: Listener | None = None, **options: object) -> Source:
    return open_source(MakeLTConfig(source=str(source), **options), listener or Listener())


def files(source: Source, split: str = "train") -> dict[str, str]:
    return {key: source.classes[label] for key, label in getattr(source, split)}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    root = tree(tmp_path / "p", {"cat": 3, "dog/deep": 2})
    theirs = ImageFolder(str(root))
    assert {str(root / key): name for key, name in files(open_(root)).items()} == {
        path: theirs.classes[label] for path, label in theirs.samples}  # fmt: skip


def test_imagenet_validation_images_are_the_test_split(tmp_path):
    root = tree(tmp_path / "im", {"train/n01440764": 3, "train/n01443537": 2, "val/n01440764": 1, "val/n01443537": 1})
    write(root / "ILSVRC2012_devkit_t12.tar.gz", "x")
    write(root / "ILSVRC2012_img_train.tar", "x")
    listener = Listener()
    source = open_(root, listener)
    assert Counter(files(source, "test").values()) == {"n01440764": 1, "n01443537": 1} and source.val is None
    assert listener.notes == ["test split: val"]


def test_a_validation_folder_beside_a_test_folder_is_one(tmp_path):
    root = tree(tmp_path / "p", {"train/a": 5, "train/b": 4, "val/b": 2, "val/a": 1, "test/a": 1})
    source = open_(root)
    assert list(files(source, "val").values()) == ["a", "b", "b"] and list(files(source, "test").values()) == ["a"]
    manifest = run(MakeLTConfig(source=str(root), as_is=True), tmp_path / "ws").manifest
    assert {split: len(part) for split, part in manifest.splits.items()} == {"train": 9, "val": 3, "test": 1}
    with pytest.raises(Exception, match="validation split of its own"):
        run(MakeLTConfig(source=str(root), as_is=True, val_per_class=1), tmp_path / "ws")
    tree(root, {"val/fox": 1})
    with pytest.raises(DataError, match="class 'fox' has no training images"):
        open_(root)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_words_for_validation(tmp_path, name):
    root = tree(tmp_path / "p", {"train/a": 5, "train/b": 4, f"{name}/b": 2, f"{name}/a": 1})
    assert list(files(open_(root), "test").values()) == ["a", "b", "b"]
    tree(root, {"test/a": 1, f"{name}/of no class": 0})
    source = open_(root)
    assert list(files(source, "val").values()) == ["a", "b", "b"] and list(files(source, "test").values()) == ["a"]
    tree(root, {"val/a": 3})  # the usual name goes first
    listener = Listener()
    assert list(files(open_(root, listener), "val")) == ["val/a/00.png", "val/a/01.png", "val/a/02.png"]
    assert listener.notes == [f"passed over: beside train and test: {name}"]


def test_inaturalist_2018_is_read_as_torchvision_reads_it(tmp_path):
    from torchvision.datasets import INaturalist

    root = tree(tmp_path / "2018", {"Aves/0": 3, "Aves/2": 1, "Plantae/1": 4, "Plantae/3": 2}, ".jpg")
    theirs = INaturalist(str(tmp_path), version="2018")
    expected = {f"{theirs.all_categories[c]}/{name}": theirs.all_categories[c] for c, name in theirs.index}
    source = open_(root, leaf_classes=True)
    assert files(source) == expected and source.classes == ["Plantae/1", "Aves/0", "Plantae/3", "Aves/2"]
    listener = Listener()
    assert open_(root, listener).classes == ["Plantae", "Aves"]
    assert any("--leaf-classes" in note and "Aves/0" in note for note in listener.notes)


def test_numbers_below_the_classes_are_taken_for_inaturalists_ids_unless_they_are_classes_too(tmp_path):
    for top, told in (("Aves", True), ("12", False)):
        listener = Listener()
        open_(tree(tmp_path / top, {f"{top}/12": 2, "Insecta/7": 1}), listener)
        assert any("--leaf-classes" in note for note in listener.notes) == told


def test_inaturalist_2021_root(tmp_path):
    from torchvision.datasets import INaturalist

    names = [f"0000{i}_Animalia_P_C_O_F_G_species{i}" for i in range(2)]
    counts = {f"2021_train/{name}": 3 - i for i, name in enumerate(names)} | {f"2021_valid/{name}": 1 for name in names}
    root = tree(tmp_path / "inat", counts, ".jpg")
    source = open_(root)
    for version, split in (("2021_train", "train"), ("2021_valid", "test")):
        theirs = INaturalist(str(root), version=version)
        assert files(source, split) == {f"{version}/{names[c]}/{name}": names[c] for c, name in theirs.index}


def test_inaturalist_json(tmp_path):
    def document(first: int, labels: list[int]) -> str:
        images = [{"id": first + i, "file_name": f"train_val2018/Aves/{c}/{first + i}.jpg"} for i, c in enumerate(labels)]
        notes = [{"id": i, "image_id": first + i, "category_id": c} for i, c in enumerate(labels)][::-1]
        return json.dumps({"info": {}, "images": images, "annotations": notes, "categories": []})

    write(tmp_path / "val2018.json", document(900, [1, 0, 2]))
    source = open_(write(tmp_path / "train2018.json", document(1, [0, 0, 1, 2, 0])))
    assert [(key.rpartition("/")[2], source.classes[c]) for key, c in source.train] == [
        ("1.jpg", "0"), ("2.jpg", "0"), ("5.jpg", "0"), ("3.jpg", "1"), ("4.jpg", "2")]  # fmt: skip
    assert list(files(source, "test").values()) == ["0", "1", "2"]
    for text in ("{}", "[]", '{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "{",
                 '{"images": 3, "annotations": 4}',
                 '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": 0}, '
                 '{"image_id": 1, "category_id": 1}]}',
                 '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": 0}, '
                 '{"image_id": 2, "category_id": 0}]}',
                 '{"images": [{"id": 1, "file_name": 7}], "annotations": [{"image_id": 1, "category_id": 0}]}'):  # fmt: skip
        with pytest.raises(DataError, match="no file of images with one annotation each"):
            open_(write(tmp_path / "a.json", text))


def places(root: Path, folders: tuple[str, str] = ("data_256_standard", "val_256")) -> Path:
    train = [("a/airfield", 3), ("a/apartment_building/outdoor", 2), ("z/zen_garden", 1)]
    tree(root, {f"{folders[0]}/{name}": count for name, count in train}, ".jpg")
    lines = [f"/{name}/{i:02d}.jpg {c}" for c, (name, count) in enumerate(train) for i in range(count)]
    write(root / "places365_train_standard.txt", "\n".join(lines) + "\n")
    for i in range(3):
        picture(root / folders[1] / f"Places365_val_0000000{i}.jpg")
    write(root / "places365_val.txt", "".join(f"Places365_val_0000000{i}.jpg {2 - i}\n" for i in range(3)))
    write(root / "categories_places365.txt", "".join(f"/{name} {c}\n" for c, (name, _) in enumerate(train)))
    return root


def test_places365_is_read_as_torchvision_reads_it(tmp_path, monkeypatch):
    from torchvision.datasets import Places365

    monkeypatch.setattr(Places365, "_check_integrity", lambda *_: True)  # the sums are those of the full lists
    root = places(tmp_path / "places")
    source = open_(root)
    for split, ours in (("train-standard", "train"), ("val", "test")):
        theirs = Places365(str(root), split=split, small=True)
        assert {str(Path(source.root) / key): int(name) for key, name in files(source, ours).items()} == dict(theirs.imgs)
    assert [source.names[one] for one in source.classes] == ["airfield", "apartment_building/outdoor", "zen_garden"]
    manifest = run(MakeLTConfig(source=str(root), as_is=True), tmp_path / "ws").manifest  # and every image is found
    assert manifest.classes[2] == "zen_garden" and manifest.name == "places-as-is"


def test_places365_without_its_images(tmp_path):
    root = places(tmp_path / "places", ("elsewhere", "val_256"))
    with pytest.raises(DataError, match=r"has the list places365_train_standard\.txt but no images: none of data_256_standard"):
        open_(root)


def test_places365_as_leaf_folders(tmp_path):
    root = places(tmp_path / "places")
    source = open_(root / "data_256_standard", leaf_classes=True, names=str(root / "categories_places365.txt"))
    assert [source.names[one] for one in source.classes] == ["airfield", "apartment_building/outdoor", "zen_garden"]


@pytest.mark.parametrize(("train", "others"), [
    ("ImageNet_LT_train.txt", ("ImageNet_LT_val.txt", "ImageNet_LT_test.txt")),
    ("iNaturalist18_train.txt", ("iNaturalist18_val.txt",)),
])  # fmt: skip
def test_published_lists_with_their_siblings(tmp_path, train, others):
    images = tmp_path / "images"
    images.mkdir()
    write(tmp_path / train, "train/a/1.JPEG 0\ntrain/a/2.JPEG 0\ntrain/b/1.JPEG 1\n")
    for i, other in enumerate(others):
        write(tmp_path / other, f"val/{i}.JPEG 1\n")
    listener = Listener()
    source = open_(tmp_path / train, listener, images=str(images))
    assert source.root == str(images.resolve()) and len(source.train) == 3
    if len(others) == 2:
        assert (source.val, source.test) == ([("val/0.JPEG", 1)], [("val/1.JPEG", 1)])
    else:
        assert (source.val, source.test) == (None, [("val/0.JPEG", 1)])
    assert len(listener.notes) == len(others)


def test_audit_reads_what_make_lt_reads(balms, tmp_path):
    root = places(tmp_path / "places")
    told = json.loads(balms("audit", root, "--json").out)
    assert told["splits"] == {"train": 6, "test": 3} and told["per_class"][2]["name"] == "zen_garden"
    inat = tree(tmp_path / "2018", {"Aves/0": 3, "Plantae/1": 4}, ".jpg")
    told = json.loads(balms("audit", inat, "--leaf-classes", "--json").out)
    assert [one["name"] for one in told["per_class"]] == ["Plantae/1", "Aves/0"]
