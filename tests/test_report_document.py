"""The report's document: each number against an independent way to it, comparisons of runs, and files of strangers."""

import csv
import io
import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import linregress, spearmanr

from balms_cli.engine.header import sha256_of
from balms_cli.metrics import SCALARS, Scores
from balms_cli.report import compare, run_files
from balms_cli.report.compare import difference, differences, same_images, seeds
from balms_cli.report.document import build, plain, unique_names
from balms_cli.report.html import points
from balms_cli.report.text import escape, markdown, percent
from balms_cli.report.write import csv_files, json_text

from .report_helpers import long_tail, make_header, make_manifest, make_scored, noisy_logits

COUNTS = [300, 150, 60, 30, 12, 6, 3]
K = len(COUNTS)


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, K, 300)


@pytest.fixture
def manifest(labels):
    return make_manifest(COUNTS, labels)


@pytest.fixture
def runs(manifest, labels):
    """A weak run and a stronger one on the same images; the weak one never says the rarest class."""
    rng = np.random.default_rng(1)
    weak = noisy_logits(rng, labels, K)
    weak[:, -1] = -50
    return [
        make_scored(manifest, weak, run="/runs/weak"),
        make_scored(manifest, noisy_logits(rng, labels, K, 4.0), run="/runs/strong"),
    ]


def test_the_keys_that_readers_build_on(runs):
    """Additions are welcome: extend the sets. A key that goes breaks the page and the scripts of others."""
    document = build(runs)
    assert set(document) == {
        "format", "version", "created", "split", "images", "device", "versions", "target_prior", "intervals", "data", "runs",
        "differences", "seeds"}  # fmt: skip
    assert set(document["data"]) == {
        "name", "source", "manifest_sha256", "profile", "seed", "classes", "train_counts", "test_counts", "group_of",
        "train_images", "imbalance_factor", "gini", "head_share", "groups", "splits", "untested"}  # fmt: skip
    assert set(document["runs"][0]) == {
        "name", "run", "stage", "classifier", "loss", "sampler", "seed", "prior_exact", "images", "same_data", "same_images",
        "train_counts", "test_counts", "group_of", "metrics", "per_class", "never_predicted", "trend", "marginal", "confusion",
        "calibration", "rates", "curves", "parent_curves", "recipe", "provenance"}  # fmt: skip
    assert set(document["runs"][0]["per_class"]) == {"accuracy", "low", "high", "predicted", "mean_score"}
    assert set(document["runs"][0]["metrics"]) == set(SCALARS)
    assert (document["format"], document["version"]) == ("balms report", 1)
    assert json.loads(json_text(document)) == document


def test_the_numbers_of_a_run(runs, labels):
    document = build(runs)
    run, one = document["runs"][0], runs[0]
    predicted = one.scores.predicted_N
    accuracy = [(predicted[labels == c] == c).mean() for c in range(K)]
    assert run["per_class"]["accuracy"] == pytest.approx(accuracy, rel=1e-5)
    assert run["per_class"]["predicted"] == [int((predicted == c).sum()) for c in range(K)]
    assert run["never_predicted"] == 1 and run["per_class"]["predicted"][-1] == 0 and run["per_class"]["accuracy"][-1] == 0
    assert sum(run["per_class"]["mean_score"]) == pytest.approx(1, abs=1e-5)
    assert run["metrics"]["top1"]["value"] == pytest.approx((predicted == labels).mean(), rel=1e-5)
    assert run["metrics"]["few"]["value"] == pytest.approx(np.mean(accuracy[4:]), rel=1e-5)
    line = linregress(np.log10(COUNTS), accuracy)
    assert (run["trend"]["slope"], run["trend"]["intercept"]) == pytest.approx((line.slope, line.intercept), rel=1e-5)
    assert run["trend"]["spearman"] == pytest.approx(spearmanr(COUNTS, accuracy).statistic, rel=1e-5)
    few = labels >= 4
    sure, right = one.scores.confidence_N[few], (predicted == labels)[few]
    bins = [np.ceil(sure * 15).astype(int) == b for b in range(1, 16)]
    ece = sum(abs(right[b].sum() - sure[b].sum()) for b in bins) / few.sum()
    assert run["calibration"]["few"]["ece"] == pytest.approx(ece, rel=1e-5) and run["calibration"]["few"]["n"] == few.sum()
    for pair in run["confusion"]["pairs"]:
        shown = [e["score"] for e in pair["examples"]]
        of = (labels == pair["true"]) & (predicted == pair["predicted"])
        assert shown == pytest.approx(np.sort(one.scores.confidence_N[of])[::-1][:3], rel=1e-5)
        assert all(of[one.keys.index(e["key"])] for e in pair["examples"])
    assert document["data"]["groups"]["few"] == {"classes": 3, "train_images": 21, "test_images": int(few.sum())}
    assert document["data"]["test_counts"] == np.bincount(labels).tolist()
    assert document["data"]["imbalance_factor"] == 100 and document["data"]["train_images"] == sum(COUNTS)


