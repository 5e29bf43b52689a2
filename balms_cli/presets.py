"""Recipes by stage, kind of data and name. A preset sets what differs from the defaults in ``config.py``.

``paper``   the values of the supplement, C.3 (the stage-2 learning rate, on which it is silent, is the released code's).
``quick``   the same shape in minutes on a 2-core CPU. Ours, chosen on CIFAR-10-LT IF 200 with 100 validation images a class
            and one seed. Balanced accuracy of softmax, and of Balanced Softmax on its features: 1,500 steps of 128 with
            Cutout 45.1, 59.4 %; without 48.0, 63.2 %; 2,800 steps of 64 without 51.5, 64.5 %. The preset takes 2,500 of
            the last, to stay well within eight minutes.
``general`` for a user's own images on a GPU. Ours.

``imagenet-lt``, ``places-lt``, ``inaturalist18``   published recipes for large sets of photos, each value with its source. What
            the sources leave out of a stage (colour jitter, the frozen first blocks of Places-LT) is said there too. Not
            measured here: they want a GPU for hours or days.
"""

from dataclasses import replace
from typing import Any

from .config import Resolved
from .errors import ConfigError

_STAGE2 = {"steps": 2000, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "nesterov": True,
           "meta_lr": 0.01, "meta_betas": (0.9, 0.99), "meta_batch_size": 512}  # fmt: skip

# stage -> kind of data -> preset -> values
_PRESETS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "pretrain": {
        "cifar": {
            "paper": {"backbone": "resnet32", "image_size": 32, "steps": 13_000, "batch_size": 512, "lr": 0.1,
                      "warmup_steps": 800, "warmup_lr": 0.05, "weight_decay": 5e-4,
                      "augment": ["crop", "flip", "autoaugment", "cutout"]},
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
                        "warmup_steps": 500, "warmup_lr": 0.01, "weight_decay": 5e-4, "augment": ["resized-crop", "flip"]},
        },
    },
    "retrain": {
        "cifar": {"paper": _STAGE2 | {"views": 16, "class_rows": 1024}, "quick": _STAGE2},
        "digits": {"quick": _STAGE2 | {"steps": 1000, "batch_size": 128, "meta_batch_size": 128}},
        "small": {"quick": _STAGE2, "general": _STAGE2},
        "photos": {"quick": _STAGE2 | {"views": 2, "class_rows": 64}, "general": _STAGE2},
    },
}  # fmt: skip
_TEXT = "supplement C.3 (Ren et al. 2020)"
_KANG = "repository of Kang et al. 2020"
_PLAIN_SGD = ({"nesterov": False, "warmup_steps": 0}, f"{_TEXT}: plain SGD, no warm-up; Nesterov is for CIFAR alone")
_VIEWS = ({"augment": ["resized-crop", "flip"]}, f"{_KANG}, without its colour jitter")
_META = {"meta_lr": 0.01, "meta_betas": (0.9, 0.99), "meta_batch_size": 512}

# stage -> name -> parts of the recipe, each with its source. All of them are for photos.
_RECIPES: dict[str, dict[str, list[tuple[dict[str, Any], str]]]] = {
    "pretrain": {
        "imagenet-lt": [
            ({"backbone": "resnet10"}, "Ren et al. 2020, table 3; Kang et al. 2020 also resnet50, resnext50_32x4d"),
            ({"epochs": 90, "batch_size": 512, "lr": 0.2, "image_size": 224}, _TEXT),
            _PLAIN_SGD, _VIEWS, ({"weight_decay": 5e-4}, _KANG),
        ],
        "places-lt": [
            ({"backbone": "resnet152"}, _TEXT),
            ({"weights": "imagenet:IMAGENET1K_V1"}, f"{_TEXT}: ImageNet weights; torchvision's of that time"),
            ({"epochs": 30}, f"{_KANG}, issue 4: 30 or 90, all but the last block frozen, here nothing; Liu et al. 2019: 30"),
            ({"batch_size": 512, "lr": 0.2, "image_size": 224}, _TEXT),
            _PLAIN_SGD, _VIEWS, ({"weight_decay": 5e-4}, _KANG),
        ],
        "inaturalist18": [
            ({"backbone": "resnet50", "epochs": 90, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4, "image_size": 224,
              "nesterov": False, "warmup_steps": 0}, _KANG),
            _VIEWS,
        ],
    },
    "retrain": {
        "imagenet-lt": [
            ({"epochs": 10, "batch_size": 512, "lr": 0.2} | _META, _TEXT), _PLAIN_SGD,
            ({"weight_decay": 5e-4}, _KANG), ({"views": 4, "class_rows": 64}, "ours: a bank of 1 GB with ResNet-10"),
        ],
        "places-lt": [
            ({"epochs": 10, "batch_size": 128, "lr": 0.01} | _META, _TEXT), _PLAIN_SGD,
            ({"weight_decay": 5e-4}, _KANG), ({"views": 4, "class_rows": 64}, "ours: a bank of 2 GB"),
        ],
        "inaturalist18": [
            ({"epochs": 30, "batch_size": 512, "lr": 0.2, "weight_decay": 1e-4, "nesterov": False, "warmup_steps": 0},
             f"{_KANG}: cRT"),
            (_META, f"{_TEXT}: as for ImageNet-LT; they did not run iNaturalist"),
            ({"views": 1, "class_rows": 32}, "ours: a bank of 4 GB"),
        ],
    },
}  # fmt: skip
for _stage, _named in _RECIPES.items():
    for _name, _parts in _named.items():
        _PRESETS[_stage]["photos"][_name] = {key: value for values, _ in _parts for key, value in values.items()}
