"""Figure 3 of the supplement: decision boundaries over iterations, softmax and Balanced Softmax, each without and with CBS.

Three classes in the plane: 10,000 red samples on one point, 100 yellow ones on another, 1 blue one on a third. A linear
classifier with a bias, no weight decay, gradient descent on the whole data set: as the samples of a class coincide, the
mean loss over a sampler's draws is exactly sum_c P(class c) loss(point c), and nothing in the figure is random.

    python examples/figures/figure3.py [--steps 100000] [--lr 0.5] [--out FOLDER]

What to see, by the boundary's place between two class means (0 at the more frequent class, 0.5 symmetric, 1 at the rarer
one): softmax + CBS is symmetric at once; softmax starts beyond the rarer class and comes to 0.5 slowly; Balanced Softmax
ends up on the majority's side of 0.5, and with CBS further still: over-balance. It is a matter of finite time. The data
can be separated, so the weights grow without end while the shift by log n stays what it is, and all four tend to 0.5:
500 steps of length 1 each take every boundary to within 0.03 of it (place_by_normalised_steps in the JSON).

The text gives no coordinates. Here the points are the corners of an equilateral triangle on the unit circle, and all
weights start from 0. Shapes: C classes, P pairs of classes.
"""

import math
from typing import Annotated, Any

import torch
import typer
from figure_tools import RESULTS, Out, new_figure, record, start, write
from torch import Tensor

from balms_cli.data.samplers import class_law
from balms_cli.engine.run_dir import check_place
from balms_cli.engine.runtime import versions
from balms_cli.losses import build_loss

CLASSES, COUNTS = ("red", "yellow", "blue"), (10_000, 100, 1)
ANGLES = (90, 210, 330)  # degrees
MEANS_C2 = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in ANGLES], dtype=torch.float64)
PAIRS = ((0, 1), (0, 2), (1, 2))  # the more frequent class first
SETUPS = {"Softmax": ("softmax", "instance"), "Softmax + CBS": ("softmax", "class"),
          "Balanced Softmax": ("balanced", "instance"), "Balanced Softmax + CBS": ("balanced", "class")}  # fmt: skip
LIMIT_STEPS, LIMIT_LENGTH = 500, 1.0  # of the run with steps of a fixed length; a few hundred more and the gradient is 0
# Red, yellow and blue as colour-blind readers tell them apart (Okabe and Ito), a marker each as well.
FILL, MARKERS = ("#D55E00", "#F0E442", "#0072B2"), ("o", "s", "^")
CORNER = 1.5  # the panels show the square [-1.5, 1.5]^2
# Colour: the loss; dashes: CBS.
LINES = {"Softmax": ("#000000", "-"), "Softmax + CBS": ("#000000", (0, (3, 1.5))),
         "Balanced Softmax": ("#009E73", "-"), "Balanced Softmax + CBS": ("#009E73", (0, (3, 1.5)))}  # fmt: skip
CONVENTION = ("place of a boundary on the segment between two class means: 0 at the more frequent class, 0.5 symmetric, "
              "1 at the rarer one; outside, one of the two is taken for the other")  # fmt: skip


def descend(loss_name: str, sampler: str, steps: int, lr: float, wanted: set[int], *, normalised: bool = False,
            start_C3: Tensor | None = None) -> dict[int, Tensor]:  # fmt: skip
    """Gradient descent on the toy; weights [C, 3] (the third column is the bias) after each step of ``wanted``.

    ``normalised``: every step has the length ``lr``, whatever the gradient's.
    """
    counts_C = torch.tensor(COUNTS)
    loss, law_C1 = build_loss(loss_name, counts_C), class_law(sampler, counts_C)[:, None]
    points_C3 = torch.cat([MEANS_C2, torch.ones(len(COUNTS), 1, dtype=torch.float64)], 1)
    weights_C3 = torch.zeros(len(COUNTS), 3, dtype=torch.float64) if start_C3 is None else start_C3.clone()
    targets_C, kept = torch.arange(len(COUNTS)), {}
    for step in range(1, steps + 1):
        _, slope_CC = loss.with_gradient(points_C3 @ weights_C3.T, targets_C)
        gradient_C3 = (law_C1 * slope_CC).T @ points_C3
        weights_C3 -= (lr / gradient_C3.norm() if normalised else lr) * gradient_C3
        if step in wanted:
            kept[step] = weights_C3.clone()
    return kept