def test_the_same_runs_give_the_same_document(runs):
    first, again = build(runs), build(runs)
    assert first | {"created": ""} == again | {"created": ""}


# Differences


def test_differences_by_hand(runs, labels):
    (found,) = build(runs)["differences"]
    right = [one.scores.predicted_N == labels for one in runs]
    assert (found["run"], found["against"]) == ("strong", "weak")
    per_class = [[r[labels == c].mean() for c in range(K)] for r in right]
    top1 = found["metrics"]["top1"]
    assert top1["value"] == pytest.approx(right[1].mean() - right[0].mean(), rel=1e-4)
    assert found["metrics"]["few"]["value"] == pytest.approx(np.mean(per_class[1][4:]) - np.mean(per_class[0][4:]), rel=1e-4)
    paired_error = np.std(right[1].astype(float) - right[0]) / 300**0.5
    assert (top1["high"] - top1["low"]) / 2 == pytest.approx(1.96 * paired_error, rel=0.15)
    assert top1["real"] is True
    (back,) = build(runs[::-1])["differences"]
    assert back["metrics"]["top1"]["value"] == -top1["value"] and back["metrics"]["top1"]["real"] is True
    itself = difference(runs[0], runs[0])
    assert itself["top1"][0] == 0 and itself["top1"][1] < 0 < itself["top1"][2]


def test_images_are_matched_by_key_and_classes_by_name(manifest, labels, runs):
    """The same images in another order, in a manifest whose classes stand in another order."""
    rng = np.random.default_rng(5)
    rows = rng.permutation(300)
    other = make_manifest(COUNTS, labels[rows], keys=[manifest.splits["test"].keys[r] for r in rows], sha256="c" * 64)
    logits = noisy_logits(np.random.default_rng(9), labels, K)
    straight, shuffled = make_scored(manifest, logits), make_scored(other, logits[rows])
    assert same_images(runs[0], shuffled).tolist() == np.argsort(rows).tolist()
    assert difference(runs[0], shuffled) == difference(runs[0], straight)


def test_runs_on_other_images_are_not_compared(manifest, labels, runs):
    logits = noisy_logits(np.random.default_rng(9), labels, K)
    elsewhere = make_scored(make_manifest(COUNTS, labels, root="/other", sha256="d" * 64), logits)
    fewer = make_scored(make_manifest(COUNTS, labels[:200], sha256="e" * 64), logits[:200])
    relabelled = make_scored(make_manifest(COUNTS, (labels + 1) % K, sha256="f" * 64), logits)
    for other in (elsewhere, fewer, relabelled):
        assert same_images(runs[0], other) is None and difference(runs[0], other) is None
    document = build([runs[0], elsewhere])
    assert document["differences"] == [] and document["runs"][1]["same_images"] is False
    assert "other images" in markdown(document)


