"""Training speed and memory of the detector at the paper's size, beside torchvision's own: Mask R-CNN ResNet-50-FPN with
1,203 categories, shorter side 800, 8 images a step, in bf16 where the device computes in it.

(a) the detector of ``balms detect train``, class-specific boxes and masks; (b) the same class-agnostic; (c) torchvision's
``maskrcnn_resnet50_fpn``. One step is forward, losses, backward and SGD on images that lie on the device already, drawn at
random with 8 objects each. Medians of several steps in which all sides take their turn. Peak memory is what torch allocates
at most in one step (on a CPU it is not told).

    python examples/bench_detector.py [--json] [--device cuda] [--size 800] [--batch 8] [--categories 1203] [--rounds 5]
"""

import json as json_module
import statistics
import time
from datetime import date
from typing import Annotated

import torch
import typer
from torchvision.models.detection import maskrcnn_resnet50_fpn

from balms_cli.detection.header import Architecture
from balms_cli.detection.model import build_detector
from balms_cli.engine.runtime import setup, versions
from balms_cli.models.weights import IMAGENET_MEAN, IMAGENET_STD

SIDES = {"a": "balms, class-specific", "b": "balms, class-agnostic", "c": "torchvision's own"}
OBJECTS = 8


def detectors(categories: int, size: int, longest: int) -> dict[str, torch.nn.Module]:
    def ours(agnostic: bool) -> torch.nn.Module:
        arch = Architecture(backbone="resnet50", norm="batch", fpn_channels=256, head_features=1024, masks=True,
                            class_agnostic=agnostic, family="softmax", min_sizes=[size], test_size=size, max_size=longest,
                            proposals=2000, rois_per_image=512, foreground_share=0.25,
                            mean=IMAGENET_MEAN, std=IMAGENET_STD)  # fmt: skip
        return build_detector(arch, categories)

    stock = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=categories + 1, min_size=size,
                                  max_size=longest)  # fmt: skip
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


def main(
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    device: Annotated[str, typer.Option()] = "auto",
    size: Annotated[int, typer.Option(help="Shorter side in pixels; the longer is 4/3 of it.")] = 800,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 8,
    categories: Annotated[int, typer.Option()] = 1203,
    rounds: Annotated[int, typer.Option()] = 5,
):
    runtime = setup(device, "auto")
    place, on_gpu = runtime.device, runtime.device.type == "cuda"
    torch.manual_seed(0)
    scenes = [scene(size, size * 4 // 3, categories, place) for _ in range(batch)]
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, float] = {}

    models = {side: model.to(place).train() for side, model in detectors(categories, size, size * 4 // 3).items()}
    # So small a rate that the untrained networks stay what they are.
    optimizers = {side: torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9) for side, model in models.items()}
    for turn in range(rounds + 1):
        for side, model in models.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(place)
                resting = torch.cuda.memory_allocated(place)
                torch.cuda.synchronize(place)
            began = time.perf_counter()
            with runtime.autocast():
                losses = model([image for image, _ in scenes], [target for _, target in scenes])
                loss = sum(losses.values())
            optimizers[side].zero_grad()
            loss.backward()
            optimizers[side].step()
            if on_gpu:
                torch.cuda.synchronize(place)
                peaks[side] = (torch.cuda.max_memory_allocated(place) - resting) / 1e9
            if turn:  # the first is for warming up
                seconds[side].append(time.perf_counter() - began)

    rates = {side: batch / statistics.median(taken) for side, taken in seconds.items()}
    result = {
        "command": "python examples/bench_detector.py", "size": size, "batch": batch, "categories": categories,
        "rounds": rounds,
        "images_per_second": {side: round(rate, 2) for side, rate in rates.items()},
        "peak_gigabytes": {side: round(peak, 2) for side, peak in peaks.items()} or None,
        "ratios": {"a/c": round(rates["a"] / rates["c"], 3), "b/c": round(rates["b"] / rates["c"], 3)},
        "sides": SIDES, "device": runtime.describe(), "versions": versions(), "date": date.today().isoformat(),
    }  # fmt: skip
    if json:
        print(json_module.dumps(result))
        return
    for side, name in SIDES.items():
        peak = f"{peaks[side]:8.2f} GB beyond the network" if side in peaks else ""
        print(f"({side}) {name:24} {rates[side]:8.2f} images/s  {peak}")
    print(f"a/c {result['ratios']['a/c']}, b/c {result['ratios']['b/c']}; {result['device']}")


if __name__ == "__main__":
    typer.run(main)
