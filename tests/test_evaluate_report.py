"""``balms evaluate`` with ``--report``, several gates, several runs, and what it refuses."""

import json
import os
import shutil
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balms_cli.config import EvaluateConfig, resolve
from balms_cli.engine.checkpoint import load_model, save_model
from balms_cli.engine.distributed import World
from balms_cli.errors import ConfigError
from balms_cli.report.write import check_folder
from balms_cli.stages import evaluate

from .conftest import SMALL, draw_photos, invoke
from .test_cli import FEW, error_of


@pytest.fixture
def page(monkeypatch):
    """A page that is drawn at once; its argument list is kept."""
    seen = []

    def write_page(document, scored, folder, reporter):
        seen.append((document, scored))
        (folder / "index.html").write_text("<p>")
        (folder / "figure.png").write_bytes(b"png")

    stand_in = types.ModuleType("balms_cli.report.page")
    stand_in.write_page = write_page
    monkeypatch.setitem(sys.modules, "balms_cli.report.page", stand_in)
    return seen


@pytest.fixture(scope="module")
def heads(chain):
    """Three classifiers on the chain's backbone: two seeds of one method, and another method."""
    found = []
    for more in (["--seed", "0"], ["--seed", "1"], ["--loss", "softmax"]):
        done = invoke("retrain", chain.pretrained, *FEW, *more, "--workspace", chain.workspace, "--quiet")
        assert done.code == 0, done.err
        found.append(done.out.strip())
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def broken(source: Path, target: Path, change) -> Path:
    """A copy of a run whose weights ``change`` spoils."""
    shutil.copytree(source, target)
    model, header = load_model(target / "model.safetensors")
    with torch.no_grad():
        change(model)
    save_model(target / "model.safetensors", model, header)
    return target


# The folder


def test_a_report_is_written_and_stdout_stays_what_it_was(balms, chain, page, tmp_path):
    out = tmp_path / "deep" / "report"
    done = balms("evaluate", chain.pretrained, "--report", out)
    assert done.code == 0 and done.out == f"{chain.pretrained}\n"
    assert f"report: {out / 'index.html'}" in done.err
    assert names(out) == {"index.html", "figure.png", "report.json", "report.md", "runs.csv", "classes.csv", "groups.csv",
                          "calibration.csv", "curves.csv", ".balms-report"} | ({"pairs.csv"} & names(out))  # fmt: skip
    document = json.loads((out / "report.json").read_text())
    assert document == page[0][0] and page[0][1][0].run == chain.pretrained
    told = json.loads(balms("evaluate", chain.pretrained, "--report", out, "--overwrite", "--json", "-q").out)
    assert told["report"] == str(out)
    run = document["runs"][0]
    for metric, found in run["metrics"].items():
        assert (told[metric] is None) == (found is None)
        if found:
            assert [found["value"], found["low"], found["high"]] == pytest.approx(
                [told[metric], *told["intervals"][metric]], rel=1e-5
            )
    assert run["calibration"]["all"]["ece"] == pytest.approx(told["ece"], rel=1e-5)
    assert run["recipe"]["steps"] == {"value": 12, "source": "flag"} and run["provenance"]["command"].startswith("balms")
    assert run["curves"]["step"] == list(range(1, 13)) and document["data"]["train_counts"] == [32, 12, 5]
    assert "report" not in json.loads(balms("evaluate", chain.pretrained, "--json", "-q").out)


def test_a_folder_in_use_is_refused_before_anything_is_scored(balms, chain, page, tmp_path, monkeypatch):
    out = tmp_path / "report"
    assert balms("evaluate", chain.pretrained, "--report", out, "-q").code == 0
    first = (out / "report.json").read_text()
    monkeypatch.setattr(evaluate, "load_model", lambda file: pytest.fail("scored"))
    assert "--overwrite" in error_of(balms("evaluate", chain.pretrained, "--report", out), 2)
    (out / "mine.txt").write_text("years of work")
    told = error_of(balms("evaluate", chain.pretrained, "--report", out, "--overwrite"), 2)
    assert "mine.txt" in told and "left alone" in told and (out / "mine.txt").read_text() == "years of work"
    assert "left alone" in error_of(balms("evaluate", chain.pretrained, "--report", chain.pretrained, "--overwrite"), 2)
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(balms("evaluate", chain.pretrained, "--report", tmp_path / "file"), 2)
    assert "cannot write" in error_of(balms("evaluate", chain.pretrained, "--report", tmp_path / "file" / "x"), 2)
    assert "cannot write" in error_of(balms("evaluate", chain.pretrained, "--report", tmp_path / ("x" * 300)), 2)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in error_of(balms("evaluate", chain.pretrained, "--report", tmp_path / "loop"), 2)
    monkeypatch.chdir(out)
    assert "work in" in error_of(balms("evaluate", chain.pretrained, "--report", ".", "--overwrite"), 2)
    assert "work in" in error_of(balms("evaluate", chain.pretrained, "--report", tmp_path, "--overwrite"), 2)
    assert "--report" in error_of(balms("evaluate", chain.pretrained, "--overwrite"), 2)
    assert (out / "report.json").read_text() == first and len(page) == 1