def test_a_group_that_holds_other_classes_in_the_two_is_not_compared(manifest, labels, runs):
    """The second checkpoint saw more images of the rare classes: its few-shot classes are others."""
    header = make_header(manifest, counts=[300, 150, 60, 30, 40, 6, 3])
    other = make_scored(manifest, noisy_logits(np.random.default_rng(9), labels, K), header=header)
    found = difference(runs[0], other)
    assert found["few"] is None and found["medium"] is None and found["top1"] is not None and found["many"] is not None
    run = build([runs[0], other])["runs"][1]
    assert run["train_counts"] == header.class_counts and run["group_of"][4] == "medium" and run["test_counts"] is None


# Seeds


def of_seed(manifest, labels, seed, *, noise=None, **header):
    rng = np.random.default_rng(100 + (seed if noise is None else noise))
    return make_scored(manifest, noisy_logits(rng, labels, K), run=f"/runs/s{seed}",
                       header=make_header(manifest, seed=seed, **header))  # fmt: skip


def test_mean_and_standard_error_over_seeds_by_hand(manifest, labels):
    scored = [of_seed(manifest, labels, s) for s in (0, 1, 2)]
    (found,) = seeds(scored, ["a", "b", "c"])
    values = [one.result["few"] for one in scored]
    assert found["metrics"]["few"] == {"mean": pytest.approx(statistics.mean(values)), "n": 3,
                                       "error": pytest.approx(statistics.stdev(values) / math.sqrt(3))}  # fmt: skip
    assert found["runs"] == ["a", "b", "c"] and found["varied"] == "classifier seeds"
    assert found["label"] == "retrain, linear, balanced"


def test_what_varied_is_named(manifest, labels):
    other = make_manifest(COUNTS, labels, sha256="c" * 64)

    def varied(*scored):
        return [one["varied"] for one in seeds(list(scored), [str(i) for i in range(len(scored))])]

    first = of_seed(manifest, labels, 0, stage="pretrain")
    assert varied(first, of_seed(manifest, labels, 1, stage="pretrain")) == ["backbone seeds"]
    assert varied(first, of_seed(other, labels, 0, stage="pretrain")) == ["data draws"]
    assert varied(first, of_seed(other, labels, 1, stage="pretrain")) == ["data draws and backbone seeds"]


def test_another_draw_s_backbone_is_another_seed_only_where_its_seed_varied(manifest, labels, monkeypatch):
    draws = manifest, make_manifest(COUNTS, labels, sha256="c" * 64)

    def varied(*parent_seeds):
        stage_1 = [make_header(draw, seed=s, stage="pretrain") for draw, s in zip(draws, parent_seeds, strict=True)]
        scored = [of_seed(draw, labels, 0, parent_sha256=x * 64) for draw, x in zip(draws, "de", strict=True)]
        known = dict(zip("de", stage_1, strict=True))
        monkeypatch.setattr(compare, "parent_of", lambda run, header: (run, known[header.parent_sha256[0]]))
        return [one["varied"] for one in seeds(scored, ["a", "b"])]

    assert varied(0, 0) == ["data draws"] and varied(0, 1) == ["data draws and backbone seeds"]


def test_runs_that_are_no_repetition_of_one_another_are_kept_apart(manifest, labels):
    one = of_seed(manifest, labels, 0)
    assert seeds([one, one], ["a", "a (2)"]) == []  # the same run twice is not two seeds
    for other in (
        of_seed(manifest, labels, 1, loss="softmax"),
        of_seed(manifest, labels, 1, recipe={"seed": 1, "lr": 0.2}),
        of_seed(manifest, labels, 1, counts=[300, 150, 60, 30, 12, 6, 4]),
        of_seed(manifest, labels, 1, parent_sha256="e" * 64),  # another backbone, of which nothing is known
    ):
        assert seeds([one, other], ["a", "b"]) == []
    how = of_seed(manifest, labels, 1, recipe={"seed": 1, "lr": 0.1, "device": "cuda", "workers": 3})
    assert len(seeds([one, how], ["a", "b"])) == 1  # how it was computed is no other method


