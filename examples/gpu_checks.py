"""Correctness on one device, check by check: what runs on a CPU must come out the same on a GPU, and be the same again.

    python examples/gpu_checks.py NAME [--device cuda] [--data DATA_ROOT]

Prints one JSON object: ``passed``, and the figures that say so. Exit code 1 where a check failed. NAME:

losses          value and gradient of every loss, float32 on the device against float64 on the CPU
influence       closed form = jvp = higher on a linear head, jvp = higher through a ResNet-8, float64
augment         the same pixels on the device as on the CPU, every operation
resume          pretrain and BALMS retrain, stopped by a signal and resumed: bit for bit those of one go (deterministic)
compile         30 steps of pretrain with --compile on, and cuda-graphs on a GPU, against off: losses, and steps a second
sync-batch-norm two processes with half a batch each against one BatchNorm on the whole batch, forward and backward
decode          JPEG files decoded by the GPU against the CPU's decoder
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

LOSSES = ("softmax", "balanced", "balanced-sigmoid", "logit-adjusted", "focal", "cost-sensitive", "class-balanced",
          "class-balanced-sigmoid", "class-balanced-focal", "ldam", "equalization")  # fmt: skip
COUNTS = [5000, 1200, 300, 60, 20, 5, 1]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value of the second."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)).item()


def losses(device: str, data: Path | None) -> dict[str, Any]:
    from balms_cli.losses import build_loss

    def value_and_gradient(name: str, where: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        scale = 1.0 if name == "ldam" else 20.0  # ldam takes cosines
        logits = (logits_BC.tanh() * scale).to(where, dtype).requires_grad_()
        loss = build_loss(name, torch.tensor(COUNTS)).to(where).to(dtype)
        loss.at_step(0, 10, 0)
        value = loss(logits, targets_B.to(where))
        value.backward()
        return value, logits.grad

    torch.manual_seed(0)
    logits_BC, targets_B = torch.randn(512, len(COUNTS), dtype=torch.float64), torch.randint(len(COUNTS), (512,))
    worst = {}
    for name in LOSSES:
        ours, exact = value_and_gradient(name, device, torch.float32), value_and_gradient(name, "cpu", torch.float64)
        worst[name] = max(relative(a, b) for a, b in zip(ours, exact, strict=True))
    return {"passed": max(worst.values()) < 1e-4, "largest_relative_difference": worst}


def influence(device: str, data: Path | None) -> dict[str, Any]:
    from balms_cli.losses import BalancedSoftmaxLoss
    from balms_cli.meta.influence import influence
    from balms_cli.models.backbones import build_backbone
    from balms_cli.models.classifiers import Classifier

    def batch(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(shape, dtype=torch.float64, device=device), torch.randint(len(COUNTS), shape[:1], device=device)

    def routes(model: nn.Module, shape: tuple[int, ...], names: list[str]) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        loss = BalancedSoftmaxLoss(torch.tensor(COUNTS)).to(device)
        inputs, targets = batch(*shape)
        loss(model(inputs), targets).backward()
        optimizer.step()  # momentum is in use
        train, meta = batch(*shape), batch(*shape)
        return {name: influence(model, optimizer, loss, train, meta, method=name).influence_B for name in names}

    torch.manual_seed(0)
    try:
        import higher  # noqa: F401

        also, skipped = ["higher"], []
    except ImportError:
        also, skipped = [], ["higher: the package higher is missing"]
    head = routes(nn.Linear(64, len(COUNTS)).to(device, torch.float64), (256, 64), ["closed-form", "jvp", *also])
    network = Classifier(build_backbone("resnet8", 16), nn.Linear(64, len(COUNTS))).to(device, torch.float64).train()
    whole = routes(network, (16, 3, 16, 16), ["jvp", *also])
    found = {f"linear: {n} and closed-form": relative(h, head["closed-form"]) for n, h in head.items() if n != "closed-form"}
    found |= {f"resnet8: {n} and jvp": relative(h, whole["jvp"]) for n, h in whole.items() if n != "jvp"}
    return {"passed": max(found.values()) < 1e-9, "largest_relative_difference": found, "skipped": skipped}


def augment(device: str, data: Path | None) -> dict[str, Any]:
    from balms_cli.data.transforms import augment

    torch.manual_seed(0)
    images, samples = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8), torch.arange(256)

    def run(where: str) -> torch.Tensor:
        mean, std = torch.full((3,), 0.5, device=where), torch.full((3,), 0.25, device=where)
        return augment(images.to(where), samples, mean, std, seed=3, stream=1,
                       ops=["crop", "flip", "autoaugment", "cutout"]).cpu()  # fmt: skip

    # In levels of 0..255; an operation that rounds (equalize, brightness) may fall on the other side of a half.
    levels = (run(device) - run("cpu")).abs() * 0.25 * 255
    share = (levels > 0.5).double().mean().item()
    return {"passed": levels.max().item() < 1.5 and share < 1e-3, "largest_level": levels.max().item(),
            "share_of_pixels_that_differ": share}  # fmt: skip


def draw(folder: Path, data: Path | None):
    """A small manifest: CIFAR-10-LT where the data is there, else random pictures."""
    from balms_cli.config import MakeLTConfig
    from balms_cli.stages import make_lt

    if data is not None and (data / "cifar10.zip").is_file():
        return make_lt.run(MakeLTConfig(source="cifar10", imbalance=200, data_root=str(data), offline=True), folder).manifest
    from bench_engine import make_pictures

    make_pictures(folder / "pictures", 400, 32, 32)
    return make_lt.run(MakeLTConfig(source=str(folder / "pictures"), as_is=True), folder).manifest


def train(manifest, out: Path, device: str, **flags):
    """A short run of stage 1, and its report."""
    from balms_cli.config import resolve
    from balms_cli.engine.run_dir import RunDir
    from balms_cli.stages import pretrain

    flags = {"backbone": "resnet8", "steps": 30, "batch_size": 64, "lr": 0.05, "device": device} | flags
    return pretrain.run(resolve("pretrain", flags=flags), manifest, RunDir(out), offline=True).report


def resume(device: str, data: Path | None) -> dict[str, Any]:
    import subprocess

    from safetensors.torch import load_file

    cut_at = 11
    stop = (
        "import os, signal, sys\n"
        "from balms_cli.engine.loop import Job\n"
        "take = Job.take\n"
        "def take_and_ask(self, step, guard):\n"
        f"    if step == {cut_at - 1}: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return take(self, step, guard)\n"
        "Job.take = take_and_ask\n"
        "from balms_cli.cli.app import main\n"
        "main()\n"
    )

    def balms(*arguments: Any, code: list[str] | None = None, expect: int = 0) -> None:
        done = subprocess.run([sys.executable, *(code or ["-m", "balms_cli"]), *map(str, arguments), "--quiet"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode != expect:
            raise RuntimeError(f"balms {arguments[0]} exited with {done.returncode}: {done.stderr[-500:]}")

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        manifest = draw(home, data).path
        shared = ["--device", device, "--steps", "24", "--batch-size", "64", "--set", "deterministic=true"]
        for stage, more in {"pretrain": ["--backbone", "resnet8", "--set", "augment=['crop','flip','autoaugment','cutout']"],
                            "retrain": ["--loss", "balanced", "--meta-sampler", "--set", "views=1"]}.items():  # fmt: skip
            source = manifest if stage == "pretrain" else home / "pretrain whole"
            command = [stage, source, *shared, *more, "--out"]
            balms(*command, home / f"{stage} whole")
            balms(*command, home / f"{stage} cut", code=["-c", stop], expect=128 + signal.SIGINT)
            balms(stage, "--resume", home / f"{stage} cut")
            ours, theirs = (load_file(home / f"{stage} {how}" / "model.safetensors") for how in ("cut", "whole"))
            found[stage] = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return {"passed": all(found.values()), "bit_for_bit": found, "stopped_after": cut_at, "steps": 24}


def compiled(device: str, data: Path | None) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    ways = ["off", "on", "cuda-graphs"] if on_gpu else ["off", "on"]
    net = {"backbone": "resnet32", "batch_size": 512, "steps": 200} if on_gpu else {"steps": 30}
    loss, rate = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = draw(Path(folder), data)
        for way in ways:
            run = Path(folder) / way
            train(manifest, run, device, compile=way, precision="fp32", **net)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            loss[way] = [line["loss"] for line in lines]
            rate[way] = sorted(line["images_per_second"] for line in lines)[len(lines) // 2]
    # Sums in another order differ in the last bits, and training carries that on: the first losses must agree closely.
    close = {way: max(abs(a - b) / b for a, b in zip(loss[way][:5], loss["off"][:5], strict=True)) for way in ways[1:]}
    return {"passed": max(close.values()) < 2e-3, "largest_relative_difference_of_the_first_losses": close,
            "last_loss": {way: values[-1] for way, values in loss.items()}, "images_per_second": rate,
            "precision": "fp32"}  # fmt: skip


def _batch_norm_process(rank: int, port: int, device: str, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    inputs, outer = torch.load(Path(folder) / "inputs.pt", weights_only=True)
    half = slice(rank * 16, rank * 16 + 16)
    layer = nn.SyncBatchNorm(8).to(device)
    x = inputs[half].to(device).requires_grad_()
    y = layer(x)
    (y * outer[half].to(device)).sum().backward()
    torch.save([t.detach().cpu() for t in (y, x.grad, layer.weight.grad, layer.running_var)], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def sync_batch_norm(device: str, data: Path | None) -> dict[str, Any]:
    import socket

    if not device.startswith("cuda"):
        return {"passed": None, "skipped": ["torch has SyncBatchNorm on GPUs only"]}
    torch.manual_seed(0)
    x, outer = torch.randn(32, 8, 6, 6).mul(3).add(1), torch.randn(32, 8, 6, 6)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.save([x, outer], Path(folder) / "inputs.pt")
        torch.multiprocessing.spawn(_batch_norm_process, (port, device, folder), nprocs=2)
        first, second = (torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    layer = nn.BatchNorm2d(8)
    x = x.requires_grad_()
    y = layer(x)
    (y * outer).sum().backward()
    found = {"output": relative(torch.cat([first[0], second[0]]), y),
             "input gradient": relative(torch.cat([first[1], second[1]]), x.grad),
             "weight gradient": relative(first[2] + second[2], layer.weight.grad),
             "running variance": max(relative(part[3], layer.running_var) for part in (first, second))}  # fmt: skip
    return {"passed": max(found.values()) < 1e-4, "largest_relative_difference": found}


def decode(device: str, data: Path | None) -> dict[str, Any]:
    from bench_engine import make_pictures

    from balms_cli.config import MakeLTConfig
    from balms_cli.data.feed import OnDisk
    from balms_cli.stages import make_lt

    if not device.startswith("cuda"):
        return {"passed": None, "skipped": ["there is no GPU to decode on"]}
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder) / "pictures", 600, 500, 375)
        manifest = make_lt.run(MakeLTConfig(source=str(Path(folder) / "pictures"), as_is=True), Path(folder)).manifest
        pixels, rate = {}, {}
        images = torch.arange(256)
        for who in ("cpu", "gpu"):
            feed = OnDisk(manifest, "train", 224, torch.device(device), decode=who)
            feed.rows(images)
            torch.cuda.synchronize()
            began = time.perf_counter()
            pixels[who] = feed.rows(images).float().cpu()
            rate[who] = round(len(images) / (time.perf_counter() - began), 1)
            feed.close()
    levels = (pixels["gpu"] - pixels["cpu"]).abs()
    return {"passed": levels.mean().item() < 2, "mean_level": levels.mean().item(), "largest_level": levels.max().item(),
            "images_per_second": rate, "image": "500 x 375 px JPEG to 224 px"}  # fmt: skip


CHECKS: dict[str, Callable[[str, Path | None], dict[str, Any]]] = {
    "losses": losses, "influence": influence, "augment": augment, "resume": resume, "compile": compiled,
    "sync-batch-norm": sync_batch_norm, "decode": decode,
}  # fmt: skip


def main(
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(CHECKS))],
    device: Annotated[str, typer.Option(help="cuda, or cpu.")] = "cuda",
    data: Annotated[Path | None, typer.Option(help="Folder with cifar10.zip (else random pictures).")] = None,
):
    if name not in CHECKS:
        raise typer.BadParameter(f"known: {', '.join(CHECKS)}", param_hint="NAME")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = CHECKS[name](device, data)
    print(json.dumps(found))
    raise typer.Exit(1 if found["passed"] is False else 0)


if __name__ == "__main__":
    typer.run(main)
