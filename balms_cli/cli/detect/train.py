"""``balms detect train``."""

from typing import Annotated

from typer import Argument, Context, Option

from .. import options as o
from ..console import make_reporter, print_result
from ..execute import Params, in_world, resolve_params, restarted
from . import common as c


@o.having(o.TRAINING, o.CONFIG, o.MACHINE, o.RUN, o.TELLING)
def command(
    ctx: Context,
    data: Annotated[str | None, Argument(metavar="DATA", help="An LVIS- or COCO-format JSON, or a folder with one that has "
                                         "train in its name.")] = None,
    images: c.Images = None,
    loss: Annotated[str | None, Option(help="Box classifier: softmax (and background), or sigmoid.",
                                       autocompletion=o.complete("softmax", "sigmoid"))] = None,
    backbone: Annotated[
        str | None, Option(help="resnet50, mobilenet_v3_large, any torchvision or timm:NAME network with maps at four scales.")
    ] = None,
    weights: Annotated[
        str | None, Option(help="Start from imagenet (torchvision's), timm, pip:PACKAGE (a file in it), or a weights file.")
    ] = None,
    masks: Annotated[bool | None, Option("--masks/--no-masks", help="Masks too (Mask R-CNN), or boxes alone.")] = None,
    class_agnostic: Annotated[bool | None, Option("--class-agnostic/--class-specific", help="One box and one mask for all "
                                                  "categories, or one a category.")] = None,
    repeat_threshold: c.RepeatThreshold = None,
    preset: c.Preset = None,
    steps: o.Steps = None,
    offline: o.Offline = None,
    **options,
) -> None:  # fmt: skip
    """Train a whole detector: Mask R-CNN on a feature pyramid, images drawn by repeat factors."""
    in_world(_train, ctx.params)


def _train(params: Params, world) -> None:
    reporter = make_reporter(params["quiet"])
    params = restarted(params) or params
    if params["resume"] is not None:
        found = c.reopen_run("detect-train", params, reporter, world)
        return found and _run(*found[:4], reporter, params, world, resume=True)
    from ... import presets_detect
    from ...errors import ConfigError

    resolved = resolve_params("detect-train", params | {"annotations": params["data"]}, "any", presets_detect)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    if resolved.config.annotations is None:
        raise ConfigError("no data is named: balms detect train DATA, a folder with a training JSON or the JSON itself")
    from ...detection.annotations import load_annotations
    from ...detection.steps import run_label
    from ...engine.tensorboard import require_tensorboard

    require_tensorboard(resolved.config)
    file, images, resolved = c.find_data(resolved, "train")
    folder = c.begin_run("detect-train", run_label(resolved, file), params, resolved, reporter, world)
    annotations = load_annotations(file, masks=resolved.config.masks)
    if params["dry_run"]:
        from ...detection.plan import show_plan

        return show_plan(resolved, annotations, images, folder, reporter, offline=bool(params["offline"]))
    return _run(folder, resolved, annotations, images, reporter, params, world, resume=False)


def _run(folder, resolved, annotations, images, reporter, params: Params, world, *, resume: bool) -> None:
    from ...detection import train
    from ...engine.distributed import ALONE

    result = train.run(resolved, annotations, images, folder, reporter, resume=resume, offline=bool(params["offline"]),
                       world=world or ALONE)  # fmt: skip
    print_result(result.to_json() if params["json"] else str(result.path))