def test_an_empty_group_has_no_mean(labels):
    manifest = make_manifest([300] * K, labels)
    (found,) = seeds([of_seed(manifest, labels, s) for s in (0, 1)], ["a", "b"])
    assert found["metrics"]["few"] is None and found["metrics"]["many"]["n"] == 2


# Sizes and shapes that are not usual


def test_one_class_only():
    manifest = make_manifest([5], np.zeros(3, int))
    document = build([make_scored(manifest, np.ones((3, 1)))])
    run = document["runs"][0]
    assert run["metrics"]["top1"]["value"] == 1 and run["metrics"]["top5"] is None and run["trend"] is None
    assert run["confusion"]["pairs"] == [] and document["data"]["gini"] == 0 and document["data"]["imbalance_factor"] == 1
    assert run["calibration"]["all"]["ece"] == 0 and run["marginal"]["variance"] == 0
    assert "| class 0 | 5 | 3 | 100.0 |" in markdown(document)


def test_classes_without_test_images():
    manifest = make_manifest(COUNTS, np.array([0, 0, 2]))
    document = build([make_scored(manifest, np.eye(K)[[0, 1, 2]])])
    run = document["runs"][0]
    assert run["never_predicted"] == 4  # each of three once
    assert document["data"]["untested"] == 5 and run["per_class"]["accuracy"] == [0.5, None, 1, None, None, None, None]
    assert run["metrics"]["few"] is None and run["calibration"]["few"] is None and run["confusion"]["groups"]["few"] is None
    rows = dict(csv_files(document))
    assert "class 4,few,12,0,,,,0," in rows["classes.csv"]


def test_classes_that_are_all_alike_have_a_trend_of_exactly_nothing():
    labels = np.repeat(np.arange(K), 3)
    logits = np.eye(K)[np.where(np.arange(3 * K) % 3, labels, (labels + 1) % K)]
    run = build([make_scored(make_manifest(COUNTS, labels), logits)])["runs"][0]
    assert run["per_class"]["accuracy"] == [0.666667] * K
    assert run["trend"] == {"slope": 0.0, "intercept": 0.666667, "spearman": None}


def test_ten_thousand_classes_are_quick_and_small():
    rng, k = np.random.default_rng(0), 10_000
    labels = np.repeat(np.arange(k), rng.integers(1, 11, k))
    manifest = make_manifest(long_tail(k), labels)
    scored = []
    for r in range(2):
        predicted = np.where(rng.random(len(labels)) < 0.5, labels, rng.integers(0, k, len(labels)))
        scores = Scores(predicted, rng.random(len(labels)), (predicted != labels) * 4, rng.dirichlet(np.ones(k)))
        scored.append(make_scored(manifest, scores, run=f"/runs/{r}"))
    began = time.monotonic()
    document = build(scored)
    text = json_text(document)
    assert time.monotonic() - began < 20 and len(text.encode()) < 2_000_000
    assert len(markdown(document)) < 30_000


def test_short_names_tell_runs_apart():
    runs = [Path(p) for p in ("/w/a/runs/x", "/w/b/runs/x", "/w/b/runs/y", "/w/b/runs/y")]
    assert unique_names(runs) == ["a/runs/x", "b/runs/x", "y", "y (2)"]
    assert unique_names([Path("/w/x"), Path("/w/x"), Path("/w/x (2)")]) == ["x", "x (3)", "x (2)"]
    assert unique_names([Path("/w/a\nb"), Path("/w/a\\nb")]) == ["a\\nb", "a\\nb (2)"]  # equal once they are shown


