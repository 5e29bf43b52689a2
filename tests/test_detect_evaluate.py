"""``balms detect evaluate``: a run's results are those of the detector, its numbers those of the official tool."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from balms_cli.config import DetectEvaluateConfig
from balms_cli.detection.annotations import load_annotations
from balms_cli.detection.evaluate import flat, parse_gate, run
from balms_cli.detection.ground_truth import load_ground_truth
from balms_cli.detection.model import detect, save_detector
from balms_cli.detection.per_category import category_rows, ends
from balms_cli.detection.scoring import METRICS
from balms_cli.errors import CheckpointError, ConfigError
from balms_cli.report.categories import category_png

from .conftest import invoke
from .detect_tools import draw_lvis, tiny_detector, tiny_header
from .test_detect_scoring import noisy, official, same


def a_run(folder: Path, data: Path, seed: int = 0, **over) -> Path:
    """A run's folder with a fresh tiny detector in it, of the three categories of ``data``."""
    categories = load_annotations(data / "lvis_train.json").categories
    model = tiny_detector(3, seed=seed, **over)
    header = tiny_header(3, **over).model_copy(update={"categories": categories, "annotations": str(data / "lvis_train.json"),
                                                       "images": str(data / "images")})  # fmt: skip
    folder.mkdir(parents=True)
    save_detector(folder / "model.safetensors", model, header)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_lvis(tmp_path_factory.mktemp("data"), images=6, categories=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    return a_run(tmp_path_factory.mktemp("runs") / "run", data)


FEW = ["--set", "detections=20", "--device", "cpu", "--precision", "fp32", "--workers", "0"]


def test_a_run_is_scored_as_the_official_tool_scores_its_results_file(trained, data, tmp_path):
    png, table = tmp_path / "c.png", tmp_path / "c.csv"
    done = invoke("detect", "evaluate", trained, "--json", "--gt-boxes", "--per-category", png, "--per-category", table, *FEW)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    entries = json.loads((trained / "results_lvis_val.json").read_text())
    assert found["detections"] == len(entries) > 20 and {e["category_id"] for e in entries} <= {3, 12, 34}
    for kind in ("bbox", "segm"):
        same(found[kind], official(data / "lvis_val.json", entries, kind))
    assert Image.open(png).format == "PNG"
    rows = list(csv.DictReader(table.open()))
    assert [(row["id"], row["train_images"]) for row in rows] == [("3", "6"), ("12", "3"), ("34", "2")]
    assert "boxes" in done.err and "masks" in done.err and "AP_r" in done.err
    again = invoke("detect", "evaluate", "--results", trained / "results_lvis_val.json", "--data", data / "lvis_val.json",
                   "--json", "--evaluator", "lvis")  # fmt: skip
    assert again.code == 0, again.err
    for kind in ("bbox", "segm"):
        same(json.loads(again.out)[kind], {k: -1 if v is None else v for k, v in found[kind].items()})


def test_results_hold_what_the_detector_finds(trained, data):
    """Boxes, labels as the file's ids, scores, and masks, against the detector called by hand."""
    from balms_cli.detection.model import load_detector

    config = DetectEvaluateConfig(detections=10, device="cpu", precision="fp32", workers=0)
    run(config, [trained / "model.safetensors"])
    entries = json.loads((trained / "results_lvis_val.json").read_text())
    model, _ = load_detector(trained / "model.safetensors")
    model.roi_heads.detections_per_img, model.roi_heads.score_thresh = 10, 1e-4
    document = json.loads((data / "lvis_val.json").read_text())
    for image in document["images"]:
        pixels = torch.from_numpy(np.asarray(Image.open(data / "images" / image["file_name"])).copy()).permute(2, 0, 1)
        [answer] = detect(model, [pixels.float() / 255])
        own = [e for e in entries if e["image_id"] == image["id"]]
        assert [e["category_id"] for e in own] == [(3, 12, 34)[label - 1] for label in answer["labels"].tolist()]
        assert [e["score"] for e in own] == pytest.approx(answer["scores"].tolist(), rel=1e-5)
        x1, y1, x2, y2 = answer["boxes"].T
        boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], 1).numpy()
        assert np.allclose([e["bbox"] for e in own], boxes, atol=1e-3)
        for entry in own:
            mask = coco_mask.decode(entry["segmentation"])
            assert mask.shape == (image["height"], image["width"])


