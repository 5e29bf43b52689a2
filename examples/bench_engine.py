"""What training runs at: images a second and peak memory of ``balms pretrain``, the field's usual loop, and no input at all.

(a) the step of ``balms pretrain``, made by the stage itself: draw, augmentation of the whole batch on the device, images in
    memory as uint8, channels last, the precision that the machine gives by default (bf16 where it computes in it);
(b) the usual loop, written plainly: every image through PIL in DataLoader workers (4, or as many as there are cores),
    float32, NCHW, ``torch.optim.SGD`` as it comes, ``loss.item()`` each step;
(c) the network, loss, precision and optimizer of (a) on one batch that lies on the device: the ceiling of (a).

ResNet-32 at 32 px: crop, flip, AutoAugment, Cutout; batch 128 on a CPU, 512 on a GPU. ResNet-50 at 224 px, batch 8 or 128:
both decode JPEG files for random resized crops and flips, (a) in threads, (b) in workers.
Medians of several rounds in which all sides take their turn after a warm-up. (b) has workers during its turn only; what they
had ready goes into its warm-up, and no epoch ends. Peak memory is what torch allocates at most during one step, beyond what
is there before it; that of workers and what they hand over are not in it.

    python examples/bench_engine.py [DATA_ROOT] [--json] [--out FILE] [--device auto] [--threads N] [--steps N] [--rounds 5]
                                    [--nets resnet32,resnet50] [--compile auto|off|on|cuda-graphs] [--full]

Without DATA_ROOT (a folder with cifar100.zip or cifar10.zip) ResNet-32 sees random images and the result says so. ``--full``
(GPU, cifar100) also takes the time of ``balms pretrain`` as a whole: 13,000 steps of 512 on CIFAR-100-LT IF 200.
``--compile`` is that of ``balms pretrain``: for (a) and (c), compiled before the clock starts.
"""

import copy
import itertools
import json as json_module
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from bench_influence import peak
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as T

from balms_cli.config import MakeLTConfig, PretrainConfig, resolve
from balms_cli.data.feed import AHEAD
from balms_cli.data.manifest import Manifest
from balms_cli.engine.compiling import choose_compile, compile_in_place
from balms_cli.engine.distributed import ALONE
from balms_cli.engine.optim import Guard, make_sgd
from balms_cli.engine.run_dir import RunDir
from balms_cli.engine.runtime import pick_device, versions
from balms_cli.errors import DataError
from balms_cli.presets import choose
from balms_cli.reporter import Reporter
from balms_cli.stages import make_lt, pretrain

# network: kind of data and preset, what differs from it; batch and steps a turn by device; what (a) and (b) read
PLAN = {
    "resnet32": {"preset": ("cifar", "paper"), "flags": {}, "batch": {"cpu": 128, "cuda": 512},
                 "steps": {"cpu": 30, "cuda": 200}, "reads": "both: uint8 in memory, in (b) through PIL"},
    "resnet50": {"preset": ("photos", "general"), "batch": {"cpu": 8, "cuda": 128}, "steps": {"cpu": 6, "cuda": 40},
                 "flags": {"backbone": "resnet50", "image_size": 224, "augment": ["resized-crop", "flip"], "steps": 13_000},
                 "reads": "both: JPEG files, decoded for every step, random resized crop and flip"},
}  # fmt: skip
SIDES = {"a": "balms pretrain", "b": "the usual loop", "c": "the network alone"}
Side = Callable[[], Iterator[torch.Tensor]]  # a turn: takes one training step for each ``next`` and gives its loss


