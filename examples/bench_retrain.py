"""What the meta sampler costs, on the features of CIFAR-10-LT at imbalance factor 200, batch 512.

(a) an iteration of ``balms retrain --loss balanced``, as the stage runs it;
(b) the same with ``--meta-sampler``: influence in closed form;
(c) the paper's computation written plainly: a Gumbel-softmax over all N images for every row of the batch, the bi-level
    step through ``higher``, features given for free;
(d) as (c), with the backbone's three forward passes a step (train batch, meta batch, train batch again).

(a) and (b) are whole runs of 2,000 iterations, medians of several in turn; (c) and (d) are medians of 20 iterations after
a warm-up. All in one process: same machine, threads, precision (float32) and data. Peak memory of (b) is what the process
adds while iterating, beyond the bank, at N and at 10 N images.

    python examples/bench_retrain.py DATA_ROOT [--json] [--out FILE] [--device cpu]

Without DATA_ROOT (a folder with cifar10.zip or the like) random features of the same shape are used and the result says so.
"""

import json as json_module
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from bench_influence import peak

from balms_cli.config import MakeLTConfig, RetrainConfig
from balms_cli.data.features import FeatureBank
from balms_cli.data.images import load_pixels
from balms_cli.data.longtail import class_counts_exponential
from balms_cli.data.samplers import ClassIndex, batches
from balms_cli.engine.optim import Guard, make_sgd
from balms_cli.engine.runtime import setup, versions
from balms_cli.losses import BalancedSoftmaxLoss
from balms_cli.meta.sampler import MetaSampler
from balms_cli.models.classifiers import linear_head
from balms_cli.models.resnet_cifar import ResNetCifar
from balms_cli.reporter import Reporter
from balms_cli.stages import make_lt
from balms_cli.stages.decoupled import plain_step, sampler_step
from balms_cli.stages.features import Features, bank_reader

BATCH, STEPS, ROUNDS, TIMED, WARMUP = 512, 2000, 5, 20, 2


def labels_of(counts) -> torch.Tensor:
    return torch.repeat_interleave(torch.tensor(counts))


def load_images(data_root: Path | None) -> tuple[torch.Tensor, torch.Tensor, str]:
    """uint8 images and labels of CIFAR-10-LT IF 200, or noise of the same shape."""
    if data_root is None:
        labels = labels_of(class_counts_exponential(5000, 10, 200))
        return torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8), labels, "random images"
    with tempfile.TemporaryDirectory() as workspace:
        config = MakeLTConfig(source="cifar10", imbalance=200, data_root=str(data_root), offline=True)
        manifest = make_lt.run(config, Path(workspace)).manifest
        pixels = torch.from_numpy(np.ascontiguousarray(load_pixels(manifest, "train", 32, Reporter())))
    return pixels, torch.from_numpy(manifest.splits["train"].labels), f"CIFAR-10-LT IF 200, sha256 {manifest.sha256[:12]}"


def stage_step(features: torch.Tensor, labels: torch.Tensor, *, meta: bool):
    """The step function of the stage itself, on a bank of one view an image, with its head and guard."""
    ones = torch.ones(len(labels), dtype=torch.int64)
    device = features.device
    bank = FeatureBank(features, torch.arange(len(labels)), ones)
    index = ClassIndex(labels, 10)
    data = Features(bank_reader(bank, 0, device), labels, index)
    config = RetrainConfig(batch_size=BATCH, meta_batch_size=BATCH, meta_sampler=meta)
    head = linear_head(features.shape[1], 10).to(device)
    loss = BalancedSoftmaxLoss(index.counts).to(device).float()
    optimizer = make_sgd(head, config)
    if not meta:
        return plain_step(head, optimizer, loss, data, batches("instance", index, BATCH, STEPS, 0))
    sampler = MetaSampler(index.counts.cpu()).to(device)
    adam = torch.optim.Adam(sampler.parameters(), lr=0.01, betas=(0.9, 0.99), fused=True)
    return sampler_step(config, head, optimizer, loss, sampler, adam, data, data, None)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(step, steps: int, device: torch.device) -> float:
    guard = Guard(device)
    wait_for(device)
    began = time.perf_counter()
    for i in range(steps):
        step(i, guard)
    wait_for(device)
    return (time.perf_counter() - began) / steps