def test_categories_are_matched_by_name(trained, data, tmp_path):
    """Other ids in another order, one category unknown to the detector: the same detections, the same at the true boxes."""
    document = json.loads((data / "lvis_val.json").read_text())
    new = {3: 90, 12: 7, 34: 55}
    for entry in document["categories"]:
        entry["id"] = new[entry["id"]]
    for annotation in document["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    for image in document["images"]:
        image["neg_category_ids"] = [new[id] for id in image["neg_category_ids"]]
    document["categories"].append({"id": 1, "name": "unicorn", "frequency": "r"})
    (tmp_path / "val.json").write_text(json.dumps(document))
    common = ["detect", "evaluate", trained, "--json", "--gt-boxes", "--images", data / "images", *FEW]
    one = json.loads(invoke(*common).out)
    other = invoke(*common, "--data", tmp_path / "val.json", "--save-results", tmp_path / "other.json")
    assert other.code == 0, other.err
    other = json.loads(other.out)
    assert other["bbox"] == pytest.approx(one["bbox"]) and other["segm"] == pytest.approx(one["segm"])
    entries = json.loads((tmp_path / "other.json").read_text())
    before = json.loads((trained / "results_lvis_val.json").read_text())
    assert [e["category_id"] for e in entries] == [new[e["category_id"]] for e in before]
    unicorn = next(row for row in other["per_category"] if row["name"] == "unicorn")
    assert (unicorn["train_images"], unicorn["bbox"]) == (0, None)
    assert other["gt_box_accuracy"] == one["gt_box_accuracy"] and one["gt_box_accuracy"]["all"] > 0


def test_what_the_annotations_do_not_know_is_left_out(trained, data, tmp_path):
    document = json.loads((data / "lvis_val.json").read_text())
    document["categories"] = [entry for entry in document["categories"] if entry["id"] != 12]
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] != 12]
    (tmp_path / "val.json").write_text(json.dumps(document))
    done = invoke("detect", "evaluate", trained, "--json", "--images", data / "images", "--data", tmp_path / "val.json",
                  "--save-results", tmp_path / "r.json", "--gt-boxes", *FEW)  # fmt: skip
    assert done.code == 0 and "1 of the detector's categories are not in val.json" in done.err, done.err
    entries = json.loads((tmp_path / "r.json").read_text())
    assert entries and {entry["category_id"] for entry in entries} <= {3, 34}


def test_without_a_common_category_there_is_nothing_to_score(trained, data, tmp_path):
    text = (data / "lvis_val.json").read_text()
    for name in ("square", "disc", "triangle"):
        text = text.replace(f'"name": "{name}"', f'"name": "no {name}"')
    (tmp_path / "val.json").write_text(text)
    with pytest.raises(CheckpointError, match="no category in common"):
        run(DetectEvaluateConfig(annotations=str(tmp_path / "val.json"), device="cpu"), [trained / "model.safetensors"])


def test_several_runs_stand_in_one_table(trained, data, tmp_path):
    boxes = a_run(tmp_path / "boxes", data, seed=1, masks=False, family="sigmoid")
    done = invoke("detect", "evaluate", trained, boxes, *FEW)
    assert done.code == 0, done.err
    assert done.out.split() == [str(trained), str(boxes)]
    table = done.err[done.err.index("LVIS metrics") :]
    lines = [line for line in table.splitlines() if "boxes" in line or "masks" in line][:3]
    assert [("run" in line, "masks" in line) for line in lines] == [(True, False), (True, True), (False, False)]
    piped = invoke("detect", "evaluate", "-", "--print-config", stdin=done.out)
    assert piped.code == 0 and "score_threshold" in piped.out


def test_nothing_detected_is_told_and_zero(trained, data):
    done = invoke("detect", "evaluate", trained, "--json", "--set", "score_threshold=0.9999", *FEW)
    found = json.loads(done.out)
    assert done.code == 0 and "nothing was detected" in done.err
    assert found["detections"] == found["bbox"]["AP"] == found["segm"]["AP"] == 0


def test_gates(data, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(noisy(data / "lvis_val.json")))
    common = ["detect", "evaluate", "--results", tmp_path / "r.json", "--data", data / "lvis_val.json", "--quiet"]
    assert invoke(*common, "--require", "AP>=0").code == 0
    missed = invoke(*common, "--require", "bbox.AP_r>=99%", "--require", "AP>=0")
    assert missed.code == 6 and "bbox.AP_r>=0.99 is not met" in missed.err and missed.out.strip() == str(tmp_path / "r.json")
    assert invoke(*common, "--require", "AP_f>=0.1").code == 2  # no frequent category among them
    unknown = invoke(*common, "--require", "AP_x>=0.1")
    assert unknown.code == 2 and "no metric 'AP_x'" in unknown.err


