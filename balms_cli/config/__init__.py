"""One strict model a stage: every value has a unit or meaning, a default, and a remembered source.

Values come from five layers, later ones winning: default < method < preset < file (``--config``) < flag (options and
``--set``); method: what the loss, classifier or reweighter that was chosen brings along, named with its source.
``resolve`` merges them, refuses unknown keys with a suggestion, and says where each value came from.
This room is a leaf: it knows nothing of torch, so that a mistake is told before anything heavy is imported.

``base``: what all share; ``stages``: classification; ``detect``: detection; ``layers``: merging, and TOML.
"""

from .base import COMPUTING, ComputeConfig, StageConfig, suggest
from .detect import (
    DETECT_LOSSES,
    DetectEvaluateConfig,
    DetectFinetuneConfig,
    DetectPredictConfig,
    DetectSGDConfig,
    DetectTrainConfig,
    family_of,
)
from .layers import STAGES, Resolved, parse_set, read_file, resolve
from .stages import (
    CLASSIFIERS,
    EXPORTS,
    LOSSES,
    REWEIGHTERS,
    SAMPLERS,
    AuditConfig,
    EvaluateConfig,
    ExportConfig,
    MakeLTConfig,
    MetaSampleConfig,
    PredictConfig,
    PretrainConfig,
    RetrainConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "CLASSIFIERS", "COMPUTING", "DETECT_LOSSES", "EXPORTS", "LOSSES", "REWEIGHTERS", "SAMPLERS", "STAGES", "AuditConfig",
    "ComputeConfig", "DetectEvaluateConfig", "DetectFinetuneConfig", "DetectPredictConfig", "DetectSGDConfig",
    "DetectTrainConfig", "EvaluateConfig", "ExportConfig", "MakeLTConfig", "MetaSampleConfig", "PredictConfig",
    "PretrainConfig", "Resolved", "RetrainConfig", "RunConfig", "StageConfig", "TrainConfig", "family_of", "parse_set",
    "read_file", "resolve", "suggest",
]  # fmt: skip
