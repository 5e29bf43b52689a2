"""Networks compiled by ``torch.compile``: where that can be done, and where training is long enough to earn its start-up."""

import logging

import torch
from torch import Tensor, nn

from ..errors import ConfigError, one_line
from ..reporter import Reporter

# Pixels that a training shows its network. On two CPU cores compiling takes about half a minute, this many pixels take
# ResNet-32 at 32 px or ResNet-50 at 224 px about half an hour, and compiled 7 to 25 % less (examples/bench_engine.py).
PAYS = 1_000_000_000


def choose_compile(how: str, pixels: int, device: torch.device, reporter: Reporter) -> str:
    """``off``, ``on`` or ``cuda-graphs``: what ``how`` means for a training that shows ``pixels`` pixels on ``device``.

    ``auto`` is ``on`` where there are at least ``PAYS`` of them and compiling works here, which a small trial shows: it
    takes a C++ compiler for a CPU, Triton for a GPU. It depends on nothing that a second start, as in ``--resume``, would
    find otherwise. Raises ConfigError where compiling was asked for and does not work here.
    """
    if how == "off" or (how == "auto" and pixels < PAYS):
        return "off"
    if (error := _fails(device)) is not None:
        if how != "auto":
            raise ConfigError(f"--compile {how} cannot work here ({one_line(error)}); a CPU needs a C++ compiler (g++ or "
                              "clang++), a GPU needs Triton; or leave it out")  # fmt: skip
        reporter.note(f"the network runs as it is, not compiled: {one_line(error)}")
        return "off"
    if how == "auto":
        # What a trial cannot show, an operation of some network that the compiler does not take, is then run as it is.
        torch._dynamo.config.suppress_errors = True
        reporter.note("compiling the network first, which pays in so long a training (--compile off goes without)")
        return "on"
    return how


def compile_in_place(module: nn.Module, how: str) -> None:
    """In place, so names and weights stay; the first step compiles. CUDA graphs launch all kernels of a pass at once, which
    pays where they are short: with small images."""
    if how != "off":
        module.compile(mode="reduce-overhead" if how == "cuda-graphs" else None)


def _fails(device: torch.device) -> Exception | None:
    """What a compiled function of two numbers raises on ``device``."""

    def double(x: Tensor) -> Tensor:
        return x + x

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA toolkit without a GPU

    try:
        torch.compile(double)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds, by what is missing
        return error
    return None
