"""``rates.json``: learned class sample rates on disk, written by meta-sample and read by ``--sampler FILE``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.manifest import Manifest
from ..engine.header import sha256_of
from ..errors import DataError
from ..reporter import Reporter

_MAX_BYTES = 50_000_000


def rates_document(rates_C: Tensor, classes: list[str], class_counts: list[int]) -> dict[str, Any]:
    """Rates by class name, and their variance over classes (population variance: the figure of the paper's Figure 1)."""
    rates = {name: max(round(r, 6), 1e-6) for name, r in zip(classes, rates_C.tolist(), strict=True)}  # 0 cannot be read back
    counts = dict(zip(classes, class_counts, strict=True))
    return {"rates": rates, "variance": rates_C.double().var(correction=0).item(), "class_counts": counts}


def load_rates(path: Path) -> dict[str, Any]:
    """The content of a ``rates.json``, rates by class name. Raises DataError (exit 3) for anything else."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large to be a rates file")
        document = json.loads(path.read_text(encoding="utf-8"))
        document["rates"] = {str(k): float(v) for k, v in document["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"--sampler {path}: not a rates.json of balms meta-sample ({error})") from None
    return document


def read_rates(sampler: str, manifest: Manifest) -> Tensor | None:
    """Rates [C] in the manifest's class order, or None where ``sampler`` is a name and not a file.

    Raises DataError (exit 3) for a missing or wrong file, or one of other classes.
    """
    if not sampler.endswith(".json"):
        return None
    path = Path(sampler)
    rates = load_rates(path)["rates"]
    missing = [name for name in manifest.classes if name not in rates]
    if missing or len(rates) != len(manifest.classes):
        odd = missing or [name for name in rates if name not in set(manifest.classes)]
        raise DataError(f"--sampler {path}: its classes are not those of {manifest.path.name}, e.g. '{odd[0]}'")
    if not all(1e-100 < r < 1e100 for r in rates.values()):  # so that counts times rates have a sum, and each a share of it
        raise DataError(f"--sampler {path}: every rate must be a number above 0 (and between 1e-100 and 1e100)")
    return torch.tensor([rates[name] for name in manifest.classes], dtype=torch.float64)


def rates_record(sampler: str) -> dict[str, str]:
    """For the record of what a run began with: the hash of the rates file that it draws by, where there is one."""
    file = Path(sampler)
    return {"rates_sha256": sha256_of(file)} if sampler.endswith(".json") and file.is_file() else {}


def show_rates(rates_C: Tensor, manifest: Manifest, title: str, reporter: Reporter, rows: int = 20) -> None:
    """The rates as bars over classes by decreasing size: all of them, or evenly spaced ones."""
    order = sorted(range(len(manifest.classes)), key=lambda c: -manifest.class_counts[c])
    shown = order if len(order) <= rows else [order[round(i * (len(order) - 1) / (rows - 1))] for i in range(rows)]
    labels = [f"{manifest.classes[c]} ({manifest.class_counts[c]})" for c in shown]
    values = [float(rates_C[c]) for c in shown]
    reporter.bars(f"{title}, largest class first", labels, values, [f"{v:.3f}" for v in values])
