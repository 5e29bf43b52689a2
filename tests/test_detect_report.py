"""``balms detect evaluate --report``: what the page says is what was measured, and no more is called real than was shown."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from balms_cli.detection.ground_truth import load_ground_truth
from balms_cli.detection.results import Results, gather
from balms_cli.detection.scoring import matches, score
from balms_cli.report import detector_chance as chance
from balms_cli.report.detector_page import render
from balms_cli.report.detector_pictures import overlaps

from .chromium import Chromium, find
from .conftest import invoke
from .detect_tools import draw_lvis
from .page_reader import Page, check_numbers
from .test_detect_evaluate import FEW, a_run
from .test_detect_scoring import noisy

STRANGE = ['<script>alert("1")</script>', "a & b ' \" `", "\u202ereversed", "=cmd|' /C calc'!A0", "]]>--><img src=x onerror=y>"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """12 photos to score on, six categories in three groups."""
    return in_groups(draw_lvis(tmp_path_factory.mktemp("data"), images=24, categories=6, seed=3))


def in_groups(root: Path) -> Path:
    for name in ("lvis_train.json", "lvis_val.json"):
        document = json.loads((root / name).read_text())
        for entry, group, count in zip(document["categories"], "rrccff", (2, 7, 40, 60, 150, 300), strict=True):
            entry["frequency"], entry["image_count"] = group, count
        for k, image in enumerate(document["images"][::2]):  # detections of these there are not judged unless they hit
            image["not_exhaustive_category_ids"] = [document["categories"][c % 6]["id"] for c in range(k, k + 3)]
        (root / name).write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def results(data, tmp_path_factory) -> list[Path]:
    """Two results files as good as one another, and one in which rare objects are never found."""
    folder, found = tmp_path_factory.mktemp("results"), [noisy(data / "lvis_val.json", seed=k, per_image=3) for k in (0, 1)]
    found.append([one for one in found[0] if one["category_id"] not in (3, 12)])
    for name, entries in zip("abc", found, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return [folder / f"{name}.json" for name in "abc"]


def evaluate(*arguments, code=0):
    done = invoke("detect", "evaluate", *arguments, "--quiet")
    assert done.code == code, done.err
    return done


def report_of(results: list[Path], data: Path, out: Path, *more) -> tuple[dict, Page, list[dict]]:
    named = [word for file in results for word in ("--results", file)]
    done = evaluate(*named, "--data", data / "lvis_val.json", "--report", out, "--json", *more)
    told = json.loads(done.out)
    return json.loads((out / "report.json").read_text()), Page((out / "index.html").read_text()), told.get("runs", [told])


def headline(page: Page) -> str:
    return page.one("p", class_="headline").text


# What chance alone would make


def everything(data: Path, results: list[Path]):
    truth = load_ground_truth(data / "lvis_val.json")
    return truth, [gather(json.loads(file.read_text()), truth.sizes, truth.names, "results") for file in results]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("at_once", [1000, 5])
def test_ap_of_the_matches_is_the_engine_s(data, results, kind, at_once, monkeypatch):
    monkeypatch.setattr("balms_cli.detection.scoring._IMAGES", at_once)
    truth, found = everything(data, results[:1])
    matched = matches(truth, found[0], kind)
    own = {id: chance.average_precision(matched, c) for c, id in enumerate(truth.names)}
    assert own == pytest.approx(score(truth, found[0], kind).per_category, abs=1e-12)
    assert 0 < min(own.values()) < max(own.values()) < 1


def test_a_swap_is_scored_as_the_engine_scores_swapped_results(data, results):
    """Rows of photos change hands in the results files; the engine scores these anew."""
    truth, found = everything(data, results[:2])
    first, other = (matches(truth, one, "bbox") for one in found)
    photos, rng = list(truth.sizes), np.random.default_rng(5)
    swapped_RB = rng.integers(0, 2, (4, len(photos)), dtype=np.int8)
    ours_CR2 = [np.stack(chance._both(first, other, c, swapped_RB), 1) for c in range(6)]
    for r, swapped_B in enumerate(swapped_RB):
        moved = [photo for photo, swap in zip(photos, swapped_B, strict=True) if swap]
        for side in (0, 1):
            stay, come = (found[k].take(np.flatnonzero(np.isin(found[k].image_ids, moved) == away))
                          for k, away in ((side, False), (1 - side, True)))  # fmt: skip
            mixed = score(truth, _joined(stay, come), "bbox").per_category
            assert [ours[r, side] for ours in ours_CR2] == pytest.approx(list(mixed.values()), abs=1e-9)


def _joined(a: Results, b: Results) -> Results:
    columns = ("image_ids", "category_ids", "scores", "boxes")
    return Results(*(np.concatenate([getattr(one, name) for one in (a, b)]) for name in columns), [*a.counts, *b.counts])


def test_p_is_that_of_all_swaps(data, results):
    """Of all 4,096 swaps of 12 photos, by hand; 999 of them, drawn, come near."""
    truth, found = everything(data, results[:2])
    first, other = (matches(truth, one, "bbox") for one in found)
    every_RB = np.array([[r >> b & 1 for b in range(12)] for r in range(4096)], np.int8)
    groups = chance.groups_of(list(truth.groups.values()))
    gained_CR = np.array([np.subtract(*chance._both(first, other, c, every_RB)[::-1]) for c in range(6)])
    drawn = chance.swapped_differences(first, other, groups, 12)
    assert set(drawn) == {"AP", "AP_r", "AP_c", "AP_f"}
    for name, (value, p) in drawn.items():
        gained_R = gained_CR[groups[name]].mean(0)
        assert value == pytest.approx(gained_R[0])
        assert p == pytest.approx((np.abs(gained_R) >= abs(gained_R[0]) - 1e-9).mean(), abs=0.05)
    assert chance.swapped_differences(first, first, groups, 12)["AP"] == (0, 1)


def test_equal_detectors_are_seldom_told_apart_and_a_better_one_is():
    rng, shown, p_K = np.random.default_rng(0), 0, np.random.default_rng(1).random(30)
    objects_N = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    photos_N = rng.integers(0, 40, len(objects_N))
    shares_N = chance.mean_shares(objects_N)
    assert shares_N.sum() == pytest.approx(1) and shares_N[objects_N == 4].sum() == pytest.approx(1 / 30)
    for r in range(200):
        one_N, other_N = (rng.random((2, len(objects_N))) < p_K[objects_N]).astype(int)
        value, p = chance.swapped_accuracy(photos_N, shares_N, other_N - one_N, 40, seed=r)
        assert value == pytest.approx(shares_N @ (other_N - one_N))
        shown += chance.shown(p, 1)
    assert 2 <= shown <= 20  # of 200: 5 % of them, and not none
    assert chance.swapped_accuracy(photos_N, shares_N, np.ones(len(objects_N)), 40)[1] == 0.001
    assert chance.shown(0.02, 2) and not chance.shown(0.03, 2) and chance.shown(0.05, 1)


@pytest.mark.parametrize(("share", "lone"), [(0.5, 10), (0.15, 10), (0.5, 0)])
def test_intervals_hold_the_truth(share, lone):
    """Objects that come in photos of several, right together or not; categories of one object."""
    rng, held, runs = np.random.default_rng(2), 0, 150
    p_K = rng.beta(2 * share, 2 * (1 - share), 25)
    for r in range(runs):
        sizes_K = np.where(np.arange(25) < lone, 1, rng.integers(2, 10, 25))
        categories_N = np.repeat(np.arange(25), sizes_K)
        photos_N = rng.integers(0, 50, len(categories_N))
        photos_N[1:] = np.where(rng.random(len(photos_N) - 1) < 0.5, photos_N[:-1], photos_N[1:])
        luck_BK = rng.random((50, 25))
        right_N = (luck_BK[photos_N, categories_N] < p_K[categories_N]).astype(int)
        value, low, high = chance.accuracy_interval(photos_N, categories_N, right_N, 50, seed=r)
        assert 0 <= low <= value <= high <= 1
        assert value == pytest.approx(np.mean([right_N[categories_N == k].mean() for k in range(25)]))
        held += low <= p_K.mean() <= high
    assert held >= 0.9 * runs


def test_an_interval_of_few_objects_is_wide():
    right, wrong = (chance.accuracy_interval(np.array([0, 1]), np.array([0, 0]), np.array([k, k]), 9) for k in (1, 0))
    assert right[0] == right[2] == 1 and right[1] < 0.5 and wrong[0] == wrong[1] == 0 and wrong[2] > 0.5


def test_overlaps():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 5, 5], [3, 3, 0, 4]], float)
    assert overlaps(boxes, boxes[:1])[:, 0] == pytest.approx([1, 50 / 150, 0, 0])


# The page


def test_every_number_is_the_json_s(data, results, tmp_path):
    document, page, told = report_of(results, data, tmp_path / "out")
    seen = check_numbers(page, document)
    assert len(seen) > 150 and not any("-" in place for place in seen)  # nothing counted from the end
    assert {"runs.2.metrics.segm.AP_r", "differences.1.metrics.segm.AP_r.p"} <= seen
    for one, run, i in zip(told, document["runs"], range(3), strict=True):
        assert run["name"] == "abc"[i] + ".json" and run["detections"] == one["detections"]
        for kind in ("bbox", "segm"):
            for name, value in one[kind].items():
                assert run["metrics"][kind][name] == (value and pytest.approx(value, rel=1e-5))
            assert run["ap"][kind] == pytest.approx([row[kind] for row in one["per_category"]], rel=1e-5)
        assert run["train_images"] == [row["train_images"] for row in one["per_category"]] == [2, 7, 40, 60, 150, 300]
    for i, difference in enumerate(document["differences"], 1):
        for kind, metrics in difference["metrics"].items():
            for name, found in metrics.items():
                assert found["value"] == pytest.approx(told[i][kind][name] - told[0][kind][name], rel=1e-4, abs=1e-9)
            moved = difference["moved"][kind]
            ups = [b[kind] - a[kind] for a, b in zip(told[0]["per_category"], told[i]["per_category"], strict=True)]
            gains, losses = sorted((v for v in ups if v > 0), reverse=True), sorted(v for v in ups if v < 0)
            assert [row["value"] for row in moved["gains"]] == pytest.approx(gains, rel=1e-4)
            assert [row["value"] for row in moved["losses"]] == pytest.approx(losses, rel=1e-4)
            for row in moved["gains"] + moved["losses"]:
                assert row["value"] == pytest.approx(ups[row["category"]], rel=1e-4)
                assert row["after"] == pytest.approx(told[i]["per_category"][row["category"]][kind], rel=1e-5)
    truth = json.loads((data / "lvis_val.json").read_text())
    assert document["data"]["objects"] == len(truth["annotations"]) and document["data"]["photos"] == 12
    rare = [a for a in truth["annotations"] if a["category_id"] in (3, 12)]
    assert document["data"]["groups"]["r"] == {"categories": 2, "tested": 2, "objects": len(rare), "lone": 0, "one": 0.5,
                                               "photos": len({a["image_id"] for a in rare})}  # fmt: skip


def test_tables_beside_the_page_hold_the_same(data, results, tmp_path):
    document, _, _ = report_of(results[:2], data, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "report.json", "categories.csv", "runs.csv", ".balms-report", "ap-by-category-1.png",
                     "ap-by-category-2.png"}  # fmt: skip
    assert set((tmp_path / "out" / ".balms-report").read_text().split()) == names - {".balms-report"}
    rows = list(csv.DictReader((tmp_path / "out" / "categories.csv").open()))
    assert [(row["run"], row["category"]) for row in rows[:2]] == [("a.json", "square"), ("a.json", "disc")]
    assert [float(row["ap_segm"]) for row in rows] == [v for run in document["runs"] for v in run["ap"]["segm"]]
    assert [int(row["objects"]) for row in rows[:6]] == [one["objects"] for one in document["categories"]]
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [(row["run"], row["of"]) for row in rows] == [(f"{n}.json", k) for n in "ab" for k in ("segm", "bbox")]
    found = document["differences"][0]["metrics"]["bbox"]["AP_r"]
    assert float(rows[3]["AP"]) == document["runs"][1]["metrics"]["bbox"]["AP"] and float(rows[3]["p_AP_r"]) == found["p"]
    assert rows[0]["difference_AP"] == rows[0]["true_boxes_all"] == ""
    for name in ("ap-by-category-1.png", "ap-by-category-2.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 500


def test_what_is_not_shown_is_not_called_better(data, results, tmp_path):
    document, page, _ = report_of(results[:2], data, tmp_path / "out")
    assert not any(f["shown"] for kind in document["differences"][0]["metrics"].values() for f in kind.values())
    assert headline(page).startswith("It is not shown that b.json finds rare objects better or worse than a.json")
    assert "by the choice of test photos alone (p 0." in headline(page)
    assert not [e for e in page.all("span") if "real" in (e.attributes.get("class") or "")]
    assert " shown," not in page.one("main").text.replace("not shown,", "")


def test_what_is_shown_is_said_so(tmp_path):
    data = in_groups(draw_lvis(tmp_path / "data", images=60, categories=6))
    found = noisy(data / "lvis_val.json")
    for name, entries in (("a", found), ("c", [one for one in found if one["category_id"] not in (3, 12)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    document, page, _ = report_of([tmp_path / "a.json", tmp_path / "c.json"], data, tmp_path / "out")
    found = document["differences"][0]["metrics"]["segm"]["AP_r"]
    assert found["shown"] and found["p"] <= 0.05 and found["value"] < 0
    assert headline(page).startswith("c.json finds rare objects worse than a.json: APr of masks is 0.0\u00a0% against")
    assert "points less, which is beyond what the choice of test photos explains (p 0.0" in headline(page)
    assert found["value"] == pytest.approx(-document["runs"][0]["metrics"]["segm"]["AP_r"], rel=1e-5)
    losses = document["differences"][0]["moved"]["segm"]["losses"]
    assert [document["categories"][row["category"]]["group"] for row in losses] == ["r", "r"]
    assert document["differences"][0]["moved"]["segm"]["same"] == 4 and "2 lose and 4 stay" in page.one("main").text


def test_a_single_run_says_what_the_tail_costs(data, results, tmp_path):
    document, page, _ = report_of([results[2]], data, tmp_path / "out")
    gap = document["runs"][0]["gap"]["segm"]
    metrics = document["runs"][0]["metrics"]["segm"]
    assert (gap["rare"], gap["frequent"]) == ("r", "f") and gap["value"] == pytest.approx(metrics["AP_f"] - metrics["AP_r"])
    said = f"The long tail costs {100 * gap['value']:.1f} points of AP: rare categories reach 0.0 %, frequent ones "
    assert headline(page) == f"{said}{100 * metrics['AP_f']:.1f} % (masks).".replace(" %", "\u00a0%")
    assert document["differences"] == [] and "p 0." not in page.one("body").text
    found = [one for one in json.loads(results[0].read_text()) if one["category_id"] in (3, 12)]
    (tmp_path / "rare.json").write_text(json.dumps(found))
    _, page, _ = report_of([tmp_path / "rare.json"], data, tmp_path / "rare")
    assert headline(page).startswith("Rare categories are found no worse than frequent ones: AP of masks is")


def test_identical_runs_and_runs_without_a_find(data, results, tmp_path):
    document, page, _ = report_of([results[0]] * 2, data, tmp_path / "out")
    assert [run["name"] for run in document["runs"]] == ["a.json", "a.json (2)"]
    assert headline(page).startswith("a.json (2) and a.json find rare objects equally well")
    assert document["differences"][0]["metrics"]["segm"]["AP"] == {"value": 0, "p": 1, "shown": False}
    (tmp_path / "none.json").write_text("[]")
    document, page, _ = report_of([tmp_path / "none.json"] * 2, data, tmp_path / "none")
    assert headline(page).startswith("Neither none.json (2) nor none.json finds rare objects") and document["kind"] == "segm"
    assert check_numbers(page, document)


def test_one_group_and_one_object(data, results, tmp_path):
    document = json.loads((data / "lvis_val.json").read_text())
    document["annotations"] = document["annotations"][:1]
    (tmp_path / "lvis_val.json").write_text(json.dumps(document))
    document, page, _ = report_of(results[:2], tmp_path, tmp_path / "out")
    assert document["data"]["objects"] == 1 and check_numbers(page, document)
    empty = [name for name, found in document["differences"][0]["metrics"]["segm"].items() if found is None]
    assert len(empty) == 2 and all(document["runs"][0]["metrics"]["segm"][name] is None for name in empty)
    assert "1 of these has one object alone" in page.one("header").text
    document, page, _ = report_of(results[:1], tmp_path, tmp_path / "out", "--overwrite")
    assert "so no tail can be seen" in headline(page)


def test_marks_have_their_names(data, results, tmp_path):
    _, page, told = report_of(results[:2], data, tmp_path / "out")
    names = [e.text for e in page.all("title") if "use" in e.inside]
    assert len(names) == 12  # six categories, two runs
    for run in told:
        for row in run["per_category"]:
            name = f"{row['name']}: {100 * row['segm']:.1f}, {row['train_images']} training images"
            assert f"{name}, {row['objects']} test objects" in names


def test_names_of_strangers_stay_text(data, results, tmp_path):
    document = json.loads((data / "lvis_val.json").read_text())
    for entry, name in zip(document["categories"], STRANGE, strict=False):
        entry["name"] = name
    (tmp_path / "lvis_val.json").write_text(json.dumps(document))
    files = []
    for file, name in zip(results[:2], ("<b>x.json", '"onload=y.json'), strict=True):
        files.append(tmp_path / name)
        files[-1].write_text(file.read_text())
    document, page, _ = report_of(files, tmp_path, tmp_path / "out", "--images", data / "images")
    assert len(page.all("script")) == 1 and not page.all("img") and not page.all("b", class_="x")
    assert not [e for e in page.elements if any(key.startswith("on") for key in e.attributes)]
    text = page.one("main").text
    assert all(name in text for name in (STRANGE[0], STRANGE[1]))
    attributes = "".join(value or "" for e in page.elements for value in e.attributes.values())
    assert "\u202e" not in attributes
    cells = {row["category"] for row in csv.DictReader((tmp_path / "out" / "categories.csv").open())}
    assert STRANGE[0] in cells and f"'{STRANGE[3]}" in cells
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy


def test_nothing_is_fetched(data, results, tmp_path):
    _, page, _ = report_of(results[:2], data, tmp_path / "out")
    links = [value for e in page.elements for key, value in e.attributes.items() if key in ("src", "href")]
    assert links and all(re.match(r"#|data:|report\.json$|[a-z0-9-]+\.(csv|png)$", link) for link in links)


# Photos


def test_photos_show_the_rarest_with_true_and_found_boxes(data, results, tmp_path):
    document, page, _ = report_of([results[0], results[2]], data, tmp_path / "out")
    truth = json.loads((data / "lvis_val.json").read_text())
    ids = [one["id"] for one in document["categories"]]
    assert [ids[one["category"]] for one in document["examples"]] == [3, 12] and document["no_pictures"] is None
    shown = []
    for one in document["examples"]:
        there = [a for a in truth["annotations"] if a["category_id"] == ids[one["category"]]]
        assert one["photo_id"] == min({a["image_id"] for a in there} - set(shown))
        shown.append(one["photo_id"])
        assert one["boxes"] == pytest.approx(np.array([a["bbox"] for a in there if a["image_id"] == one["photo_id"]]))
        for run, file in zip(one["runs"], (results[0], results[2]), strict=True):
            here = [e for e in json.loads(file.read_text()) if e["image_id"] == one["photo_id"]]
            own = sorted((e["score"] for e in here if e["category_id"] == ids[one["category"]]), reverse=True)
            assert [found["score"] for found in run["found"]] == own[: len(one["boxes"]) + 1]
            hits = [max(common_share(found["box"], box) for box in one["boxes"]) >= 0.5 for found in run["found"]]
            assert [found["hit"] for found in run["found"]] == hits and run["hits"] == sum(hits)
            largest = max(one["boxes"], key=lambda box: box[2] * box[3])
            at = [e for e in here if common_share(e["bbox"], largest) >= 0.5]
            called = max(at, key=lambda e: e["score"], default=None)
            assert run["called"] == (called and {"category": ids.index(called["category_id"]), "score": called["score"]})
    assert document["examples"][0]["runs"][1]["found"] == []
    pictures = [e.attributes["href"] for e in page.all("image")]
    assert len(pictures) == 2 and len(page.all("svg", class_="photo")) == 6
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition("base64,")[2])))
    assert picture.format == "JPEG" and picture.size == (128, 96)
    hits = [found["hit"] for one in document["examples"] for run in one["runs"] for found in run["found"]]
    assert len(page.all("rect", class_="box hit")) == sum(hits)
    assert len(page.all("rect", class_="box miss")) == len(hits) - sum(hits) > 0
    drawn = page.all("rect", class_="box true")
    boxes = [box for one in document["examples"] for box in one["boxes"]]
    assert [[float(e.attributes[k]) for k in ("x", "y", "width", "height")] for e in drawn] == pytest.approx(
        np.array(boxes), abs=0.051)  # fmt: skip


def common_share(a: list[float], b: list[float]) -> float:
    """IoU of two boxes, by hand."""
    width, height = (min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    common = max(0, width) * max(0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_a_crowd_is_drawn_in_part(data, results, tmp_path):
    document = json.loads((data / "lvis_val.json").read_text())
    crowd = [{**document["annotations"][0], "id": 1000 + k, "category_id": 3} for k in range(150)]
    document["annotations"] += crowd
    (tmp_path / "lvis_val.json").write_text(json.dumps(document))
    document, page, _ = report_of(results[:1], tmp_path, tmp_path / "out", "--images", data / "images")
    first = document["examples"][0]
    assert first["objects"] > 150 and len(first["boxes"]) == 100 and len(first["runs"][0]["found"]) <= 20
    assert f"{first['objects']} objects" in page.one("section", id="photos").text


def test_without_photos_the_reason_is_told(data, results, tmp_path):
    (tmp_path / "lvis_val.json").write_text((data / "lvis_val.json").read_text())
    document, page, _ = report_of(results[:1], tmp_path, tmp_path / "out")
    assert "can be read" in document["no_pictures"] and "No pictures: none of the photos can be read" in page.one("main").text
    assert not page.all("image") and check_numbers(page, document)
    document, page, _ = report_of(results[:1], tmp_path, tmp_path / "out", "--overwrite", "--images", data / "images")
    assert document["no_pictures"] is None and page.all("image")
    hostile = json.loads((data / "lvis_val.json").read_text())
    for image in hostile["images"]:
        image["file_name"] = "../../etc/passwd"
    (tmp_path / "lvis_val.json").write_text(json.dumps(hostile))
    document, _, _ = report_of(results[:1], tmp_path, tmp_path / "out", "--overwrite", "--images", data / "images")
    assert document["no_pictures"] is not None


# Detectors


def test_runs_with_true_boxes(tmp_path_factory, tmp_path):
    data = draw_lvis(tmp_path_factory.mktemp("small"), images=6, categories=3)
    runs = [a_run(tmp_path / name, data, seed=k) for k, name in enumerate(("before", "after"))]
    done = evaluate(*runs, "--gt-boxes", "--report", tmp_path / "out", "--json", *FEW)
    told, document = json.loads(done.out)["runs"], json.loads((tmp_path / "out" / "report.json").read_text())
    page = Page((tmp_path / "out" / "index.html").read_text())
    seen = check_numbers(page, document)
    assert {"runs.0.true_boxes.r.value", "differences.0.true_boxes.r.p", "runs.1.true_boxes.all.low"} <= seen
    for one, run in zip(told, document["runs"], strict=True):
        for group in ("all", "r"):
            found, true = run["true_boxes"][group], one["gt_box_accuracy"]
            assert found["value"] == pytest.approx(true[group], rel=1e-5) and found["objects"] == true["objects"]
            assert found["low"] <= found["value"] <= found["high"]
        assert run["true_boxes"]["f"] is None and run["provenance"]["annotations_sha256"] == "0" * 64
        assert len(run["provenance"]["sha256"]) == 64 and run["provenance"]["settings"]["detections"] == 20
    difference = document["differences"][0]["true_boxes"]["all"]
    assert difference["value"] == pytest.approx(told[1]["gt_box_accuracy"]["all"] - told[0]["gt_box_accuracy"]["all"], abs=1e-5)
    assert document["examples"] and page.all("image")
    alone = evaluate(runs[0], "--results", runs[1] / "results_lvis_val.json", "--data", data / "lvis_val.json", "--report",
                     tmp_path / "mixed", "--json", *FEW)  # fmt: skip
    assert [one["run"] is None for one in json.loads(alone.out)["runs"]] == [False, True]
    mixed = Page((tmp_path / "mixed" / "index.html").read_text())
    assert "results file" in mixed.one("section", id="provenance").text
    assert "Not asked for" in mixed.one("section", id="true-boxes").text


# The folder


@pytest.mark.parametrize(("place", "said"), [("file", "is a file"), ("full", "not empty"), ("file/below", "cannot write"),
                                             ("full --overwrite", "holds other files")])  # fmt: skip
def test_a_folder_that_cannot_be_the_report_s_is_refused_before_anything_is_scored(data, results, tmp_path, place, said,
                                                                                  monkeypatch):  # fmt: skip
    monkeypatch.setattr("balms_cli.detection.evaluate.score", lambda *_: pytest.fail("scored"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    name, *more = place.split()
    done = evaluate("--results", results[0], "--data", data / "lvis_val.json", "--report", tmp_path / name, *more, code=2)
    assert said in done.err and done.err.strip().count("\n") == 0 and done.out == ""
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_an_earlier_report_is_replaced_where_asked_and_stays_where_one_fails(data, results, tmp_path, monkeypatch):
    out = tmp_path / "out"
    report_of(results[:1], data, out)
    before = (out / "index.html").read_text()
    evaluate("--results", results[1], "--data", data / "lvis_val.json", "--report", out, code=2)

    def full(_):
        raise OSError(28, "No space left")

    monkeypatch.setattr("balms_cli.report.detector_page.json_text", full)
    done = evaluate("--results", results[1], "--data", data / "lvis_val.json", "--report", out, "--overwrite", code=3)
    assert "No space left" in done.err and (out / "index.html").read_text() == before
    monkeypatch.undo()
    document, _, _ = report_of(results[1:2], data, out, "--overwrite")
    assert document["runs"][0]["name"] == "b.json" and len(list(out.parent.iterdir())) == 1


def test_runs_on_different_photos_have_no_page(data, tmp_path_factory, tmp_path):
    small = draw_lvis(tmp_path_factory.mktemp("small"), images=4, categories=3)
    other = draw_lvis(tmp_path_factory.mktemp("other"), images=4, categories=3)
    runs = [a_run(tmp_path / name, place) for name, place in (("a", small), ("b", other))]
    done = evaluate(*runs, "--report", tmp_path / "out", *FEW, code=2)
    assert "--data" in done.err and not (tmp_path / "out").exists()


def test_boxes_alone_and_masks_alone_have_nothing_in_common(data, results, tmp_path):
    entries = json.loads(results[0].read_text())
    for name, left_out in (("boxes", "segmentation"), ("masks", "bbox")):
        kept = [{k: v for k, v in one.items() if k != left_out} for one in entries]
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    both = [word for name in ("boxes", "masks") for word in ("--results", tmp_path / f"{name}.json")]
    done = evaluate(*both, "--data", data / "lvis_val.json", "--report", tmp_path / "out", code=3)
    assert "report each by itself" in done.err
    document, page, _ = report_of([tmp_path / "masks.json"], data, tmp_path / "out")
    assert document["kind"] == "segm" and check_numbers(page, document)
    one = document["examples"][0]  # boxes are those of the masks
    boxes = [coco_mask.toBbox(e["segmentation"]).tolist() for e in entries if e["image_id"] == one["photo_id"]]
    assert one["runs"][0]["found"] and all(found["box"] in boxes for found in one["runs"][0]["found"])
    document, _, _ = report_of([tmp_path / "boxes.json", results[0]], data, tmp_path / "out", "--overwrite")
    assert document["kind"] == "bbox"


@pytest.mark.parametrize("times", [201, 400])
def test_a_page_of_many_categories_and_three_runs_is_small(data, results, tmp_path, times):
    document, _, _ = report_of(results, data, tmp_path / "out")
    own = document["categories"]
    document["categories"] = [one | {"name": f"{one['name']}_of_a_kind_{k}"} for k in range(times) for one in own]
    for run in document["runs"]:
        run["train_images"] *= times
        run["ap"] = {kind: values * times for kind, values in run["ap"].items()}
    document["data"]["tested"] *= times
    html, _ = render(document, {photo: "data:image/jpeg;base64," + "A" * 30_000 for photo in range(6)})
    assert len(document["categories"]) >= 1203 and len(html.encode()) < 2_000_000
    names = len(re.findall("<title>[a-z]+_of_a_kind_", html))
    assert names == (3 * len(document["categories"]) if times == 201 else 0) and ("Point at one" in html) == (names > 0)


@pytest.mark.slow
@pytest.mark.skipif(find() is None, reason="no Chromium here (BALMS_TEST_CHROMIUM names one)")
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(data, results, tmp_path, width):
    document, _, _ = report_of(results, data, tmp_path / "out")
    browser = Chromium(find(), tmp_path / "profile")
    try:
        browser.open(tmp_path / "out" / "index.html", width)
        complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        assert not [e for e in browser.events if e.get("method") in complaints]
        asked = {e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith("data:")} == {(tmp_path / "out" / "index.html").as_uri()}
        assert browser.run("document.documentElement.scrollWidth") <= width
        sizes = browser.run("[...document.querySelectorAll('svg.photo')].map(s => [s.clientWidth, s.clientHeight])")
        assert len(sizes) == 4 * len(document["examples"]) and all(w / h == pytest.approx(4 / 3, abs=0.05) for w, h in sizes)
        # The photo of the truth is in the panels of the runs too, with its own pixels.
        assert browser.run("[...document.querySelectorAll('.photo use')].every(u => u.getBBox().width == 128)")
        check_numbers(Page("<!DOCTYPE html>" + browser.run("document.documentElement.outerHTML")), document)
    finally:
        browser.close()