def test_a_gate_is_of_masks_where_there_are_some():
    both = {"bbox": dict.fromkeys(METRICS, 0.5), "segm": dict.fromkeys(METRICS, 0.25)}
    assert parse_gate("AP_r<=25%").met_by(flat(both)) and parse_gate("bbox.AP_r>=0.5").met_by(flat(both))
    assert parse_gate("AP>=0.5").met_by(flat({"bbox": both["bbox"]}))


def test_true_boxes_are_classified(trained, data):
    """By hand: the box head on every true box, the best of the categories."""
    from balms_cli.detection.model import load_detector

    config = DetectEvaluateConfig(device="cpu", precision="fp32", workers=0)
    found = run(config, [trained / "model.safetensors"], gt_boxes=True).scored[0]["gt_box_accuracy"]
    model, _ = load_detector(trained / "model.safetensors")
    document, right = json.loads((data / "lvis_val.json").read_text()), {3: [], 12: [], 34: []}
    for image in document["images"]:
        pixels = torch.from_numpy(np.asarray(Image.open(data / "images" / image["file_name"])).copy()).permute(2, 0, 1)
        for annotation in [a for a in document["annotations"] if a["image_id"] == image["id"]]:
            x, y, w, h = annotation["bbox"]
            with torch.no_grad():
                batch, _ = model.transform([pixels.float() / 255])
                scale = torch.tensor([batch.image_sizes[0][1] / image["width"], batch.image_sizes[0][0] / image["height"]] * 2)
                heads, box = model.roi_heads, torch.tensor([[x, y, x + w, y + h]]) * scale
                pooled = heads.box_roi_pool(model.backbone(batch.tensors), [box], batch.image_sizes)
                logits, _ = heads.box_predictor(heads.box_head(pooled))
            best = (3, 12, 34)[int(logits[0, 1:].argmax())]
            right[annotation["category_id"]].append(best == annotation["category_id"])
    shares = [np.mean(values) for values in right.values() if values]
    assert found["objects"] == len(document["annotations"]) and found["all"] == pytest.approx(np.mean(shares))
    assert found["r"] == found["all"] and found["f"] is None


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["--results", "RESULTS"], 2, "--data"), (["--results", "NONE", "--data", "VAL"], 3, "does not exist"),
    (["--data", "NONE", "RUN"], 3, "does not exist"), (["RUN", "RUN", "--save-results", "x.json"], 2, "one file"),
    (["RUN", "--per-category", "x.txt"], 2, ".csv"), (["RUN", "--per-category", "FOLDER.csv"], 2, "is a folder"),
    (["RUN", "--save-results", "NONE/x.json"], 2, "lies in none"), (["RUN", "--images", "NONE"], 3, "does not exist"),
    (["NONE"], 4, "NONE"), ([], 3, "balms detect train"),
])  # fmt: skip
def test_wrong_use_is_one_clear_line(trained, data, tmp_path, balms, monkeypatch, arguments, code, said):
    (tmp_path / "r.json").write_text("[]")
    (tmp_path / "f.csv").mkdir()
    monkeypatch.setattr("balms_cli.detection.evaluate.Detector.look", lambda *_: pytest.fail("looked at photos first"))
    names = {"RESULTS": tmp_path / "r.json", "NONE": tmp_path / "NONE", "VAL": data / "lvis_val.json", "RUN": trained,
             "FOLDER.csv": tmp_path / "f.csv", "NONE/x.json": tmp_path / "NONE" / "x.json"}  # fmt: skip
    done = balms("detect", "evaluate", *(names.get(a, a) for a in arguments), "--quiet")
    assert done.code == code and said in done.err and done.err.strip().count("\n") == 0, done.err


def test_runs_of_one_name_are_told_apart(data, tmp_path):
    runs = [a_run(tmp_path / place / "run", data, seed=k, masks=False) for k, place in enumerate("ab")]
    done = invoke("detect", "evaluate", *runs, "--top", "1", *FEW)
    assert done.code == 0, done.err
    for name in ("a/run", "b/run"):
        assert f"{name}: categories with fewest" in done.err and f" {name} " in done.err[done.err.index("LVIS metrics") :]


