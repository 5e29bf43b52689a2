"""Charts as PNG, drawn with matplotlib off screen. Colours: Okabe and Ito's, told apart by colour-blind readers."""

import io
from pathlib import Path
from typing import Any

from ..data.aside import replace_file

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def _figure(width: float, height: float, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    replace_file(path, buffer.getvalue())


def rates_chart(documents: dict[str, dict[str, Any]], path: Path) -> None:
    """Learned sample rates over classes by decreasing size, as the paper's supplement draws them in Figure 1.

    ``documents``: the content of a ``rates.json`` by the name to show for it, all of the same classes.
    """
    figure, (axis,) = _figure(8, 3.6)
    _draw_rates(axis, documents)
    _save(figure, path)


def _draw_rates(axis, documents: dict[str, dict[str, Any]]) -> None:
    counts = next(iter(documents.values()))["class_counts"]
    order = sorted(counts, key=lambda name: -counts[name])
    width = 0.85 / len(documents)
    for i, (label, document) in enumerate(documents.items()):
        places = [c + (i - (len(documents) - 1) / 2) * width for c in range(len(order))]
        axis.bar(places, [document["rates"][name] for name in order], width, color=COLOURS[i],
                 label=f"{label} (variance {document['variance']:.3f})")  # fmt: skip
    axis.axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axis.set(ylim=(0, 1), xlim=(-0.6, len(order) - 0.4), ylabel="sample rate", title="Learned sample rates")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    if len(order) <= 20:
        axis.set_xticks(range(len(order)), [f"{name}\n{counts[name]}" for name in order], fontsize=8,
                        rotation=0 if len(order) <= 12 else 90)  # fmt: skip
        axis.set_xlabel("class and its training images")
    else:
        axis.set_xlabel(f"{len(order)} classes by decreasing size ({max(counts.values())} to {min(counts.values())} images)")


def methods_chart(results: dict[str, dict[str, Any]], rates: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy by shot group for several methods, beside the learned sample rates."""
    figure, (left, right) = _figure(11, 3.9, columns=2)
    groups = [(g, s) for g, s in (("many", "many-shot\n> 100"), ("medium", "medium-shot\n20 to 100"), ("few", "few-shot\n< 20"),
              ("balanced_accuracy", "all classes")) if all(r[g] is not None for r in results.values())]  # fmt: skip
    width = 0.8 / len(results)
    for i, (name, result) in enumerate(results.items()):
        places = [g + (i - (len(results) - 1) / 2) * width for g in range(len(groups))]
        bars = left.bar(places, [100 * result[g] for g, _ in groups], width, color=COLOURS[i], label=name)
        left.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    left.set_xticks(range(len(groups)), [text for _, text in groups], fontsize=9)
    left.set(ylim=(0, 112), ylabel="accuracy %", title=title)
    left.legend(frameon=False, fontsize=8, ncols=len(results), loc="upper center")
    _draw_rates(right, rates)
    _save(figure, path)
