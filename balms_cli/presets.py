"""Recipes by stage, kind of data and name. A preset sets what differs from the defaults in ``config.py``.

``paper``   the values of the supplement, C.3 (the stage-2 learning rate, on which it is silent, is the released code's).
            AutoAugment, which the paper's CIFAR recipe uses too, is not in it yet: expect figures below the paper's.
``quick``   the same shape in minutes on a 2-core CPU. Ours, chosen on CIFAR-10-LT IF 200 with 100 validation images a class
            and one seed. Balanced accuracy of softmax, and of Balanced Softmax on its features: 1,500 steps of 128 with
            Cutout 45.1, 59.4 %; without 48.0, 63.2 %; 2,800 steps of 64 without 51.5, 64.5 %. The preset takes 2,500 of
            the last, to stay well within eight minutes.
``general`` for a user's own images on a GPU. Ours.
"""

from typing import Any

from .errors import ConfigError

_STAGE2 = {"steps": 2000, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "nesterov": True,
           "meta_lr": 0.01, "meta_betas": (0.9, 0.99), "meta_batch_size": 512}  # fmt: skip

# stage -> kind of data -> preset -> values
_PRESETS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "pretrain": {
        "cifar": {
            "paper": {"backbone": "resnet32", "image_size": 32, "steps": 13_000, "batch_size": 512, "lr": 0.1,
                      "warmup_steps": 800, "warmup_lr": 0.05, "weight_decay": 5e-4},
            "quick": {"backbone": "resnet32", "image_size": 32, "steps": 2500, "batch_size": 64, "lr": 0.1,
                      "warmup_steps": 100, "warmup_lr": 0.01, "weight_decay": 5e-4, "augment": ["crop", "flip"]},
        },
        "digits": {
            "quick": {"backbone": "resnet8", "image_size": 16, "steps": 150, "batch_size": 64, "lr": 0.1,
                      "warmup_steps": 15, "weight_decay": 5e-4, "augment": ["crop"]},
        },
        "small": {
            "quick": {"backbone": "resnet32", "image_size": 32, "steps": 2500, "batch_size": 64, "lr": 0.1,
                      "warmup_steps": 100, "warmup_lr": 0.01, "weight_decay": 5e-4, "augment": ["crop", "flip"]},
            "general": {"backbone": "resnet32", "image_size": 32, "epochs": 200, "batch_size": 128, "lr": 0.1,
                        "warmup_steps": 200, "warmup_lr": 0.01, "weight_decay": 5e-4},
        },
        "photos": {
            "quick": {"backbone": "resnet18", "image_size": 64, "epochs": 20, "batch_size": 64, "lr": 0.05,
                      "warmup_steps": 50, "warmup_lr": 0.005, "weight_decay": 5e-4, "augment": ["crop", "flip"]},
            "general": {"backbone": "resnet50", "image_size": 224, "epochs": 90, "batch_size": 256, "lr": 0.1,
                        "warmup_steps": 500, "warmup_lr": 0.01, "weight_decay": 5e-4, "augment": ["crop", "flip"]},
        },
    },
    "retrain": {
        "cifar": {"paper": _STAGE2 | {"views": 16, "class_rows": 1024}, "quick": _STAGE2},
        "digits": {"quick": _STAGE2 | {"steps": 1000, "batch_size": 128, "meta_batch_size": 128}},
        "small": {"quick": _STAGE2, "general": _STAGE2},
        "photos": {"quick": _STAGE2 | {"views": 2, "class_rows": 64}, "general": _STAGE2},
    },
}  # fmt: skip
_PRESETS["meta-sample"] = _PRESETS["retrain"]


def kind_of_data(source_name: str, image_size: tuple[int, int]) -> str:
    """Which family of recipes fits: cifar, digits, small (up to 48 px) or photos."""
    if source_name in ("cifar10", "cifar100"):
        return "cifar"
    if source_name == "digits":
        return "digits"
    return "small" if min(image_size) <= 48 else "photos"


def choose(stage: str, kind: str, name: str | None, *, on_gpu: bool) -> tuple[str, dict[str, Any]]:
    """A preset's name and values: the one asked for, else ``quick`` on a CPU and the first of the kind on a GPU."""
    fitting = _PRESETS[stage][kind]
    if name is None:
        name = next((n for n in ("paper", "general") if n in fitting), "quick") if on_gpu else "quick"
    if name not in fitting:
        raise ConfigError(f"--preset {name}: there is none for this data; choose {' or '.join(fitting)}")
    return name, fitting[name]
