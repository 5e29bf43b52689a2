"""Scores equal the official tool's; results files are read with care."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from balms_cli.detection.ground_truth import load_ground_truth
from balms_cli.detection.results import Results, read_results, rounded
from balms_cli.detection.scoring import METRICS, score
from balms_cli.errors import DataError

from .detect_tools import draw_lvis

REAL = os.environ.get("BALMS_TEST_DATA")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """40 images of six categories, with all that evaluation trips over."""
    file = draw_lvis(tmp_path_factory.mktemp("drawn"), images=40, categories=6, seed=1) / "lvis_train.json"
    document = json.loads(file.read_text())
    for entry, group in zip(document["categories"], "rrccff", strict=True):
        entry["frequency"] = group
    rng = np.random.default_rng(0)
    for image in document["images"]:
        k = document["categories"][rng.integers(6)]["id"]
        image["not_exhaustive_category_ids"] = [k] if rng.random() < 0.3 else []
        image["neg_category_ids"] = [n for n in image["neg_category_ids"] if rng.random() < 0.7]
    empty = {**document["images"][0], "id": 900, "file_name": "empty.png"}
    document["images"].append(empty)
    document["annotations"][3]["area"] = 0
    for annotation in document["annotations"][5:40:3]:
        annotation["area"] *= 30  # large and medium ones too
    file.write_text(json.dumps(document))
    return file


def noisy(file: Path, seed: int = 0, per_image: int = 0) -> list[dict]:
    """Detections from ground truth with noise, and ``per_image`` random ones in five images; scores repeat."""
    document, rng, found = json.loads(file.read_text()), np.random.default_rng(seed), []
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    ids = [entry["id"] for entry in document["categories"]]

    def add(image, category, polygons, box):
        width, height = sizes[image]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        box = [float(v) for v in (box[0], box[1], max(0.0, box[2]), max(0.0, box[3]))]
        found.append({"image_id": image, "category_id": category, "score": round(float(rng.random()), 2), "bbox": box,
                      "segmentation": {"size": [height, width], "counts": rle["counts"].decode()}})  # fmt: skip

    for annotation in document["annotations"]:
        for _ in range(2):
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
            side = max(annotation["bbox"][2:])
            polygons = [(np.array(p) + rng.normal(0, 0.06 * side)).tolist() for p in annotation["segmentation"]]
            add(annotation["image_id"], category, polygons, np.array(annotation["bbox"]) + rng.normal(0, 0.08 * side, 4))
    for image, (width, height) in list(sizes.items())[:5]:
        for _ in range(per_image):
            x, y = rng.random(2) * (width * 0.7, height * 0.7)
            w, h = rng.random(2) * (width - x, height - y)
            add(image, int(rng.choice(ids)), [[x, y, x + w, y, x + w, y + h, x, y + h]], (x, y, w, h))
    return found


def official(file: Path, found: list[dict], iou_type: str) -> dict[str, float]:
    """The lvis package by itself: files in, numbers out, with np.float given back and nothing else."""
    import lvis.eval

    class Old:
        float = float

        def __getattr__(self, name):
            return getattr(np, name)

    real, lvis.eval.np = lvis.eval.np, Old()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = "bbox" if iou_type == "segm" else "segmentation"
            entries = [{k: v for k, v in one.items() if k != other} for one in found]
            evaluation = lvis.eval.LVISEval(str(file), json.loads(json.dumps(entries)), iou_type)
            evaluation.run()
    finally:
        lvis.eval.np = real
    return {ours: evaluation.results[theirs] for ours, theirs in METRICS.items()}


def same(scores: dict, expected: dict[str, float]) -> None:
    assert {k: -1 if v is None else v for k, v in scores.items()} == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("per_image", [0, 320])
def test_both_engines_equal_the_official_tool(drawn, iou_type, per_image):
    found = noisy(drawn, per_image=per_image)
    if per_image:  # the cap matters: more than 300 an image, and other numbers without it
        _, counts = np.unique([one["image_id"] for one in found], return_counts=True)
        assert (counts > 300).sum() == 5
    expected = official(drawn, found, iou_type)
    assert len({round(v, 6) for v in expected.values()}) > 8 and min(expected.values()) > 0 and max(expected.values()) < 1
    ours, theirs = (score(drawn, found, iou_type, engine) for engine in ("hotcoco", "lvis"))
    same(ours.metrics, expected)
    same(theirs.metrics, expected)
    assert ours.per_category == pytest.approx(theirs.per_category, abs=1e-10)
    assert ours.metrics["AP"] == pytest.approx(np.mean(list(ours.per_category.values())))


@pytest.mark.skipif(not REAL, reason="needs BALMS_TEST_DATA with lvis-mini")
@pytest.mark.parametrize("name", ["lvis_val", "lvis_val_full1203"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_both_engines_equal_the_official_tool_on_photos(name, iou_type):
    file = Path(REAL) / "lvis-mini" / f"{name}.json"
    found = noisy(file)
    expected = official(file, found, iou_type)
    assert 0 < expected["AP"] < 1
    same(score(file, found, iou_type).metrics, expected)


@pytest.mark.parametrize("engine", ["hotcoco", "lvis"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_nothing_detected_is_zero(drawn, tmp_path, engine, iou_type):
    (tmp_path / "none.json").write_text("[]")
    scores = score(drawn, tmp_path / "none.json", iou_type, engine)
    assert set(scores.metrics.values()) == set(scores.per_category.values()) == {0}


def test_a_group_without_objects_is_none(drawn, tmp_path):
    document = json.loads(drawn.read_text())
    for entry in document["categories"]:
        entry["frequency"] = "f"
    (tmp_path / "val.json").write_text(json.dumps(document))
    metrics = score(tmp_path / "val.json", noisy(drawn), "bbox").metrics
    assert metrics["AP_r"] is metrics["AP_c"] is None and metrics["AP_f"] == metrics["AP"]


def test_masks_are_sized_by_themselves_though_a_box_is_there(drawn):
    """The official tool takes the area of a box that stands beside a mask, so that AP_s changes."""
    found = noisy(drawn)
    for one in found:
        one["bbox"] = [0.0, 0.0, 90.0, 90.0]
    expected = official(drawn, found, "segm")
    assert 0 < expected["AP"] < 1
    same(score(drawn, found, "segm").metrics, expected)


def test_what_a_file_lacks_is_made_up_for(drawn, tmp_path):
    """Without groups and searched-for categories: groups by images, every category searched for, as in COCO."""
    document = json.loads(drawn.read_text())
    for image in document["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    counts = {entry["id"]: len({a["image_id"] for a in document["annotations"] if a["category_id"] == entry["id"]})
              for entry in document["categories"]}  # fmt: skip
    for entry in document["categories"]:
        del entry["frequency"]
    (tmp_path / "val.json").write_text(json.dumps(document))
    truth = load_ground_truth(tmp_path / "val.json")
    assert truth.groups == {id: "r" if n <= 10 else "c" if n <= 100 else "f" for id, n in counts.items()}
    assert len(truth.notes) == 2
    for image in document["images"]:
        image |= {"neg_category_ids": list(counts), "not_exhaustive_category_ids": []}
    for entry in document["categories"]:
        entry["frequency"] = truth.groups[entry["id"]]
    (tmp_path / "told.json").write_text(json.dumps(document))
    for iou_type in ("bbox", "segm"):
        ours, theirs = score(truth, noisy(drawn), iou_type), official(tmp_path / "told.json", noisy(drawn), iou_type)
        same(ours.metrics, theirs)
    assert load_ground_truth(tmp_path / "val.json", dict.fromkeys(counts, "f")).groups == dict.fromkeys(counts, "f")


def test_an_object_without_a_mask_makes_nothing_there_wrong(drawn, tmp_path):
    """As one that is not marked: its photo says nothing of its category, where masks are scored; boxes know where it is."""
    document = json.loads(drawn.read_text())
    for image in document["images"]:
        del image["neg_category_ids"]
    gone = next(a for a in document["annotations"] if a["area"])
    (tmp_path / "whole.json").write_text(json.dumps(document))
    open_ = json.loads((tmp_path / "whole.json").read_text())
    next(i for i in open_["images"] if i["id"] == gone["image_id"])["not_exhaustive_category_ids"].append(gone["category_id"])
    open_["annotations"] = [a for a in open_["annotations"] if a["id"] != gone["id"]]
    (tmp_path / "open.json").write_text(json.dumps(open_))
    gone["segmentation"] = None
    (tmp_path / "val.json").write_text(json.dumps(document))
    found = noisy(drawn)
    assert score(tmp_path / "val.json", found, "segm") == score(tmp_path / "open.json", found, "segm")
    assert score(tmp_path / "val.json", found, "bbox") == score(tmp_path / "whole.json", found, "bbox")


@pytest.mark.parametrize("mark", ["iscrowd", "ignore"])
def test_what_is_found_in_a_crowd_is_not_wrong(drawn, tmp_path, mark):
    """COCO's crowd regions: the same as a category that is not marked wherever it is in that photo, and no object."""
    document = json.loads(drawn.read_text())
    for image in document["images"]:
        del image["neg_category_ids"]
    crowd = next(a for a in document["annotations"] if a["area"])
    told = json.loads(json.dumps(document))
    next(i for i in told["images"] if i["id"] == crowd["image_id"])["not_exhaustive_category_ids"].append(crowd["category_id"])
    told["annotations"] = [a for a in told["annotations"] if a["id"] != crowd["id"]]
    (tmp_path / "told.json").write_text(json.dumps(told))
    (tmp_path / "closed.json").write_text(json.dumps({**told, "images": document["images"]}))
    crowd[mark] = 1
    (tmp_path / "val.json").write_text(json.dumps(document))
    found, (val, open_, closed) = noisy(drawn), (tmp_path / f"{name}.json" for name in ("val", "told", "closed"))
    assert score(val, found, "bbox") == score(open_, found, "bbox") != score(closed, found, "bbox")
    assert load_ground_truth(val).left_out["crowd regions"] == 1


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_of_more_than_64_bits_are_refused(drawn, tmp_path, kind):
    document = json.loads(drawn.read_text())
    document[kind][0]["id"] = 2**63
    (tmp_path / "val.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="64 bits"):
        load_ground_truth(tmp_path / "val.json")


def test_training_images_beyond_reason_are_not_believed(drawn, tmp_path):
    document = json.loads(drawn.read_text())
    for entry, count in zip(document["categories"], (10**400, -1, True, 1.5, 0, 10**12), strict=True):
        entry["image_count"] = count
    (tmp_path / "val.json").write_text(json.dumps(document))
    assert list(load_ground_truth(tmp_path / "val.json").train_counts.values()) == [0, 10**12]


def test_an_object_numbered_0_can_be_found(drawn, tmp_path):
    """The official tool takes it for missed: 0 is its sign of no match."""
    document = json.loads(drawn.read_text())
    for number, annotation in enumerate(document["annotations"]):
        annotation["id"] = number
    (tmp_path / "val.json").write_text(json.dumps(document))
    assert score(tmp_path / "val.json", noisy(drawn), "bbox", "lvis") == score(drawn, noisy(drawn), "bbox", "lvis")


def test_nothing_is_said_or_left_changed(drawn, capfd):
    import lvis.eval

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(drawn, noisy(drawn), "bbox", "lvis")
    score(drawn, noisy(drawn), "bbox")
    assert capfd.readouterr() == ("", "")
    assert lvis.eval.np is np and not hasattr(np, "float")


# Results files


def test_a_written_file_is_read_back_to_the_bit(drawn, tmp_path):
    truth, rng = load_ground_truth(drawn), np.random.default_rng(0)
    ids = np.array(list(truth.sizes))
    scores, boxes = rounded(rng.random(50).astype(np.float32), rng.random((50, 4)) * 40)
    counts = [noisy(drawn)[0]["segmentation"]["counts"]] * 50
    results = Results(rng.choice(ids, 50), rng.choice(list(truth.names), 50), scores, boxes, counts)
    results.write(tmp_path / "results.json", truth.sizes)
    again = read_results(tmp_path / "results.json", truth.sizes, truth.names)
    for name in ("image_ids", "category_ids", "scores", "boxes", "counts"):
        assert np.array_equal(getattr(results, name), getattr(again, name)), name
    official(drawn, json.loads((tmp_path / "results.json").read_text()), "segm")


def test_the_surest_of_an_image_are_kept_in_order():
    images = np.array([7, 3, 7, 7, 3, 7])
    results = Results(images, np.arange(6), np.array([0.5, 0.1, 0.9, 0.5, 0.2, 0.1]), np.zeros((6, 4)), None)
    assert results.best(2).category_ids.tolist() == [0, 1, 2, 4]  # of the two with 0.5 the one that stands first
    assert results.best(6) is results


def change(**values):
    return lambda entries: entries[1].update(values)


@pytest.mark.parametrize(("spoil", "said"), [
    (change(image_id=123456), "detection 2 is of image 123456"),
    (change(image_id="1"), "detection 2 is of image 1,"),
    (change(category_id=1), "detection 2 is of category 1,"),
    (change(score=float("nan")), "detection 2 has the score nan"),
    (change(score=None), "detection 2 has the score None"),
    (change(bbox=[1, 2, -3, 4]), "neither side negative"),
    (change(bbox=[1, 2, float("inf"), 4]), "detection 2 has the bbox"),
    (change(bbox=[1, 2, 3]), "detection 2 has the bbox"),
    (change(segmentation=[[1, 2, 3, 4, 5, 6]]), "run lengths"),
    (change(segmentation={"size": [9, 9], "counts": "abc"}), "96 x 128"),
    (change(segmentation={"size": [96, 128], "counts": "\udcff"}), "96 x 128"),
    (lambda entries: entries[1].pop("bbox"), "all or none"),
    (lambda entries: entries.insert(1, 5), "detection 2 is not an object"),
    (lambda entries: entries.insert(1, [entries[0]]), "detection 2 is not an object"),
])  # fmt: skip
def test_a_wrong_results_file_is_one_clear_line(drawn, tmp_path, spoil, said):
    entries = noisy(drawn)[:4]
    spoil(entries)
    (tmp_path / "results.json").write_text(json.dumps(entries))
    with pytest.raises(DataError) as error:
        score(drawn, tmp_path / "results.json", "bbox")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "said"), [("{}", "not a list"), ("[", "not valid JSON"), ("[" * 100_000, "nested"),
                                            ('[{"score": 1' + "0" * 5000 + "}]", "digits"), ("\xff", "UTF-8")])  # fmt: skip
def test_a_file_that_is_no_json_of_results(drawn, tmp_path, text, said):
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=said):
        score(drawn, tmp_path / "results.json", "bbox")


def test_a_file_larger_than_memory_is_refused_unread(drawn, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("[]" + " " * 1000)
    monkeypatch.setattr("balms_cli.detection.lvis_json.available_memory", lambda: 1000)
    with pytest.raises(DataError, match="memory"):
        read_results(tmp_path / "results.json", {}, {})


def test_boxes_alone_have_no_masks_to_score(drawn):
    found = [{k: v for k, v in one.items() if k != "segmentation"} for one in noisy(drawn)]
    assert score(drawn, found, "bbox").metrics["AP"] > 0
    with pytest.raises(DataError, match="no masks"):
        score(drawn, found, "segm")
