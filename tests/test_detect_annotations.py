"""Annotation files: every format, every bad input, and nothing heavy kept."""

import json
import os
import subprocess
import sys
import tracemalloc
from array import array
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from balms_cli.detection.annotations import (
    find_annotations,
    find_images,
    keep_images,
    load_annotations,
    tell_left_out,
)
from balms_cli.detection.outlines import clip_polygon, compressed, extents_of, runs_of
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def document(**over):
    """Two images, three categories of which two are used; ids out of order and with gaps."""
    image = {"width": 100, "height": 80}
    return {
        "images": [{"id": 7, "file_name": "a.jpg", **image}, {"id": 5, "file_name": "sub/b.jpg", **image}],
        "annotations": [annotation(1, image=7, category=34), annotation(2, image=5, category=12),
                        annotation(3, image=7, category=12), annotation(4, image=7, category=12)],
        "categories": [{"id": 34, "name": "ox", "frequency": "f"}, {"id": 12, "name": "bee", "frequency": "c"},
                       {"id": 3, "name": "auk", "frequency": "r"}],
        **over,
    }  # fmt: skip


def annotation(id, image=7, category=12, **over):
    return {"id": id, "image_id": image, "category_id": category, "bbox": [10, 10, 20, 20], "segmentation": [SQUARE],
            "iscrowd": 0, **over}  # fmt: skip


def write(folder: Path, content) -> Path:
    file = folder / "train.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


class Notes(Reporter):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


def lvis_mini(name: str) -> Path:
    root = os.environ.get("BALMS_TEST_DATA")
    if not root:
        pytest.skip("BALMS_TEST_DATA names no folder with lvis-mini")
    return Path(root) / "lvis-mini" / name


# What is read


def test_labels_are_places_in_the_order_of_ids_and_counts_are_of_what_is_there(tmp_path):
    found = load_annotations(write(tmp_path, document()))
    assert [(c.id, c.name, c.frequency, c.image_count, c.instance_count) for c in found.categories] == [
        (12, "bee", "c", 2, 3), (34, "ox", "f", 1, 1)]  # fmt: skip
    assert [(image.id, image.file_name, image.labels.tolist()) for image in found.images] == [
        (7, "a.jpg", [2, 1, 1]), (5, "sub/b.jpg", [1])]  # fmt: skip
    assert found.images[0].instances[0] == (2, (10.0, 10.0, 30.0, 30.0), [SQUARE])
    assert found.left_out == {"categories without an image": 1} and found.without_image == ["auk"]
    assert found.all_categories == {3: "auk", 12: "bee", 34: "ox"}
    assert found.num_images == 2 and found.image_counts.dtype == np.int64
    assert found.frequencies.tolist() == [0.75, 0.5]  # 2 of 2 and 1 of 2, kept within [1/4, 3/4]


@pytest.mark.parametrize("name", ["lvis_train.json", "lvis_val.json", "lvis_val_full1203.json"])
def test_real_files_read_as_the_lvis_package_reads_them(name):
    from lvis import LVIS

    found, official = load_annotations(lvis_mini(name)), LVIS(str(lvis_mini(name)))
    ids = {c.id for c in found.categories}
    assert ids == {a["category_id"] for a in official.anns.values()}
    for category in found.categories:
        theirs = official.get_ann_ids(cat_ids=[category.id])
        assert category.instance_count == len(theirs)
        assert category.image_count == len({official.anns[a]["image_id"] for a in theirs})
        assert category.frequency == official.cats[category.id]["frequency"]
    for image in found.images:
        theirs = official.img_ann_map[image.id]
        assert [found.categories[i.label - 1].id for i in image.instances] == [a["category_id"] for a in theirs]
        assert [i.segmentation for i in image.instances] == [a["segmentation"] for a in theirs]
    assert len(found.images) == len(official.img_ann_map)


def test_names_of_every_format(tmp_path):
    content = document()
    images = content["images"] * 2
    named = [{"coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg"}, {"file_name": "sub\\c.jpg"},
             {"file_name": "./d.jpg"}, {"file_name": "COCO_train2014_000000391895.jpg"}]  # fmt: skip
    content["images"] = [{"id": i, "width": image["width"], "height": 80.0, **name}
                         for i, (image, name) in enumerate(zip(images, named, strict=True))]  # fmt: skip
    content["annotations"] = [annotation(i, image=i) for i in range(4)]
    found = load_annotations(write(tmp_path, content))
    assert [image.file_name for image in found.images] == [
        "train2017/000000391895.jpg", "sub/c.jpg", "d.jpg", "COCO_train2014_000000391895.jpg"]  # fmt: skip
    assert found.images[0].height == 80 and isinstance(found.images[0].height, int)