def place(weights_C3: Tensor, frequent: int, rare: int) -> float:
    """Where two classes' logits are equal on the line through their means: 0 at the mean of ``frequent``, 1 at that of
    ``rare``; below 0 or above 1 beyond them, so that one of the two classes is taken for the other."""
    gap_3 = weights_C3[frequent] - weights_C3[rare]
    at_frequent, at_rare = (MEANS_C2[c] @ gap_3[:2] + gap_3[2] for c in (frequent, rare))
    return (at_frequent / (at_frequent - at_rare)).item()


def log_spaced(steps: int, a_decade: int = 12) -> list[int]:
    """Steps evenly spaced in log from 1 to ``steps``, both among them."""
    return sorted({*(round(10 ** (i / a_decade)) for i in range(int(a_decade * math.log10(steps)) + 1)), steps})


def powers_of_ten(steps: int) -> list[int]:
    return [10**i for i in range(int(math.log10(steps) + 1e-9) + 1)]


def compute(steps: int, lr: float) -> dict[str, Any]:
    """Every set-up's boundaries over the iterations, and where steps of a fixed length take them."""
    shown, traced = powers_of_ten(steps), log_spaced(steps)
    result: dict[str, Any] = {"traced_steps": traced, "shown_steps": shown, "setups": {}}
    for name, (loss_name, sampler) in SETUPS.items():
        weights = descend(loss_name, sampler, steps, lr, {*shown, *traced})
        (limit_C3,) = descend(loss_name, sampler, LIMIT_STEPS, LIMIT_LENGTH, {LIMIT_STEPS}, normalised=True).values()
        result["setups"][name] = {
            "loss": loss_name, "sampler": sampler,
            "place": {pair_name(pair): [round(place(weights[s], *pair), 5) for s in traced] for pair in PAIRS},
            "weights": {str(s): [[round(v, 8) for v in row] for row in weights[s].tolist()] for s in shown},
            "place_by_normalised_steps": {pair_name(pair): round(place(limit_C3, *pair), 5) for pair in PAIRS},
        }  # fmt: skip
    return result


def pair_name(pair: tuple[int, int]) -> str:
    return "-".join(CLASSES[c] for c in pair)


def draw(result: dict[str, Any]):
    shown = result["shown_steps"]
    figure = new_figure(10, 3.9 + 1.68 * len(SETUPS))
    top, bottom = figure.add_gridspec(2, 1, height_ratios=(2.75, 1), left=0.1, right=0.98, top=0.91, bottom=0.105, hspace=0.24)
    grid = top.subgridspec(len(SETUPS), len(shown), wspace=0.05, hspace=0.05)
    for row, (name, setup) in enumerate(result["setups"].items()):
        for column, step in enumerate(shown):
            axis = figure.add_subplot(grid[row, column])
            draw_regions(axis, torch.tensor(setup["weights"][str(step)], dtype=torch.float64))
            if row == 0:
                axis.set_title(f"{step:,} step{'s' if step > 1 else ''}", fontsize=10)
            if column == 0:
                axis.set_ylabel(name.replace(" ", "\n", 1).replace("\n+", " +") if "B" in name[:1] else name, fontsize=10)
    lines = bottom.subgridspec(1, len(PAIRS), wspace=0.3)
    for i, pair in enumerate(PAIRS):
        axis = figure.add_subplot(lines[0, i])
        draw_places(axis, result, pair)
        if i == 0:
            axis.set_ylabel("place of the boundary")
            handles = axis.get_legend_handles_labels()
    draw_legends(figure, handles)
    figure.suptitle("Decision boundaries over iterations: linear classifier on three points in the plane", fontsize=13, y=0.985)
    figure.text(0.53, 0.012, f"{CONVENTION[0].upper()}{CONVENTION[1:]}.\n".replace("; outside", ";\noutside")
                + "In the limit of many steps all four tend to 0.5: the figure shows what finite time does.",
                ha="center", va="bottom", fontsize=8.5, color="0.25", linespacing=1.3)  # fmt: skip
    return figure


