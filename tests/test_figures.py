"""examples/figures: what the three figures of the supplement say is true, and what is drawn is what was computed."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

RESULTS = Path(__file__).parents[1] / "examples" / "results"
TINY = ["--data", "digits", "--imbalance", "40", "--set", "steps=3", "--set", "backbone=resnet8", "--set", "batch_size=8",
        "--quiet"]  # fmt: skip


@pytest.fixture(autouse=True)
def figures_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RESULTS.parent / "figures"))


def run(module, *arguments):
    """A figure's command in this process; a user's error is raised as it is."""
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return Path(result.output.strip().splitlines()[-1])


def read(png):
    """A figure's data, from strict JSON, with its picture checked to be one."""
    with Image.open(png) as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors(256)) > 20
    return json.loads(png.with_suffix(".json").read_text(), parse_constant=lambda name: pytest.fail(name))


# Figure 3

LR, STEPS = 4.0, 12_000  # as far as 96,000 steps of the figure's own rate of 0.5


def test_the_toy_descends_the_mean_loss_over_all_its_samples():
    """Against autograd over all 10,101 points one by one, the loss written out; for CBS weighted to equal classes."""
    from figure3 import COUNTS, MEANS_C2, SETUPS, descend

    labels_N = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    points_N2, counts_C = MEANS_C2[labels_N], torch.tensor(COUNTS, dtype=torch.float64)
    for loss_name, sampler in SETUPS.values():
        weight_N = 1 / len(labels_N) if sampler == "instance" else 1 / (3 * counts_C[labels_N])
        w = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w, b], lr=0.5)
        for _ in range(7):
            logits_NC = points_N2 @ w.T + b
            if loss_name == "balanced":
                logits_NC = logits_NC + counts_C.log()
            loss = (weight_N * torch.nn.functional.cross_entropy(logits_NC, labels_N, reduction="none")).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        got_C3 = descend(loss_name, sampler, 7, 0.5, {7})[7]
        torch.testing.assert_close(got_C3, torch.cat([w, b[:, None]], 1).detach(), rtol=1e-10, atol=1e-12)


def test_place_is_measured_from_the_more_frequent_class():
    """Nearest-mean weights cut every segment in half. The means are sqrt(3) apart, so the gap of two logits runs from 1.5
    to -1.5; a bias of 0.3 more for the frequent class moves its zero by 0.3 of 3, toward the rarer class."""
    from figure3 import MEANS_C2, PAIRS, place

    weights_C3 = torch.cat([MEANS_C2, -MEANS_C2.square().sum(1, keepdim=True) / 2], 1)
    assert [place(weights_C3, *pair) for pair in PAIRS] == pytest.approx([0.5] * 3)
    weights_C3[0, 2] += 0.3
    assert [place(weights_C3, *pair) for pair in PAIRS] == pytest.approx([0.6, 0.6, 0.5])
    weights_C3[0, 2] += 1.5  # the frequent class reaches beyond the rarer one's mean: that is taken for it
    assert place(weights_C3, 0, 2) == pytest.approx(1.1)
    logits_C = weights_C3[:, :2] @ MEANS_C2[2] + weights_C3[:, 2]
    assert logits_C.argmax() == 0


def test_steps_of_the_snapshots():
    from figure3 import log_spaced, powers_of_ten

    assert powers_of_ten(100_000) == [1, 10, 100, 1_000, 10_000, 100_000]
    assert powers_of_ten(99) == [1, 10]
    traced = log_spaced(2_500)
    assert traced[0] == 1 and traced[-1] == 2_500 and traced == sorted(set(traced)) and {10, 100, 1_000} <= set(traced)
    ratios = [b / a for a, b in itertools.pairwise(traced) if a > 30]
    assert max(ratios) < 1.3