def test_frequency_is_counted_where_the_file_has_none(tmp_path):
    counts = {1: 10, 2: 11, 3: 100, 4: 101}
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in range(101)],
               "annotations": [annotation(1000 * c + i, image=i, category=c) for c, n in counts.items() for i in range(n)],
               "categories": [{"id": c, "name": str(c)} for c in counts]}  # fmt: skip
    content["categories"][0]["frequency"] = "f"  # the file's word holds
    content["categories"][1]["frequency"] = "often"
    found, notes = load_annotations(write(tmp_path, content)), Notes()
    assert [c.frequency for c in found.categories] == ["f", "c", "c", "f"]
    tell_left_out(found, notes)
    assert notes.lines == ["3 of 4 categories have no frequency in train.json, so it is counted: 1 to 10 images rare, to 100 "
                           "common, above that frequent"]  # fmt: skip
    # With fewer images they are counted anew, and the labels numbered anew.
    fewer = keep_images(found, range(11, 101), "missing images")
    assert [(c.id, c.image_count, c.frequency) for c in fewer.categories] == [(3, 89, "c"), (4, 90, "c")]
    assert fewer.left_out == {"missing images": 11, "categories without an image": 2} and fewer.without_image == ["1", "2"]
    assert set(fewer.images[0].labels.tolist()) == {1, 2} and set(found.images[0].labels.tolist()) == {1, 2, 3, 4}


def test_images_without_annotation_stay_where_they_are_asked_for(tmp_path):
    content = document()
    content["images"].append({"id": 9, "file_name": "c.jpg", "width": 10, "height": 10, "neg_category_ids": [3]})
    file = write(tmp_path, content)
    assert load_annotations(file).left_out == {"categories without an image": 1, "images without a usable annotation": 1}
    every = load_annotations(file, every_image=True)
    assert [image.id for image in every.images] == [7, 5, 9] and every.num_images == 2
    assert every.images[2].instances == [] and every.images[2].neg_category_ids == (3,)


# What is left out


def test_what_cannot_be_trained_on_is_left_out_counted_and_told(tmp_path):
    huge = 10**400
    bad = {
        "crowd regions": [{"iscrowd": 1, "segmentation": {"size": [80, 100], "counts": [8000]}}],
        "annotations of an image or category that the file does not have": [
            {"image": 99}, {"category": 99}, {"image": None}, {"image": [7]}, {"category": huge}],
        "annotations without a segmentation": [{"segmentation": None}],
        "empty or degenerate segmentations": [
            {"segmentation": []}, {"segmentation": [[]]}, {"segmentation": [[1, 1, 5, 5]]},
            {"segmentation": [[1, 1, 5, 5, 9, 9]]}, {"segmentation": "none"}, {"segmentation": [["a", "b"] * 3]},
            {"segmentation": [[huge, 1, 5, 5, 9, 1]]}, {"segmentation": [[1e300, 1, 5, 5, 9, 1]]},
            {"segmentation": [[float("nan"), 1, 5, 5, 9, 1]]}, {"segmentation": [[1, 1, 5, 1, 5, 5, 2]]},
            {"segmentation": [[1, 1, 90, 2] * 9000 + [50, 60]]},
            {"segmentation": 5}, {"segmentation": [None]}, {"segmentation": {"size": [80, 100], "counts": [8000]}}],
        "segmentations outside their image": [
            {"segmentation": [[200, 10, 220, 10, 220, 30]]}, {"segmentation": [[-20, 10, 0, 10, -5, 30]]},
            {"segmentation": [[1000, -9e6, 1000, 9e6, 9e6, 9e6]]}, {"segmentation": [[-5e5, 70, 70, 5e5, -5e5, 5e5]]}],
        "run-length masks that do not fit their image": [
            {"segmentation": {"size": [100, 80], "counts": [0, 8000]}}, {"segmentation": {"size": [80, 100], "counts": "zz"}},
            {"segmentation": {"size": [80, 100], "counts": [-1, 8001]}}, {"segmentation": {}}],
        "boxes without area in their image": [
            {"bbox": [10, 10, 0, 20]}, {"bbox": [10, 10, 20, -1]}, {"bbox": [100, 10, 20, 20]}, {"bbox": [10, 10, 1e-9, 20]},
            {"bbox": [float("nan"), 1, 2, 3]}, {"bbox": [1, 2, 3]}, {"bbox": "1 2 3 4"}, {"bbox": [huge, 1, 1, 1]}],
    }  # fmt: skip
    content = document()
    for over in (over for several in bad.values() for over in several):
        content["annotations"].append(annotation(100 + len(content["annotations"]), **over))
    found, notes = load_annotations(write(tmp_path, content)), Notes()
    assert found.left_out == {**{reason: len(over) for reason, over in bad.items()}, "categories without an image": 1}
    assert [c.instance_count for c in found.categories] == [3, 1] and found.images[0].crowd == 1
    tell_left_out(found, notes)
    assert notes.lines == ["left out of train.json: crowd regions (1), annotations of an image or category that the file does "
                           "not have (5), annotations without a segmentation (1), empty or degenerate segmentations (14), "
                           "segmentations outside their image (4), run-length masks that do not fit their image (4), boxes "
                           "without area in their image (8), categories without an image (1)"]  # fmt: skip


