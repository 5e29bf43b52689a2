"""``balms export``: what a stranger gets answers as the run does, and nothing that does not is ever written.

The truth here is the run's network in float64 on photos that Pillow reads: none of the path that export checks by.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from balms_cli.engine.checkpoint import load_model, save_model
from balms_cli.engine.header import read_header
from balms_cli.errors import CheckpointError, ConfigError
from balms_cli.models.backbones import build_backbone
from balms_cli.models.classifiers import Classifier, CosineHead, linear_head
from balms_cli.stages import export, export_formats
from balms_cli.stages.export import rebuild

from .conftest import invoke

HEADS = ("linear", "cosine", "ncm")
PACKAGE = Path(export.__file__).parents[1]


def need_onnx():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra 'onnx' is not installed")


@pytest.fixture(scope="module")
def runs(chain):
    """A run of each head. The linear one is stage 1 itself."""
    found = {"linear": chain.pretrained}
    for head in ("cosine", "ncm"):
        made = invoke("retrain", chain.pretrained, "--classifier", head, "--steps", "20", "--set", "class_rows=16",
                      "--workspace", chain.workspace, "--quiet")  # fmt: skip
        assert made.code == 0, made.err
        found[head] = Path(made.out.strip())
    return found


@pytest.fixture(scope="module")
def photos(chain):
    """Seven photos as float32 [7, 3, 16, 16] in 0..1."""
    files = sorted(chain.photos.rglob("*.png"))[::9]
    fitted = [ImageOps.fit(Image.open(file).convert("RGB"), (16, 16), Image.Resampling.BICUBIC) for file in files]
    return np.stack([np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255 for image in fitted])


def truth(run, photos):
    """Logits and probabilities in float64."""
    model, header = load_model(run / "model.safetensors")
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (header.mean, header.std))
    with torch.no_grad():
        logits = model.double()((torch.from_numpy(photos).double() - mean) / std)
    exp = np.exp(logits.numpy() - logits.numpy().max(1, keepdims=True))
    return logits.numpy(), exp / exp.sum(1, keepdims=True)


def written(outcome):
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1 and outcome.err == ""
    return Path(outcome.out.strip())


def near(found, expected):
    return all(np.abs(np.asarray(f) - e).max() < 1e-4 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("head", ["linear", "cosine", pytest.param("ncm", marks=pytest.mark.slow)])
def test_onnx_answers_as_the_run_does_for_every_batch_size(runs, photos, head):
    need_onnx()
    import onnxruntime

    file = written(invoke("export", runs[head], "--to", "onnx", "--quiet", "--overwrite"))
    assert file == runs[head] / "export" / "model.onnx"
    session = onnxruntime.InferenceSession(file)
    (entry,), outputs = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape) == ("images", "tensor(float)", ["batch", 3, 16, 16])
    assert [(o.name, o.shape) for o in outputs] == [("logits", ["batch", 3]), ("probabilities", ["batch", 3])]
    expected = truth(runs[head], photos)
    assert np.ptp(expected[0]) > 0.1 and np.ptp(expected[0], axis=0).max() > 0.01  # an answer that is one at all
    for size in (1, 3, 7):
        assert near(session.run(None, {"images": photos[:size]}), [e[:size] for e in expected])
    told, header = session.get_modelmeta().custom_metadata_map, read_header(runs[head] / "model.safetensors")
    assert json.loads(told["classes"]) == ["cat", "dog", "emu"] and told["image_size"] == "16"
    assert json.loads(told["class_counts"]) == header.class_counts == [32, 12, 5]
    prior = np.exp(header.implied_log_prior)
    assert np.exp(json.loads(told["implied_log_prior"])) == pytest.approx(prior / prior.sum())
    assert told["run"] == runs[head].name and told["classifier"] == head and told["manifest_sha256"] == header.manifest_sha256
    assert str(PACKAGE).encode() not in file.read_bytes()  # no source line of the machine that made it


def test_a_torch_program_runs_where_balms_is_not(runs, photos, tmp_path):
    file = written(invoke("export", runs["cosine"], "--to", "torch", "--out", tmp_path / "m.pt2", "--quiet"))
    np.save(tmp_path / "photos.npy", photos)
    code = f"""
