"""``balms detect evaluate``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from .. import options as o
from ..console import make_reporter, print_result
from ..execute import Params, in_world, resolve_params
from . import common as c


@o.having(o.CONFIG, o.MACHINE, o.WORKSPACE, o.TELLING)
def command(
    ctx: Context,
    runs: Annotated[list[str] | None, Argument(metavar="RUN...", help="Detectors to score side by side, - for stdin "
                                               "(default: the newest of the workspace).")] = None,
    results: Annotated[list[Path] | None, Option("--results", metavar="FILE", help="Score a results file of LVIS's format; "
                                                 "repeatable; needs --data.")] = None,
    data: Annotated[str | None, Option("--data", metavar="JSON", help="Annotations to score on (default: those with val in "
                                       "their name beside the training JSON).")] = None,
    images: c.Images = None,
    evaluator: Annotated[str | None, Option(help="hotcoco, or lvis: the official tool. The same numbers, slower.",
                                            autocompletion=o.complete("hotcoco", "lvis"))] = None,
    gt_boxes: Annotated[bool, Option("--gt-boxes", help="Classify the true boxes too: accuracy of rare, common and frequent "
                                     "categories without what proposals miss.")] = False,
    report: Annotated[Path | None, Option(metavar="FOLDER", help="Write a report there: one page (index.html), its figures as "
                                          "PNG, its numbers as JSON and CSV.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier report in --report.")] = False,
    require: Annotated[list[str] | None, Option(metavar="EXPR", help="Gate such as 'AP_r>=0.10' (of masks where there are "
                                                "some) or 'bbox.AP>=20%'; repeatable; exit 6 where one is not met.")] = None,
    per_category: Annotated[list[Path] | None, Option("--per-category", metavar="FILE", help="Write AP and training images of "
                                                      "each category: .csv, .json or .png (a plot); repeatable.")] = None,
    top: Annotated[int, Option(min=0, help="How many of the rarest and of the most frequent categories are shown.")] = 5,
    save_results: Annotated[Path | None, Option("--save-results", metavar="FILE", help="Where the detections are written in "
                                                "LVIS's format (default: in the run's folder).")] = None,
    batch_size: o.BatchSize = None,
    **options,
) -> None:  # fmt: skip
    """Score detectors by LVIS's rules: AP of boxes and masks, overall and of rare, common and frequent categories.

    Prints the runs' folders. The detections of each are written there, as the official tool reads them.
    """
    in_world(_evaluate, ctx.params)


def _evaluate(params: Params, world) -> None:
    from ...detection import per_category

    reporter = make_reporter(params["quiet"])
    flags = {**params, "annotations": params["data"], "require": params["require"] or None}
    resolved = resolve_params("detect-evaluate", flags)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    targets = params["per_category"] or []
    for target in targets:
        per_category.check_target(target)
    files = _checkpoints(params, reporter)
    from ...detection.evaluate import hold_gates, run
    from ...engine.distributed import ALONE

    world = world or ALONE
    evaluation = run(resolved.config, files, params["results"], reporter, save=params["save_results"],
                     gt_boxes=params["gt_boxes"], report=params["report"], overwrite=params["overwrite"],
                     world=world)  # fmt: skip
    _show_categories(evaluation.scored, params["top"], reporter)
    if world.main:
        _write_categories(evaluation.scored, targets, reporter)
    if params["json"]:
        print_result(evaluation.to_json())
    else:
        print_result("\n".join(one["run"] or one["results"] for one in evaluation.scored))
    return hold_gates(resolved.config, evaluation)


def _checkpoints(params: Params, reporter) -> list[Path]:
    from ...detection.header import detector_file
    from ..inputs import read_paths

    if params["runs"]:
        return [detector_file(path) for argument in params["runs"] for path in read_paths(argument)]
    if params["results"]:
        return []
    return [c.newest(params, ("detect-train", "detect-finetune"), reporter)]


def _show_categories(scored: list[dict], top: int, reporter) -> None:
    """The rarest and the most frequent categories of each run."""
    from ...data.aside import printable
    from ...detection.evaluate import names_of
    from ...detection.per_category import ends

    kinds = {"bbox": "AP boxes", "segm": "AP masks"}
    for name, one in zip(names_of(scored), scored, strict=True) if top else []:
        there = [kind for kind in kinds if kind in one]
        rows = [[printable(row["name"]), row["frequency"], "-" if row["train_images"] is None else f"{row['train_images']:,}",
                 f"{row['images']:,}", f"{row['objects']:,}", *(f"{100 * row[kind]:.1f}" if row[kind] is not None else "-"
                                                                 for kind in there)]
                for row in ends(one["per_category"], top)]  # fmt: skip
        reporter.table(f"{name}: categories with fewest and with most training images",
                       ["category", "group", "training images", "images", "objects", *(kinds[kind] for kind in there)],
                       rows)  # fmt: skip


def _write_categories(scored: list[dict], targets: list[Path], reporter) -> None:
    """Of several runs a table holds all, and a plot is a file each: NAME-RUN.png."""
    from ...data.aside import replace_file
    from ...detection.evaluate import names_of
    from ...detection.per_category import plotted, write_table

    for target in targets:
        if target.suffix.lower() != ".png":
            write_table([(one["run"] or one["results"], one["per_category"]) for one in scored], target)
            reporter.note(f"categories: {target}")
            continue
        from ...report.categories import category_png

        for number, (name, one) in enumerate(zip(names_of(scored), scored, strict=True), 1):
            kind = "segm" if "segm" in one else "bbox"
            path = target if len(scored) == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}")
            replace_file(path, category_png(name, plotted(one["per_category"], kind), kind))
            reporter.note(f"categories of {name}: {path}")
