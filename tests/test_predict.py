"""Classifying images without labels: network and pixels as in evaluate, whatever files come along, and honest scores."""

import inspect
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from balms_cli.cli import console, predictions
from balms_cli.config import EvaluateConfig, PredictConfig
from balms_cli.data import unlabelled
from balms_cli.data.feed import AHEAD
from balms_cli.data.images import load_pixels
from balms_cli.data.manifest import Manifest
from balms_cli.data.unlabelled import find_images, read_batches
from balms_cli.engine.checkpoint import load_model
from balms_cli.engine.distributed import ALONE
from balms_cli.engine.runtime import setup
from balms_cli.metrics.temperature import fit_temperature
from balms_cli.reporter import Reporter
from balms_cli.stages import predict
from balms_cli.stages.evaluate import _Cache

from .conftest import SMALL, draw_photos, invoke

RNG = np.random.default_rng(0)


def lines(outcome) -> list[dict]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def files_of(manifest: Manifest, split: str) -> list[str]:
    return [os.path.join(manifest.source["root"], key) for key in manifest.splits[split].keys]


@pytest.fixture(scope="module")
def with_val(tmp_path_factory):
    """A Balanced Softmax run and its manifest, whose data has validation images."""
    root = tmp_path_factory.mktemp("val")
    photos = draw_photos(root / "photos", {"cat": 40, "dog": 18, "emu": 12})
    made = invoke("make-lt", photos, "--imbalance", 4, "--val-per-class", 4, "--workspace", root, "-q").out.strip()
    unsure = ["--set", "warmup_steps=100"]  # of a network that is right each time no temperature can be told
    done = invoke("pretrain", made, *SMALL, *unsure, "--workspace", root, "--precision", "fp32", "-q")
    assert done.code == 0, done.err
    return Path(done.out.strip()), Manifest.load(made)


@pytest.fixture
def run_with_val(with_val, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(with_val[0], tmp_path / "run")
    return tmp_path / "run"


class TestFinding:
    def test_folders_are_read_in_depth_sorted_without_hidden_and_other_files(self, tmp_path):
        for name in ("b.jpg", "a/z.PNG", "a/b/c.webp", "a.jpeg", ".h.jpg", ".hidden/x.jpg", "notes.txt", "x.heic", "a/y.heic"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).touch()
        passed = Counter()
        found = list(find_images([str(tmp_path / "in"), "else.tiff.bak", str(tmp_path / "in" / ".h.jpg")], passed))
        names = [os.path.relpath(path, tmp_path / "in") for path, _ in found[:-2]]
        assert names == ["a/b/c.webp", "a/z.PNG", "a.jpeg", "b.jpg"] and all(problem is None for _, problem in found)
        assert [path for path, _ in found[-2:]] == ["else.tiff.bak", str(tmp_path / "in" / ".h.jpg")]  # named: taken as it is
        assert passed == {".heic": 2, ".txt": 1}

    def test_links_stay_inside_and_end(self, tmp_path):
        """A web of folders that link to each other has n! ways through it; each is read once."""
        inside = tmp_path / "in"
        for i in range(9):
            (inside / str(i)).mkdir(parents=True)
            (inside / str(i) / "x.jpg").touch()
            for j in range(9):
                os.symlink(f"../{j}", inside / str(i) / f"to{j}")
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "s.jpg").touch()
        os.symlink(tmp_path / "secret", inside / "out")
        os.symlink(tmp_path / "secret" / "s.jpg", inside / "s.jpg")
        os.symlink("0/x.jpg", inside / "same.jpg")
        found = list(find_images([str(inside)]))
        good = [os.path.relpath(os.path.realpath(path), inside) for path, problem in found if problem is None]
        assert sorted(good) == sorted([f"{i}/x.jpg" for i in range(9)] + ["0/x.jpg"])
        bad = {os.path.basename(path): problem for path, problem in found if problem}
        assert bad == {"out": "a link that leaves the folder", "s.jpg": "a link that leaves the folder"}
        assert list(find_images([str(inside / "s.jpg")])) == [(str(inside / "s.jpg"), None)]  # who names it, means it

    def test_a_folder_that_cannot_be_listed_is_one_bad_entry(self, tmp_path, monkeypatch):
        for name in ("a/1.jpg", "locked/2.jpg", "z/3.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        listdir = os.listdir

        def refuse(path):
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied")
            return listdir(path)

        monkeypatch.setattr(unlabelled.os, "listdir", refuse)
        found = [(os.path.basename(path), problem) for path, problem in find_images([str(tmp_path)])]
        assert found == [("1.jpg", None), ("locked", "Permission denied"), ("3.jpg", None)]

    def test_deep_folders_do_not_end_in_a_recursion_error(self, tmp_path):
        deep = tmp_path.joinpath(*["d"] * 300)
        deep.mkdir(parents=True)
        (deep / "x.jpg").touch()
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack()) + 100)
        try:
            found = list(find_images([str(tmp_path)]))
        finally:
            sys.setrecursionlimit(limit)
        assert found == [(str(deep / "x.jpg"), None)]


