"""``balms detect finetune``."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from ...config import DETECT_LOSSES
from .. import options as o
from ..console import make_reporter, print_result
from ..execute import Params, in_world, restarted
from . import common as c

STAGE = "detect-finetune"
_KANG = "Kang et al. 2020: LWS"


@o.having(o.TRAINING, o.CONFIG, o.MACHINE, o.RUN, o.TELLING)
def command(
    ctx: Context,
    run: Annotated[str | None, Argument(metavar="[RUN]", help="A detector: its run's folder or model.safetensors, - for stdin "
                                        "(default: the newest detect train run of the workspace).")] = None,
    source: Annotated[str | None, Option("--from", metavar="RUN", help="The same, as an option.")] = None,
    loss: Annotated[str | None, Option(help=f"Loss of the box classifier: {', '.join(DETECT_LOSSES)} (default: the balanced "
                                       "one of the detector's family).", autocompletion=o.complete(*DETECT_LOSSES))] = None,
    classifier: Annotated[str | None, Option(help="What is tuned: linear, the layer, or lws, a scale for each of its rows.",
                                             autocompletion=o.complete("linear", "lws"))] = None,
    sampler: Annotated[str | None, Option(help="Images of a step: repeat (repeat factors), or class (class-balanced).",
                                          autocompletion=o.complete("repeat", "class"))] = None,
    meta_reweigher: Annotated[
        bool | None, Option("--meta-reweigher", help="Learn category weights (BALMS); twice the time.")
    ] = None,
    meta_loss: Annotated[str | None, Option(help="Read on the meta batch: plain, or adjusted as the released code has it by a "
                                            "slip.", autocompletion=o.complete("plain", "adjusted"))] = None,
    hypergradient: o.Hypergradient = None,
    cache: Annotated[bool | None, Option("--cache/--online", help="Features of all images computed once and kept beside the "
                                         "detector, or anew in every step.")] = None,
    views: Annotated[int | None, Option(help="Cache: augmented views of every image.")] = None,
    data: Annotated[Path | None, Option(metavar="JSON", help="Other annotations than the detector's own, of the same "
                                        "categories.")] = None,
    images: c.Images = None,
    repeat_threshold: c.RepeatThreshold = None,
    preset: c.Preset = None,
    steps: o.Steps = None,
    **options,
) -> None:  # fmt: skip
    """Tune the box classifier alone, for rare categories (default: balanced softmax or sigmoid). All else stays as it was."""
    in_world(_finetune, ctx.params)


def _finetune(params: Params, world) -> None:
    from ...detection.header import read_detect_header

    reporter = make_reporter(params["quiet"])
    params = restarted(params) or params
    if params["resume"] is not None:
        found = c.reopen_run(STAGE, params, reporter, world)
        if found is None:
            return None
        folder, resolved, annotations, images, parent_file = found
        return _run(folder, resolved, parent_file, annotations, images, reporter, params, world, resume=True)
    parent_file = _parent(params, reporter)
    parent = read_detect_header(parent_file)
    resolved = _resolved(params, parent)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    from ...data.aside import printable
    from ...detection.annotations import load_annotations
    from ...detection.steps import run_label
    from ...engine.tensorboard import require_tensorboard
    from ...errors import ConfigError, DataError

    require_tensorboard(resolved.config)
    if params["data"] is None and not Path(resolved.config.annotations).is_file():
        raise DataError(f"the annotations of {parent_file} are no longer at {printable(parent.annotations)}; say where they "
                        "are by --data")  # fmt: skip
    file, images, resolved = c.find_data(resolved, "train")
    folder = c.begin_run(STAGE, run_label(resolved, file), params, resolved, reporter, world)
    if folder.path.resolve() == parent_file.parent.resolve():
        raise ConfigError(f"--out {folder.path} is the run that finetune starts from: choose another, or it is lost")
    annotations = load_annotations(file, masks=parent.architecture.masks)
    return _run(folder, resolved, parent_file, annotations, images, reporter, params, world, resume=False)


def _parent(params: Params, reporter) -> Path:
    """The checkpoint file to start from. Raises DataError or CheckpointError."""
    from ...detection.header import detector_file
    from ...errors import ConfigError
    from ..inputs import read_paths

    given = [params[key] for key in ("run", "source") if params[key] is not None]
    if len(given) == 2:
        raise ConfigError("the detector is named twice, as RUN and by --from: leave one of them out")
    if given:
        return detector_file(read_paths(given[0])[0])
    return c.newest(params, ("detect-train",), reporter)


class _Recipes:
    """The presets of detection, but what the detector has to say of its images and its classifier stands before them."""

    def __init__(self, parent) -> None:
        from ... import presets_detect

        self.presets, self.parent = presets_detect, parent
        views = {"min_sizes": parent.architecture.min_sizes, "max_size": parent.architecture.max_size}
        own = parent.recipe
        self.own = views | {key: own[key] for key in ("flip", "repeat_threshold") if key in own}
        self.own |= {"annotations": parent.annotations, "images": parent.images}

    def choose(self, stage: str, kind: str, name: str | None, *, on_gpu: bool) -> tuple[str, dict[str, Any]]:
        name, values = self.presets.choose(stage, kind, name, on_gpu=on_gpu)
        return name, {key: value for key, value in values.items() if key not in self.own}

    def sources(self, stage: str, name: str) -> dict[str, str]:
        return self.presets.sources(stage, name)

    def methods(self, chosen: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        own = dict(self.own)
        if "annotations" in chosen:  # other annotations: their images lie beside them
            own.pop("images")
        layers = [("the detector", own), ("the detector's family", {"loss": f"balanced-{self.parent.architecture.family}"})]
        if chosen.get("classifier") == "lws":
            layers.append((f"method {_KANG}", {"loss": self.parent.architecture.family, "sampler": "class"}))
        return layers


def _resolved(params: Params, parent):
    from ..execute import resolve_params

    return resolve_params(STAGE, params | {"annotations": params["data"]}, "any", _Recipes(parent))


def _run(folder, resolved, parent_file: Path, annotations, images: Path, reporter, params: Params, world, *, resume: bool
         ) -> None:  # fmt: skip
    from ...detection import finetune
    from ...engine.distributed import ALONE

    if params["dry_run"]:
        return finetune.show_plan(resolved, parent_file, annotations, images, folder, reporter)
    result = finetune.run(resolved, parent_file, annotations, images, folder, reporter, resume=resume, world=world or ALONE)
    print_result(result.to_json() if params["json"] else str(result.path))