@pytest.mark.parametrize("start", ["zero", "random"])
def test_what_finite_time_does_to_the_boundaries(start):
    from figure3 import PAIRS, SETUPS, descend, log_spaced, place

    from balms_cli.models.classifiers import linear_head

    start_C3 = None
    if start == "random":  # torch's own initial law
        head = linear_head(2, 3, torch.Generator().manual_seed(1)).double()
        start_C3 = torch.cat([head.weight, head.bias[:, None]], 1).detach()
    steps = [s for s in log_spaced(STEPS) if s >= 10]
    places = {}
    for name, (loss_name, sampler) in SETUPS.items():
        weights = descend(loss_name, sampler, STEPS, LR, set(steps), start_C3=start_C3)
        places[name] = np.array([[place(weights[s], *pair) for pair in PAIRS] for s in steps])
    softmax, softmax_cbs, balanced, balanced_cbs = places.values()

    near = 1e-9 if start == "zero" else 0.1
    assert np.abs(softmax_cbs - 0.5).max() < near and np.abs(softmax_cbs[-1] - 0.5).max() < min(near, 0.03)
    late = len(steps) // 2
    assert (np.diff(softmax[late:], axis=0) < 0).all() and (softmax[late:] > 0.55).all()  # to 0.5, from the rare side
    assert (softmax[-1] < [0.65, 0.85, 0.77]).all()
    assert (balanced[-1] < 0.45).all()  # beyond 0.5, on the side of the more frequent class
    assert (balanced_cbs[-1] < balanced[-1] - 0.05).all() and (balanced_cbs[late:] < balanced[late:]).all()  # over-balance


def test_in_the_limit_all_boundaries_are_symmetric():
    """Steps of a fixed length get there: the shift by log n is finite and the weights are not."""
    from figure3 import PAIRS, SETUPS, descend, place

    for loss_name, sampler in SETUPS.values():
        weights = descend(loss_name, sampler, 500, 1.0, {50, 500}, normalised=True)
        early, late = (max(abs(place(weights[s], *pair) - 0.5) for pair in PAIRS) for s in (50, 500))
        assert late < 0.025 and late <= early / 4 + 1e-3


def test_figure_3_is_drawn(tmp_path):
    import figure3

    data = read(run(figure3, "--steps", "10", "--out", tmp_path))
    assert data["class_counts"] == [10_000, 100, 1] and data["shown_steps"] == [1, 10]
    assert data["command"] == "python examples/figures/figure3.py --steps 10 --lr 0.5"
    for setup in data["setups"].values():
        weights_C3 = torch.tensor(setup["weights"]["10"], dtype=torch.float64)
        assert setup["place"]["red-blue"][-1] == pytest.approx(figure3.place(weights_C3, 0, 2), abs=1e-4)
    assert "0 at the more frequent class" in data["convention"]


def test_a_panel_of_figure_3_shows_which_class_a_point_is_taken_for():
    import figure3

    figure = figure3.new_figure(2, 2)
    axis = figure.add_subplot()
    weights_C3 = figure3.descend("balanced", "class", 100, 0.5, {100})[100]
    figure3.draw_regions(axis, weights_C3)
    shown_GG = axis.images[0].get_array()
    for row, column in ((0, 0), (380, 200), (60, 390), (200, 10)):
        x, y = (-1.5 + 3 * v / 399 for v in (column, row))
        logits = [w[0] * x + w[1] * y + w[2] for w in weights_C3.tolist()]
        assert shown_GG[row, column] == logits.index(max(logits))


# Figure 1

SIZES = {"emu": 2, "fox": 200, "cat": 30}
RATES = {"softmax": {"rates": {"emu": 0.9, "fox": 0.1, "cat": 0.4}, "class_counts": SIZES},
         "balanced": {"rates": {"emu": 0.6, "fox": 0.5, "cat": 0.5}, "class_counts": SIZES}}  # fmt: skip


def test_figure_1_s_numbers_by_hand():
    from figure1 import summary

    found = summary(RATES)
    assert found["classes"] == ["fox", "cat", "emu"] and found["class_counts"] == [200, 30, 2]
    softmax = found["losses"]["softmax"]
    assert softmax["rates"] == [0.1, 0.4, 0.9]
    assert softmax["variance"] == pytest.approx(np.var([0.1, 0.4, 0.9]), abs=1e-5)
    assert softmax["mean_rate"] == {"many": 0.1, "medium": 0.4, "few": 0.9}
    assert softmax["class_share"] == pytest.approx([20 / 33.8, 12 / 33.8, 1.8 / 33.8], abs=1e-6)


def test_figure_1_draws_the_rates_and_quotes_the_paper():
    import figure1

    result = figure1.summary(RATES)
    result["losses"]["softmax"]["variance_paper"] = 0.13
    figure = figure1.draw(result, "title")
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == [0.1, 0.4, 0.9]
    assert [bar.get_height() for bar in lower.patches] == [0.5, 0.5, 0.6]
    assert upper.get_title(loc="right") == "variance 0.109   (paper: 0.13)" and lower.get_title(loc="right") == "variance 0.002"
    assert [t.get_text() for t in lower.get_xticklabels()] == ["1\n200", "2\n30", "3\n2"]


