"""Recipes of ``balms detect`` by stage and name. A preset sets what differs from the defaults in ``config/detect.py``.

``paper``       the supplement's recipe for LVIS (C.3): batches of 8. Where it is silent, the released code's values.
``reference``   the released code's own recipe: batches of 16 and twice the learning rate to train, another meta learning rate,
                and its meta loss, which is the adjusted one by a slip.
``quick``       the same shape on a small set and a 2-core CPU. Ours, chosen on 213 images with 79 categories; no source has
                a recipe for that.
"""

from typing import Any

from .errors import ConfigError

_TEXT = "supplement C.3 (Ren et al. 2020)"
_CODE = "released code of Ren et al. 2020"
_BASE = "detectron2's defaults, which the released code keeps"
_LVIS = "Gupta et al. 2019 (LVIS), which the supplement follows"
_OURS = "ours, for a 2-core CPU"

_DETECTOR = [
    ({"backbone": "resnet50", "masks": True, "min_sizes": [640, 672, 704, 736, 768, 800], "test_size": 800}, _TEXT),
    ({"weights": "imagenet:IMAGENET1K_V1"}, f"{_CODE}: a ResNet-50 trained on ImageNet; here torchvision's of that time"),
    ({"trainable_layers": 3, "fpn_channels": 256, "head_features": 1024, "class_agnostic": False, "rois_per_image": 512,
      "foreground_share": 0.25, "proposals": 1000, "max_size": 1333, "flip": True}, _BASE),
    ({"repeat_threshold": 0.001}, _LVIS),
    ({"warmup_steps": 1000, "warmup_factor": 0.001}, _BASE),
]  # fmt: skip
_TUNED = [
    ({"min_sizes": [640, 672, 704, 736, 768, 800]}, _TEXT),
    ({"max_size": 1333, "flip": True, "warmup_steps": 1000, "warmup_factor": 0.001}, _BASE),
    ({"repeat_threshold": 0.001}, _LVIS),
]  # fmt: skip
_SGD = {"momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
# As large as a step of about a second allows. With few images a share of them under 0.001 does not occur.
_SMALL = {"min_sizes": [256, 288, 320], "max_size": 533, "warmup_steps": 100, "repeat_threshold": 0.1}

# stage -> name -> parts of the recipe, each with its source
_RECIPES: dict[str, dict[str, list[tuple[dict[str, Any], str]]]] = {
    "detect-train": {
        "paper": [
            ({"steps": 90_000, "batch_size": 8, "lr": 0.01, "lr_drops": [60_000, 80_000]} | _SGD, _TEXT), *_DETECTOR,
        ],
        "reference": [
            ({"steps": 90_000, "batch_size": 16, "lr": 0.02, "lr_drops": [60_000, 80_000]} | _SGD, _CODE), *_DETECTOR,
        ],
        "quick": [
            ({"backbone": "mobilenet_v3_large", "fpn_channels": 128, "head_features": 1024, "rois_per_image": 256,
              "proposals": 1000, "test_size": 320, "steps": 1500, "batch_size": 2, "lr": 0.01, "lr_drops": [1000, 1350],
              "clip_norm": 10.0} | _SMALL, _OURS),
        ],
    },
    "detect-finetune": {
        "paper": [
            ({"steps": 22_000, "batch_size": 8, "lr": 0.02, "lr_drops": [11_000, 18_000], "meta_lr": 0.001} | _SGD, _TEXT),
            *_TUNED,
            ({"meta_batch_size": 8}, "ours: as large as the batch; the supplement does not say"),
            ({"meta_loss": "plain"}, f"{_TEXT}: the standard loss on a balanced meta set"),
            ({"weight_norm": "mean"}, _CODE),
        ],
        "reference": [
            ({"steps": 22_000, "batch_size": 16, "lr": 0.02, "lr_drops": [11_000, 18_000], "meta_lr": 0.01,
              "meta_batch_size": 16, "weight_norm": "mean"} | _SGD, _CODE),
            *_TUNED,
            ({"meta_loss": "adjusted"}, f"{_CODE}: meant as the plain one, but its logits are already moved"),
        ],
        "quick": [
            ({"steps": 1500, "batch_size": 8, "lr": 0.02, "lr_drops": [1000, 1350], "meta_batch_size": 8, "views": 2} | _SMALL,
             _OURS),
        ],
    },
}  # fmt: skip


def methods(chosen: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The layers that chosen methods bring along: none here, the defaults are theirs."""
    return []


def choose(stage: str, kind: str, name: str | None, *, on_gpu: bool) -> tuple[str, dict[str, Any]]:
    """A preset's name and values: the one asked for, else ``paper`` on a GPU and ``quick`` on a CPU. ``kind`` plays no part."""
    name = name or ("paper" if on_gpu else "quick")
    if name not in _RECIPES[stage]:
        raise ConfigError(f"--preset {name}: there is no such preset; choose {' or '.join(_RECIPES[stage])}")
    return name, {key: value for values, _ in _RECIPES[stage][name] for key, value in values.items()}


def sources(stage: str, name: str) -> dict[str, str]:
    """Where the values of a preset come from, by key."""
    return {key: source for values, source in _RECIPES.get(stage, {}).get(name, []) for key in values}
