"""The compared methods as users run them: which head, loss and prior come out, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balms_cli.config import resolve
from balms_cli.data.manifest import Manifest
from balms_cli.data.samplers import ClassIndex
from balms_cli.engine.checkpoint import load_model
from balms_cli.engine.header import read_header
from balms_cli.stages import training_free
from balms_cli.stages.common import load_images
from balms_cli.stages.features import Features

from .conftest import SMALL, draw_photos, invoke
from .test_stages import FEW, log_share, run

COUNTS = [32, 12, 5]


def metrics(*arguments) -> dict:
    done = invoke("evaluate", *arguments, "--json", "--quiet")
    assert done.code == 0, done.err
    return json.loads(done.out)


def head_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith("head.")}


@pytest.fixture(scope="module")
def with_val(tmp_path_factory):
    """A draw that leaves validation images out, and a run on it."""
    root = tmp_path_factory.mktemp("val")
    photos = draw_photos(root / "photos", {"cat": 40, "dog": 30, "emu": 30})
    workspace = ["--workspace", root / "ws"]
    data = run("make-lt", photos, "--imbalance", "4", "--val-per-class", "6", "--meta-per-class", "3", *workspace)
    return run("pretrain", data, *SMALL, *workspace)


# Losses, end to end


@pytest.mark.parametrize("options, head, exact, prior", [
    (["--loss", "focal"], "linear", False, COUNTS), (["--loss", "equalization"], "linear", False, COUNTS),
    (["--loss", "ldam"], "cosine", False, COUNTS), (["--loss", "cost-sensitive"], "linear", True, [1, 1, 1]),
    (["--loss", "cost-sensitive", "--loss-exponent", "0.5"], "linear", True, [n**0.5 for n in COUNTS]),
    (["--loss", "class-balanced", "--set", "cb_beta=0.9"], "linear", True, [n / (1 - 0.9**n) for n in COUNTS]),
    (["--loss", "logit-adjusted"], "linear", True, [1, 1, 1]),
    (["--loss", "softmax", "--drw", "--set", "cb_beta=0"], "linear", True, COUNTS),
    (["--loss", "softmax", "--classifier", "cosine"], "cosine", True, COUNTS),
])  # fmt: skip
def test_every_loss_trains_a_network_and_states_its_prior(chain, tmp_path, options, head, exact, prior):
    folder = run("pretrain", chain.manifest, *SMALL, *options, "--out", tmp_path / "r")
    header = read_header(folder / "model.safetensors")
    assert (header.head, header.prior_exact) == (head, exact)
    assert header.implied_log_prior == pytest.approx(log_share(prior), abs=1e-6)
    assert metrics(folder)["top1"] > 0 and (load_file(folder / "model.safetensors").get("head.scale") is None) == (
        head == "linear"
    )


def test_the_sigmoid_form_starts_from_the_prior_bias_which_does_not_decay(chain, tmp_path):
    frozen = ["--lr", "1e-9", "--set", "weight_decay=1e6", "--set", "warmup_steps=0", "--steps", "3"]
    folder = run("pretrain", chain.manifest, *SMALL, *frozen, "--loss", "class-balanced-sigmoid", "--out", tmp_path / "r")
    bias = head_of(folder)["head.bias"]
    assert bias.tolist() == pytest.approx([-torch.tensor(2.0).log().item()] * 3, abs=1e-5)


def test_deferred_weights_change_nothing_before_their_time_and_something_after(chain, tmp_path):
    plain = run("pretrain", chain.manifest, *SMALL, "--out", tmp_path / "a")
    never = run("pretrain", chain.manifest, *SMALL, "--drw", "--set", "drw_start=1", "--out", tmp_path / "b")
    late = run("pretrain", chain.manifest, *SMALL, "--drw", "--out", tmp_path / "c")
    assert torch.equal(head_of(plain)["head.weight"], head_of(never)["head.weight"])
    assert not torch.equal(head_of(plain)["head.weight"], head_of(late)["head.weight"])
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (plain, late)]
    assert losses[0][:9] == losses[1][:9] and losses[0][10:] != losses[1][10:]  # 0.8 of 12 steps


@pytest.mark.parametrize("options", [["--loss", "equalization"], ["--reweight", "meta-weight-net"], ["--reweight", "l2rw"],
                                     ["--loss", "ldam", "--drw"]])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(chain, tmp_path, options, monkeypatch):
    """Draws of the loss, weights of the weight net and its optimizer included."""
    from balms_cli.engine import loop

    options = [*options, "--set", "meta_batch_size=8"]
    whole = run("pretrain", chain.manifest, *SMALL, *options, "--out", tmp_path / "whole")
    stop, train = {"after": 5}, loop._save

    def save_and_stop(job, run, step, *rest):
        train(job, run, step, *rest)
        if step == stop["after"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_and_stop)
    cut = invoke(
        "pretrain", chain.manifest, *SMALL, *options, "--set", "checkpoint_seconds=1e-9", "--out", tmp_path / "cut", "-q"
    )
    assert cut.code == 130
    stop["after"] = None
    run("pretrain", "--resume", tmp_path / "cut")
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("cut", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and whole.is_dir()


# Re-weighting end to end


@pytest.mark.parametrize("method", ["l2rw", "meta-weight-net"])
def test_reweighting_trains_and_names_its_meta_set(with_val, tmp_path, method):
    manifest = read_header(with_val / "model.safetensors").manifest
    sets = ["--set", "meta_batch_size=6", "--out"]
    for meta_set in ("train", "meta"):
        folder = run("pretrain", manifest, *SMALL, "--reweight", method, "--meta-set", meta_set, *sets, tmp_path / meta_set)
        report = json.loads((folder / "report.json").read_text())
        assert (report["reweight"], report["meta_set"]) == (method, meta_set)
        header = read_header(folder / "model.safetensors")
        assert header.sampler == f"instance + {method}" and not header.prior_exact
    heads = [head_of(tmp_path / s)["head.weight"] for s in ("train", "meta")]
    assert not torch.equal(*heads)


def test_both_ways_to_look_ahead_train_the_same_network(chain, tmp_path):
    """Through BatchNorm in train mode; float32, so nearly."""
    heads = []
    for route in ("jvp", "higher"):
        folder = run("pretrain", chain.manifest, *SMALL, "--reweight", "l2rw", "--set", "meta_batch_size=8", "--steps", "3",
                     "--precision", "fp32", "--set", f"hypergradient={route}", "--out", tmp_path / route)  # fmt: skip
        heads.append(head_of(folder)["head.weight"])
    assert torch.allclose(*heads, atol=1e-4)


def test_the_held_out_meta_set_must_be_there(chain, tmp_path):
    done = invoke("pretrain", chain.manifest, *SMALL, "--reweight", "l2rw", "--meta-set", "meta", "--out", tmp_path / "r")
    assert done.code == 2 and "--meta-per-class" in done.err and not (tmp_path / "r").exists()


# Classifiers of stage 2


def test_tau_zero_is_stage_1_exactly(chain, tmp_path):
    folder = run("retrain", chain.pretrained, "--classifier", "tau-norm", "--tau-norm", "0", "--out", tmp_path / "r")
    assert all(torch.equal(tensor, head_of(chain.pretrained)[name]) for name, tensor in head_of(folder).items())
    header = read_header(folder / "model.safetensors")
    assert header.classifier == "tau-norm" and header.prior_exact
    assert header.implied_log_prior == read_header(chain.pretrained / "model.safetensors").implied_log_prior


@pytest.mark.parametrize("options", [["tau-norm", "--tau-norm", "0"], ["lws", "--steps", "2", "--lr", "1e-12"]])
def test_stage_1s_classifier_keeps_its_names_on_data_with_another_order_of_classes(chain, tmp_path, options):
    """The head of that data is the tail of the checkpoint's own. Nothing is learned, so nothing may change."""
    photos = draw_photos(tmp_path / "photos", {"cat": 5, "dog": 12, "emu": 30})
    data = run("make-lt", photos, "--as-is", "--out", tmp_path / "data")
    folder = run("retrain", chain.pretrained, "--data", data, "--classifier", *options, "--out", tmp_path / "r")
    header, before = read_header(folder / "model.safetensors"), read_header(chain.pretrained / "model.safetensors")
    assert header.classes == ["emu", "dog", "cat"] == before.classes[::-1] and header.class_counts == [24, 10, 4]
    for name, tensor in head_of(chain.pretrained).items():
        assert torch.allclose(head_of(folder)[name], tensor.flip(0), rtol=1e-5)
    if options[0] == "tau-norm":
        assert header.implied_log_prior == before.implied_log_prior[::-1]
    ours, theirs = (found["per_class"] for found in (metrics(folder), metrics(chain.pretrained, "--data", data)))
    assert [(c["name"], c["accuracy"]) for c in ours] == [(c["name"], c["accuracy"]) for c in theirs]


