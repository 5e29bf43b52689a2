"""``balms detect stats``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from .. import options as o
from ..console import make_reporter, print_result
from ..execute import Params


def command(
    ctx: Context,
    data: Annotated[str, Argument(metavar="JSON", help="An LVIS- or COCO-format JSON, or a folder with one that has train in "
                                  "its name.")],
    images: Annotated[Path | None, Option("--images", metavar="DIR", help="Look for the image files there too.")] = None,
    masks: Annotated[bool, Option("--masks/--no-masks", help="Count what can be trained on with masks, or with boxes alone.")
                     ] = True,
    repeat_threshold: Annotated[float, Option(min=0, max=1, help="Repeat factor sampling: images of categories in a smaller "
                                              "share of the images than this come more often.")] = 0.001,
    top: Annotated[int, Option(min=0, help="How many of the rarest and of the most frequent categories are shown.")] = 10,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Show how long the tail of annotations is: frequency groups, priors, repeat factors, and what cannot be trained on."""
    _stats(ctx.params)


def _stats(params: Params) -> None:
    from ...detection.annotations import find_annotations, find_images, load_annotations
    from ...detection.stats import measure, show

    reporter = make_reporter(params["quiet"])
    file = find_annotations(params["data"], "train")
    folder = None if params["images"] is None else find_images(file, params["images"])
    stats = measure(load_annotations(file, masks=params["masks"]), params["repeat_threshold"], folder)
    show(stats, reporter, params["top"])
    print_result(stats.to_json() if params["json"] else str(file))