def make_pictures(folder: Path, count: int, width: int, height: int) -> None:
    """JPEG files of 10 classes: random blobs under grain, about as large as photos of that size."""
    rng = np.random.default_rng(0)
    for i in range(count):
        blobs = Image.fromarray(rng.integers(0, 256, (max(4, height // 16), max(4, width // 16), 3), dtype=np.uint8))
        grain = rng.normal(0, 12, (height, width, 3)).astype(np.float32)
        pixels = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC)) + grain
        path = folder / f"class{i % 10}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_manifest(net: str, data_root: Path | None, folder: Path, batch: int) -> tuple[Manifest, str]:
    """The data of a network, and what it is in words."""
    if net == "resnet32" and data_root is not None:
        try:
            manifest = long_tail("cifar100", data_root, folder)
        except DataError:
            manifest = long_tail("cifar10", data_root, folder)
        return manifest, f"{manifest.name}, sha256 {manifest.sha256[:12]}"
    width, height, least = (32, 32, 512) if net == "resnet32" else (500, 375, 64)
    photos = folder / "photos"
    make_pictures(photos, 5 * max(least, batch), width, height)  # a fifth is set aside for testing
    kilobytes = statistics.mean(file.stat().st_size for file in photos.glob("*/*.jpg")) / 1000
    manifest = make_lt.run(MakeLTConfig(source=str(photos), as_is=True), folder).manifest
    return manifest, f"random images, JPEG files of {width} x {height} px and {kilobytes:.0f} kB"


def long_tail(source: str, data_root: Path, folder: Path) -> Manifest:
    config = MakeLTConfig(source=source, imbalance=200, data_root=str(data_root), offline=True)
    return make_lt.run(config, folder).manifest


class Cutout:
    """A black square of 16 pixels around a random place of a tensor [3, H, W]."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        y, x = random.randrange(image.shape[1]), random.randrange(image.shape[2])
        image[:, max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0
        return image


class Pictures(Dataset):
    """The training images of the stage one by one, for the usual loop: at 32 px from memory, at 224 px from their files."""

    def __init__(self, net: str, begun, manifest: Manifest):
        self.labels = manifest.splits["train"].labels
        flip, to_input = T.RandomHorizontalFlip(), [T.ToTensor(), T.Normalize(begun.mean, begun.std)]
        if net == "resnet32":
            self.images = begun.images.pixels.cpu().permute(0, 2, 3, 1).contiguous().numpy()
            policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)
            each = [T.RandomCrop(32, padding=4), flip, policy, to_input[0], Cutout(), to_input[1]]
        else:
            self.images = [os.path.join(manifest.source["root"], key) for key in manifest.splits["train"].keys]
            each = [T.RandomResizedCrop(224), flip, *to_input]
        self.transform = T.Compose(each)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = self.images[i]
        image = Image.open(image).convert("RGB") if isinstance(image, str) else Image.fromarray(image)
        return self.transform(image), int(self.labels[i])


def stage_side(config: PretrainConfig, begun) -> Side:
    """(a): the job that the stage itself would train, driven as its loop drives it."""
    job, device = pretrain._job(config, begun, ALONE), begun.runtime.device
    count = itertools.count()

    def turn():
        guard = Guard(device)
        for i in count:
            yield job.take(i % job.steps, guard)

    return turn


def usual_side(config: PretrainConfig, begun, data: Dataset, workers: int) -> Side:
    """(b): plain PyTorch; nothing here is shared with the stage but the network and its first weights."""
    device, on_gpu = begun.runtime.device, begun.runtime.device.type == "cuda"
    model = begun.model.to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.warmup_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    endless = RandomSampler(data, num_samples=config.batch_size * 1_000_000)  # one shuffled epoch after the other
    loader = DataLoader(data, config.batch_size, sampler=endless, num_workers=workers, pin_memory=on_gpu)

    def turn():
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield torch.tensor(loss.item())

    return turn


def alone_side(config: PretrainConfig, begun) -> Side:
    """(c): the same batch again and again; no draw, no augmentation, no guard, no schedule."""
    model, loss, device, size = begun.model.train(), begun.loss, begun.runtime.device, config.image_size
    optimizer = make_sgd(model, config)
    images = torch.randn(config.batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(len(model.head.weight), (config.batch_size,), device=device)

    def turn():
        while True:
            with begun.runtime.autocast():
                logits = model(images)
            value = loss(logits, labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            yield value.detach()

    return turn


def seconds_a_step(side: Side, steps: int, warm_up: int, device: torch.device) -> float:
    """One turn of a side."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    turn = side()
    for _ in range(warm_up):
        next(turn)
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        value = next(turn)
    wait()
    spent = time.perf_counter() - began
    turn.close()
    if not torch.isfinite(value):
        raise SystemExit("a loss is not finite: these steps are not those of a training run")
    return spent / steps


def peak_of_a_step(side: Side, device: torch.device) -> int:
    """Bytes that one step allocates at its peak, counted as in bench_influence."""
    turn = side()
    next(turn), next(turn)
    most = peak(lambda: next(turn), str(device))
    turn.close()
    return most


def measure(net: str, data_root: Path | None, device: str, steps: int | None, rounds: int, compile: str) -> dict:
    """Images a second and peak bytes of every side, and what they were measured on."""
    plan, kind = PLAN[net], "cuda" if pick_device(device).type == "cuda" else "cpu"
    steps, batch = steps or plan["steps"][kind], plan["batch"][kind]
    flags = plan["flags"] | {"batch_size": batch, "device": device, "compile": "off"}  # (b) stays as it is
    config = resolve("pretrain", preset=choose("pretrain", *plan["preset"], on_gpu=kind == "cuda"), flags=flags).config
    workers = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        manifest, data = make_manifest(net, data_root, Path(folder), batch)
        begun = pretrain._begin(config, manifest, Reporter(), True)
        where = begun.runtime.device
        fresh = [replace(begun, model=copy.deepcopy(begun.model)) for _ in SIDES]  # all start from the same weights
        compile = choose_compile(compile, config.steps * batch * config.image_size**2, where, Reporter())
        for compiled in (fresh[0], fresh[2]):
            compile_in_place(compiled.model.backbone, compile)
        sides = {"a": stage_side(config, fresh[0]), "c": alone_side(config, fresh[2]),
                 "b": usual_side(config, fresh[1], Pictures(net, begun, manifest), workers)}  # fmt: skip
        memory = {side: peak_of_a_step(turn, where) for side, turn in sides.items()}
        warm_up = {"a": 2 + AHEAD, "b": 2 * workers + 2, "c": 2}  # what was read before the turn goes into it
        spent = [{s: seconds_a_step(t, steps, warm_up[s], where) for s, t in sides.items()} for _ in range(rounds)]
    return {"rates": {s: sorted(batch / r[s] for r in spent) for s in SIDES}, "memory": memory, "batch": batch, "steps": steps,
            "workers": workers, "precision": begun.runtime.precision, "compile": compile, "reads": plan["reads"],
            "data": f"{len(begun.images.labels):,} images: {data}"}  # fmt: skip


def full_run(data_root: Path, device: str, steps: int = 13_000) -> dict:
    """``balms pretrain`` as a whole, checkpoints and log included, preset ``paper``."""
    flags = {"device": device, "steps": steps}
    resolved = resolve("pretrain", preset=choose("pretrain", "cifar", "paper", on_gpu=True), flags=flags)
    with tempfile.TemporaryDirectory() as folder:
        manifest = long_tail("cifar100", data_root, Path(folder))
        report = pretrain.run(resolved, manifest, RunDir(Path(folder) / "run"), offline=True).report
    return {"data": f"{manifest.name}, sha256 {manifest.sha256[:12]}", "batch": resolved.config.batch_size,
            **{k: report[k] for k in ("steps", "seconds", "images_per_second", "final_loss")}}  # fmt: skip


def processor() -> str:
    """What the CPU is, and what it multiplies bf16 with: ratios differ with it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    units = [unit for unit in ("amx_tile", "avx512_bf16") if getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)()]
    return ", ".join([name, *units])


def main(
    data_root: Annotated[Path | None, typer.Argument(help="Folder with cifar100.zip or cifar10.zip.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write that object here too.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of torch on a CPU (default: torch's own).", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of a side in a round (default: by network, device).", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; the median of each side counts.", min=1)] = 5,
    nets: Annotated[str, typer.Option(help="Which networks: resnet32,resnet50.")] = "resnet32,resnet50",
    compile: Annotated[str, typer.Option(help="Of (a) and (c): as in balms pretrain.")] = "auto",
    full: Annotated[bool, typer.Option("--full", help="GPU: also all 13,000 iterations of preset paper.")] = False,
):
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to stderr on its own
    chosen = nets.split(",")
    if unknown := [n for n in chosen if n not in PLAN]:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(PLAN)}", param_hint="--nets")
    where = pick_device(device)
    on_gpu = where.type == "cuda"
    if full and (not on_gpu or data_root is None):
        raise typer.BadParameter("needs a GPU, and a DATA_ROOT with cifar100.zip", param_hint="--full")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    whole = {"full": full_run(data_root, device)} if full else {}  # first, so that missing data is told at once
    found = {net: measure(net, data_root, device, steps, rounds, compile) for net in chosen}

    rates = {f"{n} {s}": f["rates"][s] for n, f in found.items() for s in SIDES}
    median = {name: statistics.median(of_rounds) for name, of_rounds in rates.items()}
    must = {"resnet32 a/b": "at least 8" if on_gpu else "at least 2.5, on 2 cores", "a/c": "at least 0.9"}
    must = {f"{n} a/{s}": must.get(f"{n} a/{s}") or must.get(f"a/{s}") for n in chosen for s in "bc"}
    result = {
        "ratios": {f"{n} a/{s}": round(median[f"{n} a"] / median[f"{n} {s}"], 2) for n in chosen for s in "bc"},
        "must": {name: text for name, text in must.items() if text},
        "images_per_second": {name: round(rate, 1) for name, rate in median.items()},
        "slowest_and_fastest_round": {name: [round(r[0], 1), round(r[-1], 1)] for name, r in rates.items()},
        "peak_megabytes": {f"{n} {s}": round(f["memory"][s] / 1e6, 1) for n, f in found.items() for s in SIDES},
        **{key: {n: f[key] for n, f in found.items()} for key in ("data", "reads", "batch", "steps")}, "rounds": rounds,
        "workers": found[chosen[0]]["workers"],
        "precision": {"a, c": found[chosen[0]]["precision"], "b": "fp32, TF32 allowed" if on_gpu else "fp32"},
        "device": torch.cuda.get_device_name(where) if on_gpu else f"cpu, {torch.get_num_threads()} threads",
        "processor": processor(), "threads": torch.get_num_threads(), "versions": versions(), "date": date.today().isoformat(),
        "command": f"python examples/bench_engine.py {'DATA_ROOT ' if data_root else ''}--device {where} --nets {nets}"
        + (f" --threads {threads}" if threads else "") + (f" --compile {compile}" if compile != "auto" else "")
        + (" --full" if full else ""), "compile": {n: f["compile"] for n, f in found.items()},
        **whole,
    }  # fmt: skip
    if out:
        out.write_text(json_module.dumps(result, indent=1) + "\n")
    for name, rate in median.items():
        text, memory = f"{name[:-2]} ({name[-1]}) {SIDES[name[-1]]}", result["peak_megabytes"][name]
        print(f"{text:34} {rate:10,.1f} images/s {memory:10,.1f} MB at the peak", file=sys.stderr)
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio}" + (f"  (must be {must[name]})" if must[name] else ""), file=sys.stderr)
    if full:
        print(f"{result['full']['steps']:,} iterations: {result['full']['seconds']} s", file=sys.stderr)
    if json:
        print(json_module.dumps(result))


if __name__ == "__main__":
    typer.run(main)