def test_overwrite_leaves_nothing_of_the_earlier_report(balms, chain, heads, page, tmp_path):
    out = tmp_path / "report"
    balms("evaluate", *heads, "--report", out, "-q")
    assert {"differences.csv", "seeds.csv"} <= names(out)
    assert balms("evaluate", heads[0], "--report", out, "-q", "--overwrite").code == 0
    assert not {"differences.csv", "seeds.csv"} & names(out)
    assert names(tmp_path) == {"report"} | ({"ws"} & names(tmp_path))


def test_a_report_that_fails_midway_leaves_the_earlier_one(balms, chain, page, tmp_path, monkeypatch):
    out = tmp_path / "report"

    def fails(document, scored, folder, reporter):
        (folder / "index.html").write_text("half")
        raise error

    sys.modules["balms_cli.report.page"].write_page = fails
    error = OSError(28, "No space left on device")
    assert "No space left" in error_of(balms("evaluate", chain.pretrained, "--report", out, "-q"), 3)
    assert not out.exists() and not list(tmp_path.glob(".new-*"))
    page_ok = types.SimpleNamespace(write_page=lambda d, s, folder, r: (folder / "index.html").write_text("whole"))
    monkeypatch.setitem(sys.modules, "balms_cli.report.page", page_ok)
    assert balms("evaluate", chain.pretrained, "--report", out, "-q").code == 0
    page_ok.write_page, error = fails, ValueError("a bug")
    assert balms("evaluate", chain.pretrained, "--report", out, "-q", "--overwrite").code == 1
    assert (out / "index.html").read_text() == "whole" and not list(tmp_path.glob(".*"))


def test_what_comes_into_the_folder_meanwhile_is_left_alone(balms, chain, page, tmp_path):
    out = tmp_path / "report"
    sys.modules["balms_cli.report.page"].write_page = lambda *_: (out.mkdir(), (out / "mine.txt").write_text("work"))
    assert "is not empty" in error_of(balms("evaluate", chain.pretrained, "--report", out, "-q"), 2)
    assert names(out) == {"mine.txt"} and not list(tmp_path.glob(".*"))


def _refused():
    raise PermissionError(13, "Permission denied")


