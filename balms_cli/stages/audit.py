"""``balms audit``: what a data set holds, what is wrong with it, and which methods can help, before any training.

Shapes: N entries (an image in a split), S splits, C classes.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import AuditConfig
from ..data import aside
from ..data.audit import Listing, open_listing
from ..data.audit_files import Facts, look
from ..data.duplicates import KINDS, TRAIN_TEST, WITHIN, Duplicates, find
from ..data.longtail import GROUPS, shot_groups
from ..data.manifest import now
from ..errors import ConfigError, DataError
from ..metrics.tail import gini, head_share, imbalance_factor
from ..report.document import plain
from ..reporter import Reporter
from .audit_advice import advise
from .audit_findings import PROBLEM, Finding, findings
from .audit_show import show

FORMAT, VERSION = "balms audit", 1
MOST_LISTED = 10_000  # images of a list in the JSON; the totals beside it count all
HEAD = 0.1  # the share of the classes that is called the head in head_share
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Result:
    """``path``: what was audited, as the next stage takes it; ``document``: the JSON; ``findings`` as told."""

    path: str
    document: dict[str, Any]
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        return self.document


def run(config: AuditConfig, reporter: Reporter | None = None) -> Result:
    """List the data, look at its files, and tell what follows. Nothing is written.

    Raises: DataError (exit 3) where there is no data to look at, ConfigError (exit 2) where none is named; what is wrong
    inside the data is a finding.
    """
    reporter, began = reporter or Reporter(), time.monotonic()
    if config.data is None:
        raise ConfigError("which data? name a folder, a list file, a manifest, or digits, cifar10, cifar100")
    listing = open_listing(config.data, config.data_root, config.offline, reporter, images=config.images, names=config.names,
                           leaf_classes=config.leaf_classes)  # fmt: skip
    hashes = config.decode if config.hashes is None else config.hashes
    facts = look(listing, reporter, decode=config.decode, hashes=hashes, workers=config.workers)
    duplicates = find(listing, facts.content_N)
    counts_SC = listing.counts()
    found = findings(listing, facts, duplicates, counts_SC)
    document = plain({
        "format": FORMAT, "version": VERSION, "created": now(),
        "data": aside.printable(listing.path),
        **({"manifest": str(listing.manifest.path), "manifest_sha256": listing.manifest.sha256} if listing.manifest else {}),
        "name": aside.printable(listing.name), "kind": "manifest" if listing.manifest else listing.kind,
        "checked": {"decoded": facts.decoded, "hashed": facts.hashed, "hashed_files": facts.hashed_files},
        "splits": {split: int(n) for split, n in zip(listing.splits, counts_SC.sum(axis=1), strict=True)},
        "tail": tail(counts_SC[0]),
        "per_class": _per_class(listing, facts, counts_SC),
        "images": _images(facts),
        "unreadable": _unreadable(listing, facts),
        "duplicates": _duplicates(listing, facts, duplicates),
        "findings": [one.to_json() for one in found],
    })  # fmt: skip
    document["advice"] = [one.to_json() for one in advise(listing, document, found, config)]
    document["problems"] = sum(one.level == PROBLEM for one in found)
    document["seconds"] = round(time.monotonic() - began, 1)
    show(document, reporter)
    return Result(document.get("manifest", document["data"]), document, found)


def hold_strict(result: Result) -> None:
    """``--strict``. Raises: DataError (exit 3) that names the problems."""
    bad = [one for one in result.findings if one.level == PROBLEM]
    if bad:
        named = aside.name_some([f"{one.kind} ({one.count:,})" for one in bad], 6)
        raise DataError(f"{len(bad)} problem{'s' * (len(bad) != 1)} in {result.path}: {named}")


def json_text(result: Result) -> str:
    """What ``--out`` writes."""
    return json.dumps(result.document, allow_nan=False, indent=1) + "\n"


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a place for the JSON before the work is done. Raises: ConfigError."""
    if os.path.isdir(out):
        raise ConfigError(f"{out} is a folder; --out names the JSON file to write")
    if os.path.exists(out) and not overwrite:
        raise ConfigError(f"{out} is there already; choose another --out, or --overwrite")
    if not os.path.isdir(out.parent):
        raise ConfigError(f"cannot write {out}: the folder {out.parent} does not exist; make it, or choose another --out")


def tail(train_C: np.ndarray) -> dict[str, Any]:
    """Figures of the tail. Classes without images are counted apart: no ratio to them is finite."""
    used = train_C[train_C > 0]
    groups = shot_groups(used)
    return {
        "images": int(used.sum()), "classes": len(train_C), "empty": int((train_C == 0).sum()),
        "largest": int(used.max()) if used.size else 0, "smallest": int(used.min()) if used.size else 0,
        "imbalance_factor": imbalance_factor(used) if used.size else None,
        "gini": gini(used), "head_share": head_share(used, HEAD) if used.size else None, "head_classes": HEAD,
        "groups": {group: {"classes": int((groups == group).sum()), "images": int(used[groups == group].sum())}
                   for group in GROUPS},
    }  # fmt: skip