def plain_paper_step(features, labels, pixels=None, backbone=None):
    """The text's own computation, as one would write it down: nothing here is shared with the package's meta room."""
    import higher

    counts, device = torch.bincount(labels).float(), labels.device
    n = len(labels)
    theta = torch.zeros(10, requires_grad=True, device=device)
    head = torch.nn.Linear(features.shape[1], 10).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    adam = torch.optim.Adam([theta], lr=0.01, betas=(0.9, 0.99))
    order = [torch.nonzero(labels == c).flatten() for c in range(10)]

    def read(indices):
        if backbone is None:
            return features[indices]
        with torch.no_grad():
            return backbone(pixels[indices].float() / 127.5 - 1)

    def step(i, guard):
        log_rho = theta.sigmoid().log()[labels]
        gumbel = -torch.empty(BATCH, n, device=device).exponential_().log()
        soft = ((log_rho + gumbel) / 1.0).softmax(1)
        drawn = soft.argmax(1)
        sample = torch.zeros_like(soft).scatter_(1, drawn[:, None], 1.0) - soft.detach() + soft
        weights = sample.gather(1, drawn[:, None]).squeeze(1)
        targets = labels[drawn]
        meta = torch.stack([order[c][int(torch.randint(len(order[c]), ()))] for c in torch.randint(10, (BATCH,)).tolist()])
        with higher.innerloop_ctx(head, optimizer) as (fast, inner):
            losses = F.cross_entropy(fast(read(drawn)) + counts.log(), targets, reduction="none")
            inner.step((losses * weights).mean())
            meta_loss = F.cross_entropy(fast(read(meta)), labels[meta])
            adam.zero_grad()
            meta_loss.backward()
        adam.step()
        optimizer.zero_grad()
        F.cross_entropy(head(read(drawn)) + counts.log(), targets).backward()
        optimizer.step()

    return step


def median_of_iterations(step, timed: int, device: torch.device) -> float:
    times = []
    for i in range(WARMUP + timed):
        wait_for(device)
        began = time.perf_counter()
        step(i, None)
        wait_for(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARMUP:])


def peak_growth(n_factor: int, device: torch.device) -> int:
    """Bytes that 50 iterations of (b) allocate at their peak, on a synthetic bank of ``n_factor`` times the images."""
    labels = labels_of([c * n_factor for c in class_counts_exponential(5000, 10, 200)]).to(device)
    step = stage_step(torch.randn(len(labels), 64, device=device), labels, meta=True)
    guard = Guard(device)
    step(0, guard)
    return peak(lambda: [step(i, guard) for i in range(1, 51)], str(device))


def main(
    data_root: Annotated[Path | None, typer.Argument(help="Folder with cifar10.zip or the like.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write that object here too.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    rehearse: Annotated[bool, typer.Option("--rehearse", help="A few steps, to see that it runs.")] = False,
):
    steps, rounds, timed = (20, 1, 1) if rehearse else (STEPS, ROUNDS, TIMED)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    where = setup(device, "fp32").device
    pixels, labels, data = load_images(data_root)
    pixels, labels = pixels.to(where), labels.to(where)
    backbone = ResNetCifar(32).eval().to(where)
    with torch.no_grad():
        features = torch.cat([backbone(p.float() / 127.5 - 1) for p in pixels.split(512)])

    plain, balms = stage_step(features, labels, meta=False), stage_step(features, labels, meta=True)
    seconds_a_step(plain, 100, where), seconds_a_step(balms, 100, where)
    a, b = [], []
    for _ in range(rounds):  # in turn, so that a noisy moment hits both
        a.append(seconds_a_step(plain, steps, where))
        b.append(seconds_a_step(balms, steps, where))
    a, b = statistics.median(a), statistics.median(b)
    c = median_of_iterations(plain_paper_step(features, labels), timed, where)
    d = median_of_iterations(plain_paper_step(features, labels, pixels, backbone), timed, where)
    memory = SimpleNamespace(n=peak_growth(1, where), ten_n=peak_growth(10, where))

    result = {
        "ratios": {"b/a": round(b / a, 2), "c/b": round(c / b, 1), "d/b": round(d / b, 1)},
        "must": {"b/a": "at most 3.5", "c/b": "at least 100", "d/b": "at least 500"} if where.type == "cpu" else {},
        "milliseconds": {k: round(1e3 * v, 3) for k, v in {"a": a, "b": b, "c": c, "d": d}.items()},
        "peak_bytes_beyond_bank": {"N": memory.n, "10 N": memory.ten_n},
        "data": data, "images": len(labels), "batch": BATCH, "precision": "fp32",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": versions(), "date": date.today().isoformat(),
        "command": "python examples/bench_retrain.py DATA_ROOT" + ("" if device == "cpu" else f" --device {device}"),
    }  # fmt: skip
    if out:
        out.write_text(json_module.dumps(result, indent=1) + "\n")
    if json:
        print(json_module.dumps(result))
        return
    for name, text in {"a": "balanced", "b": "balanced + meta sampler", "c": "the paper's step, features free",
                       "d": "the same with three backbone passes"}.items():  # fmt: skip
        print(f"({name}) {text:38} {result['milliseconds'][name]:12.3f} ms an iteration")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio}" + (f"  (must be {result['must'][name]})" if result["must"] else ""))
    print(f"peak memory of (b) beyond the bank: {memory.n / 1e6:.2f} MB at N, {memory.ten_n / 1e6:.2f} MB at 10 N")


if __name__ == "__main__":
    typer.run(main)
