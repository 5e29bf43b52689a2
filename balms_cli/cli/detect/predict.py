"""``balms detect predict``."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from .. import options as o
from ..console import make_reporter, print_result
from ..execute import Params, resolve_params


def command(
    ctx: Context,
    run: Annotated[str, Argument(metavar="RUN", help="A detector's run folder or its model.safetensors, - for stdin.")],
    photos: Annotated[list[str], Argument(metavar="IMAGES...", help="Image files, and folders with images at any depth; - "
                                          "reads paths from stdin, one a line.")],
    score_threshold: Annotated[float | None, Option(min=0, max=1, help="Show what scores at least this (default 0.3).")] = None,
    detections: Annotated[int | None, Option(min=1, help="Objects an image at most (default 100).")] = None,
    pictures: Annotated[bool, Option("--pictures/--no-pictures", help="Draw boxes, masks and names (default: yes).",
                                     rich_help_panel="Output")] = True,
    json: Annotated[bool, Option("--json", help="Print one JSON object a line, for each image.",
                                 rich_help_panel="Output")] = False,
    config: o.ConfigFile = None,
    sets: o.Sets = None,
    print_config: o.PrintConfig = False,
    device: o.Device = None,
    precision: o.Precision = None,
    workspace: o.Workspace = Path("balms-runs"),
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Find objects in photos: a folder of pictures with boxes, masks, names and scores, and JSON lines.

    Prints the folder's path; with --no-pictures a line an object, PATH, CATEGORY, SCORE, X, Y, WIDTH, HEIGHT between tabs.
    What cannot be read is told on stderr and left out; exit 3 where nothing could be read.
    """
    _predict(ctx.params)


def _predict(params: Params) -> None:
    import os

    from ...errors import ConfigError
    from ..inputs import read_paths

    reporter = make_reporter(params["quiet"])
    resolved = resolve_params("detect-predict", params)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("detect predict is one process: start it without torchrun, and share the images out over several")
    if params["run"] == "-" and "-" in params["photos"]:
        raise ConfigError("stdin can name the run or the images, not both: give one of them as a path")
    if not params["pictures"] and (params["out"] or params["overwrite"]):
        raise ConfigError("--out and --overwrite are about the pictures: leave them out, or --no-pictures")
    runs = read_paths(params["run"])
    if len(runs) != 1:
        raise ConfigError(f"detect predict takes one run, stdin names {len(runs)}")
    from ...detection.header import detector_file, read_detect_header

    file = detector_file(runs[0])
    read_detect_header(file)  # what is no detector is told before torch is loaded
    from ...detection import predict

    results = None
    if params["pictures"]:
        folder = params["out"] or predict.default_folder(params["workspace"], file.resolve().parent)
        results = predict.Results(folder, overwrite=params["overwrite"])
    predictor = predict.load(file, resolved.config)
    predict.describe(predictor, file.resolve().parent.name, reporter)
    return _write(predictor, results, params, resolved.config.score_threshold, reporter)


def _write(predictor, results, params: Params, threshold: float, reporter) -> None:
    """Photo by photo. Raises: DataError (exit 3) where not one could be read."""
    import time
    from collections import Counter
    from contextlib import closing
    from json import dumps

    from ...data.aside import printable
    from ...detection.predict import text_line
    from ...errors import DataError
    from ..predictions import nothing_read, passed_over, paths_of

    passed, first = Counter(), None
    good = bad = objects = empty = 0
    began = said = time.monotonic()
    out = None if results is None else results.folder
    with closing(predictor.predict(paths_of(params["photos"]), passed, out=out)) as photos:
        for photo in photos:
            if photo.error is not None:
                reporter.warn(f"{printable(photo.path)} is left out: {photo.error}")
                first = first or f"{printable(photo.path)}: {photo.error}"
            good, bad = good + (photo.error is None), bad + (photo.error is not None)
            objects, empty = objects + len(photo.detections), empty + (photo.error is None and not photo.detections)
            picture = None if results is None else results.write(photo)
            if params["json"]:
                print_result(dumps(photo.to_json(picture)))
            elif results is None and photo.detections:
                print_result("\n".join(text_line(photo, found) for found in photo.detections))
            if time.monotonic() - said > 10:
                said = time.monotonic()
                reporter.note(f"{good + bad:,} images, {(good + bad) / (said - began):.1f} a second")
    if not good:
        raise DataError(nothing_read(bad, passed, first))
    if not objects:
        reporter.warn(f"nothing scores {threshold:g} or more in these images; a lower --score-threshold shows more")
    reporter.note(f"found: {objects:,} objects in {good - empty:,} of {good:,} images, {time.monotonic() - began:.1f} s"
                  f"{passed_over(passed)}")  # fmt: skip
    if results is not None:
        reporter.note(f"pictures: {results.folder}, with all numbers in {results.folder / 'predictions.jsonl'}")
        if not params["json"]:
            print_result(str(results.folder))
