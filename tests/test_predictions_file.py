"""``balms evaluate --predictions``: a file from which every figure follows, and nothing where it cannot be written."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from balms_cli.config import EvaluateConfig
from balms_cli.data.manifest import Manifest
from balms_cli.errors import DataError
from balms_cli.stages import evaluate, evaluate_predictions

from .conftest import draw_photos, invoke
from .test_cli import FEW, error_of


@pytest.fixture(scope="module")
def tuned(chain) -> str:
    done = invoke("retrain", chain.pretrained, *FEW, "--workspace", chain.workspace, "--quiet")
    assert done.code == 0, done.err
    return done.out.strip()


def balanced_accuracy(labels, predicted) -> float:
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    return float(np.mean([np.mean(predicted[labels == c] == c) for c in np.unique(labels)]))


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("prior", [[], ["--target-prior", "uniform", "--posthoc-tau", "3"]])
def test_figures_follow_from_the_file(chain, tuned, tmp_path, prior):
    """The logits are raw where scores are asked for another prior too."""
    files = {ending: tmp_path / f"p.{ending}" for ending in ("csv", "npz")}
    for file in files.values():
        done = invoke("evaluate", tuned, "--predictions", file, "--json", *prior)
        assert done.code == 0, done.err
        assert json.loads(done.out)["predictions"] == str(file) and f"predictions: {file}" in done.err
    plain = json.loads(invoke("evaluate", tuned, "--json").out)
    manifest = Manifest.load(chain.manifest)
    test = manifest.splits["test"]

    with np.load(files["npz"], allow_pickle=False) as npz:
        assert set(npz.files) == {"logits", "labels", "keys", "classes"}
        logits, labels = npz["logits"], npz["labels"]
        assert logits.dtype == np.float32 and npz["classes"].tolist() == manifest.classes
        assert npz["keys"].tolist() == test.keys and labels.tolist() == test.labels.tolist()
    assert balanced_accuracy(labels, logits.argmax(1)) == pytest.approx(plain["balanced_accuracy"], abs=1e-12)

    rows = rows_of(files["csv"])
    assert list(rows[0]) == ["key", "label", "predicted", *manifest.classes]
    assert [row["key"] for row in rows] == test.keys
    found = np.array([[float(row[name]) for name in manifest.classes] for row in rows], np.float32)
    assert np.array_equal(found, logits)  # to the last bit
    assert [manifest.classes.index(row["label"]) for row in rows] == labels.tolist()
    assert [manifest.classes.index(row["predicted"]) for row in rows] == logits.argmax(1).tolist()


def test_several_runs_stand_in_one_file(chain, tuned, tmp_path):
    runs = [str(chain.pretrained), tuned]
    done = invoke("evaluate", *runs, "--predictions", tmp_path / "p.csv", "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)["runs"]
    rows = rows_of(tmp_path / "p.csv")
    assert next(iter(rows[0])) == "run" and len(rows) == sum(one["images"] for one in results)
    assert invoke("evaluate", *runs, "--predictions", tmp_path / "p.npz").code == 0
    with np.load(tmp_path / "p.npz") as npz:
        assert npz["runs"].tolist() == runs
        for n, one in enumerate(results):
            labels, logits = npz[f"labels_{n}"], npz[f"logits_{n}"]
            assert balanced_accuracy(labels, logits.argmax(1)) == pytest.approx(one["balanced_accuracy"])
            mine = [row for row in rows if row["run"] == one["run"]]
            assert [row["key"] for row in mine] == npz[f"keys_{n}"].tolist()
            right = np.mean([row["label"] == row["predicted"] for row in mine])
            assert right == pytest.approx(one["top1"])


@pytest.mark.parametrize("place, told", [
    ("p.txt", "ends in .csv or .npz"), ("p.csv/", "is a folder"), ("no/p.csv", "there is no folder"),
    ("old.csv", "--overwrite"),
])  # fmt: skip
def test_a_place_is_refused_before_anything_is_scored(tuned, tmp_path, monkeypatch, place, told):
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("scored"))
    (tmp_path / "old.csv").write_text("mine")
    if place.endswith("/"):
        (tmp_path / place).mkdir()
    done = invoke("evaluate", tuned, "--predictions", tmp_path / place)
    assert told in error_of(done, 2)
    assert (tmp_path / "old.csv").read_text() == "mine"


def test_an_earlier_file_goes_where_that_is_asked_for(tuned, tmp_path):
    (tmp_path / "p.csv").write_text("mine")
    assert invoke("evaluate", tuned, "--predictions", tmp_path / "p.csv", "--overwrite", "--quiet").code == 0
    assert (tmp_path / "p.csv").read_text().startswith("key,label,predicted,")


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_a_full_disk_leaves_nothing(tuned, tmp_path, monkeypatch, ending):
    def parts(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate_predictions, "_parts", parts)
    done = invoke("evaluate", tuned, "--predictions", tmp_path / f"p.{ending}")
    assert "No space left" in error_of(done, 3)
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_scored_leaves_nothing(tuned, tmp_path):
    done = invoke("evaluate", tuned, "--predictions", tmp_path / "p.npz", "--require", "many>=0.1", "--quiet")
    assert done.code == 2 and "'many' is empty" in done.err and not list(tmp_path.iterdir())


def test_names_run_in_no_spreadsheet(tmp_path):
    photos = draw_photos(tmp_path / "photos", {"=cmd": 12, "@sum": 8})
    made = invoke("make-lt", photos, "--as-is", "--out", tmp_path / "data", "--quiet")
    assert made.code == 0, made.err
    done = invoke("pretrain", tmp_path / "data", "--backbone", "resnet8", "--set", "image_size=16", "--steps", "2",
                  "--batch-size", "4", "--out", tmp_path / "run", "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    assert invoke("evaluate", tmp_path / "run", "--predictions", tmp_path / "p.csv", "--quiet").code == 0
    cells = (tmp_path / "p.csv").read_text().replace("\n", ",").split(",")
    assert "'=cmd" in cells and not [cell for cell in cells if cell.startswith(("=", "@"))]


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_no_second_copy_of_the_logits_is_held(tmp_path, ending):
    """NumPy's arrays are traced: what turning 16 MB of logits into a file takes stays far below them."""
    import tracemalloc

    logits, keys = torch.randn(4000, 1000), [str(n) for n in range(4000)]
    evaluate_predictions._ROWS, before = 20_000, evaluate_predictions._ROWS
    tracemalloc.start()
    try:
        with evaluate_predictions.writing(tmp_path / f"p.{ending}", ["run"], [f"c{n}" for n in range(1000)]) as add:
            add(0, keys, np.zeros(4000, np.int64), logits, list(range(1000)))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
        evaluate_predictions._ROWS = before


def test_process_0_alone_writes_and_all_stop_where_it_cannot(chain, tmp_path, monkeypatch):
    """A world of one that says it is another: nothing is written; and what process 0 could not write stops it too."""
    from balms_cli.engine.distributed import World

    class Second(World):
        refused = None

        def agree(self, value):
            return self.refused, None

        def rows(self, count, rank=None):
            return slice(0, count)

    config, file = EvaluateConfig(), chain.pretrained / "model.safetensors"
    evaluate.run(config, [file], predictions=tmp_path / "p.csv", world=Second(rank=1))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Second, "refused", DataError("full"))
    with pytest.raises(DataError, match="full"):
        evaluate.run(config, [file], predictions=tmp_path / "p.csv", world=Second(rank=1))