import sys
class NotHere:
    def find_spec(self, name, *more):
        if name.partition(".")[0] == "balms_cli":
            raise ImportError(name)
sys.meta_path.insert(0, NotHere())
import json, numpy, torch
extra = {{"balms.json": ""}}
network = torch.export.load({str(file)!r}, extra_files=extra).module()
images = torch.from_numpy(numpy.load("photos.npy"))
for size in (1, 7):
    print(json.dumps([part.tolist() for part in network(images[:size])]))
print(json.loads(extra["balms.json"])["classes"])
"""
    done = subprocess.run([sys.executable, "-Wignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, seven, classes = done.stdout.splitlines()
    expected = truth(runs["cosine"], photos)
    assert near(json.loads(one), [e[:1] for e in expected]) and near(json.loads(seven), expected)
    assert classes == "['cat', 'dog', 'emu']"
    assert str(PACKAGE).encode() not in file.read_bytes()


@pytest.mark.parametrize("head", HEADS)
def test_plain_weights_are_rebuilt_from_their_two_files(runs, photos, head):
    folder = written(invoke("export", runs[head], "--to", "safetensors", "--quiet"))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    with torch.no_grad():
        found = rebuild(folder)(torch.from_numpy(photos))
    assert near(found, truth(runs[head], photos))
    names = {name.partition(".")[0] for name in load_file(folder / "model.safetensors")}
    assert names == {"backbone", "head"}


def made(chain, folder, backbone="resnet8", size=16, head="linear", **changes):
    """A run that was not trained: a network of the named kind with the header of the chain's."""
    torch.manual_seed(1)
    network = build_backbone(backbone, size)
    top = CosineHead(network.feature_dim, 3) if head == "cosine" else linear_head(network.feature_dim, 3)
    if head == "cosine":
        torch.nn.init.normal_(top.weight)
    changes |= {"backbone": backbone, "feature_dim": network.feature_dim, "image_size": size, "head": head}
    folder.mkdir()
    header = read_header(chain.pretrained / "model.safetensors").model_copy(update=changes)
    save_model(folder / "model.safetensors", Classifier(network, top), header)
    return folder