# Files and names of strangers


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("content", [
    b"", b"nonsense", b"[]", b"[" * 100_000, b'{"step": 1}', b'{"step": 1e999, "loss": 1, "lr": 1}',
    b'{"step": {}, "loss": 1, "lr": 1}', b'{"step": 1, "loss": NaN, "lr": 1}', b'{"step": 1, "loss": 1, "lr": -1e308}',
    b'{"rates": {"a": 1e308, "b": 1}}', b'{"step": 1, "loss": "x", "lr": 1}', b'{"rates": {"a": NaN, "b": 1}}',
    b'{"rates": {"a": 1}}', b'{"rates": 3}', b"\xff\x00",
])  # fmt: skip
def test_files_that_are_not_what_they_should_be_count_as_not_there(folder, manifest, content):
    header = make_header(manifest)
    for name in ("metrics.jsonl", "rates.json", "config.toml"):
        (folder / name).write_bytes(content)
    assert run_files.curves(folder, "retrain") is None and run_files.learned_rates(folder, header, ["a", "b"]) is None
    assert run_files.recipe(folder, header)["lr"] == {"value": 0.1, "source": None}
    assert run_files.parent_of(folder, header) is None


def test_a_configuration_with_odd_values_still_makes_plain_json(folder, manifest, labels):
    (folder / "config.toml").write_text(
        '[retrain]\nlr = 2020-01-01\nloss = inf\nodd = "a\\nb"\n[source]\nlr = [1]\n'
        '[run]\ncommand = 3\nversions = "x"\nparent = 5\n'
    )
    scored = make_scored(manifest, noisy_logits(np.random.default_rng(0), labels, K), run=str(folder))
    document = build([scored])
    recipe = document["runs"][0]["recipe"]
    assert recipe["lr"] == {"value": "2020-01-01", "source": [1]} and recipe["loss"]["value"] is None
    assert recipe["odd"]["value"] == "a\\nb" and json.loads(json_text(document)) == document
    assert "2020-01-01" in markdown(document)


def test_a_classifier_says_what_it_has_from_stage_1(folder, manifest, labels):
    """Its own recipe has no backbone: the network is the checkpoint's, the weights are known from stage 1's header alone."""
    scored = make_scored(manifest, noisy_logits(np.random.default_rng(0), labels, K), run=str(folder))
    recipe = build([scored])["runs"][0]["recipe"]
    assert recipe["backbone"] == {"value": "resnet32", "source": "stage 1"} and recipe["image_size"]["value"] == 32
    assert "weights" not in recipe and recipe["lr"]["value"] == 0.1
    parent = make_header(manifest, stage="pretrain", recipe={"seed": 0, "weights": "imagenet"})
    assert run_files.taken_over(scored.header, parent)["weights"] == {"value": "imagenet", "source": "stage 1"}
    assert run_files.taken_over(parent, None) == {}


@pytest.mark.parametrize("classifier", ["ncm", "tau-norm"])
def test_a_classifier_made_without_training_shows_no_steps(folder, manifest, classifier):
    values = {"seed": 0, "steps": 2000, "lr": 0.1, "classifier": classifier}
    untrained = make_header(manifest, classifier=classifier, recipe=values)
    assert set(run_files.recipe(folder, untrained)) == {"seed", "classifier"}
    (folder / "config.toml").write_text('[retrain]\nsteps = 2000\nviews = 4\n[source]\nsteps = "preset quick"\n')
    assert set(run_files.recipe(folder, untrained)) == {"views"}
    assert run_files.recipe(folder, make_header(manifest, recipe=values))["steps"]["value"] == 2000


def test_what_lies_between_two_decimals_is_rounded_alike_in_terminal_and_report():
    """A standard error of 0.25 that is a rounding error more in memory than in the document."""
    exact = 0.0025 + 1e-12
    assert percent(exact) == percent(plain(exact)) == "0.2" and points(exact) == points(plain(exact)) == "0.2"