def draw_regions(axis, weights_C3: Tensor) -> None:
    """Which class a point of the plane is taken for, and the three points."""
    from matplotlib.colors import ListedColormap, to_rgb

    side_G = torch.linspace(-CORNER, CORNER, 400, dtype=torch.float64)  # even: none at 0, where classes tie
    y_GG, x_GG = torch.meshgrid(side_G, side_G, indexing="ij")
    logits_GGC = torch.stack([x_GG, y_GG, torch.ones_like(x_GG)], 2) @ weights_C3.T
    tints = ListedColormap([[0.45 + 0.55 * v for v in to_rgb(colour)] for colour in FILL])
    axis.imshow(logits_GGC.argmax(2).numpy(), cmap=tints, vmin=0, vmax=2, origin="lower", interpolation="nearest",
                extent=(-CORNER, CORNER, -CORNER, CORNER))  # fmt: skip
    for (x, y), colour, marker in zip(MEANS_C2.tolist(), FILL, MARKERS, strict=True):
        axis.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="black", markeredgewidth=0.9)
    axis.set(xticks=[], yticks=[])


def draw_legends(figure, setups: tuple[list, list]) -> None:
    from matplotlib.lines import Line2D

    points = [Line2D([], [], marker=marker, color=colour, linestyle="", markersize=8, markeredgecolor="black",
                     label=f"{name}: {count:,} sample{'s' if count > 1 else ''}")
              for name, count, colour, marker in zip(CLASSES, COUNTS, FILL, MARKERS, strict=True)]  # fmt: skip
    figure.legend(handles=points, loc="upper center", bbox_to_anchor=(0.53, 0.969), ncols=3, frameon=False, fontsize=10)
    figure.legend(*setups, loc="lower center", bbox_to_anchor=(0.53, 0.315), ncols=4, frameon=False, fontsize=10,
                  handlelength=2.8)  # fmt: skip


def draw_places(axis, result: dict[str, Any], pair: tuple[int, int]) -> None:
    frequent, rare = (CLASSES[c] for c in pair)
    for y in (0, 0.5, 1):
        axis.axhline(y, color="0.75", linewidth=0.8, zorder=0)
    for name, setup in result["setups"].items():
        colour, dashes = LINES[name]
        axis.plot(result["traced_steps"], setup["place"][pair_name(pair)], label=name, color=colour, linestyle=dashes, lw=2)
    axis.set(xscale="log", xlim=(1, result["traced_steps"][-1]), ylim=(-0.6, 1.45), xlabel="iterations")
    axis.set_yticks([0, 0.5, 1], [f"{frequent}  0", "0.5", f"{rare}  1"], fontsize=9)
    axis.set_title(f"{frequent} ({COUNTS[pair[0]]:,}) and {rare} ({COUNTS[pair[1]]:,})", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def main(
    steps: Annotated[int, typer.Option(help="Iterations of gradient descent.", min=10)] = 100_000,
    lr: Annotated[float, typer.Option(help="Its learning rate, kept constant.", min=1e-6, max=4)] = 0.5,
    out: Out = RESULTS,
) -> None:
    check_place(out)
    torch.set_num_threads(1)
    result = compute(steps, lr)
    made = {"device": "cpu with 1 threads, float64", "versions": versions()}
    about = record("figure3.py", [], {"steps": steps, "lr": lr}, made, seeds=None,
                   seeds_note="nothing is random: weights start from 0, gradients are exact")  # fmt: skip
    data = {
        "figure": "Figure 3 of the supplement: decision boundaries over iterations",
        "convention": CONVENTION,
        "classes": CLASSES, "class_counts": COUNTS, "means": MEANS_C2.tolist(), "normalised_steps": [LIMIT_STEPS, LIMIT_LENGTH],
        **about, **result,
    }  # fmt: skip
    print(write(draw(result), data, "figure3", out))


if __name__ == "__main__":
    start(main)