def _per_class(listing: Listing, facts: Facts, counts_SC: np.ndarray) -> list[dict[str, Any]]:
    bad_C = listing.counts(facts.reason_N > 0).sum(axis=0)
    groups = shot_groups(counts_SC[0])
    return [
        {"name": aside.printable(name), **{split: int(n) for split, n in zip(listing.splits, counts_SC[:, c], strict=True)},
         "group": str(groups[c]) if counts_SC[0, c] else None, "unreadable": int(bad_C[c])}
        for c, name in enumerate(listing.classes)
    ]  # fmt: skip


def _images(facts: Facts) -> dict[str, Any] | None:
    """Sizes, modes and formats of the images that were decoded; None where none was."""
    rows = np.flatnonzero(facts.width_N)
    if not rows.size:
        return None

    def quantiles(values: np.ndarray) -> dict[str, int]:
        found = np.percentile(values, _QUANTILES, method="inverted_cdf")
        return {f"q{q}": int(v) for q, v in zip(_QUANTILES, found, strict=True)}

    def share(codes_N: np.ndarray, texts: list[str]) -> dict[str, int]:
        counts = np.bincount(codes_N[rows], minlength=len(texts))
        return {texts[c]: int(counts[c]) for c in np.argsort(-counts, kind="stable") if counts[c] and texts[c]}

    width, height = facts.width_N[rows], facts.height_N[rows]
    return {
        "decoded": int(rows.size), "width": quantiles(width), "height": quantiles(height),
        "shorter_side": quantiles(np.minimum(width, height)), "aspect": {
            "q50": float(np.median(np.maximum(width, height) / np.minimum(width, height))),
            "q100": float((np.maximum(width, height) / np.minimum(width, height)).max())},
        "modes": share(facts.mode_N, facts.modes.texts), "formats": share(facts.format_N, facts.formats.texts),
        "bytes": int(facts.bytes_N[rows].clip(0).sum()),
    }  # fmt: skip


def _entry(listing: Listing, row: int) -> dict[str, str]:
    return {"split": listing.splits[listing.split_N[row]],
            "class": aside.printable(listing.classes[listing.label_N[row]]), "path": listing.keys[row]}  # fmt: skip


def _unreadable(listing: Listing, facts: Facts) -> dict[str, Any]:
    rows = np.flatnonzero(facts.reason_N)
    counts = np.bincount(facts.reason_N[rows], minlength=len(facts.reasons.texts))
    reasons = {facts.reasons.texts[c]: int(counts[c]) for c in np.argsort(-counts, kind="stable") if counts[c]}
    for _, reason in listing.bad:
        reasons[reason] = reasons.get(reason, 0) + 1
    items = [{"path": aside.printable(key), "reason": reason} for key, reason in listing.bad[:MOST_LISTED]]
    items += [_entry(listing, row) | {"reason": facts.reasons.texts[facts.reason_N[row]]}
              for row in rows[: MOST_LISTED - len(items)]]  # fmt: skip
    return {"images": int(rows.size) + len(listing.bad), "reasons": reasons, "list": items}


def _duplicates(listing: Listing, facts: Facts, duplicates: Duplicates) -> dict[str, Any]:
    """Groups of entries with the same content, leakage first; ``list`` stops at MOST_LISTED images."""
    groups, listed = [], 0
    for rows in duplicates.worst_first():
        rows = rows[: MOST_LISTED - listed]
        listed += len(rows)
        if len(rows) < 2:
            break
        groups.append([_entry(listing, row) for row in rows])
    of = {kind: duplicates.of_kind(kind) for kind in KINDS}
    leaked = duplicates.rows(of[TRAIN_TEST])
    splits = np.bincount(listing.split_N[leaked], minlength=len(listing.splits))
    labels = np.flatnonzero(duplicates.labels_G)
    return {
        "checked": "by content (sha256)" if facts.hashed else "same files only",
        "groups": len(duplicates.size_G), "images": len(duplicates.row_M),
        "train_test": {"groups": len(of[TRAIN_TEST]),
                       "images": {split: int(n) for split, n in zip(listing.splits, splits, strict=True) if n}},
        "two_labels": {"groups": len(labels), "images": int(duplicates.size_G[labels].sum()),
                       "within_one_split": int((duplicates.labels_G & ~duplicates.several_G).sum())},
        "within": {"groups": len(of[WITHIN]), "extra_images": int((duplicates.size_G[of[WITHIN]] - 1).sum())},
        "other_splits": {"groups": len(of["splits"])},
        "list": groups,
    }  # fmt: skip
