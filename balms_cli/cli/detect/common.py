"""What the subcommands of ``balms detect`` share: options said once, the configuration, and runs that go on."""

from pathlib import Path
from typing import Annotated

from typer import Option

from ..execute import Params, agreed, reopen, told_complete
from ..options import complete

_RECIPE = "Recipe"

Images = Annotated[Path | None, Option("--images", metavar="DIR", help="Folder of the images (default: images/ beside the "
                                       "JSON, else the JSON's own).")]  # fmt: skip
Preset = Annotated[str | None, Option(help="paper, reference (the released code's values) or quick (default: quick on a CPU, "
                                      "paper on a GPU).", autocompletion=complete("paper", "reference", "quick"),
                                      rich_help_panel=_RECIPE)]  # fmt: skip
RepeatThreshold = Annotated[float | None, Option(help="Repeat factor sampling: images of categories in a smaller share of "
                                                 "the images than this come more often (0: off).",
                                                 rich_help_panel=_RECIPE)]  # fmt: skip


def newest(params: Params, stages: tuple[str, ...], reporter) -> Path:
    """The checkpoint of the newest complete detector of these stages, named on stderr. Raises DataError where there is none."""
    from ...detection.header import detector_file, newest_detector
    from ...engine.run_dir import interrupted_run
    from ...errors import DataError

    found = newest_detector(params["workspace"], stages)
    if found is None:
        kind = "detect train run" if stages == ("detect-train",) else "detector"
        begun = interrupted_run(params["workspace"], stages)
        advice = f"go on with the interrupted one: {begun}" if begun else "run balms detect train first"
        raise DataError(f"there is no complete {kind} in {params['workspace']}; {advice}")
    reporter.note(f"detector: {found} (the newest of {params['workspace']})")
    return detector_file(found)


def find_data(resolved, split: str):
    """The annotations file and the images' folder that a configuration names, and the configuration with both in full.

    Raises DataError (exit 3) where they are not there.
    """
    from ...detection.annotations import find_annotations, find_images

    config = resolved.config
    file = find_annotations(config.annotations, split)
    images = find_images(file, config.images)
    config = config.model_copy(update={"annotations": str(file.resolve()), "images": str(images.resolve())})
    return file, images, type(resolved)(resolved.stage, config, resolved.sources, resolved.preset)


def reopen_run(stage: str, params: Params, reporter, world):
    """``--resume``: (folder, configuration, annotations, images, parent file or None) of the run; None where it is complete,
    which is told. Raises CheckpointError (exit 4) where it no longer has what it began with."""
    from ...detection.annotations import load_annotations
    from ...detection.header import read_detect_header
    from ...engine.run_dir import check_unchanged

    folder, resolved, record = reopen(stage, params, world)
    if folder.complete(stage):
        return told_complete(folder, reporter)
    parent = Path(record["parent"]) if "parent" in record else None
    masks = resolved.config.masks if parent is None else read_detect_header(parent).architecture.masks
    annotations = load_annotations(Path(record["manifest"]), masks=masks)
    check_unchanged(folder, record, annotations, parent)
    return folder, resolved, annotations, Path(record["images"]), parent


def begin_run(stage: str, label: str, params: Params, resolved, reporter, world):
    """The folder of a new run (nothing is made yet), the same in all processes; says which preset holds."""
    from ...engine.run_dir import new_run

    folder = new_run(stage, label, workspace=params["workspace"], out=params["out"], overwrite=params["overwrite"])
    folder = agreed(folder, world)
    reporter.note(f"preset {resolved.preset}; {sum(s != 'default' for s in resolved.sources.values())} values set by preset, "
                  f"file or flag; all of them: --print-config, or {folder.path}/config.toml")  # fmt: skip
    return folder
