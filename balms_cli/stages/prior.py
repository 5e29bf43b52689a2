"""Scores for another class prior than the one that training left in the raw logits (design: what raw logits mean).

Raw logits are right for the implied prior of the checkpoint's header. For another prior, add
strength * (log target - log implied). Softmax on the data re-scored for the uniform prior is post-hoc logit adjustment
(Menon et al., ICLR 2021, eq 9): z - tau log n.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import EvaluateConfig, PredictConfig, suggest
from ..engine.header import Header
from ..errors import ConfigError
from ..reporter import Reporter

NAMED = ("uniform", "train", "reversed")


def adjustment(config: EvaluateConfig | PredictConfig, header: Header) -> Tensor | None:
    """What to add to the raw logits [C] in the header's class order, or None. Raises ConfigError (exit 2)."""
    if config.target_prior is None and config.posthoc_tau is None:
        return None
    target_C = _target(config.target_prior or "uniform", header)
    implied_C = torch.tensor(header.implied_log_prior, dtype=torch.float64)
    strength = 1.0 if config.posthoc_tau is None else config.posthoc_tau
    return strength * (target_C.log().log_softmax(0) - implied_C.log_softmax(0))


def warn_of_inexact(shift_C: Tensor | None, header: Header, name: str, reporter: Reporter) -> None:
    """``name``: the run's, as one of several may be meant."""
    if shift_C is not None and not header.prior_exact:
        reporter.warn(f"{name}: {header.classifier} with {header.loss} leaves no exact prior in its logits; re-scored as if it "
                      "were that of its training law")  # fmt: skip


def _target(name: str, header: Header) -> Tensor:
    counts_C = torch.tensor(header.class_counts, dtype=torch.float64)
    if name == "uniform":
        return torch.ones_like(counts_C)
    if name == "train":
        return counts_C
    if name == "reversed":  # the rarest class gets the share of the most frequent one, and so on inwards
        order = counts_C.argsort(stable=True)
        return torch.empty_like(counts_C).scatter_(0, order, counts_C.sort(descending=True).values)
    if not name.endswith(".json"):
        raise ConfigError(f"--target-prior '{name}' is unknown; {suggest(name, NAMED)} (or a .json file of class: share)")
    return _from_file(Path(name), header)


def _from_file(path: Path, header: Header) -> Tensor:
    try:
        shares = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(shares, dict):
            raise ValueError("it is no JSON object of class: share")
        missing = [c for c in header.classes if c not in shares]
        if missing:
            raise ValueError(f"it has no share for {', '.join(missing[:3])}")
        if unknown := [c for c in shares if c not in set(header.classes)]:
            raise ValueError(f"it names a class that the checkpoint has not: {unknown[0]}")
        target_C = torch.tensor([float(shares[c]) for c in header.classes], dtype=torch.float64)
        if not (target_C.isfinite().all() and (target_C > 0).all()):
            raise ValueError("every share must be a number above zero (a class that never comes: 1e-9)")
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"--target-prior {path}: {error}") from None
    return target_C