class TestReading:
    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_pixels_are_exactly_those_of_training(self, chain, workers):
        manifest = Manifest.load(chain.manifest)
        expected = load_pixels(manifest, "train", 16)
        found = ((path, None) for path in files_of(manifest, "train"))
        batches = list(read_batches(found, 16, 7, workers))
        assert [len(b) for b in batches] == [7] * 7
        assert (np.stack([pixels for batch in batches for _, pixels in batch]) == expected).all()

    def test_digits_as_files_are_resized_as_the_digits_were(self, tmp_path):
        from sklearn.datasets import load_digits

        manifest = Manifest.load(invoke("make-lt", "digits", "--imbalance", 4, "--out", tmp_path / "m", "-q").out.strip())
        keys = manifest.splits["test"].keys[:5]
        for key in keys:
            values = load_digits().images[int(key.removeprefix("digit-")) - 1]  # 8 x 8, from 0 to 16
            Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8)).save(tmp_path / f"{key}.png")
        found = [(str(tmp_path / f"{key}.png"), None) for key in keys]
        expected = load_pixels(manifest, "test", 16)[:5]
        assert (np.stack([pixels for _, pixels in next(read_batches(found, 16, 5, kind="digits"))]) == expected).all()

    def test_an_endless_row_of_paths_is_read_only_so_far_ahead(self, chain):
        asked = Counter()

        def endless():
            for path in itertools.cycle(files_of(Manifest.load(chain.manifest), "test")):
                asked["n"] += 1
                yield path

        predictor = predict.load(chain.pretrained, PredictConfig(batch_size=4, workers=2))
        reading = predictor.predict(endless())
        assert len([next(reading) for _ in range(9)]) == 9
        assert asked["n"] <= 4 * (3 + AHEAD)
        reading.close()

    def test_what_is_wrong_with_each_bad_image(self, chain, tmp_path):
        photo = Image.fromarray(RNG.integers(0, 255, (90, 60, 3), dtype=np.uint8)).resize((300, 450))
        photo.save(tmp_path / "good.jpg", quality=95)
        (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:9000])
        (tmp_path / "text.jpg").write_text("not a picture")
        (tmp_path / "empty.jpg").touch()
        os.mkfifo(tmp_path / "pipe.jpg")
        names = ["cut.jpg", "text.jpg", "empty.jpg", "pipe.jpg", "missing.jpg", "x" * 300, "good.jpg"]
        found = predict.load(chain.pretrained).predict([tmp_path / name for name in names] + ["nul\0.jpg"])
        reasons = [one.error for one in found]
        assert reasons[:6] == ["truncated", "not an image", "empty", "not a regular file", "missing", "File name too long"]
        assert reasons[6] is None and "null" in reasons[7]

    def test_modes_and_orientations_of_one_photo_get_one_answer(self, chain, tmp_path):
        photo = Image.fromarray(np.tile(np.linspace(20, 230, 96, dtype=np.uint8)[:, None, None], (1, 64, 3)))
        photo.save(tmp_path / "rgb.png")
        photo.convert("L").save(tmp_path / "gray.png")
        photo.convert("RGBA").save(tmp_path / "alpha.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera lay on its side
        photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        photo.convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
        predictor = predict.load(chain.pretrained, PredictConfig(precision="fp32"))
        names = ("rgb.png", "gray.png", "alpha.png", "turned.png", "ink.jpg")
        first, *others, ink = predictor.predict(tmp_path / name for name in names)
        assert all(one.classes == first.classes and one.scores == pytest.approx(first.scores, abs=1e-6) for one in others)
        assert ink.classes == first.classes and ink.scores == pytest.approx(first.scores, abs=0.05)


class TestScores:
    def test_logits_and_answers_are_those_of_evaluate(self, chain):
        manifest, file = Manifest.load(chain.manifest), chain.pretrained / "model.safetensors"
        model, header = load_model(file)
        cache = _Cache(EvaluateConfig(precision="fp32"), setup("cpu", "fp32"), Reporter(), ALONE)
        logits_NC, labels_N = cache.logits(model, header, manifest, "test", "x")
        predictor = predict.load(chain.pretrained, PredictConfig(precision="fp32", batch_size=5, top_k=99))
        found = list(predictor.predict(files_of(manifest, "test")))
        ours_NC = np.array([[dict(zip(one.classes, one.scores, strict=True))[c] for c in header.classes] for one in found])
        assert np.allclose(np.log(ours_NC), log_softmax(logits_NC.numpy(), axis=1), atol=1e-5)
        assert all(one.scores == sorted(one.scores, reverse=True) for one in found)
        scored = json.loads(invoke("evaluate", chain.pretrained, "--precision", "fp32", "--json", "-q").out)
        right = [one.classes[0] == manifest.classes[label] for one, label in zip(found, labels_N, strict=True)]
        assert np.mean(right) == pytest.approx(scored["top1"])

    def test_another_prior_moves_the_scores_by_its_logarithm(self, chain, tmp_path):
        (tmp_path / "p.json").write_text(json.dumps({"cat": 0.5, "dog": 0.3, "emu": 0.2}))
        photo = next(iter(files_of(Manifest.load(chain.manifest), "test")))

        def scores(*options):
            (line,) = lines(invoke("predict", chain.pretrained, photo, "--json", "-q", "--precision", "fp32", *options))
            return line, np.array([{p["class"]: p["score"] for p in line["predictions"]}[c] for c in ("cat", "dog", "emu")])

        _, raw_C = scores()
        line, ours_C = scores("--target-prior", tmp_path / "p.json")
        expected_C = raw_C * np.array([0.5, 0.3, 0.2]) / np.array([32, 12, 5])  # softmax on 32, 12 and 5 images
        assert ours_C == pytest.approx(expected_C / expected_C.sum(), rel=1e-4)
        assert line["target_prior"].endswith("p.json") and line["prior_exact"] is True
        _, half_C = scores("--posthoc-tau", "0.5")
        expected_C = raw_C / np.sqrt([32, 12, 5])
        assert half_C == pytest.approx(expected_C / expected_C.sum(), rel=1e-4)

    def test_damaged_weights_are_told_not_predicted_with(self, chain, tmp_path):
        with safe_open(chain.pretrained / "model.safetensors", "pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        tensors["head.bias"][1] = torch.nan
        save_file(tensors, tmp_path / "model.safetensors", metadata)
        outcome = invoke("predict", tmp_path, chain.photos, "-q")
        assert outcome.code == 4 and "weights are damaged" in outcome.err and outcome.out == ""


class TestTemperature:
    def test_it_is_the_minimum_that_scipy_finds(self):
        logits_NC = RNG.normal(size=(300, 7)) * 4
        labels_N = np.array([RNG.choice(7, p=softmax(z / 2.5)) for z in logits_NC])
        for shift_C in (None, RNG.normal(size=7)):

            def nll(log_t, shift_C=shift_C):
                logp_NC = log_softmax(logits_NC / np.exp(log_t) + (0 if shift_C is None else shift_C), axis=1)
                return -logp_NC[np.arange(300), labels_N].mean()

            best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x
            assert fit_temperature(logits_NC, labels_N, shift_C) == pytest.approx(np.exp(best), rel=1e-5)
        assert fit_temperature(logits_NC, labels_N) == pytest.approx(2.5, rel=0.2)  # by which the labels were drawn

    def test_chunks_change_nothing(self, monkeypatch):
        logits_NC, labels_N = RNG.normal(size=(101, 5)).astype(np.float32), RNG.integers(0, 5, 101)
        logits_NC[np.arange(101), labels_N] += 1
        whole = fit_temperature(logits_NC, labels_N)
        monkeypatch.setattr("balms_cli.metrics.temperature._CHUNK", 35)
        assert fit_temperature(logits_NC, labels_N) == pytest.approx(whole, rel=1e-9)

    def test_the_prior_of_the_validation_images_is_not_taken_for_sureness(self):
        """Softmax on a long tail, right for its own prior but twice too sure; validation images are as many a class."""
        prior_C, classes = np.array([0.7, 0.2, 0.1]), np.arange(3)
        labels_N = np.repeat(classes, 4000)
        x_NC = RNG.normal(size=(12000, 3)) + 1.5 * np.eye(3)[labels_N]  # log p(x | c) = 1.5 x_c + const
        logits_NC = 2 * (1.5 * x_NC + np.log(prior_C))
        shift_C = np.log(1 / 3) - np.log(prior_C)
        assert fit_temperature(logits_NC, labels_N, shift_C) == pytest.approx(2, rel=0.05)
        assert fit_temperature(logits_NC, labels_N) > 2.2  # what it would be otherwise
        only = labels_N < 2  # a class that is not among the validation images
        missing_C = np.log([0.5, 0.5, 1]) - np.log(prior_C)
        missing_C[2] = -np.inf
        assert fit_temperature(logits_NC[only], labels_N[only], missing_C) == pytest.approx(2, rel=0.07)

    def test_nothing_is_made_of_images_that_do_not_tell(self):
        sure_NC = 5 * np.eye(3)
        assert fit_temperature(sure_NC, np.arange(3)) is None  # all right: the surer the better
        assert fit_temperature(sure_NC, (np.arange(3) + 1) % 3) is None  # all wrong: the less sure the better
        assert fit_temperature(np.zeros((0, 3)), np.zeros(0, np.int64)) is None
        assert fit_temperature(np.full((3, 3), np.nan), np.arange(3)) is None

    def test_a_run_with_validation_images_is_scaled_by_their_temperature(self, with_val, run_with_val):
        manifest = with_val[1]
        plain = predict.load(run_with_val, PredictConfig(calibrate=False, precision="fp32"))
        z_NC = plain.logits(torch.from_numpy(load_pixels(manifest, "val", 16))).numpy().astype(np.float64)
        labels_N = manifest.splits["val"].labels

        def nll(t):
            logp_NC = log_softmax(z_NC / t + np.log(1 / 3) - np.log(manifest.class_counts), axis=1)
            return -logp_NC[np.arange(12), labels_N].mean()

        expected = minimize_scalar(nll, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
        photo = files_of(manifest, "test")[0]
        (line,) = lines(invoke("predict", run_with_val, photo, "--json", "--precision", "fp32"))
        assert line["calibrated"] is True and line["temperature"] == pytest.approx(expected, rel=1e-4)
        pixels = torch.from_numpy(np.stack([read[1] for read in next(read_batches([(photo, None)], 16, 1, 0))]))
        top = softmax(plain.logits(pixels).numpy() / expected, axis=1).max()
        assert line["predictions"][0]["score"] == pytest.approx(top, rel=1e-4)
        (line,) = lines(invoke("predict", run_with_val, photo, "--json", "--no-calibrate"))
        assert line["calibrated"] is False and line["temperature"] is None

    def test_it_is_kept_beside_the_run_and_believed_only_for_these_weights(self, with_val, run_with_val, monkeypatch):
        found = predict.load(run_with_val).temperature
        kept = run_with_val / "temperature.json"
        with monkeypatch.context() as patch:
            patch.setattr(predict, "fit_temperature", lambda *a: pytest.fail("fitted again"))
            assert predict.load(run_with_val).temperature.value == found.value
        for damage in (
            {"temperature": 1e9},
            {"temperature": "x"},
            {"images": []},
            {"temperature": 9.0, "model_sha256": "0" * 64},
            {"temperature": 9.0, "precision": "fp8"},
        ):
            kept.write_text(json.dumps(json.loads(kept.read_text()) | damage))
            assert predict.load(run_with_val).temperature == found  # fitted anew, and kept
        infinite = kept.read_text().replace(f'"images": {found.images}', '"images": 1e999')
        for content in ("", "[]", "{", "x" * 20_000, "[" * 9000, infinite):
            kept.write_text(content)
            assert predict.load(run_with_val).temperature == found
        kept.unlink()
        kept.mkdir()  # cannot be written, as in a read-only run
        outcome = invoke("predict", run_with_val, files_of(with_val[1], "test")[0], "--json")
        assert outcome.code == 0 and lines(outcome)[0]["calibrated"] and "not kept for next time" in outcome.err

    def test_uncalibrated_is_said_with_the_reason(self, chain, with_val, run_with_val, tmp_path, monkeypatch):
        photo = files_of(with_val[1], "test")[0]
        outcome = invoke("predict", chain.pretrained, photo, "--json")
        assert lines(outcome)[0]["calibrated"] is False and lines(outcome)[0]["temperature"] is None
        assert "uncalibrated: " in outcome.err and "no validation split" in outcome.err
        other = invoke("make-lt", Path(with_val[1].source["root"]), "--imbalance", 4, "--val-per-class", 4, "--seed", 5,
                       "--out", tmp_path / "other", "-q").out.strip()  # fmt: skip
        assert "another draw" in predict.load(run_with_val, data=Path(other)).temperature.reason
        assert not (run_with_val / "temperature.json").exists()
        shutil.copytree(with_val[1].path, tmp_path / "moved")
        moved = predict.load(run_with_val, data=tmp_path / "moved").temperature
        assert moved.value is not None and moved.images == 12
        (run_with_val / "temperature.json").unlink()
        monkeypatch.setattr("balms_cli.stages.predict.manifest_of", lambda *a: (_ for _ in ()).throw(
            predict.DataError("the data of x is no longer at y; say where it is by --data")))  # fmt: skip
        outcome = invoke("predict", run_with_val, photo, "--json")
        assert outcome.code == 0 and "no longer at y" in outcome.err and lines(outcome)[0]["calibrated"] is False


class TestCommand:
    @pytest.fixture
    def mixed(self, tmp_path):
        folder = draw_photos(tmp_path / "mixed", {"a b": 2, "ünï 猫": 2})
        (folder / "bad.jpg").write_text("no")
        (folder / "notes.md").touch()
        return folder

    def test_a_line_an_image_between_tabs(self, chain, mixed):
        outcome = invoke("predict", chain.pretrained, mixed, "-k", 2)
        rows = [line.split("\t") for line in outcome.out.splitlines()]
        assert outcome.code == 0 and [len(row) for row in rows] == [5] * 4
        assert [row[0] for row in rows] == [str(mixed / n / f"00{i}.png") for n in ("a b", "ünï 猫") for i in (0, 1)]
        for row in rows:
            assert {row[1], row[3]} <= {"cat", "dog", "emu"} and float(row[2]) >= float(row[4]) > 0
        assert f"warning: {mixed / 'bad.jpg'} is left out: not an image" in outcome.err.splitlines()
        assert "classified: 4 of 5 images" in outcome.err and "1 .md" in outcome.err

    def test_json_lines_hold_every_image_read_or_not(self, chain, mixed):
        outcome = invoke("predict", chain.pretrained, mixed, "--json", "--batch-size", 2)
        rows = lines(outcome)
        assert [set(row) for row in rows[:2]] == [{"path", "predictions", "calibrated", "temperature"}] * 2
        assert len(rows) == 5 and [len(row["predictions"]) for row in rows if "predictions" in row] == [3] * 4  # of 3 classes
        assert rows[2] == {"path": str(mixed / "bad.jpg"), "error": "not an image"}

    def test_quiet_keeps_the_errors_alone(self, chain, mixed):
        outcome = invoke("predict", chain.pretrained, mixed, "-q")
        assert outcome.code == 0 and len(outcome.out.splitlines()) == 4 and outcome.err == ""
        nothing = invoke("predict", chain.pretrained, mixed / "bad.jpg", "-q")
        (line,) = nothing.err.splitlines()
        assert nothing.code == 3 and "bad.jpg: not an image" in line

    def test_a_code_page_without_the_names_is_no_bug(self, chain, mixed):
        """``predict > file`` where Python writes cp1252: what it lacks is escaped."""
        command = [sys.executable, "-m", "balms_cli", "predict", chain.pretrained, mixed, "-q"]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
        assert done.returncode == 0, done.stderr
        assert str(mixed / "ünï \\u732b" / "000.png") in done.stdout.decode("cp1252")

    def test_exit_codes(self, chain, mixed, tmp_path):
        nothing = invoke("predict", chain.pretrained, mixed / "bad.jpg", tmp_path / "gone.jpg", "--json")
        assert nothing.code == 3 and len(lines(nothing)) == 2 and "no image could be read, of 2; " in nothing.err
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "a.heic").touch()
        empty = invoke("predict", chain.pretrained, tmp_path / "none")
        assert empty.code == 3 and empty.out == "" and "no images" in empty.err and "1 .heic" in empty.err
        assert "cannot be decoded here" in empty.err and "convert them" in empty.err
        assert invoke("predict", tmp_path / "none", mixed).code == 4
        assert invoke("predict", chain.pretrained).code == 2
        assert invoke("predict", chain.pretrained, mixed, "--top-k", 0).code == 2
        assert invoke("predict", chain.pretrained, mixed, "--target-prior", "unifrom").code == 2
        assert invoke("predict", "-", "-", stdin="x").code == 2
        assert invoke("predict", "-", mixed, stdin="").code == 3
        two = invoke("predict", "-", mixed, stdin=f"{chain.pretrained}\n{chain.pretrained}\n")
        assert two.code == 2 and "names 2" in two.err

    def test_a_run_without_a_classifier_is_refused(self, chain, mixed, tmp_path):
        frozen = invoke("pretrain", chain.manifest, "--frozen", *SMALL[:4], "--out", tmp_path / "f", "-q")
        outcome = invoke("predict", frozen.out.strip(), mixed)
        assert outcome.code == 4 and "balms retrain" in outcome.err

    def test_stdin_names_the_run_or_the_images(self, chain, mixed, tmp_path):
        photos = sorted((mixed / "a b").glob("*"))
        text = f"{photos[0]}\r\n\n{photos[1]}"
        by_path = invoke("predict", chain.pretrained, *photos, "-q").out
        assert invoke("predict", chain.pretrained, "-", "-q", stdin=text).out == by_path
        assert invoke("predict", "-", *photos, "-q", stdin=f"{chain.pretrained}\n").out == by_path
        assert invoke("predict", "-", *photos, "-q", stdin=json.dumps({"run": str(chain.pretrained)})).out == by_path
        assert by_path.count("\n") == 2

    def test_names_of_any_bytes_stay_on_their_line(self, chain, tmp_path, monkeypatch):
        odd = [b"tab\tnew\nline.png", b"caf\xe9.png"]
        for name in odd:
            Image.new("RGB", (20, 20)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name), format="PNG")
        outcome = invoke("predict", chain.pretrained, tmp_path, "-k", 1, "-q")
        rows = [line.split("\t") for line in outcome.out.splitlines()]
        assert [row[0].removeprefix(f"{tmp_path}/") for row in rows] == ["caf\\udce9.png", "tab\\tnew\\nline.png"]
        found = lines(invoke("predict", chain.pretrained, tmp_path, "--json", "-q"))
        assert {os.fsencode(os.path.basename(row["path"])) for row in found} == set(odd)  # in JSON nothing is lost
        listing = b"".join(os.fsencode(tmp_path) + b"/" + name + b"\n" for name in odd[1:])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listing)))
        assert [os.fsencode(p) for p in predictions.paths_of(["-"])] == [listing[:-1]]

    def test_on_a_terminal_people_get_a_table_and_no_lines(self, chain, mixed, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        predictor, paths = predict.load(chain.pretrained), [str(mixed)]
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        predictions.write(predictor, paths, as_json=False, quiet=False, reporter=console.ConsoleReporter())
        assert out.getvalue() == "" and "uncalibrated" in err.getvalue() and err.getvalue().count("000.png") == 2
        predictions.write(predictor, paths, as_json=False, quiet=True, reporter=Reporter())
        assert out.getvalue().count("\n") == 4
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # 2> log: the result stays on the screen
        predictions.write(predictor, paths, as_json=False, quiet=False, reporter=console.ConsoleReporter())
        assert out.getvalue().count("\n") == 8

    def test_it_ends_cleanly_in_the_midst_of_endless_paths(self, chain):
        """Once as its reader goes (``| head``), once by Ctrl-C."""
        photo = files_of(Manifest.load(chain.manifest), "test")[0]
        program = [sys.executable, "-m", "balms_cli", "predict", chain.pretrained, "-", "--batch-size", "8"]

        def start():
            feeder = subprocess.Popen(["yes", photo], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            # A shell's background jobs ignore SIGINT, and so would what they start.
            process = subprocess.Popen(program, stdin=feeder.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
            feeder.stdout.close()
            return process, feeder

        (left, *_), (stopped, *_) = both = start(), start()  # side by side, as starting takes the time
        for process, _ in both:
            assert process.stdout.readline().startswith(os.fsencode(photo))  # before the paths have an end
        left.stdout.close()
        stopped.send_signal(signal.SIGINT)
        told = left.stderr.read(), stopped.communicate(timeout=60)[1]
        assert (left.wait(60), stopped.wait(60)) == (1, 130), told
        assert not any(b"Traceback" in text or b"Exception" in text for text in told)
        assert [text.count(b"error") for text in told] == [0, 1]
        for _, feeder in both:
            feeder.wait(60)