def test_figure_1_from_data_to_picture_and_again_from_its_runs(tmp_path, monkeypatch):
    import figure1
    import figure_tools

    from balms_cli.errors import ConfigError

    options = [*TINY, "--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    first = read(run(figure1, *options))
    assert first["classes"] == list("0123456789") and first["data"]["name"] == "digits" and first["steps"] == 3
    assert len(first["data"]["manifest_sha256"]) == 64 and first["seeds"] == {"runs": 0, "draw": 0}
    assert str(tmp_path) not in json.dumps(first)
    assert not any("variance_paper" in found for found in first["losses"].values())  # those are of CIFAR-100-LT at 200
    kept = json.loads((tmp_path / "runs" / "rates-balanced" / "rates.json").read_text())
    assert first["losses"]["balanced"]["rates"] == [kept["rates"][name] for name in first["classes"]]

    for stage in (figure_tools.pretrain, figure_tools.meta_sample):
        monkeypatch.setattr(stage, "run", lambda *a, **k: pytest.fail("trained again"))
    assert read(run(figure1, *options)) == first
    with pytest.raises(ConfigError, match="another seed: name another folder by --runs"):
        run(figure1, *options, "--seed", "1")
    with pytest.raises(ConfigError, match="another data"):
        run(figure1, *options, "--imbalance", "20")


# Figure 2


def test_figure_2_s_numbers_against_brute_force():
    import figure2

    rng = np.random.default_rng(3)
    labels_N = np.repeat([0, 1, 2, 3], [40, 25, 20, 15])
    features_ND = rng.normal(size=(4, 5))[labels_N] + rng.normal(size=(100, 5))
    got = figure2.numbers(features_ND, labels_N, [2, 3])
    own, outline = [], []
    for i in range(100):
        distance = [math.dist(features_ND[i], other) for other in features_ND]
        nearest = sorted((d, j) for j, d in enumerate(distance) if j != i)[: figure2.NEIGHBOURS]
        own.append(sum(labels_N[j] == labels_N[i] for _, j in nearest) / figure2.NEIGHBOURS)
        to = {c: sum(d for d, y in zip(distance, labels_N, strict=True) if y == c) for c in range(4)}
        a = to[labels_N[i]] / ((labels_N == labels_N[i]).sum() - 1)
        b = min(to[c] / (labels_N == c).sum() for c in range(4) if c != labels_N[i])
        outline.append((b - a) / max(a, b))
    for name, values in (("own_class_neighbours", np.array(own)), ("silhouette", np.array(outline))):
        assert got[name]["all"] == pytest.approx(values.mean(), abs=1e-4)
        assert got[name]["rarest"] == pytest.approx(values[labels_N >= 2].mean(), abs=1e-4)
        assert got[name]["per_class"] == pytest.approx([values[labels_N == c].mean() for c in range(4)], abs=1e-4)


def test_images_shown_are_so_many_of_each_class():
    from figure2 import choose_images

    labels_N = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 30, 4]))
    shown = choose_images(labels_N, 10, seed=5)
    assert np.bincount(labels_N[shown]).tolist() == [10, 10, 4] and len(set(shown)) == 24
    assert (shown == choose_images(labels_N, 10, seed=5)).all() and set(shown) != set(choose_images(labels_N, 10, seed=6))


def test_a_group_without_test_images_has_no_number():
    from figure2 import caption

    found = {"own_class_neighbours": {"all": 0.5, "rarest": None}, "silhouette": {"all": -0.25, "rarest": None}}
    assert caption(found) == "own-class neighbours 50 %, 3 rarest none\nsilhouette −0.25, 3 rarest none"


def test_every_class_has_a_look_of_its_own_and_the_rarest_stand_out():
    from figure2 import STRONG, looks

    order, styles = looks([50, 400, 30, 20, 100, 90, 80, 70, 60, 10])
    assert order == [1, 4, 5, 6, 7, 8, 0, 2, 3, 9]
    assert len({colour for colour, _, _ in styles}) == len({marker for _, marker, _ in styles}) == 10
    assert [rare for *_, rare in styles] == [False] * 7 + [True] * 3 and tuple(c for c, _, _ in styles[7:]) == STRONG
    assert len(looks([5, 9])[1]) == 2