def test_a_listing_names_files_below_folders_and_bounds_the_search(tmp_path, monkeypatch):
    out = tmp_path / "report"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "a.png").write_text("")
    (out / ".balms-report").write_text("figures/a.png\nindex.html\n")
    check_folder(out, overwrite=True)
    for i in range(9):
        (out / "figures" / f"{i}.txt").write_text("")
    with pytest.raises(ConfigError, match=r"figures/0.txt, figures/1.txt, figures/2.txt:"):
        check_folder(out, overwrite=True)
    scandir = os.scandir
    shutil.rmtree(out / "figures")
    (out / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", lambda place: _refused() if Path(place).name == "locked" else scandir(place))
    with pytest.raises(ConfigError, match="Permission denied"):  # what may lie in there is not to be thrown away
        check_folder(out, overwrite=True)
    monkeypatch.undo()
    (out / "locked").rmdir()
    (out / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="such as elsewhere"):
        check_folder(out, overwrite=True)


def test_of_several_processes_the_first_writes(chain, page, tmp_path):
    class Second(World):
        """Process 1 of 2, as far as an evaluation sees, with all rows for itself."""

        def agree(self, value):
            return None, None  # process 0 was not refused, and has nothing to hand out

        def rows(self, count, rank=None):
            return slice(0, count)

        def gather(self, part, count):
            return part

    out = tmp_path / "report"
    files = [chain.pretrained / "model.safetensors"]
    found = evaluate.run(EvaluateConfig(), files, report=out, world=Second(1, 2))
    assert not out.exists() and page == []
    assert found.to_json()["top1"] == evaluate.run(EvaluateConfig(), files, report=out).to_json()["top1"] and out.is_dir()


# Another prior


@pytest.mark.parametrize("prior", ["uniform", "train", "reversed", "FILE"])
def test_a_target_prior_stands_in_the_document(balms, chain, page, tmp_path, prior):
    if prior == "FILE":
        prior = tmp_path / "p.json"
        prior.write_text('{"cat": 1, "dog": 2, "emu": 3}')
    done = balms("evaluate", chain.pretrained, "--target-prior", prior, "--report", tmp_path / "r", "--json")
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["target_prior"] == {"prior": str(prior), "tau": 1.0} and document["runs"][0]["prior_exact"] is True
    assert document["runs"][0]["metrics"]["top1"]["value"] == pytest.approx(json.loads(done.out)["top1"], rel=1e-5)
    assert "re-scored" in (tmp_path / "r" / "report.md").read_text()
    assert "re-scored" in done.err


# Gates


def test_all_gates_must_hold_and_each_that_fails_is_named(balms, chain, heads, page, tmp_path):
    held = balms("evaluate", *heads, "--require", "top1>=0", "--require", "ece<=1", "-q")
    assert held.code == 0
    gates = ["--require", "top1>=0", "--require", "few>100%", "--require", "ece<0"]
    missed = balms("evaluate", *heads[:2], *gates, "--report", tmp_path / "r", "--json", "-q")
    found = json.loads(missed.out)
    assert missed.code == 6 and found["report"] == str(tmp_path / "r")  # the result is out all the same
    for one in found["runs"]:
        assert one["gates"] == [{"require": "top1>=0", "value": one["top1"], "met": True},
                                {"require": "few>1", "value": one["few"], "met": False},
                                {"require": "ece<0", "value": one["ece"], "met": False}]  # fmt: skip
    (told,) = [line for line in missed.err.splitlines() if line.startswith("error: ")]
    assert told.count("is not met") == 2 and "few>1 is not met" in told and "ece<0 is not met" in told and "top1" not in told
    assert all(told.count(f"({run})") == 2 for run in heads[:2])


def test_a_gate_on_an_empty_group_leaves_no_report(balms, chain, page, tmp_path):
    done = balms("evaluate", chain.pretrained, "--require", "top1>=0", "--require", "many<=1", "--report", tmp_path / "r")
    assert "empty" in error_of(done, 2) and not (tmp_path / "r").exists()


def test_gates_in_a_file_one_or_several(balms, chain, tmp_path):
    for written, read in (('"top1>=0"', ["top1>=0"]), ('["top1>=0", "few>1"]', ["top1>=0", "few>1"])):
        (tmp_path / "e.toml").write_text(f"[evaluate]\nrequire = {written}\n")
        shown = tomllib.loads(balms("evaluate", chain.pretrained, "--config", tmp_path / "e.toml", "--print-config").out)
        assert shown["evaluate"]["require"] == read and shown["source"]["require"] == "file e.toml"
    assert balms("evaluate", chain.pretrained, "--config", tmp_path / "e.toml", "-q").code == 6
    assert balms("evaluate", chain.pretrained, "--config", tmp_path / "e.toml", "--require", "top1>=0", "-q").code == 0
    assert resolve("evaluate", sets={"require": "few>=0.3"}).config.require == ["few>=0.3"]


# Several runs


def test_differences_and_seeds_are_shown_and_in_the_json(balms, chain, heads):
    done = balms("evaluate", *heads, "--json")
    found = json.loads(done.out)
    assert [(d["run"], d["against"]) for d in found["differences"]] == [(heads[1], heads[0]), (heads[2], heads[0])]
    for i, one in enumerate(found["differences"], 1):
        assert one["metrics"]["top1"]["value"] == pytest.approx(found["runs"][i]["top1"] - found["runs"][0]["top1"])
    (group,) = found["seeds"]
    assert group["runs"] == heads[:2] and group["varied"] == "classifier seeds" and group["metrics"]["few"]["n"] == 2
    assert "on the same images" in done.err and "2 runs: classifier seeds" in done.err
    assert found == json.loads(balms("evaluate", *heads, "--json", "-q").out) | {}
    single = json.loads(balms("evaluate", heads[0], "--json", "-q").out)
    assert "differences" not in single and "seeds" not in single


def test_seeds_of_the_backbone_are_told_from_those_of_the_classifier(balms, chain):
    runs = []
    for seed in ("0", "1"):
        backbone = balms("pretrain", chain.manifest, *SMALL, "--seed", seed, "-q").out.strip()
        runs.append(balms("retrain", backbone, *FEW, "-q").out.strip())
        runs.append(backbone)
    found = json.loads(balms("evaluate", *runs, "--json", "-q").out)["seeds"]
    assert {tuple(one["runs"]): one["varied"] for one in found} == {
        (runs[0], runs[2]): "backbone seeds", (runs[1], runs[3]): "backbone seeds",
    }  # fmt: skip


@pytest.fixture(scope="module")
def other_classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("other")
    photos = draw_photos(root / "photos", {"cat": 12, "dog": 8, "fox": 6})
    made = invoke("make-lt", photos, "--as-is", "--workspace", root / "ws", "-q").out.strip()
    return invoke("pretrain", made, *SMALL, "--workspace", root / "ws", "-q").out.strip()


def test_runs_of_other_classes_are_refused_in_one_line(balms, chain, other_classes, page, tmp_path):
    told = error_of(balms("evaluate", chain.pretrained, other_classes, "--report", tmp_path / "r"), 4)
    assert "fox" in told and "emu" in told and "cat" not in told.split("(")[1] and not (tmp_path / "r").exists()


def test_runs_whose_classes_stand_in_another_order_are_matched_by_name(balms, chain, tmp_path):
    photos = draw_photos(tmp_path / "photos", {"cat": 8, "dog": 9, "emu": 30})
    made = balms("make-lt", photos, "--as-is").out.strip()
    other = balms("pretrain", made, *SMALL, "-q").out.strip()
    both = json.loads(balms("evaluate", chain.pretrained, other, "--json", "-q").out)
    alone = json.loads(balms("evaluate", other, "--json", "-q").out)
    assert [c["name"] for c in alone["per_class"]] == ["emu", "dog", "cat"]
    assert [c["name"] for c in both["runs"][1]["per_class"]] == ["cat", "dog", "emu"]
    by_name = [{c["name"]: c for c in result["per_class"]} for result in (both["runs"][1], alone)]
    assert by_name[0] == by_name[1] and both["runs"][1]["top1"] == alone["top1"]
    assert both["differences"] == []  # other images
    shared = json.loads(balms("evaluate", chain.pretrained, other, "--data", made, "--json", "-q").out)
    assert len(shared["differences"]) == 1


# Bad input


def test_no_test_images(balms, tmp_path, page):
    photos = draw_photos(tmp_path / "photos", {"cat": 2, "dog": 2})
    made = balms("make-lt", photos, "--as-is").out.strip()
    run = balms("pretrain", made, *SMALL, "--batch-size", "4", "-q").out.strip()
    told = error_of(balms("evaluate", run, "--report", tmp_path / "r"), 3)
    assert "has no test images" in told and "--split" in told and not (tmp_path / "r").exists()
    assert balms("evaluate", run, "--split", "train", "--report", tmp_path / "r", "-q").code == 0


def test_one_class(balms, tmp_path, page):
    made = balms("make-lt", draw_photos(tmp_path / "photos", {"cat": 12}), "--as-is").out.strip()
    run = balms("pretrain", made, *SMALL, "--batch-size", "4", "-q").out.strip()
    found = json.loads(balms("evaluate", run, "--report", tmp_path / "r", "--json", "-q").out)
    assert found["top1"] == 1 and found["ece"] == 0 and found["rarest3"] is None


def test_a_class_that_is_never_predicted(balms, chain, page, tmp_path):
    def silence(model):
        model.head.bias[1] = -1e6

    run = broken(chain.pretrained, tmp_path / "quiet", silence)
    done = balms("evaluate", run, "--report", tmp_path / "r", "--json", "-q")
    dog = json.loads(done.out)["per_class"][1]
    assert done.code == 0 and dog["name"] == "dog" and dog["accuracy"] == 0
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["runs"][0]["per_class"]["predicted"][1] == 0 and document["runs"][0]["never_predicted"] >= 1
    assert "never predicts" in (tmp_path / "r" / "report.md").read_text()


@pytest.mark.parametrize("place", ["head", "backbone"])
def test_damaged_weights_are_one_line_and_no_report(balms, chain, page, tmp_path, place):
    def spoil(model):
        next(iter(getattr(model, place).parameters())).fill_(float("nan"))

    run = broken(chain.pretrained, tmp_path / "nan", spoil)
    assert not all(t.isfinite().all() for t in load_file(run / "model.safetensors").values() if t.is_floating_point())
    told = error_of(balms("evaluate", chain.pretrained, run, "--report", tmp_path / "r", "-q"), 4)
    assert "nan" in told and "damaged" in told and not (tmp_path / "r").exists()
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert error_of(balms("evaluate", run, "--report", tmp_path / "r", "-q"), 4)


def test_a_run_without_its_other_files_still_has_a_report(balms, chain, page, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(chain.pretrained / "model.safetensors", tmp_path / "bare")
    assert balms("evaluate", tmp_path / "bare", "--report", tmp_path / "r", "-q").code == 0
    run = json.loads((tmp_path / "r" / "report.json").read_text())["runs"][0]
    assert run["curves"] is None and run["provenance"]["command"] is None
    assert run["recipe"]["steps"] == {"value": 12, "source": None}
