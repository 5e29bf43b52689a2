"""What tuning the box classifier of a detector costs, beside training all of it, and what the Meta Reweigher adds.

(a) a step of the whole detector, as ``balms detect train`` takes it: all losses, all gradients, masks;
(b) a step of ``balms detect finetune``: the frozen part without gradients or losses, then the classifier;
(c) the same with ``--meta-reweigher``: a second pass for the meta batch, and the bi-level step in closed form;
(d) a step of ``balms detect finetune --cache``: regions from the disk;
(e) the same with ``--meta-reweigher``;
(f) the paper's way: the detector with all its losses on the batch, on the meta batch and on the batch again, the classifier
    alone with gradients, and the bi-level step through ``higher``.

Mask R-CNN on a MobileNetV3-Large with a feature pyramid as the preset ``quick`` has it, at its largest size, after one step of
training from scratch; balanced sigmoid; the same number of images a step for all, and as many in a meta batch. Medians of
several rounds in which all sides take their turn, after a warm-up, float32. With one thread on a CPU the clock is that of the
thread that computes, so neither other work nor the threads that decode images count; else it is the wall's. Peak memory is
what torch allocates at most during one step, beyond the network.

    python examples/bench_detect.py [DATA] [--json FILE] [--small] [--device cpu] [--threads 1] [--batch 4] [--rounds 5]

DATA is a folder with an LVIS-format training JSON and its images. Without it 24 pictures of rectangles of 79 categories are
drawn, and the result says so. ``--small``: a tiny detector at 96 pixels, to see that all of it runs.
"""

import json as json_module
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated

import higher
import torch
import typer
from bench_influence import peak
from PIL import Image, ImageDraw
from torch import Tensor, nn

from balms_cli.config import DetectFinetuneConfig, DetectTrainConfig
from balms_cli.data.manifest import now
from balms_cli.detection import finetune
from balms_cli.detection.annotations import Annotations, find_annotations, find_images, load_annotations
from balms_cli.detection.dataset import DetectImages
from balms_cli.detection.header import FORMAT, DetectHeader
from balms_cli.detection.model import cls_score, save_detector
from balms_cli.detection.regions import make_cache, region_cache
from balms_cli.detection.sampling import class_balanced_images, draw_batches, repeat_factors
from balms_cli.detection.steps import on_device, seed_share
from balms_cli.detection.train import initial_detector
from balms_cli.engine.optim import Guard, make_sgd
from balms_cli.engine.runtime import versions
from balms_cli.meta.reweigher import MetaReweigher
from balms_cli.reporter import Reporter

SIDES = {"a": "train the whole detector", "b": "finetune", "c": "finetune + reweigher", "d": "finetune from the cache",
         "e": "finetune from the cache + reweigher", "f": "three detector passes and higher"}  # fmt: skip
MUST = {"c/b": "at most 2.2", "e/d": "at most 4"}
SMALL = {"backbone": "resnet18", "fpn_channels": 32, "head_features": 32, "proposals": 64, "rois_per_image": 16,
         "min_sizes": [96], "test_size": 96, "max_size": 160}  # fmt: skip
QUICK = {"backbone": "mobilenet_v3_large", "fpn_channels": 128, "head_features": 1024, "proposals": 1000,
         "rois_per_image": 256, "min_sizes": [320], "test_size": 320, "max_size": 533}  # fmt: skip