def test_a_parent_is_the_checkpoint_that_it_was(folder, tmp_path, manifest):
    """Found where it was or beside its child, and only with the very bytes that the child started from."""
    parent = tmp_path / "first" / "model.safetensors"
    parent.parent.mkdir()
    text = json.dumps({"__metadata__": make_header(manifest, stage="pretrain").to_metadata()}).encode()
    parent.write_bytes(len(text).to_bytes(8, "little") + text)
    child = make_header(manifest, parent_sha256=sha256_of(parent))
    for place in (parent, Path("/gone/first/model.safetensors")):
        (folder / "config.toml").write_text(f'[run]\nparent = "{place}"\n')
        found, header = run_files.parent_of(folder, child)
        assert (found, header.stage) == (parent.parent, "pretrain")
    parent.write_bytes(parent.read_bytes() + b" ")
    assert run_files.parent_of(folder, child) is None


def test_a_file_that_is_too_large_or_no_file_is_not_read(folder, monkeypatch):
    monkeypatch.setitem(run_files._MAX_BYTES, "metrics.jsonl", 40)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5, "lr": 0.1}\n')
    assert run_files.curves(folder, "retrain") == {"stage": "retrain", "step": [1], "loss": [1.5], "lr": [0.1]}
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5, "lr": 0.1}\n' * 2)
    assert run_files.curves(folder, "retrain") is None
    (folder / "rates.json").mkdir()
    assert run_files.learned_rates(folder, None, ["a"]) is None


def test_a_point_of_a_curve_that_is_no_number_is_left_out(folder):
    (folder / "metrics.jsonl").write_text("\n".join(f'{{"step": {s}, "loss": {x}, "lr": 0.1}}' for s, x in
                                                    ((1, 2.5), (2, "NaN"), (3, "1e999"), (4, 1.5))))  # fmt: skip
    assert run_files.curves(folder, "retrain") == {"stage": "retrain", "step": [1, 4], "loss": [2.5, 1.5], "lr": [0.1, 0.1]}


