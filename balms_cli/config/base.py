"""What every stage's model is built on, and what they have in common."""

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

# How a run is computed, not what: two runs that differ in these alone are of one method.
COMPUTING = frozenset(
    {"device", "loading", "workers", "decode", "checkpoint_seconds", "deterministic", "compile", "tensorboard"}
)
Beta = Annotated[float, Field(ge=0, lt=1)]  # of Adam
Estimator = Literal["class", "image", "expected"]
Hypergradient = Literal["auto", "closed-form", "jvp", "higher"]
# "on" and "off" may also be said as true and false, as older runs do.
Compile = Annotated[
    Literal["auto", "off", "on", "cuda-graphs"],
    BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value),
]


class StageConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("should be a number")
        return value


class ComputeConfig(StageConfig):
    """Where and how things are computed."""

    seed: int = Field(0, ge=0, description="initial weights, order of the batches, augmentation")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the processor computes in it")


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """A clause that helps with a mistyped word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