def test_torchvision_takes_plain_weights_by_the_lines_that_the_sidecar_gives(chain, tmp_path, monkeypatch):
    run = made(chain, tmp_path / "r", "mobilenet_v3_small", 32)
    folder = written(invoke("export", run, "--to", "safetensors", "--quiet", "--images", "4"))
    told = json.loads((folder / "config.json").read_text())
    assert told["torchvision"]["rename"] == {"backbone.": "", "head.": "classifier.3."}
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec("\n".join(told["load"]), scope)
    network = scope["network"]
    assert type(network).__module__.startswith("torchvision.")
    images = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(told[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        assert near([network((images - mean) / std)], [truth(run, images.numpy())[0]])


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_another_prior_is_baked_in(chain, tmp_path, head):
    """Softmax on the data, for uniform classes: every logit gets -log n, up to what is the same for all classes."""
    run = made(chain, tmp_path / "r", head=head)
    images, counts = torch.rand(2, 3, 16, 16), np.array([32, 12, 5])
    plain = export.load_model(run / "model.safetensors")[0]
    config = export.ExportConfig(target_prior="uniform", to="torch")
    shift = export.adjustment(config, read_header(run / "model.safetensors"))
    with torch.no_grad():
        moved = (export_formats.with_shift(plain, shift)(images) - plain(images)).numpy() + np.log(counts)
    assert np.ptp(moved, axis=1).max() < 1e-5
    done = invoke("export", run, "--to", "safetensors", "--target-prior", "uniform", "--quiet", "--images", "3")
    if head == "cosine":
        assert done.code == 2 and "no bias" in done.err and not (run / "export").exists()
        return
    with torch.no_grad():
        found = rebuild(written(done))(images)[0].numpy() - truth(run, images.numpy())[0] + np.log(counts)
    assert np.ptp(found, axis=1).max() < 1e-5
    told = json.loads((run / "export" / "safetensors" / "config.json").read_text())
    assert told["target_prior"] == "uniform" and np.exp(told["implied_log_prior"]) == pytest.approx(1 / 3)


def test_the_result_says_where_the_largest_difference_is(chain, tmp_path, monkeypatch):
    """A network that is 0.003 off for one image and one class: told with both, and let pass by a larger tolerance."""
    run = made(chain, tmp_path / "r")
    real = export._WRITERS["safetensors"]

    def off(model, about):
        found, calls = real(model, about), []

        def run_it(images):
            logits, probabilities = (part.clone() for part in found.run(images))
            calls.append(len(images))
            if len(calls) == 2:
                logits[1, 2] += 0.003
            return logits, probabilities

        return export_formats.Exported(found.files, run_it)

    monkeypatch.setitem(export._WRITERS, "safetensors", off)
    options = ("export", run, "--to", "safetensors", "--images", "5", "--quiet")
    test_keys = [line.partition(",")[0] for line in (chain.manifest / "test.csv").read_text().splitlines()[1:]]
    picked = [test_keys[i] for i in np.linspace(0, len(test_keys) - 1, 5).astype(int)]
    refused = invoke(*options)
    assert refused.code == 6 and refused.out == "" and refused.err.count("\n") == 1
    assert f"differ by 3.00e-03 from the run's at {picked[2]}, class emu" in refused.err
    assert not (run / "export").exists()
    told = json.loads(invoke(*options, "--tolerance", "0.01", "--json").out)
    assert told["difference"] == pytest.approx(0.003, abs=1e-5) and told["largest_at"] == {"image": picked[2], "class": "emu"}
    assert (told["images"], told["images_from"], told["tolerance"]) == (5, "test split", 0.01)
    assert Path(told["export"]) == run / "export" / "safetensors" and Path(told["export"]).is_dir()
    assert told["bytes"] == sum(p.stat().st_size for p in Path(told["export"]).iterdir())


@pytest.mark.parametrize("fault", [
    lambda logits: logits.flip(1), lambda logits: logits * float("nan"), lambda logits: logits * 1.001 + 0.01,
], ids=["classes in another order", "not numbers", "off a little everywhere"])  # fmt: skip
def test_a_model_that_answers_otherwise_is_never_written(chain, tmp_path, monkeypatch, fault):
    run, real = made(chain, tmp_path / "r"), export_formats.Deployable.forward

    def broken(self, images):
        logits = fault(real(self, images)[0])
        return logits, logits.softmax(1)

    monkeypatch.setattr(export_formats.Deployable, "forward", broken)
    refused = invoke("export", run, "--to", "safetensors", "--quiet")
    assert refused.code == 6 and "nothing is written" in refused.err and not (run / "export").exists()


def test_probabilities_are_checked_too(chain, tmp_path, monkeypatch):
    run, real = made(chain, tmp_path / "r"), export_formats.Deployable.forward
    monkeypatch.setattr(export_formats.Deployable, "forward", lambda self, images: (real(self, images)[0],) * 2)
    refused = invoke("export", run, "--to", "safetensors", "--quiet")
    assert refused.code == 6 and "the exported model's probabilities differ by" in refused.err and not (run / "export").exists()


def test_where_the_data_is_gone_noise_is_taken_and_that_is_said(chain, tmp_path):
    run = made(chain, tmp_path / "r", manifest=str(tmp_path / "gone"))
    done = invoke("export", run, "--to", "safetensors", "--images", "3", "--json")
    assert done.code == 0 and "no real images to check on" in done.err and "weaker check" in done.err
    told = json.loads(done.out)
    assert told["images_from"] == "synthetic" and told["largest_at"]["image"].startswith("noise-")
    named = invoke("export", run, "--to", "safetensors", "--data", tmp_path / "gone", "--out", tmp_path / "x")
    assert named.code == 3 and not (tmp_path / "x").exists()  # data that was asked for is not passed over
    given = invoke("export", run, "--to", "safetensors", "--data", chain.manifest, "--out", tmp_path / "y", "--json")
    told = json.loads(given.out)
    assert told["images_from"] == "test split" and told["images"] == 12  # all there are


def test_what_must_not_be_replaced_is_left_alone(chain, tmp_path):
    run = made(chain, tmp_path / "r")
    weights = (run / "model.safetensors").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    bare = made(chain, tmp_path / "bare")  # nothing but the weights, by the name that an export has too
    plain = ("export", run, "--quiet", "--images", "2", "--to", "safetensors")
    itself = ("export", bare, *plain[2:], "--overwrite", "--out", bare)
    assert invoke(*plain).code == 0
    for arguments, said in [
        (plain, "is there already"), ((*plain, "--overwrite", "--out", other), "is left alone"),
        ((*plain, "--overwrite", "--out", run), "is left alone"), (itself, "is left alone"),
        ((*plain, "--out", "/proc/x/y"), "cannot write"),
        ((*plain[:-1], "torch", "--out", tmp_path / "m.onnx"), "say --out"),
        ((*plain[:-1], "onxx"), "to: "), ((*plain, "--images", "0"), "images: "),
    ]:  # fmt: skip
        refused = invoke(*arguments)
        assert refused.code == 2 and said in refused.err and refused.out == "", (arguments, refused)
    assert (run / "model.safetensors").read_bytes() == weights and (other / "notes.txt").read_text() == "mine"
    assert written(invoke(*plain, "--overwrite")) == run / "export" / "safetensors"
    assert not [p for p in (run / "export").iterdir() if p.name != "safetensors"]


def test_a_run_without_a_classifier_and_a_missing_package_are_one_line_each(chain, tmp_path, monkeypatch):
    run = made(chain, tmp_path / "r", head="linear")
    header = read_header(run / "model.safetensors").model_copy(update={"head": "untrained"})
    (tmp_path / "u").mkdir()
    save_model(tmp_path / "u" / "model.safetensors", load_model(run / "model.safetensors")[0], header)
    frozen = invoke("export", tmp_path / "u", "--to", "torch")
    assert frozen.code == 4 and "no trained classifier" in frozen.err
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    missing = invoke("export", run)
    assert missing.code == 2 and "needs onnxscript" in missing.err and "pip install 'balms[onnx]'" in missing.err
    assert missing.err.count("\n") == 1 and not (run / "export").exists()


@pytest.mark.parametrize("change", [
    {"classes": ["a"] * 4}, {"feature_dim": 10**9}, {"image_size": 10**6}, {"backbone": "os.system"}, {"mean": 3},
    {"format": "balms-export 2"}, {"head": "cosine"}, "not json",
], ids=["classes", "features", "size", "backbone", "mean", "format", "head", "text"])  # fmt: skip
def test_a_strangers_sidecar_builds_nothing_that_its_weights_do_not_bear_out(chain, tmp_path, change):
    run = made(chain, tmp_path / "r")
    folder = written(invoke("export", run, "--to", "safetensors", "--images", "2", "--quiet"))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(change if isinstance(change, str) else json.dumps(told | change))
    with pytest.raises((CheckpointError, ConfigError), match=r"not a model|is unknown"):
        rebuild(folder)


@pytest.mark.slow
@pytest.mark.parametrize("backbone, size", [("resnet18", 64), ("mobilenet_v3_small", 64), ("vit_b_16", 32), ("resnet32", 32)])
def test_real_networks_and_nothing_but_the_result_on_the_streams(chain, tmp_path, backbone, size):
    need_onnx()
    run = made(chain, tmp_path / "r", backbone, size)
    for to in ("onnx", "torch", "safetensors"):
        done = subprocess.run([sys.executable, "-m", "balms_cli", "export", run, "--to", to, "--quiet", "--images", "9"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert re.fullmatch(rf"{re.escape(str(run))}/export/\S+\n", done.stdout)
