"""``balms make-lt``: from a source of images to a long-tailed manifest."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MakeLTConfig
from ..data import aside, longtail
from ..data.images import check_images, median_size, refuse_bad
from ..data.index import Split, index_sha256
from ..data.manifest import HEADER, Manifest, check_target, now, stored_sha256
from ..data.sources import SHARDS, Item, Source, by_class, drop, open_source, split_test
from ..errors import ConfigError, DataError
from ..reporter import Reporter

DEFAULT_IMBALANCE = {"digits": 40.0}  # at which the 128 training images of the head leave all three shot groups
# Where the data lies is told by the manifest's source; how it is fetched changes nothing of what is in it.
_NOT_THE_DRAW = {"source", "data_root", "offline", "images", "names", "check"}
_ALPHA = MakeLTConfig.model_fields["alpha"].default
KNOWN_IMBALANCE = 100.0  # the factor most often reported for CIFAR-LT


@dataclass(frozen=True)
class Result:
    """The manifest and its folder; ``reused``: the very same one was there. With ``dry_run`` nothing is at ``path``."""

    path: Path
    manifest: Manifest
    reused: bool

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        data = self.manifest
        groups = longtail.shot_groups(data.class_counts)
        return {
            "manifest": str(self.path),
            "name": data.name,
            "classes": data.classes,
            "class_counts": data.class_counts,
            "total": sum(data.class_counts),
            "imbalance_factor": data.imbalance_factor,
            "groups": {group: int((groups == group).sum()) for group in longtail.GROUPS},
            "splits": {split: len(part) for split, part in data.splits.items()},
            "profile": data.profile,
            "seed": data.seed,
            "manifest_sha256": data.sha256,
            "skipped": len(data.skipped),
            "untested": data.untested,
        }


def run(
    config: MakeLTConfig, workspace: Path, reporter: Reporter | None = None,
    *, out: Path | None = None, overwrite: bool = False, dry_run: bool = False,
) -> Result:  # fmt: skip
    """Open the source, check its images, draw the tail, show it, and write the manifest (unless ``dry_run``).

    ``out``: the manifest's folder (default: ``<workspace>/data/<name>-<hash>``; the same one for the same draw).
    Raises: ConfigError (exit 2) for contradicting options or an unusable folder, DataError (exit 3) for bad data.
    """
    reporter = reporter or Reporter()
    if config.as_is and config.imbalance is not None:
        raise ConfigError("--as-is keeps every image and --imbalance makes a tail: give one of the two")
    if "alpha" in config.model_fields_set and config.profile != "pareto" and config.alpha != _ALPHA:
        raise ConfigError(f"--alpha is the exponent of --profile pareto; {config.profile} has none")
    source = open_source(config, reporter)
    imbalance = _imbalance(config, source)
    source, skipped = _without_bad(source, config, reporter)
    source = split_test(source, config.test_fraction)
    splits = _draw(source, config, imbalance, reporter)
    manifest = _describe(source, splits, config, imbalance, skipped)
    show(manifest, reporter)
    _compare(manifest, config.alpha, reporter)
    folder = Path(out) if out is not None else Path(workspace) / "data" / f"{manifest.name}-{manifest.sha256[:8]}"
    folder = Path(os.path.expanduser(folder)).absolute()
    manifest = replace(manifest, path=folder)
    return Result(folder, manifest, _write(manifest, ours=out is None, overwrite=overwrite, dry_run=dry_run))


def _imbalance(config: MakeLTConfig, source: Source) -> float | None:
    """The imbalance factor to make, or None for as-is."""
    if config.as_is or config.imbalance is not None:
        return config.imbalance
    if not source.known:
        raise ConfigError(
            f"say what {config.source} is: --as-is where it is long-tailed by nature, or --imbalance N to make it so"
        )
    return DEFAULT_IMBALANCE.get(source.name, KNOWN_IMBALANCE)


def _without_bad(source: Source, config: MakeLTConfig, reporter: Reporter) -> tuple[Source, list[dict[str, str]]]:
    """The source without its unreadable images, and what was left out. Raises: DataError, unless ``skip_bad``.

    Known sets are believed (their archives carry checksums) unless ``skip_bad`` asks for a look.
    """
    bad = list(source.bad)
    total = len(source.train) + len(source.test or []) + len(source.val or []) + len(bad)
    if source.kind in ("folder", "list", SHARDS) and (config.skip_bad or (config.check and not source.known)):
        bad += check_images(source, reporter)
    if not config.skip_bad:
        refuse_bad(bad, total)
    if bad:
        reporter.warn(f"{len(bad)} of {total} images left out, such as {aside.printable(bad[0][0])} ({bad[0][1]})")
    skipped = [{"path": aside.printable(key), "reason": reason} for key, reason in bad]
    return drop(source, {key for key, _ in bad}), skipped


def _draw(source: Source, config: MakeLTConfig, imbalance: float | None, reporter: Reporter) -> dict[str, list[Item]]:
    """Items a split. Each class in its hash order: first validation, then meta, then what the profile asks for.

    A validation split that the source brings is taken as it is.
    """
    if source.val is not None and config.val_per_class:
        raise ConfigError("the source has a validation split of its own: leave out --val-per-class")
    k, cut = len(source.classes), config.val_per_class + config.meta_per_class
    ordered = []
    for label, keys in by_class(source.train, k).items():
        if len(keys) <= cut:
            name, had = source.classes[label], len(keys)
            raise DataError(f"class '{name}' has no training image left: it has {had}, val and meta take {cut}")
        order = longtail.order_images(config.seed, source.classes[label], [source.hash_key(key) for key in keys])
        ordered.append([(keys[i], label) for i in order])
    have = np.array([len(items) - cut for items in ordered])
    counts = _counts(source, config, imbalance, have, reporter)
    meta_from = config.val_per_class
    splits = {
        "train": [item for items, n in zip(ordered, counts, strict=True) for item in items[cut : cut + n]],
        "val": [item for items in ordered for item in items[:meta_from]] if source.val is None else source.val,
        "meta": [item for items in ordered for item in items[meta_from:cut]],
        "test": source.test or [],
    }
    return {name: items for name, items in splits.items() if items or name in ("train", "test")}


def _counts(source: Source, config: MakeLTConfig, imbalance: float | None, have: np.ndarray, reporter: Reporter) -> np.ndarray:
    """Training images a class: what the profile asks for, where the class has them; int64 [C]."""
    if imbalance is None:
        return have if config.head_size is None else np.minimum(have, config.head_size)
    head = config.head_size or int(have[0])
    options = {"alpha": config.alpha} if config.profile == "pareto" else {}
    asked = longtail.PROFILES[config.profile](head, len(have), imbalance, **options)
    short = np.flatnonzero(have < asked)
    if short.size:
        first = short[0]
        reporter.warn(
            f"{short.size} of {len(have)} classes have fewer images than the profile asks for and keep all, "
            f"such as '{source.classes[first]}': {have[first]} instead of {asked[first]}"
        )
    return np.minimum(have, asked)


def _describe(
    source: Source, splits: dict[str, list[Item]], config: MakeLTConfig,
    imbalance: float | None, skipped: list[dict[str, str]],
) -> Manifest:  # fmt: skip
    """The manifest of a draw, all but its place."""
    parts = {
        name: Split([key for key, _ in items], np.array([label for _, label in items], dtype=np.int64))
        for name, items in splits.items()
    }
    counts = np.bincount(parts["train"].labels, minlength=len(source.classes))
    tested = set(parts["test"].labels.tolist())
    manifest = Manifest(
        path=Path(),
        name=manifest_name(source.name, config, imbalance),
        source={"kind": source.kind, "name": source.name, "root": source.root},
        classes=[source.names.get(name, name) for name in source.classes],
        class_counts=counts.tolist(),
        splits=parts,
        profile="as-is" if imbalance is None else config.profile,
        imbalance=imbalance,
        imbalance_factor=longtail.imbalance_factor(counts),
        seed=config.seed,
        sha256="",
        image_size=median_size(source),
        skipped=skipped,
        untested=[source.names.get(name, name) for label, name in enumerate(source.classes) if label not in tested],
        created=now(),
        options=config.model_dump(mode="json", exclude_defaults=True, exclude=_NOT_THE_DRAW),
    )
    return replace(manifest, sha256=index_sha256(manifest.classes, manifest.index_texts()))


def manifest_name(source: str, config: MakeLTConfig, imbalance: float | None) -> str:
    """A short name, fit for a folder: '<source>-lt-if200-seed0', '<source>-step-if10-seed0', '<source>-pareto6-if256-seed0',
    '<source>-as-is'."""
    plain = re.sub(r"[^\w.]+", "-", source).strip("-.")[:60] or "images"
    if imbalance is None:
        return f"{plain}-as-is"
    profile = {"exponential": "lt", "pareto": f"pareto{config.alpha:g}"}.get(config.profile, config.profile)
    return f"{plain}-{profile}-if{imbalance:g}-seed{config.seed}"


def _compare(manifest: Manifest, alpha: float, reporter: Reporter) -> None:
    """How near the data comes to the published list with its classes, head and tail, if there is one."""
    counts = manifest.class_counts
    k, largest, smallest, total = len(counts), max(counts), min(counts), sum(counts)
    for one in longtail.PUBLISHED:
        if (k, largest) != (one.classes, one.largest) or abs(smallest - one.smallest) > 1:
            continue
        if manifest.profile == "as-is" and (smallest, total) == (one.smallest, one.images):
            reporter.note(f"these figures are those of the published {one.name}")
        if manifest.profile == "pareto":
            nearest = longtail.alpha_for_total(one.images, one.largest, one.classes, one.largest / one.smallest)
            better = "" if nearest is None or nearest == alpha else f"; --alpha {nearest:g} comes nearest"
            reporter.note(
                f"the published {one.name} has {one.images:,} training images, this draw {total:,} "
                f"({total / one.images - 1:+.1%}){better}. There, chance decided which class has how many: its own list "
                f"(balms make-lt LIST --images DIR --as-is) gives exactly {one.name}"
            )


def _write(manifest: Manifest, *, ours: bool, overwrite: bool, dry_run: bool) -> bool:
    """Write the manifest, or refresh the header of the same one that is there. Returns: whether it was there.

    ``ours``: the folder is named after its content, so whatever else is in it is a damaged manifest, to be replaced.
    """
    there = os.path.exists(manifest.path)
    same = stored_sha256(manifest.path) == manifest.sha256
    if not same:
        check_target(manifest.path, overwrite=overwrite or ours)
    if dry_run:
        return same
    if same:
        aside.replace_file(manifest.path / HEADER, manifest.header_text())
    else:
        # Named after its content, a folder that appears from now on holds the same; one that was there is damaged.
        manifest.save(manifest.path, overwrite=overwrite or ours, keep_existing=ours and not there)
    return same


def show(manifest: Manifest, reporter: Reporter) -> None:
    """Counts, groups, imbalance factor, total and Gini of a manifest, and the curve over the classes."""
    counts = np.array(manifest.class_counts)
    groups, k = longtail.shot_groups(counts), len(counts)
    per_class = {name: np.bincount(part.labels, minlength=k) for name, part in manifest.splits.items()}
    rows: list[list[str]] = []
    for label in range(k) if k <= 20 else [*range(5), *range(k // 2 - 3, k // 2 + 3), *range(k - 5, k)]:
        if rows and label and k > 20 and label in (k // 2 - 3, k - 5):
            rows.append(["...", *("" for _ in per_class), ""])
        sizes = [f"{per_class[name][label]:,}" for name in per_class]
        rows.append([aside.printable(manifest.classes[label]), *sizes, str(groups[label])])
    reporter.table(manifest.name, ["class", *per_class, "group"], rows)
    picked = np.unique(np.linspace(0, k - 1, min(k, 20)).astype(int))
    names = [aside.printable(manifest.classes[i]) for i in picked]
    shown = [float(counts[i]) for i in picked]
    title = "training images a class" + ("" if k <= 20 else f" ({len(picked)} of {k} classes)")
    reporter.bars(title, names, shown, [f"{counts[i]:,}" for i in picked])
    # Counts are whole numbers, so the smallest class may make the factor larger than the one asked for.
    exact = manifest.imbalance is None or abs(manifest.imbalance_factor / manifest.imbalance - 1) < 0.005
    asked = "" if exact else f" (asked for: {manifest.imbalance:g})"
    many, medium, few = (int((groups == group).sum()) for group in longtail.GROUPS)
    reporter.note(
        f"{counts.sum():,} training images in {k} classes, from {counts.max():,} to {counts.min():,}: imbalance factor "
        f"{manifest.imbalance_factor:.4g}{asked}, Gini {longtail.gini(counts):.2f}; many-shot {many}, medium-shot {medium}, "
        f"few-shot {few} classes"
    )
    if manifest.untested:
        named = aside.name_some([aside.printable(name) for name in manifest.untested])
        reporter.warn(f"without test images, and so untested: {named} ({len(manifest.untested)} of {k} classes)")