def draw_data(folder: Path, images: int = 24, categories: int = 79) -> Path:
    """Pictures of rectangles on grey, in LVIS format."""
    rng = random.Random(0)
    names = [{"id": c, "name": f"shade {c}"} for c in range(1, categories + 1)]
    document = {"images": [], "annotations": [], "categories": names}
    (folder / "images").mkdir(parents=True)
    for i in range(1, images + 1):
        width, height = rng.choice([(640, 480), (480, 640)])
        picture = Image.new("RGB", (width, height), (128, 128, 128))
        for k in range(8):
            x, y, w, h = rng.randrange(width // 2), rng.randrange(height // 2), rng.randrange(30, 200), rng.randrange(30, 200)
            category = 1 + (8 * i + k) % categories
            shade = (3 * category, 255 - 3 * category, 40 * (category % 6))
            ImageDraw.Draw(picture).rectangle([x, y, x + w, y + h], fill=shade)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            document["annotations"].append({"id": len(document["annotations"]) + 1, "image_id": i, "category_id": category,
                                            "bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon]})  # fmt: skip
        picture.save(folder / "images" / f"{i}.png")
        document["images"].append({"id": i, "width": width, "height": height, "file_name": f"{i}.png"})
    (folder / "train.json").write_text(json_module.dumps(document))
    return folder


def whole_step(config: DetectTrainConfig, annotations: Annotations, images: Path, model: nn.Module) -> Callable[[], None]:
    """(a)"""
    data = DetectImages(annotations, images, masks=True, workers=config.workers)
    draw = draw_batches(repeat_factors(annotations, config.repeat_threshold), config.batch_size, config.seed)
    read = data.reader(lambda i: [int(image) for image in draw(i)], 1000)
    device, done = next(model.parameters()).device, 0
    optimizer, guard = make_sgd(model, config), Guard(device)

    def step() -> None:
        nonlocal done
        seed_share(0, 1, done, 0)
        model.train()
        optimizer.zero_grad()
        value = sum(model(*on_device(read(done), device, flip=config.flip)).values())
        value.backward()
        guard.step(value.detach(), optimizer)
        done += 1

    return step


class Weighed(nn.Module):
    """The box classifier's loss with the reweigher's weights, differentiable by them; normalised as its ``weights`` are."""

    def __init__(self, loss: nn.Module, reweigher: MetaReweigher):
        super().__init__()
        self.loss, self.held = loss, [reweigher]  # in a list: not a parameter of the detector

    def forward(self, logits_RC: Tensor, labels_R: Tensor) -> Tensor:
        losses_R = self.loss.per_example(logits_RC, labels_R)
        found_R = labels_R > 0
        if not found_R.any():
            return losses_R.mean()
        rates_R = self.held[0].theta.sigmoid()[labels_R[found_R] - 1]
        weights_R = torch.ones_like(losses_R).masked_scatter(found_R, rates_R * len(rates_R) / rates_R.sum())
        return (losses_R * weights_R).mean()


def paper_step(config: DetectFinetuneConfig, frozen, model: nn.Module) -> Callable[[], None]:
    """(f). The network is in training mode but for BatchNorm, as the released code freezes that."""
    annotations, device = frozen.annotations, frozen.runtime.device
    data = DetectImages(annotations, frozen.data.folder, masks=True, workers=config.workers)
    draw = draw_batches(repeat_factors(annotations, config.repeat_threshold), config.batch_size, config.seed)
    meta_draw = class_balanced_images(annotations, config.meta_batch_size, config.seed, 1)
    read, meta_read = (data.reader(lambda i, d=d: [int(image) for image in d(i)], 1000) for d in (draw, meta_draw))
    model.train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    head = cls_score(model).requires_grad_(True)
    reweigher = MetaReweigher(len(annotations.categories)).to(device)
    adam = torch.optim.Adam(reweigher.parameters(), lr=config.meta_lr, betas=config.meta_betas)
    optimizer, guard = make_sgd(head, config), Guard(device)
    loss = finetune.training_loss(config, annotations).to(device)
    weighed, plain = Weighed(loss, reweigher), loss.plain().to(device)
    done = 0

    def step() -> None:
        nonlocal done
        batch, meta_batch = (on_device(samples(done), device, flip=config.flip) for samples in (read, meta_read))
        model.roi_heads.cls_loss = weighed
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, ahead):
            ahead.step(fmodel(*batch)["loss_classifier"])
            fmodel.roi_heads.cls_loss = plain
            meta_value = fmodel(*meta_batch)["loss_classifier"]
            (reweigher.theta.grad,) = torch.autograd.grad(meta_value, [reweigher.theta])
        guard.step(meta_value.detach(), adam)
        value = model(*batch)["loss_classifier"]
        optimizer.zero_grad()
        value.backward()
        reweigher.theta.grad = None
        guard.step(value.detach(), optimizer)
        done += 1

    return step


def sides(folder: Path, data: Path, options: dict, batch: int, device: str) -> dict[str, Callable[[], None]]:
    """The six steps, each a call."""
    file = find_annotations(data, "train")
    images = find_images(file, None)
    annotations = load_annotations(file)
    shared = {"batch_size": batch, "device": device, "precision": "fp32", "repeat_threshold": 0.1, "lr": 0.002,
              "min_sizes": options["min_sizes"], "max_size": options["max_size"]}  # fmt: skip
    config = DetectTrainConfig(**options | shared, loss="sigmoid")
    architecture, model = initial_detector(config, annotations, offline=True)
    model.to(device)
    whole = whole_step(config, annotations, images, model)
    whole()  # BatchNorm then has statistics to go by
    header = DetectHeader(format=FORMAT, created=now(), stage="detect-train", architecture=architecture,
                          categories=annotations.categories, num_images=annotations.num_images, loss="sigmoid", recipe={},
                          annotations=str(file), annotations_sha256=annotations.sha256, images=str(images))  # fmt: skip
    save_detector(folder / "model.safetensors", model, header)
    calls = {"a": whole}
    for side, cache, reweigher in (("b", False, False), ("c", False, True), ("d", True, False), ("e", True, True)):
        tune = DetectFinetuneConfig(**shared, loss="balanced-sigmoid", cache=cache, meta_reweigher=reweigher,
                                    meta_batch_size=batch)  # fmt: skip
        calls[side] = tuned_step(tune, folder / "model.safetensors", annotations, images)
    frozen = finetune.begin(tune, folder / "model.safetensors", annotations, images, Reporter())
    return calls | {"f": paper_step(tune, frozen, frozen.model)}


def tuned_step(config: DetectFinetuneConfig, file: Path, annotations: Annotations, images: Path) -> Callable[[], None]:
    """(b) to (e): the step of the stage itself."""
    frozen = finetune.begin(config, file, annotations, images, Reporter())
    cache = None
    if config.cache:
        cache = region_cache(config, frozen)
        make_cache(cache, config, frozen, Reporter())
    job = finetune.learn(config, frozen, cache).job
    guard, done = Guard(frozen.runtime.device), 0

    def step() -> None:
        nonlocal done
        job.take(done, guard)
        done += 1

    return step


def seconds(call: Callable, device: str, threads: int) -> float:
    clock = time.thread_time if threads == 1 and device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize(device)
    began = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - began


def main(
    data: Annotated[Path | None, typer.Argument(help="Folder with a training JSON and images (default: drawn).")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    small: Annotated[bool, typer.Option("--small", help="A tiny detector, to see that all of it runs.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch on a CPU.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Images a step, and in a meta batch.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="The median of each side counts.", min=1)] = 5,
):
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to stderr on its own
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        source = data or draw_data(Path(folder) / "data")
        (Path(folder) / "run").mkdir()
        calls = sides(Path(folder) / "run", source, SMALL if small else QUICK, batch, device)
        for call in calls.values():
            call()
        memory = {side: peak(call, device) for side, call in calls.items()}
        timed = [{side: seconds(call, device, threads) for side, call in calls.items()} for _ in range(rounds)]
    spent = {side: statistics.median(t[side] for t in timed) for side in SIDES}

    where = f"cpu, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else torch.cuda.get_device_name(device)
    pairs = ["c/b", "e/d", "a/b", "f/c"]
    result = {
        "ratios": {pair: round(spent[pair[0]] / spent[pair[2]], 2) for pair in pairs},
        "must": MUST,
        "memory_ratios": {pair: round(memory[pair[0]] / memory[pair[2]], 2) for pair in pairs},
        "seconds_a_step": {side: round(s, 4) for side, s in spent.items()},
        "peak_megabytes": {side: round(m / 1e6, 1) for side, m in memory.items()},
        "sides": SIDES, "detector": SMALL if small else QUICK, "batch": batch, "meta_batch": batch, "rounds": rounds,
        "data": data.name if data else "drawn rectangles", "precision": "fp32",
        "clock": "of the computing thread" if threads == 1 and device == "cpu" else "wall",
        "device": where, "versions": versions(), "date": date.today().isoformat(), "command": "python examples/bench_detect.py",
    }  # fmt: skip
    if json:
        json.write_text(json_module.dumps(result, indent=1) + "\n")
    for side, text in SIDES.items():
        print(f"({side}) {text:36} {spent[side]:9.3f} s {memory[side] / 1e6:9.1f} MB at the peak")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio}" + (f"  (must be {MUST[name]})" if name in MUST else ""))


if __name__ == "__main__":
    typer.run(main)