def test_t_sne_keeps_apart_what_is_far_apart():
    from figure2 import embed

    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(30, 8)), rng.normal(size=(30, 8)) + 30])
    xy = embed(features, seed=0)
    assert xy.shape == (60, 2) and np.array_equal(xy, embed(features, seed=0))
    centres = xy[:30].mean(0), xy[30:].mean(0)
    assert all((np.linalg.norm(p - centres[i // 30]) < np.linalg.norm(p - centres[1 - i // 30])) for i, p in enumerate(xy))


def test_figure_2_draws_every_image_where_it_lies():
    import figure2

    labels = [0, 0, 1, 1, 2, 3, 3]
    points = [[float(i), float(i * i)] for i in range(7)]
    value = {"all": 0.5, "rarest": -0.25, "per_class": [0.5] * 4}
    method = {"label": "Softmax", "own_class_neighbours": value, "silhouette": value, "points": points}
    result = {"classes": list("abcd"), "class_counts": [9, 700, 5, 3], "labels": labels, "methods": {"softmax": method}}
    figure = figure2.draw(result, "title")
    (axis,) = figure.axes
    drawn = [part.get_offsets().tolist() for part in axis.collections]  # by decreasing class size: b, a, c, d
    assert drawn == [points[2:4], points[0:2], points[4:5], points[5:7]]
    assert "own-class neighbours 50 %" in axis.get_title() and "silhouette 0.50, 3 rarest −0.25" in axis.get_title()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["b: 700", "a: 9", "c: 5", "d: 3"]


def test_figure_2_from_data_to_picture(tmp_path, monkeypatch):
    import figure2

    from balms_cli.config import EvaluateConfig
    from balms_cli.data.manifest import Manifest
    from balms_cli.engine.checkpoint import load_model
    from balms_cli.reporter import Reporter
    from balms_cli.stages import evaluate

    monkeypatch.setattr(figure2, "embed", lambda features_MD, seed: features_MD[:, :2])  # t-SNE itself is tested above
    data = read(run(figure2, *TINY, "--per-class", "5", "--runs", tmp_path / "runs", "--out", tmp_path / "out"))
    assert list(data["methods"]) == ["softmax", "cbs", "balanced"] and np.bincount(data["labels"]).tolist() == [5] * 10
    assert str(tmp_path) not in json.dumps(data)

    # The features are those that evaluate scores: through the run's own head they give its very confidences.
    run_dir = tmp_path / "runs" / "balanced"
    (folder,) = (tmp_path / "runs" / "data").iterdir()
    features_ND, labels_N = figure2.test_features(run_dir, Manifest.load(folder), Reporter())
    with torch.no_grad():
        p_NC = load_model(run_dir / "model.safetensors")[0].head(torch.from_numpy(features_ND)).softmax(1).numpy()
    (scored,) = evaluate.run(EvaluateConfig(precision="fp32"), [run_dir / "model.safetensors"]).scored
    assert (labels_N == scored.labels_N).all() and np.ptp(p_NC.max(1)) > 1e-3
    np.testing.assert_allclose(p_NC.max(1), scored.scores.confidence_N, atol=1e-5)
    shown = [[round(float(v), 2) for v in features_ND[i, :2]] for i in data["images"]]
    assert data["methods"]["balanced"]["points"] == shown


# The figures that are kept with the source


def test_the_figures_in_results_are_those_of_the_scripts():
    import figure1

    rates, space, toy = (read(RESULTS / f"figure{n}.png") for n in (1, 2, 3))
    assert all((RESULTS / f"figure{n}.png").stat().st_size < 200_000 for n in (1, 2, 3))
    documents = {loss: {"rates": dict(zip(rates["classes"], found["rates"], strict=True)),
                        "class_counts": dict(zip(rates["classes"], rates["class_counts"], strict=True))}
                 for loss, found in rates["losses"].items()}  # fmt: skip
    for loss, found in figure1.summary(documents)["losses"].items():
        assert rates["losses"][loss] == found | {"variance_paper": figure1.PAPER_VARIANCE[loss]}
    assert rates["losses"]["softmax"]["variance"] > 4 * rates["losses"]["balanced"]["variance"]
    assert (rates["data"]["name"], space["data"]["name"]) == ("cifar100", "cifar10")
    assert rates["data"]["imbalance"] == space["data"]["imbalance"] == 200
    assert all(len(found["points"]) == len(space["labels"]) == 2_000 for found in space["methods"].values())
    final = {name: [places[-1] for places in setup["place"].values()] for name, setup in toy["setups"].items()}
    assert toy["traced_steps"][-1] == 100_000 and final["Softmax + CBS"] == [0.5] * 3
    assert min(final["Softmax"]) > 0.5 > max(final["Balanced Softmax"])
    assert all(c < b for b, c in zip(final["Balanced Softmax"], final["Balanced Softmax + CBS"], strict=True))
