"""Figure 2 of the supplement: t-SNE of test-set features after softmax, softmax + CBS and Balanced Softmax end to end.

CIFAR-10-LT, imbalance factor 200; the same images in every panel. t-SNE is for the eye and moves clusters about at will, so
each panel also carries two numbers, computed on the features themselves over the whole test set:

* own-class neighbours: of an image's 20 nearest (Euclidean, itself left out), the share of its own class; chance is 10 %;
* silhouette (Rousseeuw, 1987), mean over images: 1 for tight classes far apart, 0 where they overlap, below 0 where an
  image lies nearer to another class than to its own.

    python examples/figures/figure2.py DATA_ROOT [--runs FOLDER] [--preset quick|paper] [--seed 0] [--out FOLDER]

Runs are kept in FOLDER by name (softmax, cbs, balanced) and taken from there where they are complete and of this very
recipe; one that was cut off goes on where it stopped. Preset quick: three times 12 to 20 minutes on one CPU core.

Shapes: N images, D features.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from figure_tools import RESULTS, Out, data_record, new_figure, open_runs, record, report_of, start, title_of, write

from balms_cli.cli.console import make_reporter
from balms_cli.config import parse_set
from balms_cli.data.features import extract_all
from balms_cli.data.manifest import Manifest
from balms_cli.engine.checkpoint import load_model
from balms_cli.engine.run_dir import MODEL, check_place
from balms_cli.reporter import Reporter
from balms_cli.stages.common import load_images

METHODS = {"softmax": ("Softmax", {}), "cbs": ("Softmax + CBS", {"sampler": "class"}),
           "balanced": ("Balanced Softmax", {"loss": "balanced"})}  # fmt: skip
NEIGHBOURS, RAREST, PERPLEXITY = 20, 3, 30.0
# Pale for frequent classes, strong for the rarest three (Tol's light, Okabe and Ito's): told apart without seeing hue, by a
# marker each. Strong ones are drawn last, the rarest on top.
PALE = ("#77AADD", "#FFAABB", "#44BB99", "#DDCC77", "#BBBBBB", "#AAAA00", "#66CCEE")
STRONG = ("#0072B2", "#D55E00", "#000000")
MARKERS, STRONG_MARKERS = ("o", "s", "^", "v", "P", "X", "*"), ("<", "d", ">")


def test_features(run: Path, manifest: Manifest, reporter: Reporter, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] of a run's backbone, and labels [N] in the manifest's order."""
    model, header = load_model(run / MODEL)
    cpu = torch.device("cpu")
    images = load_images(manifest, split, header.image_size, cpu, reporter)
    mean, std = torch.tensor(header.mean), torch.tensor(header.std)
    found = extract_all(model.backbone, images, mean, std, batch_size=500, reporter=reporter, what=run.name)
    return found.numpy(), manifest.splits[split].labels


def numbers(features_ND: np.ndarray, labels_N: np.ndarray, rarest: list[int]) -> dict[str, Any]:
    """Own-class neighbours and silhouette: over all images, over those of the classes ``rarest``, and a class."""
    from sklearn.metrics import silhouette_samples
    from sklearn.neighbors import NearestNeighbors

    k = min(NEIGHBOURS, len(labels_N) - 1)
    nearest_NK = NearestNeighbors(n_neighbors=k).fit(features_ND).kneighbors(return_distance=False)
    values = {"own_class_neighbours": (labels_N[nearest_NK] == labels_N[:, None]).mean(1),
              "silhouette": silhouette_samples(features_ND, labels_N)}  # fmt: skip
    rare_N, classes = np.isin(labels_N, rarest), range(labels_N.max() + 1)
    return {name: {"all": mean(of_N), "rarest": mean(of_N[rare_N]), "per_class": [mean(of_N[labels_N == c]) for c in classes]}
            for name, of_N in values.items()}  # fmt: skip


def mean(values_M: np.ndarray) -> float | None:
    """To four places; None of no values: a class without test images."""
    return round(float(values_M.mean()), 4) if len(values_M) else None


