"""What the annotations of a data set say before anything is trained: frequency groups, priors, repeat factors, what is missing.

Shapes: C categories, N images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.aside import name_some, printable
from ..reporter import Reporter
from .annotations import Annotations, ImageInfo, tell_left_out
from .sampling import category_repeats, repeat_factors

GROUPS = {"r": "rare", "c": "common", "f": "frequent"}


@dataclass(frozen=True)
class Stats:
    """Of one JSON file. Arrays [C] are in the order of ``annotations.categories``; ``missing``: image files that are not there
    (None: nobody looked)."""

    annotations: Annotations
    threshold: float
    factors: np.ndarray  # [N] repeat factors of images
    repeats: np.ndarray  # [C] max(1, sqrt(t / f)): what a category asks for
    log_odds: np.ndarray  # [C] log(f / (1 - f)): the offset of balanced sigmoid
    offsets: np.ndarray  # [C] log f minus its mean: the offset of balanced softmax
    missing: list[ImageInfo] | None

    def to_json(self) -> dict[str, Any]:
        """One JSON object; ratios are shares of the images, offsets are in logits."""
        a = self.annotations
        return {
            "annotations": str(a.path), "annotations_sha256": a.sha256, "images": a.num_images,
            "instances": sum(c.instance_count for c in a.categories), "categories": len(a.categories),
            "groups": {group: found for group in GROUPS if (found := self.group(group))["categories"]},
            "repeat": {"threshold": self.threshold, "repeated_images": int((self.factors > 1).sum()),
                       "largest_factor": float(self.factors.max()), "images_an_epoch": float(self.factors.sum())},
            "log_odds": [float(self.log_odds.min()), float(self.log_odds.max())],
            "softmax_offsets": [float(self.offsets.min()), float(self.offsets.max())],
            "categories_without_image": a.without_image, "left_out": a.left_out,
            "missing_images": None if self.missing is None else len(self.missing),
            "per_category": [self.category(c) for c in range(len(a.categories))],
        }  # fmt: skip

    def category(self, c: int) -> dict[str, Any]:
        """What there is to say of the category in place ``c``."""
        category = self.annotations.categories[c]
        return {**category.model_dump(), "share": category.image_count / self.annotations.num_images,
                "log_odds": float(self.log_odds[c]), "softmax_offset": float(self.offsets[c]),
                "repeat_factor": float(self.repeats[c])}  # fmt: skip

    def group(self, group: str) -> dict[str, Any]:
        """Of one frequency group (``r``, ``c`` or ``f``): ``images`` are those with a category of it."""
        a = self.annotations
        members = np.array([category.frequency == group for category in a.categories])
        if not members.any():
            return {"categories": 0, "images": 0, "instances": 0}
        counts = a.image_counts[members]
        return {
            "categories": int(members.sum()), "images": sum(bool(members[image.labels - 1].any()) for image in a.images),
            "instances": sum(c.instance_count for c in a.categories if c.frequency == group),
            "images_a_category": [int(counts.min()), int(counts.max())],
            "log_odds": [float(self.log_odds[members].min()), float(self.log_odds[members].max())],
            "repeat_factor": [float(self.repeats[members].min()), float(self.repeats[members].max())],
        }  # fmt: skip


def measure(annotations: Annotations, threshold: float, folder: Path | None = None) -> Stats:
    """Count. ``folder``: look there for the image files. Raises: DataError where it cannot be listed."""
    f_C = annotations.frequencies
    missing = None
    if folder is not None:
        from .dataset import find_files

        paths = find_files(annotations.images, folder)
        missing = [image for image, path in zip(annotations.images, paths, strict=True) if path is None]
    return Stats(annotations, threshold, repeat_factors(annotations, threshold),
                 category_repeats(annotations, threshold), np.log(f_C) - np.log1p(-f_C),
                 np.log(f_C) - np.log(f_C).mean(), missing)  # fmt: skip


def show(stats: Stats, reporter: Reporter, top: int) -> None:
    """Tables and lines for people; ``top``: how many of the rarest and of the most frequent categories are named."""
    found = stats.to_json()
    reporter.table(f"{printable(stats.annotations.path.name)}: {found['images']:,} images, {found['instances']:,} instances, "
                   f"{found['categories']:,} categories",
                   ["frequency group", "categories", "images", "instances", "images per category", "log-odds", "repeat factor"],
                   [_group_row(GROUPS[group], values) for group, values in found["groups"].items()])  # fmt: skip
    if top:
        _show_categories(stats, reporter, top)
    _say(stats, found, reporter)


def _group_row(name: str, values: dict[str, Any]) -> list[str]:
    return [name, f"{values['categories']:,}", f"{values['images']:,}", f"{values['instances']:,}",
            _range(*values["images_a_category"], ","), _range(*values["log_odds"], ".2f"),
            _range(*values["repeat_factor"], ".2f")]  # fmt: skip


def _range(low: float, high: float, form: str) -> str:
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def _show_categories(stats: Stats, reporter: Reporter, top: int) -> None:
    counts_C = stats.annotations.image_counts
    order = np.argsort(-counts_C, kind="stable").tolist()
    columns = ["category", "id", "group", "images", "instances", "share", "log-odds", "repeat factor"]

    def rows(places: list[int]) -> list[list[str]]:
        return [[printable(v["name"]), str(v["id"]), v["frequency"], f"{v['image_count']:,}", f"{v['instance_count']:,}",
                 f"{v['share']:.2%}", f"{v['log_odds']:.2f}", f"{v['repeat_factor']:.2f}"]
                for v in map(stats.category, places)]  # fmt: skip

    if len(order) <= 2 * top:
        return reporter.table("categories", columns, rows(order))
    reporter.table(f"the {top} most frequent categories", columns, rows(order[:top]))
    return reporter.table(f"the {top} rarest categories", columns, rows(order[-top:]))


def _say(stats: Stats, found: dict[str, Any], reporter: Reporter) -> None:
    repeat, threshold = found["repeat"], f"{stats.threshold:g}"
    if repeat["repeated_images"]:
        reporter.note(f"repeat factors at threshold {threshold}: {repeat['repeated_images']:,} images come more than once, "
                      f"{repeat['largest_factor']:.2f} times at most; about {repeat['images_an_epoch']:,.0f} images an "
                      "epoch")  # fmt: skip
    else:
        rarest = stats.annotations.image_counts.min() / found["images"]
        hint = f"; a --repeat-threshold above {rarest:.3g} repeats some" if rarest < 1 else ""
        reporter.note(f"repeat factors at threshold {threshold}: no image comes more than once, as the rarest category is in "
                      f"{100 * rarest:.3g} % of the images{hint}")  # fmt: skip
    for name, key in (("balanced sigmoid, log(f / (1 - f))", "log_odds"), ("balanced softmax, log f less its mean",
                                                                        "softmax_offsets")):  # fmt: skip
        low, high = found[key]
        reporter.note(f"offsets of {name}: {low:.2f} to {high:.2f} logits")
    if without := stats.annotations.without_image:
        reporter.note(f"categories without an image: {name_some([printable(name) for name in without])}")
    tell_left_out(stats.annotations, reporter)
    if stats.missing:
        first = printable(stats.missing[0].file_name)
        reporter.warn(f"{len(stats.missing):,} of {found['images']:,} image files are not there: {first} ...")
