"""Speed and memory of the detector at the paper's size, beside torchvision's own: Mask R-CNN ResNet-50-FPN with 1,203
categories, shorter side 800, 8 images a step, in bf16 where the device computes in it.

(a) the detector of ``balms detect train``, class-specific boxes and masks; (b) the same class-agnostic; (c) torchvision's
``maskrcnn_resnet50_fpn``. A step is forward, losses, backward and SGD on images that lie on the device already, drawn at random
with 128 objects each, so that as many regions are foreground as a trained network's proposals make it; a look is the
detection of 300 objects in one of them, scores from 1e-4, as LVIS is evaluated. Medians of several steps in which all sides
take their turn. Peak memory is what torch allocates at most in one call, beyond the network.

    python examples/bench_detector.py [--json] [--out FILE] [--device cuda] [--size 800] [--batch 8] [--categories 1203]
"""

import json as json_module
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_influence import peak
from torchvision.models.detection import maskrcnn_resnet50_fpn

from balms_cli.detection.header import Architecture
from balms_cli.detection.model import build_detector, detect
from balms_cli.engine.runtime import Runtime, setup, versions
from balms_cli.models.weights import IMAGENET_MEAN, IMAGENET_STD

SIDES = {"a": "balms, class-specific", "b": "balms, class-agnostic", "c": "torchvision's own"}
OBJECTS = 128  # each is a foreground region: as many as a trained network's proposals bring (a quarter of 512)


def detectors(categories: int, size: int, longest: int) -> dict[str, torch.nn.Module]:
    def ours(agnostic: bool) -> torch.nn.Module:
        arch = Architecture(backbone="resnet50", norm="batch", fpn_channels=256, head_features=1024, masks=True,
                            class_agnostic=agnostic, family="softmax", min_sizes=[size], test_size=size, max_size=longest,
                            proposals=2000, rois_per_image=512, foreground_share=0.25,
                            mean=IMAGENET_MEAN, std=IMAGENET_STD)  # fmt: skip
        return build_detector(arch, categories)

    stock = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=categories + 1, min_size=size,
                                  max_size=longest, box_score_thresh=1e-4, box_detections_per_img=300)  # fmt: skip
    return {"a": ours(False), "b": ours(True), "c": stock}


def scene(height: int, width: int, categories: int, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One image of noise with objects of noise: the work of a step does not depend on what is seen."""
    corner_N2 = torch.rand(OBJECTS, 2) * torch.tensor([0.6 * width, 0.6 * height])
    side_N2 = (0.1 + 0.3 * torch.rand(OBJECTS, 2)) * torch.tensor([width, height])
    boxes_N4 = torch.cat([corner_N2, corner_N2 + side_N2], 1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes_N4.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes_N4, "labels": torch.randint(1, categories + 1, (OBJECTS,)), "masks": masks}
    return torch.rand(3, height, width).to(device), {name: t.to(device) for name, t in target.items()}


def calls(model: torch.nn.Module, scenes: list, runtime: Runtime) -> dict[str, Callable[[], object]]:
    """A training step, and a look at one image."""
    # So small a rate that the untrained network stays what it is.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        model.train()
        with runtime.autocast():
            losses = model([image for image, _ in scenes], [target for _, target in scenes])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    def look() -> list:
        with torch.no_grad(), runtime.autocast():
            return detect(model, [scenes[0][0]]) if hasattr(model.roi_heads, "cls_loss") else model.eval()([scenes[0][0]])

    return {"step": step, "look": look}


def seconds_of(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object to a file.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    size: Annotated[int, typer.Option(help="Shorter side in pixels; the longer is 4/3 of it.")] = 800,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 8,
    categories: Annotated[int, typer.Option()] = 1203,
    rounds: Annotated[int, typer.Option()] = 5,
):
    runtime = setup(device, "auto")
    torch.manual_seed(0)
    scenes = [scene(size, size * 4 // 3, categories, runtime.device) for _ in range(batch)]
    models = {side: model.to(runtime.device) for side, model in detectors(categories, size, size * 4 // 3).items()}
    sides = {side: calls(model, scenes, runtime) for side, model in models.items()}
    name = "cpu" if runtime.device.type == "cpu" else str(runtime.device)
    # A first call of each sets up what stays: momentum, caches.
    found = {what: {side: (seconds_of(c[what], runtime.device), peak(c[what], name)) for side, c in sides.items()}
             for what in ("step", "look")}  # fmt: skip
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, c in sides.items():
            taken[side].append(seconds_of(c["step"], runtime.device))
    rates = {side: batch / statistics.median(spent) for side, spent in taken.items()}
    peaks = {what: {side: round(memory / 1e9, 3) for side, (_, memory) in of.items()} for what, of in found.items()}
    typed = f"--size {size} --batch {batch} --categories {categories} --rounds {rounds}"
    result = {
        "command": f"python examples/bench_detector.py {typed}", "size": size, "batch": batch, "categories": categories,
        "rounds": rounds, "images_per_second": {side: round(rate, 3) for side, rate in rates.items()},
        "peak_gigabytes": peaks,
        "ratios": {"a/c": round(rates["a"] / rates["c"], 3), "b/c": round(rates["b"] / rates["c"], 3),
                   **{f"memory of a {what}, a/c": round(of["a"] / of["c"], 3) for what, of in peaks.items()}},
        "sides": SIDES, "device": runtime.describe(), "versions": versions(), "date": date.today().isoformat(),
    }  # fmt: skip
    if out is not None:
        out.write_text(json_module.dumps(result, indent=1) + "\n")
    if json:
        print(json_module.dumps(result))
        return
    for side, text in SIDES.items():
        print(f"({side}) {text:24} {rates[side]:8.2f} images/s   peak of a step {peaks['step'][side]:6.2f} GB, of a look "
              f"{peaks['look'][side]:6.2f} GB")  # fmt: skip
    print(f"{result['ratios']}; {result['device']}")


if __name__ == "__main__":
    typer.run(main)