def test_one_polygon_without_a_list_around_it_and_a_small_one_far_out_are_read(tmp_path):
    tiny = [90000.3, 90000.7, 90000.301, 90000.7, 90000.301, 90000.701]
    image = {"id": 7, "file_name": "a.jpg", "width": 100_000, "height": 100_000}
    content = document(images=[image], annotations=[annotation(1, segmentation=SQUARE), annotation(2, segmentation=[tiny])])
    found = load_annotations(write(tmp_path, content))
    assert [i.segmentation for i in found.images[0].instances] == [[SQUARE], [tiny]]
    assert extents_of([(array("d", tiny),)])[0][4] == pytest.approx(1e-6, rel=1e-3)  # twice the area


def test_a_bad_polygon_does_not_spoil_the_one_before_it(tmp_path):
    infinite = [float("inf"), 1, 5, 1, 5, 5]
    content = document(annotations=[annotation(1), annotation(2, segmentation=[infinite]), annotation(3)])
    found = load_annotations(write(tmp_path, content))
    assert len(found.images[0].labels) == 2 and found.left_out["empty or degenerate segmentations"] == 1


def test_boxes_alone_need_no_segmentation(tmp_path):
    content = document(annotations=[annotation(1, segmentation=None), annotation(2, segmentation=[]),
                                    annotation(3, bbox=None), annotation(4, bbox=None, segmentation=[])])  # fmt: skip
    found = load_annotations(write(tmp_path, content), masks=False)
    assert [i.segmentation for i in found.images[0].instances] == [None] * 3 and not found.masks
    assert found.left_out["boxes without area in their image"] == 1  # neither box nor polygon
    assert found.images[0].boxes[2].tolist() == [10, 10, 30, 30]  # of the polygon


def test_boxes_are_cut_at_the_image_and_polygons_far_out_are_cut_around_it(tmp_path):
    far = [-1e6, -1e6, 1e6, -1e6, 1e6, 1e6, -1e6, 1e6]
    wide = [-5, 70, 5000, 70, 195, 90]
    content = document(annotations=[annotation(1, bbox=[-5, -5, 20, 1000], segmentation=[far]),
                                    annotation(2, bbox=[-5, 70, 200, 20], segmentation=[wide])])  # fmt: skip
    one, two = load_annotations(write(tmp_path, content)).images[0].instances
    assert one.box == (0, 0, 15, 80) and two.box == (0, 70, 100, 80)
    xs, ys = one.segmentation[0][::2], one.segmentation[0][1::2]
    assert (min(xs), max(xs), min(ys), max(ys)) == (-100, 200, -80, 160)
    assert two.segmentation == [wide]  # the rasteriser's to cut


def test_a_clipped_polygon_covers_the_same_points():
    rng = np.random.default_rng(0)
    for _ in range(50):
        polygon = rng.uniform(-400, 500, 2 * int(rng.integers(3, 9))).tolist()
        clipped = clip_polygon(array("d", polygon), 100, 80).tolist()
        points = rng.uniform((-100, -80), (200, 160), (200, 2))
        assert [even_odd(polygon, *p) for p in points] == [even_odd(clipped, *p) for p in points]
        assert not clipped or (min(clipped[::2]) >= -100 and max(clipped[1::2]) <= 160)


