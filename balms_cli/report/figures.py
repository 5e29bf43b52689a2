"""The figures over classes and steps: class counts, p(y), learned rates, training curves. Shapes: C classes, T steps."""

import math

import numpy as np

from ..metrics import GROUPS
from .canvas import Drawn, canvas, class_axis, class_room, label, legend, logarithmic, room, run_style
from .palette import LIGHT
from .view import View

_BARS = 40  # classes that get a bar each
_STEPS = 1500  # heights of one staircase: more than the figure has pixels
_MARKED = 30  # classes whose values get a marker each


def class_counts(view: View) -> Drawn:
    """Training images a class, most first, on a logarithmic axis; coloured by shot group."""
    order = view.order
    counts_C = np.asarray(view.document["data"]["train_counts"])[order]
    groups_C = np.asarray(view.document["data"]["group_of"])[order]
    figure, axes = canvas(2.2, bottom=class_room(view))
    low = 0.7 * 10 ** math.floor(math.log10(counts_C.min()))
    for group in GROUPS:
        places = np.flatnonzero(groups_C == group) + 1
        if not len(places):
            continue
        if len(order) <= _BARS:
            axes.bar(places, counts_C[places - 1] - low, 0.74, bottom=low, color=LIGHT[group], label=f"{group}-shot")
        else:
            kept = places if len(places) <= _STEPS else places[np.linspace(0, len(places) - 1, _STEPS).astype(int)]
            axes.stairs(counts_C[kept - 1], np.append(kept - 0.5, places[-1] + 0.5), baseline=low, fill=True,
                        color=LIGHT[group], label=f"{group}-shot")  # fmt: skip
    high = counts_C.max() * 1.35
    axes.set_yscale("log")
    axes.set(ylim=(low, high), ylabel="training images")
    logarithmic(axes.yaxis, low, 1e9, narrow=True)  # decades alone: bars need no finer scale
    class_axis(axes, view)
    legend(axes, ["many-shot", "medium-shot", "few-shot"])
    said = (f"Training images of {len(order):,} classes, from {counts_C.max():,} down to {counts_C.min():,}, the most frequent "
            "first, on a logarithmic axis")  # fmt: skip
    return Drawn("class-counts", "Training images a class", said, figure)


def marginal(view: View) -> Drawn:
    """p(y) of each class, most training images first; flat at 1/C is balanced."""
    k = len(view.order)
    share = "share of the test images"
    names = [view.runs[run]["name"] for run in view.shown] + [share]
    names = names if not view.balanced_test else names[:-1] if len(view.runs) > 1 else []
    figure, axes = canvas(2.3, top=room(names), right=0.34, bottom=class_room(view))
    highest = 1.0
    for place, run in enumerate(view.shown):
        x, y = _thin(k * np.asarray(view.runs[run]["per_class"]["mean_score"])[view.order])
        highest = max(highest, y.max())
        axes.plot(x, y, label=label(view.runs[run]["name"]), **run_style(place, k <= _MARKED))
    if not view.balanced_test:
        tested_C = np.asarray(view.document["data"]["test_counts"])[view.order]
        x, y = _thin(k * tested_C / tested_C.sum())
        highest = max(highest, y.max())
        axes.plot(x, y, color=LIGHT["muted"], linewidth=1, linestyle=(0, (1, 1.5)), label=share)
    axes.axhline(1, color=LIGHT["ink"], linewidth=1)
    axes.text(1.015, 1, "1/C", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set(ylim=(0, 1.08 * highest), ylabel="p(y), as multiple of 1/C")
    class_axis(axes, view)
    legend(axes, names)
    said = "; ".join(f"{view.runs[run]['name']}: variance {view.runs[run]['marginal']['variance']:.3g}" for run in view.shown)
    return Drawn("marginal", "Marginal likelihood p(y)", f"Mean score of each class as a multiple of 1/C. {said}", figure)


def rates(view: View) -> Drawn:
    """What the meta-learners found for each class, most training images first."""
    runs = [(place, view.runs[run]) for place, run in enumerate(view.shown) if view.runs[run]["rates"] is not None]
    names = [run["name"] for _, run in runs] if len(view.runs) > 1 else []
    figure, axes = canvas(2.3, top=room(names), bottom=class_room(view))
    for place, run in runs:
        x, y = _thin(np.asarray(run["rates"]["values"])[view.order])
        axes.plot(x, y, label=label(run["name"]), **run_style(place, len(view.order) <= _MARKED))
    kinds = " and ".join(sorted({run["rates"]["kind"] for _, run in runs}))
    axes.axhline(0.5, color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 2)))
    axes.set(ylim=(0, max(1, *(1.05 * max(run["rates"]["values"]) for _, run in runs))), ylabel=kinds)
    class_axis(axes, view)
    legend(axes, names)
    said = "; ".join(f"{run['name']}: variance {run['rates']['variance']:.3g}" for _, run in runs)
    return Drawn("rates", f"Learned {kinds}", f"Learned {kinds} a class. {said}", figure)