def test_lws_moves_rows_along_themselves_with_class_balanced_batches(chain, tmp_path):
    folder = run("retrain", chain.pretrained, *FEW, "--classifier", "lws", "--out", tmp_path / "r")
    header, before, after = read_header(folder / "model.safetensors"), head_of(chain.pretrained), head_of(folder)
    assert (header.classifier, header.head, header.loss, header.sampler) == ("lws", "linear", "softmax", "class")
    ratio = after["head.weight"] / before["head.weight"]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3) and (ratio[:, 0] - 1).abs().max() > 1e-3
    assert torch.allclose(after["head.bias"] / before["head.bias"], ratio[:, 0], rtol=1e-3)
    source = (folder / "config.toml").read_text()
    assert 'sampler = "method lws' in source


def test_lws_can_be_learned_by_the_meta_sampler_too(chain, tmp_path):
    folder = run("retrain", chain.pretrained, *FEW, "--classifier", "lws", "--loss", "balanced", "--meta-sampler", "--out",
                 tmp_path / "r")  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert report["hypergradient"] == "jvp" and read_header(folder / "model.safetensors").sampler == "meta (class)"


def test_ncm_is_the_cosine_of_class_means_of_plain_training_images(chain, tmp_path):
    folder = run("retrain", chain.pretrained, "--classifier", "ncm", "--out", tmp_path / "r")
    model, header = load_model(folder / "model.safetensors")
    images = load_images(Manifest.load(chain.manifest), "train", 16, torch.device("cpu"), None)
    mean, std = (torch.tensor(v)[:, None, None] for v in (header.mean, header.std))
    with torch.no_grad():
        features = model.backbone((images.pixels / 255 - mean) / std)
    for c in range(3):
        assert torch.allclose(model.head.weight[c], features[images.labels == c].mean(0), atol=0.05)  # bf16 backbone
    assert (header.classifier, header.head, header.sampler) == ("ncm", "cosine", "none")
    assert metrics(folder)["top1"] > 0.5


