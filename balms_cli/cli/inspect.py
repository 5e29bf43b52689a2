"""From parsed options to the commands that train nothing: they look at data, at checkpoints, or at single images."""

from .console import make_reporter, print_result
from .execute import Params, in_world, resolve_params


def evaluate(params: Params) -> None:
    in_world(_evaluate, params)


def _evaluate(params: Params, world) -> None:
    from . import inputs

    reporter = make_reporter(params["quiet"])
    resolved = resolve_params("evaluate", params)
    if params["print_config"]:
        return print_result(resolved.to_toml().rstrip())
    files = inputs.find_checkpoints(params["runs"], params["workspace"], ("retrain", "pretrain"), reporter)
    from ..engine.distributed import ALONE
    from ..stages.evaluate import hold_gate, run

    evaluation = run(resolved.config, files, params["data"], reporter, world=world or ALONE)
    if params["json"]:
        print_result(evaluation.to_json())
    else:
        print_result("\n".join(result["run"] for result in evaluation.runs))
    return hold_gate(resolved.config, evaluation)