def test_a_run_without_a_common_category_is_refused_before_another_is_scored(trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr("balms_cli.detection.evaluate.Detector.look", lambda *_: pytest.fail("looked at photos first"))
    other = a_run(tmp_path / "other", data)
    from balms_cli.detection.model import load_detector

    model, header = load_detector(other / "model.safetensors")
    named = [c.model_copy(update={"name": f"no {c.name}"}) for c in header.categories]
    save_detector(other / "model.safetensors", model, header.model_copy(update={"categories": named}))
    with pytest.raises(CheckpointError, match="no category in common"):
        run(DetectEvaluateConfig(device="cpu", workers=0), [trained / "model.safetensors", other / "model.safetensors"])


def test_a_plot_of_masks_needs_masks(data, tmp_path):
    """The only category with a count of training images has no mask: there was an empty plot, or a bug's traceback."""
    document = json.loads((data / "lvis_val.json").read_text())
    for entry in document["categories"][1:]:
        del entry["image_count"]
    for annotation in document["annotations"]:
        if annotation["category_id"] == 3:
            annotation["segmentation"] = None
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "r.json").write_text(json.dumps(noisy(data / "lvis_val.json")))
    done = invoke("detect", "evaluate", "--results", tmp_path / "r.json", "--data", tmp_path / "val.json", "--per-category",
                  tmp_path / "c.png")  # fmt: skip
    assert done.code == 3 and "training images" in done.err and not (tmp_path / "c.png").exists()


def test_a_plot_needs_training_images(data, tmp_path):
    """A results file has none: they are LVIS's own counts, where the annotations have them."""
    (tmp_path / "r.json").write_text(json.dumps(noisy(data / "lvis_val.json")))
    common = ["detect", "evaluate", "--results", tmp_path / "r.json", "--per-category", tmp_path / "c.png", "--data"]
    (tmp_path / "val.json").write_text((data / "lvis_val.json").read_text().replace("image_count", "other"))
    done = invoke(*common, tmp_path / "val.json")
    assert done.code == 3 and "training images" in done.err and not (tmp_path / "c.png").exists()
    assert invoke(*common, data / "lvis_val.json").code == 0 and (tmp_path / "c.png").exists()


def test_the_rarest_and_the_most_frequent_are_shown():
    rows = [{"id": n, "train_images": (7 * n) % 10, "objects": n != 3} for n in range(10)]
    assert [row["train_images"] for row in ends(rows, 2)] == [0, 2, 8, 9]
    assert len(ends(rows, 20)) == 9


def test_a_group_without_tested_categories_and_one_never_seen_can_be_drawn(data):
    rows = category_rows(load_ground_truth(data / "lvis_val.json"), {"bbox": {3: 0.5, 12: 0.1, 34: 0.9}}, tiny_header(3))
    rows[0]["train_images"] = 0
    picture = category_png("_run $x$", rows, "bbox")
    assert picture.startswith(b"\x89PNG") and picture == category_png("_run $x$", rows, "bbox")


def test_save_results_of_several_runs_is_refused(trained):
    with pytest.raises(ConfigError, match="one file"):
        run(DetectEvaluateConfig(), [trained / "model.safetensors"] * 2, save=Path("x.json"))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(trained, data, tmp_path):
    """Images shared out, results gathered in order: the same file but for rounding of the network's sums."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m",
               "balms_cli", "detect", "evaluate", trained, "--json", "--gt-boxes", "--save-results", tmp_path / "two.json",
               "--report", tmp_path / "report", *FEW]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    told = json.loads((tmp_path / "report" / "report.json").read_text())["runs"][0]
    assert told["true_boxes"]["all"]["value"] == pytest.approx(two["gt_box_accuracy"]["all"], rel=1e-5)
    assert told["detections"] == two["detections"]
    one = json.loads(invoke("detect", "evaluate", trained, "--json", "--gt-boxes", *FEW).out)
    assert two["gt_box_accuracy"] == pytest.approx(one["gt_box_accuracy"]) and two["detections"] == one["detections"]
    ours, theirs = (json.loads(file.read_text()) for file in (trained / "results_lvis_val.json", tmp_path / "two.json"))
    assert [e["image_id"] for e in ours] == [e["image_id"] for e in theirs]
    assert np.allclose([e["bbox"] for e in ours], [e["bbox"] for e in theirs], atol=0.01)
    assert two["segm"] == pytest.approx(one["segm"], abs=1e-6)


def test_damaged_weights_are_told(data, tmp_path):
    folder = a_run(tmp_path / "run", data)
    from balms_cli.detection.model import load_detector

    model, header = load_detector(folder / "model.safetensors")
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.weight.fill_(float("nan"))
    save_detector(folder / "model.safetensors", model, header)
    with pytest.raises(CheckpointError, match="bbox_pred"):
        run(DetectEvaluateConfig(device="cpu", workers=0, score_threshold=0), [folder / "model.safetensors"])
