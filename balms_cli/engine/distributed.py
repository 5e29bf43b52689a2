"""Several processes that work on one run: torchrun starts them, ``torch.distributed`` connects them.

    torchrun --nproc-per-node 8 -m balms_cli pretrain DATA

Every process gets the same options, reads the same data and takes its share of each batch: of 512 images in 8 processes
those in places 0 to 63, 64 to 127, and so on. Draws and augmentation are keyed by the place in the whole batch, so the
images that a step sees do not depend on the number of processes. Gradients are averaged by DistributedDataParallel (gloo
between CPUs, NCCL between GPUs). Process 0 alone writes and prints. To a single process nothing here matters.
"""

import gc
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import BalmsError, ConfigError, one_line

_PATIENCE = timedelta(days=1)
STOP_STRIDE = 10  # steps between asking the others on a GPU, where an answer stalls the queue


@dataclass(frozen=True)
class World:
    """This process among those of the run: ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """The places of a batch that are this process's. Raises ConfigError (exit 2) where the shares would differ."""
        if batch_size % self.size:
            raise ConfigError(f"--batch-size {batch_size} does not divide among {self.size} processes; "
                              f"try {max(1, round(batch_size / self.size)) * self.size}")  # fmt: skip
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def rows(self, count: int, rank: int | None = None) -> slice:
        """This process's part of ``count`` rows: every row in just one part, parts alike to one row."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, in each of them; without a graph."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, in each of them; without a graph."""
        if self.size == 1:
            return value
        total = value.detach().to(_meeting(value.device), copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Does any process say so? All of them hear the same answer."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=device)).item())

    def agree(self, value: Any) -> Any:
        """What process 0 says, in all of them."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def by_main(self, action: Callable[[], Any]) -> Any:
        """What process 0 makes of ``action``, in all of them; where it is refused, all of them stop with that error."""
        refused = made = None
        if self.main:
            try:
                made = action()
            except BalmsError as error:
                refused = error
        refused, made = self.agree((refused, made))
        if refused is not None:
            raise refused
        return made

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All ``count`` rows from the parts of ``rows``, in every process, in order."""
        if self.size == 1:
            return part
        shapes = [self.rows(count, rank) for rank in range(self.size)]
        return _all_rows(part, [s.stop - s.start for s in shapes])

    def gather_rows(self, part: Tensor) -> Tensor:
        """All rows [N, ...] from parts of any length, none included, in every process: process 0's first. Without a graph."""
        if self.size == 1:
            return part
        lengths_P = self.gather(torch.tensor([len(part)]), self.size)
        return _all_rows(part.detach(), lengths_P.tolist())

    def wrap(self, model: nn.Module, device: torch.device, *, sync_batch_norm: bool = False) -> nn.Module:
        """``model`` with its gradients averaged over the processes, in backward; ``sync_batch_norm``: BatchNorm statistics over
        all of them too (between GPUs only)."""
        if self.size == 1:
            return model
        if sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _meeting(device: torch.device) -> torch.device:
    """Where a tensor of ``device`` is sent from: NCCL speaks between GPUs only."""
    return device if dist.get_backend() != "nccl" else torch.device("cuda", torch.cuda.current_device())


def _all_rows(part: Tensor, lengths: list[int]) -> Tensor:
    """The parts of all processes after one another; ``lengths`` says how long each is."""
    padded = torch.zeros(max(lengths), *part.shape[1:], dtype=part.dtype, device=_meeting(part.device))
    padded[: len(part)] = part.to(padded.device)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([p[:length].to(part.device) for p, length in zip(parts, lengths, strict=True)])


ALONE = World()


def process_count() -> int:
    """How many processes torchrun started (1: it did not)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(name: str) -> str:
    """Where several share the work, this process's own GPU: also for a numbered one, as a resumed run has process 0's."""
    if process_count() > 1 and (name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


@contextmanager
def join(device: str):
    """This process's World, connected while the block runs. Without torchrun: alone."""
    if process_count() == 1:
        yield ALONE
        return
    name = local_device(device)
    if name.startswith("cuda"):
        torch.cuda.set_device(torch.device(name))
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE is set as by torchrun, and the rest is not ({one_line(error, 200)}): start by torchrun, "
                          "or take WORLD_SIZE out of the environment") from None  # fmt: skip
    # After a restart the store may still hold the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # The others wait while process 0 alone trains a head; torchrun itself sees to processes that die.
    dist.init_process_group("nccl" if name.startswith("cuda") else "gloo", store=store, rank=rank, world_size=size,
                            timeout=_PATIENCE)  # fmt: skip
    yield World(rank, size)
    # Not after an error, where others may be dead. Together, and with the wrapped network gone: one that left while process
    # 0 still wrote was seen to abort in the threads of its connection.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