def test_parts_make_the_same_class_means_as_the_whole(monkeypatch):
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    data = Features(lambda images, step, stream: features[images], labels, ClassIndex(labels, 3))
    monkeypatch.setattr(training_free, "_PART", 3)
    head = training_free.class_means(resolve("retrain", flags={"classifier": "ncm"}).config, data, 3)
    for c in range(3):
        assert torch.allclose(head.weight[c], features[labels == c].mean(0))


def test_a_class_without_validation_images_has_no_say_in_tau():
    logits = torch.eye(3)[[0, 0, 1, 0]]
    assert training_free._class_mean_accuracy(logits, torch.tensor([0, 0, 1, 1])) == 0.75


def test_tau_above_zero_leaves_no_exact_prior(chain, tmp_path):
    folder = run("retrain", chain.pretrained, "--classifier", "tau-norm", "--tau-norm", "0.5", "--out", tmp_path / "r")
    assert not read_header(folder / "model.safetensors").prior_exact


def test_tau_is_chosen_on_validation_images_alone(with_val, tmp_path, monkeypatch):
    from balms_cli.stages import features

    read, splits = features.load_images, []
    monkeypatch.setattr(
        features, "load_images", lambda manifest, split, *a, **k: (splits.append(split), read(manifest, split, *a, **k))[1]
    )
    folder = run("retrain", with_val, "--classifier", "tau-norm", "--out", tmp_path / "r")
    report = json.loads((folder / "report.json").read_text())
    assert splits == ["val"] and "val of" in report["tau_chosen_on"]
    curve = {float(t): a for t, a in report["tau_curve"].items()}
    assert len(curve) == 21 and report["tau_norm"] == min(t for t, a in curve.items() if a == max(curve.values()))
    again = run("retrain", with_val, "--classifier", "tau-norm", "--tau-norm", report["tau_norm"], "--out", tmp_path / "again")
    assert metrics(folder, "--split", "val")["balanced_accuracy"] == pytest.approx(max(curve.values()), abs=1e-4)
    assert all(torch.equal(tensor, head_of(again)[name]) for name, tensor in head_of(folder).items())


