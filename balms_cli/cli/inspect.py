"""From parsed options to the commands that train nothing: they look at data, at checkpoints, or at single images."""

from .console import make_reporter, print_result
from .execute import Params, in_world, resolve_params


def evaluate(params: Params) -> None:
    in_world(_evaluate, params)


def _evaluate(params: Params, world) -> None:
    from ..errors import ConfigError
    from . import inputs

    reporter = make_reporter(params["quiet"])
    resolved = resolve_params("evaluate", {**params, "require": params["require"] or None})
    if params["overwrite"] and params["report"] is None and params["predictions"] is None:
        raise ConfigError("--overwrite is about --report or --predictions: say where by one of them, or leave it out")
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    files = inputs.find_checkpoints(params["runs"], params["workspace"], ("retrain", "pretrain"), reporter)
    from ..engine.distributed import ALONE
    from ..stages.evaluate import hold_gates, run

    evaluation = run(resolved.config, files, params["data"], reporter, report=params["report"],
                     predictions=params["predictions"], overwrite=params["overwrite"], world=world or ALONE)  # fmt: skip
    if params["json"]:
        print_result(evaluation.to_json())
    else:
        print_result("\n".join(result["run"] for result in evaluation.runs))
    return hold_gates(resolved.config, evaluation)


def predict(params: Params) -> None:
    import os

    from ..errors import ConfigError
    from . import inputs, predictions

    reporter = make_reporter(params["quiet"])
    resolved = resolve_params("predict", params)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("predict is one process: start it without torchrun, and share the images out over several of it")
    if params["run"] == "-" and "-" in params["images"]:
        raise ConfigError("stdin can name the run or the images, not both: give one of them as a path")
    files = inputs.find_checkpoints([params["run"]], None, (), reporter)
    if len(files) != 1:
        raise ConfigError(f"predict takes one run, stdin names {len(files)}")
    from ..stages.predict import describe, load

    predictor = load(files[0], resolved.config, params["data"], reporter)
    describe(predictor, files[0], reporter)
    return predictions.write(predictor, params["images"], as_json=params["json"], quiet=params["quiet"], reporter=reporter)


def export(params: Params) -> None:
    from ..errors import ConfigError
    from . import inputs

    reporter = make_reporter(params["quiet"])
    resolved = resolve_params("export", params)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    argument = params["run"]
    files = inputs.find_checkpoints([argument] if argument else None, params["workspace"], ("retrain", "pretrain"), reporter)
    if len(files) != 1:
        raise ConfigError(f"export takes one run, stdin names {len(files)}")
    from ..stages.export import run

    result = run(resolved.config, files[0], params["out"], params["data"], reporter, overwrite=params["overwrite"])
    return print_result(result.to_json() if params["json"] else str(result.path))


def audit(params: Params) -> None:
    from ..errors import ConfigError
    from . import inputs

    reporter = make_reporter(params["quiet"])
    if params["data"] == "-":
        paths = inputs.read_paths("-")
        if len(paths) != 1:
            raise ConfigError(f"audit takes one data set, stdin names {len(paths)}")
        params = params | {"data": str(paths[0])}
    resolved = resolve_params("audit", params)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    config = resolved.config
    if config.data is None:
        config = config.model_copy(update={"data": str(inputs.find_manifest(None, params["workspace"], reporter).path)})
    from ..data.aside import replace_file
    from ..stages.audit import check_target, hold_strict, json_text, run

    if params["out"] is not None:
        check_target(params["out"], overwrite=params["overwrite"])
    result = run(config, reporter)
    if params["out"] is not None:
        replace_file(params["out"], json_text(result))
        reporter.note(f"written: {params['out']}")
    if params["json"]:
        print_result(result.to_json())
    if params["strict"]:
        hold_strict(result)  # before the path is printed: in a pipe, no stage goes on with such data
    return None if params["json"] else print_result(result.path)
