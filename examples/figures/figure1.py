"""Figure 1 of the supplement: sample rates that the meta sampler learns, with softmax and with Balanced Softmax.

CIFAR-100-LT, imbalance factor 200. One network of stage 1 (softmax), then the meta sampler on its features with either
loss, both from rates of 0.5. The paper's rates have a variance over the classes of 0.13 and 0.03.

    python examples/figures/figure1.py DATA_ROOT [--runs FOLDER] [--preset quick|paper] [--seed 0] [--out FOLDER]

Runs are kept in FOLDER by name (softmax, rates-softmax, rates-balanced) and taken from there where they are complete and
of this very recipe; one that was cut off goes on where it stopped. Preset quick: 12 to 20 minutes on one CPU core.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from figure_tools import RESULTS, Out, data_record, new_figure, open_runs, rates_of, record, report_of, start, title_of, write

from balms_cli.cli.console import make_reporter
from balms_cli.config import parse_set
from balms_cli.data.longtail import GROUPS, shot_groups
from balms_cli.engine.run_dir import check_place

# Section C.4 of the supplement: on this data set at this imbalance factor.
PAPER_DATA, PAPER_VARIANCE = ("cifar100", 200), {"softmax": 0.13, "balanced": 0.03}
LABELS = {"softmax": "Softmax", "balanced": "Balanced Softmax"}
COLOURS = {"softmax": "#0072B2", "balanced": "#E69F00"}


def summary(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figure's numbers from the ``rates.json`` of each loss: classes by decreasing size, variance over them, mean rate
    by shot group, and the batches that the rates amount to, P(class c) = n_c r_c / sum_j n_j r_j."""
    counts = next(iter(documents.values()))["class_counts"]
    classes = sorted(counts, key=lambda name: -counts[name])
    counts_C = [counts[name] for name in classes]
    groups_C = shot_groups(counts_C)
    losses = {}
    for loss, document in documents.items():
        rates_C = [document["rates"][name] for name in classes]
        mean, mass = sum(rates_C) / len(rates_C), sum(n * r for n, r in zip(counts_C, rates_C, strict=True))
        of_group = {group: [r for r, g in zip(rates_C, groups_C, strict=True) if g == group] for group in GROUPS}
        losses[loss] = {
            "variance": round(sum((r - mean) ** 2 for r in rates_C) / len(rates_C), 5),
            "mean_rate": {group: round(sum(rs) / len(rs), 4) if rs else None for group, rs in of_group.items()},
            "rates": rates_C, "class_share": [round(n * r / mass, 6) for n, r in zip(counts_C, rates_C, strict=True)],
        }  # fmt: skip
    return {"classes": classes, "class_counts": counts_C, "losses": losses}


def draw(result: dict[str, Any], title: str):
    counts_C, losses = result["class_counts"], result["losses"]
    places = range(1, len(counts_C) + 1)
    figure = new_figure(8.6, 5.2, layout="constrained")
    axes = figure.subplots(len(losses), 1, sharex=True, sharey=True)
    for axis, (loss, found) in zip(axes, losses.items(), strict=True):
        axis.bar(places, found["rates"], 0.85, color=COLOURS[loss])
        axis.axhline(0.5, color="0.3", linewidth=1, linestyle=(0, (4, 2)))
        axis.set(ylim=(0, 1), ylabel="sample rate")
        axis.set_title(LABELS[loss], loc="left", fontsize=11)
        paper = found.get("variance_paper")
        axis.set_title(f"variance {found['variance']:.3f}" + (f"   (paper: {paper:.2f})" if paper else ""), loc="right",
                       fontsize=11)  # fmt: skip
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].annotate("all rates start at 0.5", (0.6, 0.5), (0, 3), textcoords="offset points", fontsize=9, color="0.15")
    axes[-1].set_xlim(0.4, len(counts_C) + 0.6)
    ticks = sorted({round(1 + i * (len(counts_C) - 1) / 9) for i in range(10)})
    axes[-1].set_xticks(ticks, [f"{t}\n{counts_C[t - 1]}" for t in ticks])
    axes[-1].set_xlabel("class, by decreasing number of training images (second line: that number)")
    figure.suptitle(title, fontsize=12)
    return figure


def main(
    data_root: Annotated[Path | None, typer.Argument(help="Where the data set lies on disk (else BALMS_DATA, ...).")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept, and taken from.")] = Path("balms-runs/figure1"),
    preset: Annotated[str, typer.Option(help="quick or paper.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of every run.")] = 0,
    data: Annotated[str, typer.Option(help="Any source of balms make-lt.")] = "cifar100",
    imbalance: Annotated[float, typer.Option(help="Imbalance factor.")] = 200,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of both stages (steps=20 ...).")] = None,
    out: Out = RESULTS,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
) -> None:
    check_place(out)
    found = open_runs(runs, data, imbalance, data_root, preset, seed, parse_set(sets or []), make_reporter(quiet))
    parent = found.pretrained("softmax")
    folders = {loss: found.rates(f"rates-{loss}", parent, loss=loss) for loss in LABELS}
    result = summary({loss: rates_of(folder) for loss, folder in folders.items()})
    if (data, imbalance) == PAPER_DATA:
        for loss, variance in PAPER_VARIANCE.items():
            result["losses"][loss]["variance_paper"] = variance
    report = report_of(folders["softmax"])
    options = {"preset": preset, "seed": seed, "data": data, "imbalance": imbalance, "set": sets or []}
    about = record("figure1.py", ["DATA_ROOT"], options, report, data=data_record(found.manifest),
                   seeds={"runs": seed, "draw": found.manifest.seed}, steps=report["steps"],
                   estimator=report["estimator"])  # fmt: skip
    figure = draw(result, title_of("Learned sample rates", found.manifest, preset))
    figure_data = {"figure": "Figure 1 of the supplement: learned sample rates with Meta Sampler", **about, **result}
    print(write(figure, figure_data, "figure1", out))


if __name__ == "__main__":
    start(main)
