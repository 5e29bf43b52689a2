"""Layers into one configuration, and a configuration into TOML."""

import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tomli_w
from pydantic import ValidationError

from ..errors import ConfigError
from .base import StageConfig, suggest
from .detect import DETECT_STAGES
from .stages import CLASSIFY_STAGES

STAGES: dict[str, type[StageConfig]] = CLASSIFY_STAGES | DETECT_STAGES

C = TypeVar("C", bound=StageConfig)

# A layer that sets one of a pair takes back what an earlier layer said of the other.
_EXCLUSIVE = {"steps": "epochs", "epochs": "steps"}


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A validated configuration, and for every key the layer its value came from."""

    stage: str
    config: C
    sources: dict[str, str]
    preset: str | None = None

    def to_toml(self, run: dict[str, Any] | None = None) -> str:
        """The dump that ``--config`` reads back: the stage's table, a source a key, and the run's provenance."""
        values = {k: v for k, v in self.config.model_dump(mode="json").items() if v is not None}
        document: dict[str, Any] = {"preset": self.preset} if self.preset else {}
        document |= {self.stage: values, "source": {k: self.sources[k] for k in values}}
        return tomli_w.dumps(document | ({"run": run} if run else {}))


def parse_set(pairs: list[str]) -> dict[str, Any]:
    """``--set key=value`` into typed values: the value is read as TOML, or taken as text where it is not TOML."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {pair!r}: write it as key=value")
        try:
            found = tomllib.loads(f"v = {text}")
        except (ValueError, RecursionError):
            found = {}
        values[_spelt(key.strip())] = found["v"] if found.keys() == {"v"} else text.strip()
    return values


def _spelt(key: str) -> str:
    """A key may be written as its option is: batch-size."""
    return key.replace("-", "_")


def read_file(path: Path, stage: str) -> tuple[dict[str, Any], str | None]:
    """The table of ``stage`` in a TOML file, and the file's preset. Tables of other stages are left alone."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    preset = document.pop("preset", None)
    if not isinstance(preset, str | None):
        raise ConfigError(f"{path}: preset is the name of a recipe, such as 'quick', got {preset!r}")
    for key, value in document.items():
        if key in ("source", "run") or (key in STAGES and isinstance(value, dict)):
            continue
        if key in STAGES:
            raise ConfigError(f"{path}: '{key}' is no table; write [{key}], and its values below")
        if _spelt(key) in STAGES[stage].model_fields:
            raise ConfigError(f"{path}: '{key}' stands outside a table; put it under [{stage}]")
        raise ConfigError(f"{path}: unknown table or key '{key}'; {suggest(key, [*STAGES, 'preset'])}")
    return {_spelt(key): value for key, value in document.get(stage, {}).items()}, preset


def resolve(
    stage: str,
    *,
    methods: list[tuple[str, dict[str, Any]]] | None = None,
    preset: tuple[str, dict[str, Any]] | None = None,
    preset_sources: dict[str, str] | None = None,
    file: tuple[Path, dict[str, Any]] | None = None,
    flags: dict[str, Any] | None = None,
    sets: dict[str, Any] | None = None,
) -> Resolved:
    """Merge the layers for ``stage`` and validate. All mistakes are told at once, a clause each, in one line.

    ``methods``: what a chosen method brings along (``presets.methods``), each with the name of its source.
    ``preset_sources``: where single values of the preset come from, by key (``presets.sources``).
    Raises: ConfigError (exit 2) for unknown keys and for values of the wrong type or range.
    """
    model = STAGES[stage]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers = [("flag", flags or {}), ("flag --set", sets or {})]
    if file:
        layers.insert(0, (f"file {file[0].name}", file[1]))
    if preset:
        layers.insert(0, (f"preset {preset[0]}", preset[1]))
    layers = [*(methods or []), *layers]
    unknown: list[str] = []
    for name, layer in layers:
        for key, value in layer.items():
            if key not in model.model_fields:
                unknown.append(f"unknown key '{key}' ({name}); {suggest(key, list(model.model_fields))}")
                continue
            values[key], sources[key] = value, name
            if preset_sources and name == f"preset {preset[0]}" and key in preset_sources:
                sources[key] += f": {preset_sources[key]}"
            other = _EXCLUSIVE.get(key) if value is not None else None
            if other in model.model_fields and layer.get(other) is None:
                values[other], sources[other] = None, name
    if unknown:
        raise ConfigError("; ".join(unknown))
    try:
        config = model(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, sources) for e in error.errors())) from None
    return Resolved(stage, config, {k: sources.get(k, "default") for k in model.model_fields}, preset[0] if preset else None)


def _explain(error: Any, sources: dict[str, str]) -> str:
    """One pydantic error as one clause: the key, what is wrong, what was given, and by which layer."""
    if not error["loc"]:  # a rule about several keys, which says it all
        return error["msg"].removeprefix("Value error, ")
    key = str(error["loc"][0])
    what = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    near = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        known = re.findall("'([^']*)'", error["ctx"]["expected"])
        near = "".join(f"; did you mean '{word}'?" for word in difflib.get_close_matches(error["input"], known, n=1))
    return f"{key}: {what}, got {error['input']!r:.200} ({sources.get(key, 'default')}){near}"