@pytest.mark.parametrize("options, code, told", [
    (["--classifier", "tau-norm"], 2, "--val-per-class"), (["--meta-sampler", "--meta-set", "meta"], 2, "--meta-per-class"),
    (["--tau-norm", "0.5"], 2, "--classifier tau-norm"),
    (["--classifier", "ncm", "--meta-sampler"], 2, "trains nothing"),
    (["--classifier", "cosine", "--meta-sampler", "--hypergradient", "closed-form"], 2, "leave out --hypergradient"),
    (["--loss", "ldam", "--classifier", "linear"], 2, "cosines"),
    (["--classifier", "nmc"], 2, "ncm"), (["--loss", "ldm"], 2, "ldam"),
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_does_not_go_together_is_told_in_a_line(chain, tmp_path, options, code, told, more):
    done = invoke("retrain", chain.pretrained, *options, *more, "--out", tmp_path / "r")
    assert done.code == code and told in done.err.strip().splitlines()[-1] and not (tmp_path / "r").exists()


@pytest.mark.parametrize("method", ["lws", "tau-norm"])
def test_a_method_of_stage_1_weights_refuses_others(chain, tmp_path, method):
    frozen = run("pretrain", chain.manifest, *SMALL, "--frozen", "--out", tmp_path / "frozen")
    cosine = run("pretrain", chain.manifest, *SMALL, "--classifier", "cosine", "--out", tmp_path / "cosine")
    extra = ["--tau-norm", "1"] if method == "tau-norm" else []
    for parent in (frozen, cosine):
        done = invoke("retrain", parent, "--classifier", method, *extra, "--out", tmp_path / "r")
        assert done.code == 4 and "starts from the linear classifier of stage 1" in done.err and not (tmp_path / "r").exists()


def test_a_cosine_classifier_of_stage_2_is_read_back(chain, tmp_path):
    folder = run(
        "retrain", chain.pretrained, *FEW, "--classifier", "cosine", "--set", "cosine_scale=12", "--out", tmp_path / "r"
    )
    assert head_of(folder)["head.scale"].item() == 12 and "head.bias" not in head_of(folder)
    assert metrics(folder)["classifier"] == "cosine"


# Scores for another prior


def logits_of(folder: Path, chain) -> tuple[torch.Tensor, torch.Tensor]:
    model, header = load_model(folder / "model.safetensors")
    images = load_images(Manifest.load(chain.manifest), "test", 16, torch.device("cpu"), None)
    mean, std = (torch.tensor(v)[:, None, None] for v in (header.mean, header.std))
    with torch.no_grad():
        return model((images.pixels / 255 - mean) / std), images.labels


@pytest.mark.parametrize("options, shift", [
    (["--posthoc-tau", "1"], lambda n: -n.log()), (["--posthoc-tau", "3"], lambda n: -3 * n.log()),
    (["--target-prior", "uniform"], lambda n: -n.log()), (["--target-prior", "train"], lambda n: 0 * n),
    (["--target-prior", "reversed"], lambda n: n.flip(0).log() - n.log()), (["--posthoc-tau", "0"], lambda n: 0 * n),
])  # fmt: skip
def test_rescoring_is_adding_the_log_ratio_of_priors(chain, options, shift):
    """A softmax network, so the implied prior is that of the counts; they fall in class order here."""
    logits_NC, labels_N = logits_of(chain.pretrained, chain)
    want_N = (logits_NC + shift(torch.tensor(COUNTS).double())).argmax(1)
    found = metrics(chain.pretrained, *options, "--precision", "fp32")
    assert found["top1"] == pytest.approx((want_N == labels_N).double().mean().item())
    assert found["prior_exact"] is True and found["target_prior"] == (options[1] if options[1].isalpha() else "uniform")


def test_a_prior_of_ones_own_comes_from_a_file(chain, tmp_path):
    (tmp_path / "p.json").write_text('{"cat": 1e-30, "dog": 1e-30, "emu": 1}')
    found = metrics(chain.pretrained, "--target-prior", tmp_path / "p.json")
    assert [c["accuracy"] for c in found["per_class"]] == [0, 0, 1]


@pytest.mark.parametrize("text, told", [
    ('{"cat": 1, "dog": 1}', "no share for emu"), ('{"cat": 1, "dog": 1, "emu": 0}', "above zero"), ("[1, 2", "p.json"),
    ('["cat", "dog", "emu"]', "no JSON object"), ("3", "no JSON object"), ("[" * 100_000, "p.json"),
    ('{"cat": 1, "dog": 1, "emu": 1%s}' % ("0" * 400), "p.json"), ('{"cat": 1, "dog": 1, "emu": NaN}', "above zero"),
    ('{"cat": 1, "dog": 1, "emu": 1, "yak": 1}', "yak"), ('{"cat": "x", "dog": 1, "emu": 1}', "p.json"),
])  # fmt: skip
def test_a_bad_prior_is_refused_in_a_line(chain, tmp_path, text, told):
    (tmp_path / "p.json").write_text(text)
    done = invoke("evaluate", chain.pretrained, "--target-prior", tmp_path / "p.json")
    assert done.code == 2 and told in done.err and done.out == ""
    assert invoke("evaluate", chain.pretrained, "--target-prior", "unifrom").code == 2


def test_an_inexact_prior_is_told(chain, tmp_path):
    folder = run("pretrain", chain.manifest, *SMALL, "--loss", "focal", "--out", tmp_path / "r")
    done = invoke("evaluate", folder, "--posthoc-tau", "1", "--json")
    assert done.code == 0 and "no exact prior" in done.err and json.loads(done.out)["prior_exact"] is False


# The bound's terms


def test_the_terms_of_the_bound_are_those_of_plain_training_images(chain):
    found = metrics(chain.pretrained, "--bound", "--precision", "fp32")["bound"]
    model, header = load_model(chain.pretrained / "model.safetensors")
    images = load_images(Manifest.load(chain.manifest), "train", 16, torch.device("cpu"), None)
    mean, std = (torch.tensor(v)[:, None, None] for v in (header.mean, header.std))
    with torch.no_grad():
        losses_N = torch.nn.functional.cross_entropy(model((images.pixels / 255 - mean) / std), images.labels, reduction="none")
    for c, row in enumerate(found["per_class"]):
        mine = losses_N[images.labels == c]
        assert row["error"] == pytest.approx((mine > 0.6931).double().mean().item()) and row["images"] == COUNTS[c]
    shown = invoke("evaluate", chain.pretrained, "--bound")
    assert "gamma" in shown.err and "sqrt(C(F))" in shown.err


# The tables


def test_the_script_of_the_tables_resumes_shares_backbones_and_reports_what_varied(tmp_path, monkeypatch):
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import tables
    from typer.testing import CliRunner

    trained = []
    monkeypatch.setattr(tables.pretrain, "run", lambda *a, _run=tables.pretrain.run, **k: (trained.append(1), _run(*a, **k))[1])
    options = ["--data", "digits", "--imbalance", "20", "--seeds", "0,1", "--workspace", str(tmp_path / "ws"), "--out",
               str(tmp_path / "out")]  # fmt: skip
    steps = ["--set", "steps=6", "-q", "--rows", "softmax,crt,ncm,posthoc"]
    done = CliRunner().invoke(tables.app, ["run", *options, *steps])
    assert done.exit_code == 0, done.output
    result = json.loads(Path(done.stdout.strip()).read_text())
    assert len(trained) == 1 and list(result["rows"]) == ["softmax", "posthoc", "ncm", "crt"]
    crt = result["rows"]["crt"]
    assert (
        crt["varied"] == "2 classifier seeds on 1 backbone"
        and len(crt["top1"]) == 2
        and len(result["rows"]["ncm"]["top1"]) == 1
    )
    kept = [json.loads(f.read_text())["top1"] for f in sorted((tmp_path / "ws" / "rows").glob("*/crt-*.json"))]
    mean = sum(kept) / 2
    assert crt["top1"] == [pytest.approx(mean, abs=1e-4), pytest.approx(abs(kept[0] - kept[1]) / 2, abs=1e-4)]
    monkeypatch.setattr(tables, "run_row", lambda *a: pytest.fail("done already"))
    assert CliRunner().invoke(tables.app, ["run", *options, *steps]).exit_code == 0
    other = CliRunner().invoke(tables.app, ["run", *options, "-q", "--rows", "ncm"])
    assert other.exit_code == 2 and "other --set values" in " ".join(other.output.replace("│", " ").split())
    text = (tmp_path / "out" / "tables_digits_if20_quick.md").read_text()
    assert "| cRT (linear, CBS) |" in text and "2 classifier seeds" in text


def test_the_papers_figures_belong_to_rows_of_the_tables():
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import table_report
    import tables

    paper = json.loads(table_report.PAPER.read_text())
    for table, rows in paper["tables"].items():
        known = {r.name for r in tables.ROWS if table in ("reported", *r.tables)}
        assert set(rows) <= known and table in paper["sources"]
        if table != "reported":
            ours = {"cbs", "crt"} if table == "ablation" else tables_without_figures
            assert set(rows) >= {r.name for r in tables.ROWS if table in r.tables} - ours
    assert (
        paper["tables"]["table2"]["balms"]["cifar10/200"] == [81.5, 0.0] == paper["tables"]["ablation"]["balms"]["cifar10/200"]
    )


# Rows of ours in Table 2 that the paper does not have.
tables_without_figures = {"class-balanced-sigmoid", "class-balanced-focal", "ldam-drw", "l2rw", "meta-weight-net", "posthoc",
                          "logit-adjusted", "ncm", "tau-norm", "cosine"}  # fmt: skip