def test_long_curves_are_thinned_with_the_last_point_kept(folder):
    lines = [json.dumps({"step": s, "loss": 1 / s, "lr": 0.1}) for s in range(1, 2346)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    found = run_files.curves(folder, "pretrain")
    assert len(found["step"]) <= 500 and found["step"][-1] == 2345 and set(np.diff(found["step"])) == {5}
    assert found["loss"] == [1 / s for s in found["step"]]


def test_plain_leaves_nothing_that_json_cannot_hold():
    odd = {"a": np.float32(1 / 3), 2: np.array([np.nan, np.inf, 1]), "b": np.bool_(True), "\n": ["\ud800", (np.int64(3), None)]}
    assert plain(odd) == {"a": 0.333333, "2": [None, None, 1.0], "b": True, "\\n": ["\\ud800", [3, None]]}


HOSTILE = ["<script>alert(1)</script>", "a|b", "*x* _y_ `z` [l](http://e) ![p](q)", "# head", "=1+1", 'q"uote', "Ünï 漢字"]
HOSTILE_TOO = ["@someone #1 GH-1", "https://example.org/a", "www.example.org", "a@example.org", "{{ site.x }}", "\u202eesrever",
               "+cmd|' /C calc'!A0"]  # fmt: skip


def test_names_cannot_break_out_of_the_tables(labels):
    manifest = make_manifest(COUNTS, labels, names=HOSTILE)
    document = build([make_scored(manifest, noisy_logits(np.random.default_rng(0), labels, K), run="/runs/a|b<i>")])
    text = markdown(document)
    for line in text.splitlines():
        bare = line.replace("\\\\", "").replace("\\|", "").replace("\\<", "").replace("\\`", "").replace("\\[", "")
        assert "<" not in bare and "`" not in bare and "[" not in bare
        if line.startswith("| "):
            assert bare.count("|") == bare.rstrip().count(" |") + 1  # every bar is a cell's
    widths = [line.replace("\\|", "").count("|") for line in text.split("## Class by class")[1].split("##")[0].splitlines()
              if line.startswith("|")]  # fmt: skip
    assert len(set(widths)) == 1 and len(widths) == K + 2
    assert escape("a\nb\x1b[1m") == "a\\\\nb\\\\x1b\\[1m" and len(escape("x" * 1000)) < 310


def test_names_are_no_mentions_links_or_templates_in_markdown(labels):
    """Where Markdown has more than CommonMark: a pull request calls people and makes links of addresses by itself."""
    from markdown_it import MarkdownIt

    manifest = make_manifest(COUNTS, labels, names=HOSTILE_TOO)
    text = markdown(build([make_scored(manifest, noisy_logits(np.random.default_rng(0), labels, K))]))
    bare = re.sub(r"\\[^\w\s]", "", text)
    assert not re.search(r"@someone|://|www\.|@example|\{\{|\u202e", bare)
    shown = "".join(token.content for token in MarkdownIt("commonmark").enable("table").parse(text) if token.type == "inline")
    assert all(word in shown.replace("\\", "") for word in ("@someone #1 GH-1", "https://example.org/a", "{{ site.x }}"))


def test_no_cell_of_a_table_is_a_formula(labels):
    names = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "＝1", "-5", "plain =1"]
    document = build([make_scored(make_manifest(COUNTS, labels, names=names),
                                  noisy_logits(np.random.default_rng(0), labels, K), run="/runs/=run")])  # fmt: skip
    rows = [row for _, text in csv_files(document) for row in csv.reader(io.StringIO(text))]
    assert not [cell for row in rows for cell in row if cell[:1] in set("=@＝＋－＠")]
    shown = {row[1] for row in rows}
    assert {"'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'＝1", "-5", "plain =1"} <= shown
    assert document["data"]["classes"] == names


def test_one_is_not_a_plural():
    text = markdown(build([make_scored(make_manifest([1], np.zeros(1, int)), np.zeros((1, 1)))]))
    assert "1 image of 1 class, scored on" in text and "- 1 training image, 1 to 1 a class" in text


def test_the_tables_hold_the_documents_numbers(runs):
    document = build(runs)
    tables = {name: list(csv.DictReader(io.StringIO(text))) for name, text in csv_files(document)}
    assert set(tables) == {"runs.csv", "classes.csv", "pairs.csv", "groups.csv", "calibration.csv", "differences.csv"}
    assert len(tables["classes.csv"]) == 2 * K and len(tables["runs.csv"]) == 2
    for i, run in enumerate(document["runs"]):
        row = tables["runs.csv"][i]
        assert float(row["few"]) == run["metrics"]["few"]["value"] and float(row["few_low"]) == run["metrics"]["few"]["low"]
        assert float(row["ece"]) == run["calibration"]["all"]["ece"] and row["folder"] == run["run"]
        for c in range(K):
            row = tables["classes.csv"][i * K + c]
            assert row["class"] == f"class {c}" and int(row["train_count"]) == COUNTS[c]
            assert [float(row[key]) for key in ("accuracy", "low", "high", "mean_score")] == [
                run["per_class"][key][c] for key in ("accuracy", "low", "high", "mean_score")]  # fmt: skip
        assert f"| {run['name']} | {100 * run['metrics']['top1']['value']:.1f} (" in markdown(document)
    assert float(tables["differences.csv"][0]["value"]) == document["differences"][0]["metrics"]["top1"]["value"]


def test_differences_are_against_the_first_of_several(runs):
    names = ["a", "b", "c"]
    found = differences([*runs, runs[0]], names)
    assert [(one["run"], one["against"]) for one in found] == [("b", "a"), ("c", "a")]
    assert found[1]["metrics"]["top1"]["value"] == 0 and found[1]["metrics"]["top1"]["real"] is False