_PRESETS["meta-sample"], _RECIPES["meta-sample"] = _PRESETS["retrain"], _RECIPES["retrain"]

# What a method brings along: the key and value that choose it -> its values, and where they come from. The first source is
# that of the method, the second that of the figures where they are another's.
_METHODS: dict[tuple[str, Any], tuple[dict[str, Any], str]] = {
    ("loss", "focal"): ({"focal_gamma": 1.0}, "focal (Lin et al. 2017; gamma of the LDAM-DRW repository)"),
    ("loss", "cost-sensitive"): ({"loss_exponent": 1.0}, "cost-sensitive (weights 1/n; Bag of Tricks repository)"),
    ("loss", "class-balanced"): ({"cb_beta": 0.9999}, "class-balanced (Cui et al. 2019; beta of the LDAM-DRW repository)"),
    ("loss", "class-balanced-sigmoid"): (
        {"cb_beta": 0.9999}, "class-balanced (Cui et al. 2019; beta of the LDAM-DRW repository)"),
    ("loss", "class-balanced-focal"): (
        {"cb_beta": 0.9999, "focal_gamma": 1.0}, "class-balanced (Cui et al. 2019; values of the LDAM-DRW repository)"),
    ("loss", "ldam"): ({"ldam_margin": 0.5, "cosine_scale": 30.0}, "ldam (Cao et al. 2019, LDAM-DRW repository)"),
    ("drw", True): ({"cb_beta": 0.9999, "drw_start": 0.8}, "drw (Cao et al. 2019, LDAM-DRW repository: epoch 160 of 200)"),
    ("loss", "equalization"): ({"eql_gamma": 0.9, "eql_threshold": 0.005},
                               "equalization (Bag of Tricks repository; the authors' values for CIFAR are unknown)"),
    ("loss", "logit-adjusted"): ({"loss_exponent": 1.0}, "logit-adjusted (Menon et al. 2021)"),
    ("classifier", "lws"): ({"loss": "softmax", "sampler": "class"}, "lws (Kang et al. 2020: learned with CBS)"),
    ("classifier", "cosine"): ({"cosine_scale": 30.0}, "cosine (scale of the LDAM-DRW repository)"),
    ("reweight", "l2rw"): ({"meta_batch_size": 100}, "l2rw (Ren et al. 2018: batches of 100)"),
    ("reweight", "meta-weight-net"): (
        {"meta_batch_size": 100, "weight_net_hidden": 100, "weight_net_lr": 1e-5, "weight_net_decay": 5e-4},
        "meta-weight-net (Shu et al. 2019, their repository)"),
}  # fmt: skip


def methods(chosen: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The layers that the methods in ``chosen`` (all values known so far) bring along: (source, values) each."""
    # A meta sampler draws by itself: a method's sampler does not hold beside it.
    # Class-balanced sampling is for softmax: with a balanced loss, asked for beside lws, it would over-balance.
    balanced = chosen.get("classifier") == "lws" and chosen.get("loss", "softmax") != "softmax"
    dropped = {"sampler"} if chosen.get("meta_sampler") or balanced else set()
    return [
        (f"method {source}", {k: v for k, v in values.items() if k not in dropped})
        for (key, value), (values, source) in _METHODS.items()
        if chosen.get(key) == value
    ]


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


def with_fitting_warm_up(resolved: Resolved, images: int) -> Resolved:
    """A preset's warm-up is made for trainings of its own length: of a shorter one (few images) it takes a tenth at most."""
    config, source = resolved.config, resolved.sources["warmup_steps"]
    most = max(1, config.total_steps(images) // 10)
    if not source.startswith("preset") or config.warmup_steps <= most:
        return resolved
    told = f"preset {resolved.preset}, cut from {config.warmup_steps} to a tenth of the steps"
    return replace(resolved, config=config.model_copy(update={"warmup_steps": most}),
                   sources=resolved.sources | {"warmup_steps": told})  # fmt: skip


def sources(stage: str, name: str) -> dict[str, str]:
    """Where the values of a published recipe come from, by key. Of the other presets the module's text tells."""
    return {key: source for values, source in _RECIPES.get(stage, {}).get(name, []) for key in values}