def choose_images(labels_N: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of ``per_class`` images of each class (all of them where a class has fewer), drawn without replacement."""
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels_N == c))[:per_class] for c in np.unique(labels_N)]))


def embed(features_MD: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE in the plane [M, 2], started from the first two principal components."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features_MD) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features_MD)


def looks(class_counts: list[int]) -> tuple[list[int], list[tuple[str, str, bool]]]:
    """Classes by decreasing size, and of each, in that order, colour, marker and whether it is one of the rarest."""
    order = sorted(range(len(class_counts)), key=lambda c: -class_counts[c])
    frequent = max(0, len(order) - RAREST)
    styles = [(PALE[i % len(PALE)], MARKERS[i % len(MARKERS)], False) for i in range(frequent)]
    styles += [(STRONG[i], STRONG_MARKERS[i], True) for i in range(len(order) - frequent)]
    return order, styles


def draw(result: dict[str, Any], title: str):
    order, styles = looks(result["class_counts"])
    labels_M = np.array(result["labels"])
    figure = new_figure(11.4, 5.6)
    for i, found in enumerate(result["methods"].values()):
        axis = figure.add_axes((0.012 + i * 0.3293, 0.175, 0.3167, 0.6448))
        xy_M2 = np.array(found["points"])
        for place, (c, (colour, marker, rare)) in enumerate(zip(order, styles, strict=True)):
            x, y = xy_M2[labels_M == c].T
            axis.scatter(x, y, s=26 if rare else 11, c=colour, marker=marker, linewidths=0.4 if rare else 0,
                         edgecolors="white" if rare else "none", zorder=2 + place)  # fmt: skip
        axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axis.text(0.5, 1.135, found["label"], transform=axis.transAxes, ha="center", fontsize=11, fontweight="bold")
        axis.set_title(caption(found), fontsize=9.5, linespacing=1.35)
    figure.suptitle(title, fontsize=12, y=0.98)
    draw_legend(figure, result, order, styles)
    return figure


def caption(found: dict[str, Any]) -> str:
    own, outline = found["own_class_neighbours"], found["silhouette"]
    return (f"own-class neighbours {percent(own['all'])}, {RAREST} rarest {percent(own['rarest'])}\n"
            f"silhouette {signed(outline['all'])}, {RAREST} rarest {signed(outline['rarest'])}")  # fmt: skip


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.0f} %"


def signed(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def draw_legend(figure, result: dict[str, Any], order: list[int], styles: list[tuple[str, str, bool]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", marker=marker, color=colour, markersize=8 if rare else 6,
                      markeredgecolor="white" if rare else colour, markeredgewidth=0.5,
                      label=f"{result['classes'][c]}: {result['class_counts'][c]:,}")
               for c, (colour, marker, rare) in zip(order, styles, strict=True)]  # fmt: skip
    legend = figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.0), ncols=5, frameon=False, fontsize=9.5,
                           title="class: training images", title_fontsize=9.5)  # fmt: skip
    for text, (_, _, rare) in zip(legend.get_texts(), styles, strict=True):
        text.set_fontweight("bold" if rare else "normal")


def main(
    data_root: Annotated[Path | None, typer.Argument(help="Where the data set lies on disk (else BALMS_DATA, ...).")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept, and taken from.")] = Path("balms-runs/figure2"),
    preset: Annotated[str, typer.Option(help="quick or paper.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of every run, of the images shown and of t-SNE.")] = 0,
    data: Annotated[str, typer.Option(help="Any source of balms make-lt.")] = "cifar10",
    imbalance: Annotated[float, typer.Option(help="Imbalance factor.")] = 200,
    per_class: Annotated[int, typer.Option(help="Test images of a class that are shown.", min=1)] = 200,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of stage 1 (steps=20 ...).")] = None,
    out: Out = RESULTS,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
) -> None:
    check_place(out)
    reporter = make_reporter(quiet)
    found = open_runs(runs, data, imbalance, data_root, preset, seed, parse_set(sets or []), reporter)
    manifest = found.manifest
    folders = {name: found.pretrained(name, **flags) for name, (_, flags) in METHODS.items()}
    order, _ = looks(manifest.class_counts)
    methods, shown_M, labels_N = {}, None, None
    for name, folder in folders.items():
        features_ND, labels_N = test_features(folder.path, manifest, reporter)
        shown_M = choose_images(labels_N, per_class, seed)
        reporter.note(f"{name}: t-SNE of {len(shown_M):,} images")
        points_M2 = embed(features_ND[shown_M], seed)
        methods[name] = {"label": METHODS[name][0], **numbers(features_ND, labels_N, order[-RAREST:]),
                         "points": [[round(float(v), 2) for v in point] for point in points_M2]}  # fmt: skip
    report = report_of(folders["softmax"])
    options = {"preset": preset, "seed": seed, "data": data, "imbalance": imbalance, "per-class": per_class, "set": sets or []}
    about = record("figure2.py", ["DATA_ROOT"], options, report, data=data_record(manifest), steps=report["steps"],
                   seeds={"runs": seed, "images": seed, "t-SNE": seed, "draw": manifest.seed})  # fmt: skip
    result = {"classes": manifest.classes, "class_counts": manifest.class_counts, "neighbours": NEIGHBOURS,
              "perplexity": PERPLEXITY, "images": shown_M.tolist(), "labels": labels_N[shown_M].tolist(),
              "methods": methods}  # fmt: skip
    figure_data = {"figure": "Figure 2 of the supplement: t-SNE of the feature space", **about, **result}
    print(write(draw(result, title_of("Test-set features by t-SNE", manifest, preset)), figure_data, "figure2", out))


if __name__ == "__main__":
    start(main)
