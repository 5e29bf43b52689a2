"""What it costs to know every example's influence through a whole network: ResNet-32, batch 128, meta batch 128, 32 px.

(a) a plain forward and backward pass, no optimizer step;
(b) the influence at zero weights, which L2RW needs each step, by one forward-mode pass: virtual step, meta gradient,
    directional derivative of the per-example losses; BatchNorm in train mode;
(c) the same number through ``higher``, which differentiates through the virtual step;
(d) the influence at the weights of a Meta-Weight-Net, as (b) but with a first pass for losses and gradient.

Medians of several rounds in which all sides take their turn, after a warm-up; float32, random images, channels last as
``balms pretrain`` has them. With one thread on a CPU the clock is that of the process, which stands still while others
work; else it is the wall's. Peak memory is what torch allocates at most during one call, beyond network and batches. The
relative difference of (b) and (c) is taken in float64.

    python examples/bench_influence.py [--json] [--out FILE] [--threads 1] [--device cpu] [--repeats 7]
"""

import json as json_module
import os
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated

import higher  # noqa: F401  loaded before anything is measured
import torch
import typer
from torch import Tensor

from balms_cli.engine.runtime import versions
from balms_cli.losses import SoftmaxLoss
from balms_cli.meta.influence import Influence, influence
from balms_cli.meta.weight_net import MetaWeightNet
from balms_cli.models.backbones import build_backbone
from balms_cli.models.classifiers import Classifier, linear_head

BATCH, CLASSES, SIZE = 128, 10, 32
SIDES = {"a": "plain forward and backward", "b": "influence at zero weights, forward mode", "c": "the same through higher",
         "d": "influence at a net's weights, forward mode"}  # fmt: skip


def sides(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Influence | None]]:
    """The four computations on one network whose momentum buffers are in use."""
    torch.manual_seed(0)
    model = Classifier(build_backbone("resnet32", SIZE), linear_head(64, CLASSES))
    model = model.to(device, dtype, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loss, net = SoftmaxLoss(), MetaWeightNet().to(device)

    def read() -> tuple[Tensor, Tensor]:
        images = torch.randn(BATCH, 3, SIZE, SIZE, dtype=dtype).to(device, memory_format=torch.channels_last)
        return images, torch.randint(CLASSES, (BATCH,)).to(device)

    data, meta_data = read(), read()

    def plain() -> None:
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()

    def by(method: str, weights_B) -> Callable[[], Influence]:
        return lambda: influence(model, optimizer, loss, data, meta_data, weights_B=weights_B, method=method)

    plain()
    optimizer.step()
    optimizer.zero_grad()
    return {"a": plain, "b": by("jvp", 0.0), "c": by("higher", 0.0), "d": by("jvp", net.weights)}


def seconds(call: Callable, device: str, threads: int) -> float:
    on_gpu = device != "cpu"
    clock = time.process_time if threads == 1 and not on_gpu else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize(device)
    began = clock()
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - began


def peak(call: Callable, device: str) -> int:
    """Bytes that one call allocates at its peak. On a CPU counted event by event: resident memory depends on the past."""
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def relative_difference(device: str) -> float:
    """Largest |h_b - h_c| over the largest |h_c|, in float64."""
    exact = sides(device, dtype=torch.float64)
    forward_B, reference_B = exact["b"]().influence_B, exact["c"]().influence_B
    return ((forward_B - reference_B).abs().max() / reference_B.abs().max()).item()


def main(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write that object here too.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch on a CPU.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds; the median of each side counts.", min=1)] = 7,
):
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to stderr on its own
    torch.set_num_threads(threads)
    difference = relative_difference(device)
    calls = sides(device)
    for call in calls.values():
        call()
    memory = {side: peak(call, device) for side, call in calls.items()}
    rounds = [{side: seconds(call, device, threads) for side, call in calls.items()} for _ in range(repeats)]
    spent = {side: statistics.median(r[side] for r in rounds) for side in SIDES}

    result = {
        "ratios": {"b/a": round(spent["b"] / spent["a"], 2), "c/a": round(spent["c"] / spent["a"], 2),
                   "d/a": round(spent["d"] / spent["a"], 2), "c/b": round(spent["c"] / spent["b"], 2),
                   "memory c/b": round(memory["c"] / memory["b"], 2)},
        "must": {"b/a": "at most 3.5", "c/b": "more than 1", "memory c/b": "more than 1"},
        "milliseconds": {side: round(1e3 * s, 1) for side, s in spent.items()},
        "peak_megabytes": {side: round(m / 1e6, 1) for side, m in memory.items()},
        "relative_difference_b_c_float64": difference,
        "network": "resnet32", "batch": BATCH, "meta_batch": BATCH, "data": "random images", "precision": "fp32",
        "clock": "process" if threads == 1 and device == "cpu" else "wall", "repeats": repeats,
        "device": f"cpu, {threads} threads" if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": versions(), "date": date.today().isoformat(), "command": "python examples/bench_influence.py",
    }  # fmt: skip
    if out:
        out.write_text(json_module.dumps(result, indent=1) + "\n")
    if json:
        print(json_module.dumps(result))
        return
    for side, text in SIDES.items():
        print(f"({side}) {text:44} {1e3 * spent[side]:9.1f} ms {memory[side] / 1e6:9.1f} MB at the peak")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio}" + (f"  (must be {result['must'][name]})" if name in result["must"] else ""))
    print(f"largest difference of (b) and (c) in float64, relative: {difference:.1e}")


if __name__ == "__main__":
    typer.run(main)