def even_odd(polygon: list[float], x: float, y: float) -> bool:
    """Whether a ray from a point crosses the outline an odd number of times."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    inside = False
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            inside = not inside
    return inside


def test_run_length_masks_are_read_like_pycocotools_and_hostile_ones_never_reach_it():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 7), (60, 300), (400, 300)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = np.asfortranarray((rng.random((height, width)) < share).astype(np.uint8))
            runs, value = [0], 0
            for pixel in mask.ravel(order="F").tolist():
                if pixel != value:
                    runs.append(0)
                    value = pixel
                runs[-1] += 1
            theirs = coco_mask.encode(mask)["counts"].decode()
            assert runs_of(theirs) == runs
            for counts in (theirs, runs):
                assert compressed({"size": [height, width], "counts": counts}, height, width)["counts"] == theirs
    for counts in ("", "0", "é", "oooooooooooooo", "0" * 20, "~~~", "P" * 9, b"0", None, [25.0], [True] * 25, [10**400], [],
                   [10, 10], [-5, 30]):  # fmt: skip
        assert compressed({"size": [5, 5], "counts": counts}, 5, 5) is None
    for counts in ([0, 2**33], [2**33], "0"):  # more pixels than pycocotools can count
        assert compressed({"size": [2**16, 2**17], "counts": counts}, 2**16, 2**17) is None
    for rle in (None, [], {"counts": [25]}, {"size": 5, "counts": [25]}, {"size": [5, 5]}):
        assert compressed(rle, 5, 5) is None


# What is refused

NOTHING = "{file}: no image has a usable annotation"
REFUSED = {
    "no file": (None, "{file} does not exist: give a JSON file with annotations, or a folder that holds one"),
    "not text": (b"\xff\xfe\x00", "{file} is not a text file in UTF-8"),
    "not JSON": (b'{"images": [', "{file} is not valid JSON: Expecting value: line 1 column 13 (char 12)"),
    "empty": (b"", "{file} is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
    "deep": (b"[" * 100_000, "{file} is not valid JSON: it is nested too deeply"),
    "long number": (b'{"images": [' + b"9" * 5000 + b"]}",
                    "{file} is not valid JSON: it holds a number of thousands of digits"),
    "a list": ([], "{file} is not an object with images, annotations and categories, as LVIS and COCO have it"),
    "a detection": (annotation(1), "{file} is not an object with images, annotations and categories, as LVIS and COCO have it"),
    "no images": ({"annotations": [], "categories": []}, "{file} has no list of images: it is not in LVIS or COCO format"),
    "images no list": (document(images={}), "{file} has no list of images: it is not in LVIS or COCO format"),
    "annotations without images": (document(images=[]), "{file} has no images: there is nothing to train on"),
    "images without annotations": (document(annotations=[]), "{file} has no annotations: there is nothing to train on"),
    "no categories": (document(categories=[]), "{file} has no categories: there is nothing to train on"),
    "no image id": (document(images=[{}]), "{file}: one of the images has no 'id' that is an integer"),
    "image is text": (document(images=["a.jpg"]), "{file}: one of the images has no 'id' that is an integer"),
    "image twice": (document(images=document()["images"][:1] * 2), "{file}: image id 7 is there twice"),
    "no size": (document(images=[{"id": 1, "file_name": "a"}]),
                "{file}: image 1 has no usable width and height (pixels, from 1 to 100000)"),
    "huge size": (document(images=[{"id": 1, "file_name": "a", "width": 10**400, "height": 5}]),
                  "{file}: image 1 has no usable width and height (pixels, from 1 to 100000)"),
    "no name": (document(images=[{"id": 1, "width": 5, "height": 5}]),
                "{file}: image 1 has neither a file_name nor a coco_url"),
    "name leads out": (document(images=[{"id": 1, "width": 5, "height": 5, "file_name": "a/../../etc/x\n"}]),
                       "{file}: image 1 has the file name 'a/../../etc/x\\n', which leads out of the images' folder"),
    "absolute name": (document(images=[{"id": 1, "width": 5, "height": 5, "file_name": "/etc/x"}]),
                      "{file}: image 1 has the file name '/etc/x', which leads out of the images' folder"),
    "drive": (document(images=[{"id": 1, "width": 5, "height": 5, "file_name": "C:\\x"}]),
              "{file}: image 1 has the file name 'C:\\x', which leads out of the images' folder"),
    "category id": (document(categories=[{"id": "3", "name": "x"}]),
                    "{file}: one of the categories has no 'id' that is an integer"),
    "category twice": (document(categories=[{"id": 3, "name": "x"}, {"id": 3, "name": "y"}]),
                       "{file}: category id 3 is there twice"),
    "category name": (document(categories=[{"id": 3}]), "{file}: category 3 has no name"),
    "surrogate": (b'{"images": [{"id": 1, "width": 5, "height": 5, "file_name": "a"}], "annotations": [1], "categories": '
                  b'[{"id": 3, "name": "\\ud800"}]}', "{file}: category 3 has no name"),
    "name twice": (document(categories=[{"id": 3, "name": "x"}, {"id": 4, "name": "x"}]),
                   "{file}: two categories are called 'x': rename one"),
    "annotation twice": (document(annotations=[annotation(1), annotation(1)]), "{file}: annotation id 1 is there twice"),
    "no annotation": (document(annotations=[{"id": 1, "image_id": 7}]),
                      "{file}: one of the annotations is not an object with an image_id and a category_id"),
    "number": (document(annotations=[1]), "{file}: one of the annotations is not an object with an image_id and a category_id"),
    "unknown images": (document(annotations=[annotation(1, image=1)]),
                       NOTHING + " (left out: annotations of an image or category that the file does not have (1))"),
    "only crowd": (document(annotations=[annotation(1, iscrowd=1)]), NOTHING + " (left out: crowd regions (1))"),
    "no masks": (document(annotations=[annotation(1, segmentation=None)]), NOTHING + " (left out: annotations without a "
                 "segmentation (1)); boxes alone need no segmentation: --no-masks"),
    "zero area": (document(annotations=[annotation(1, bbox=[1, 1, 0, 0])]),
                  NOTHING + " (left out: boxes without area in their image (1))"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_wrong_is_refused_in_one_line(case, tmp_path, balms):
    content, message = REFUSED[case]
    file = tmp_path / "train.json" if content is None else write(tmp_path, content)
    outcome = balms("detect", "stats", file)
    assert outcome.code == 3 and outcome.out == ""
    assert outcome.err == f"error: {message.format(file=file)}\n"


def test_a_folder_is_not_read_as_a_file(tmp_path):
    with pytest.raises(DataError, match="is a folder: give the JSON file"):
        load_annotations(tmp_path)


# Where things are


def test_the_file_of_a_split_is_found(tmp_path):
    for name in ("lvis_val.json", "lvis_val_full.json", "constrained.json", "captions_train2017.json"):
        (tmp_path / name).touch()
    assert find_annotations(tmp_path, "val") == tmp_path / "lvis_val.json"
    with pytest.raises(DataError, match="holds no annotations of 'train'"):
        find_annotations(tmp_path, "train")
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.touch()
    assert find_annotations(tmp_path, "train") == file and find_annotations(file, "val") == file
    (tmp_path / "annotations" / "lvis_v1_train.json").touch()
    with pytest.raises(DataError, match=r"several JSON files of 'train' \(instances_train2017.json, lvis_v1_train.json\)"):
        find_annotations(tmp_path, "train")


def test_a_file_that_does_not_fit_into_memory_is_told_before_it_is_read(tmp_path, monkeypatch):
    file = write(tmp_path, document())
    size = file.stat().st_size
    monkeypatch.setattr("balms_cli.detection.lvis_json.available_memory", lambda: 4 * size)
    assert load_annotations(file).num_images == 2
    monkeypatch.setattr("balms_cli.detection.lvis_json.available_memory", lambda: 4 * size - 1)
    with pytest.raises(DataError, match=r"takes about 0\.0 GiB of memory, where 0\.0 GiB are free: more memory"):
        load_annotations(file)


def test_the_images_folder_is_found(tmp_path):
    file = tmp_path / "annotations" / "train.json"
    file.parent.mkdir()
    assert find_images(file, None) == tmp_path and find_images(tmp_path / "train.json", None) == tmp_path
    (tmp_path / "images").mkdir()
    assert find_images(file, None) == find_images(tmp_path / "train.json", None) == tmp_path / "images"
    assert find_images(file, str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match=r"folder no\\nwhere does not exist: name another by --images"):
        find_images(file, "no\nwhere")  # of a stranger's checkpoint: on one line


# What it costs


def test_annotations_take_less_than_half_the_memory_of_the_parsed_json(tmp_path):
    outline = np.round(np.random.default_rng(0).uniform(0, 80, 90), 2).tolist()
    content = document(annotations=[annotation(i, segmentation=[outline]) for i in range(2000)])
    file = write(tmp_path, content)
    del content

    def kept(read) -> int:
        tracemalloc.start()
        result = read()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert result
        return size

    packed, plain = kept(lambda: load_annotations(file)), kept(lambda: json.loads(file.read_text()))
    assert packed < 0.5 * plain and packed / 2000 < 8 * len(outline) + 400  # bytes an annotation


def test_annotations_and_stats_do_without_torch():
    code = "import sys; from balms_cli.detection import annotations, sampling, stats; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
