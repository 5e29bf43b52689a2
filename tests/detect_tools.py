"""Small data and small detectors for the tests of ``balms detect``."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IDS = (3, 12, 34, 101, 205, 777)  # of the JSON: neither from 1 on nor without gaps
NAMES = ("square", "disc", "triangle", "bar", "pentagon", "diamond")
_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233))
_CORNERS = (4, 24, 3, 4, 5, 4)


def draw_lvis(folder: Path, images: int = 6, categories: int = 3, size: int = 96, seed: int = 0) -> Path:
    """``lvis_train.json`` and ``lvis_val.json`` of LVIS v1's fields in ``folder``, with pictures of coloured shapes in
    ``images/``; returns the folder.

    Category k has JSON id IDS[k] and is in every 2^k-th training image, and at least in one: 0 is in all of them. Pictures
    are ``size`` high and a third wider, with one to four shapes. Val has half as many pictures, with all categories in turn.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    first = 1
    for split, count in (("train", images), ("val", max(1, images // 2))):
        there = [[k for k in range(categories) if _in_train(k, i, images)] if split == "train"
                 else sorted({i % categories, (i + 1) % categories}) for i in range(count)]  # fmt: skip
        pictures, annotations = [], []
        for i, present in enumerate(there):
            name, width = f"{split}_{i:03}.png", size + size // 3
            picture = Image.fromarray(rng.integers(60, 110, (size, width, 3)).astype(np.uint8))
            for k in present * (2 if len(present) == 1 else 1):
                points = _shape(k, rng, width, size)
                ImageDraw.Draw(picture).polygon(points, fill=_COLOURS[k])
                annotations.append(_annotation(len(annotations) + 1, first + i, IDS[k], points))
            picture.save(folder / "images" / name)
            absent = [IDS[k] for k in range(categories) if k not in present]
            pictures.append({"id": first + i, "file_name": name, "width": width, "height": size,
                             "neg_category_ids": absent, "not_exhaustive_category_ids": []})  # fmt: skip
        if split == "train":
            seen = [[a["image_id"] for a in annotations if a["category_id"] == IDS[k]] for k in range(categories)]
            in_train = [len(set(ids)) for ids in seen]
        table = [{"id": IDS[k], "name": NAMES[k], "synset": f"{NAMES[k]}.n.01", "synonyms": [NAMES[k]], "def": "",
                  "image_count": in_train[k], "instance_count": len(seen[k]),
                  "frequency": "r" if in_train[k] <= 10 else "c" if in_train[k] <= 100 else "f"}
                 for k in range(categories)]  # fmt: skip
        text = {"info": {}, "licenses": [], "images": pictures, "annotations": annotations, "categories": table}
        (folder / f"lvis_{split}.json").write_text(json.dumps(text))
        first += count
    return folder


def _in_train(k: int, i: int, images: int) -> bool:
    return i % min(2**k, images) == 0


def _shape(k: int, rng: np.random.Generator, width: int, height: int) -> list[tuple[float, float]]:
    """A polygon of this category's kind somewhere inside the picture."""
    radius = height * rng.uniform(0.15, 0.25)
    x, y = rng.uniform(radius + 1, width - radius - 1), rng.uniform(radius + 1, height - radius - 1)
    if NAMES[k] == "bar":
        return [(x - radius, y - radius / 3), (x + radius, y - radius / 3), (x + radius, y + radius / 3),
                (x - radius, y + radius / 3)]  # fmt: skip
    corners, turn = _CORNERS[k], math.pi / 4 if NAMES[k] == "square" else -math.pi / 2
    angles = [turn + 2 * math.pi * j / corners for j in range(corners)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _annotation(number: int, image: int, category: int, points: list[tuple[float, float]]) -> dict[str, Any]:
    xs, ys = zip(*points, strict=True)
    area = abs(sum(xs[j - 1] * ys[j] - xs[j] * ys[j - 1] for j in range(len(xs)))) / 2
    return {"id": number, "image_id": image, "category_id": category, "area": round(area, 2),
            "bbox": [round(v, 2) for v in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))],
            "segmentation": [[round(v, 2) for point in points for v in point]]}  # fmt: skip


def tiny_architecture(**over: Any):
    """The architecture of a detector that trains a step in a fraction of a second."""
    from balms_cli.detection.header import Architecture

    values = dict(backbone="resnet18", norm="batch", fpn_channels=32, head_features=32, masks=True, class_agnostic=False,
                  family="softmax", min_sizes=[64], test_size=64, max_size=96, proposals=64, rois_per_image=16,
                  foreground_share=0.25, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # fmt: skip
    return Architecture(**values | over)


def tiny_detector(categories: int, *, cls_loss=None, seed: int = 0, **over: Any):
    """A fresh detector of ``tiny_architecture`` with ``over``, drawn from ``seed``."""
    import torch

    from balms_cli.detection.model import build_detector

    torch.manual_seed(seed)
    return build_detector(tiny_architecture(**over), categories, cls_loss=cls_loss)


def tiny_targets(count: int, categories: int, size: int = 64, seed: int = 0):
    """``count`` random images [3, size, size] in 0..1 with targets of two boxes, labels 1..categories and masks each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        images.append(torch.rand(3, size, size, generator=generator))
        corner_N2 = torch.rand(2, 2, generator=generator) * size / 2
        boxes_N4 = torch.cat([corner_N2, corner_N2 + size / 4 + torch.rand(2, 2, generator=generator) * size / 5], 1)
        masks = torch.zeros(2, size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes_N4.round().int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels_N = torch.randint(1, categories + 1, (2,), generator=generator)
        targets.append({"boxes": boxes_N4, "labels": labels_N, "masks": masks})
    return images, targets


def tiny_header(categories: int, **over: Any):
    """A header that fits ``tiny_detector(categories, **over)``."""
    from balms_cli.detection.header import FORMAT, Category, DetectHeader

    table = [Category(id=IDS[k] if k < len(IDS) else 1000 + k, name=NAMES[k] if k < len(NAMES) else f"category {k}",
                      image_count=1 + 12 * (categories - 1 - k), instance_count=2 + 12 * (categories - 1 - k),
                      frequency="r" if k == categories - 1 else "c") for k in range(categories)]  # fmt: skip
    architecture = tiny_architecture(**over)
    return DetectHeader(format=FORMAT, created="2026-01-01T00:00:00Z", stage="detect-train", architecture=architecture,
                        categories=table, num_images=1 + 12 * categories, loss=architecture.family, recipe={},
                        annotations="lvis_train.json", annotations_sha256="0" * 64, images="images")  # fmt: skip
