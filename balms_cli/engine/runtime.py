"""Where and how things are computed: device, precision, determinism."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch

from .. import __version__
from ..errors import ConfigError, one_line
from .distributed import local_device


@dataclass(frozen=True)
class Runtime:
    """A device, and the precision that the backbone runs in on it (heads and losses are always float32)."""

    device: torch.device
    precision: str  # fp32 | bf16

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def describe(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.precision}"
        threads = torch.get_num_threads()
        return f"{self.device.type} with {threads} thread{'s' if threads > 1 else ''}, {self.precision}"


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one. Raises ConfigError for a device that this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used here ({one_line(error)}); try --device auto") from None
    return device


def setup(device: str, precision: str, *, deterministic: bool = False) -> Runtime:
    """Resolve ``auto``. bf16 pays where the processor multiplies in it: GPUs since 2020, CPUs with AVX512_BF16 or AMX."""
    where = pick_device(local_device(device))
    if where.type == "cpu":
        _keep_memory()
    if precision == "auto":
        if where.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        else:
            precision = "bf16" if where.type == "cpu" and _cpu_has_bf16() else "fp32"
    if where.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    return Runtime(where, precision)


def _keep_memory() -> None:
    """Let glibc keep what a step frees for the next step, instead of asking the kernel for zeroed pages again.

    A step of ResNet-32 at batch 128 so takes none of 2,000 to 3,500 page faults, about 2 % of its time. No effect elsewhere.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 28)  # what is larger than any activation goes back as before
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def _cpu_has_bf16() -> bool:
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, flag, lambda: False)() for flag in flags)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """For loops whose kernels take microseconds: on a CPU a second thread only waits, and long where others work too."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """What produced a result: for run folders and benchmarks."""
    return {"balms": __version__, "torch": torch.__version__, "torchvision": version("torchvision"),
            "python": platform.python_version()}  # fmt: skip