def _thin(values_C: np.ndarray, most: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Places 1..C and values; above ``most`` classes, means of as many neighbours as needed."""
    if len(values_C) <= most:
        return np.arange(1, len(values_C) + 1), values_C
    parts = np.array_split(values_C, most)
    ends = np.cumsum([len(part) for part in parts])
    middles = ends - np.array([(len(part) - 1) / 2 for part in parts])
    return middles, np.array([part.mean() for part in parts])


def curves(view: View, stage: str) -> Drawn | None:
    """Loss over the steps of one stage, of every run that has it; under it the learning rate."""
    found = view.curves(stage)
    if not found:
        return None
    names = [name for _, name, _ in found] if len(view.runs) > 1 else []
    figure, axes = canvas(2.9, top=room(names))
    box = axes.get_position()
    axes.set_position((box.x0, box.y0 + 0.27 * box.height, box.width, 0.73 * box.height))
    below = figure.add_axes((box.x0, box.y0, box.width, 0.2 * box.height), sharex=axes)
    for place, name, curve in found:
        step_T, loss_T = np.asarray(curve["step"]), np.asarray(curve["loss"], float)
        style = run_style(place, False)
        axes.plot(step_T, loss_T, color=style["color"], linewidth=0.7, alpha=0.3)
        axes.plot(step_T, _smooth(loss_T), label=label(name), **style)
        below.plot(step_T, curve["lr"], **(style | {"linewidth": 1.3}))
    low, high = axes.get_ylim()
    least = min(min(curve["loss"]) for *_, curve in found)
    if least > 0 and high / least > 8:
        axes.set_yscale("log")
        logarithmic(axes.yaxis, *axes.get_ylim(), narrow=True)
    else:
        axes.set_ylim(min(0.0, low), high)
    axes.tick_params(axis="x", labelbottom=False)
    axes.set_ylabel("training loss")
    below.set(xlabel="step", ylabel="lr", ylim=(0, None))
    for one in (axes.yaxis, below.yaxis):
        one.set_label_coords(-0.105, 0.5)
    below.locator_params(axis="y", nbins=2)
    legend(axes, names)
    words = "Stage 1: the backbone" if stage == "pretrain" else "Stage 2: the classifier"
    said = "; ".join(f"{name}: {curve['loss'][0]:.3g} to {curve['loss'][-1]:.3g}" for _, name, curve in found)
    return Drawn(f"curves-{stage}", words, f"Training loss and learning rate over the steps. {said}", figure)


def _smooth(values_T: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the points, shorter at the ends."""
    half, n = max(1, len(values_T) // 40), len(values_T)
    total = np.concatenate([[0.0], np.cumsum(values_T)])
    low, high = (np.arange(n) - half).clip(0), (np.arange(n) + half + 1).clip(max=n)
    return (total[high] - total[low]) / (high - low)
