"""What stage 2 costs on large data: retrain with the meta sampler, from a feature bank on the disk, batch 512.

Synthetic banks of the size of ImageNet-LT on a ResNet-10 (115,846 images, 512 features, 1,000 classes) and of iNaturalist
2018 on a ResNet-50 (437,513 images, 2,048 features, 8,142 classes: 3.6 GB), one row an image. Each is set against a bank with
a tenth of the images and one with an eighth of the classes. The step is the stage's own (``sampler_step``, closed form); the
bank is written and memory-mapped by the stage's own file (``BankFile``). For each bank, in a process of its own:

* seconds an iteration, of the clock and of the processors: medians over rounds that take the banks in turn, so that a noisy
  moment hits all of them (a machine that others use too spoils the clock, less so the processors' time);
* bytes that an iteration allocates at its peak, counted event by event;
* memory that the process took for all of it: its own (head, optimizer, index), and pages of the bank that it read, which
  the system takes back when it needs them;
* milliseconds to read 512 random rows from the file: with its pages in memory, and with them dropped.

    python examples/bench_scale.py [--folder DIR] [--threads 2] [--json] [--out FILE]

The banks take up to 4 GB in DIR (default: a temporary folder) and are removed at the end.
"""

import json as json_module
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_influence import peak

from balms_cli.config import RetrainConfig
from balms_cli.data.bank import BankFile
from balms_cli.data.features import FeatureBank
from balms_cli.data.samplers import ClassIndex
from balms_cli.engine.optim import Guard, make_sgd
from balms_cli.engine.runtime import setup, versions
from balms_cli.losses import BalancedSoftmaxLoss
from balms_cli.meta.sampler import MetaSampler
from balms_cli.models.classifiers import linear_head
from balms_cli.stages.decoupled import sampler_step, threads_for
from balms_cli.stages.features import Features, bank_reader

BATCH, ROUNDS, STEPS, ROW_READS = 512, 5, 10, 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """A bank: images, features, classes, and the counts of the largest and the smallest class at full size."""

    name: str
    images: int
    features: int
    classes: int
    largest: int
    smallest: int

    def counts(self) -> torch.Tensor:
        """A power law from the largest class to the smallest, bent so that the images add up [C]."""
        rank_C = torch.linspace(0, 1, self.classes, dtype=torch.float64)
        low, high = 0.01, 100.0
        for _ in range(100):  # the larger the bend, the fewer the images
            bend = (low * high) ** 0.5
            counts_C = self.smallest + (self.largest - self.smallest) * (1 - rank_C) ** bend
            low, high = (bend, high) if counts_C.sum() > self.images else (low, bend)
        counts_C = counts_C.long().clamp(min=1)
        counts_C[1 : 1 + self.images - int(counts_C.sum())] += 1
        return counts_C


SIZES = (
    Size("ImageNet-LT", 115_846, 512, 1_000, 1_280, 5),
    Size("ImageNet-LT, N/10", 11_585, 512, 1_000, 128, 1),
    Size("ImageNet-LT, C/8", 115_846, 512, 125, 10_240, 5),
    Size("iNaturalist", 437_513, 2_048, 8_142, 1_000, 2),
    Size("iNaturalist, N/10", 43_751, 2_048, 8_142, 100, 1),
    Size("iNaturalist, C/8", 437_513, 2_048, 1_018, 8_000, 2),
)


def write_bank(path: Path, size: Size) -> BankFile:
    """A bank of noise around one point a class, shard by shard."""
    file = BankFile(path, size.images, size.features)
    labels_N = torch.repeat_interleave(size.counts())
    centres_CD = torch.randn(size.classes, size.features, generator=torch.Generator().manual_seed(1))
    file.begin()
    with file.writer() as writer:
        for shard in file.missing():
            rows = file.shard(shard)
            noise_BD = torch.randn(len(rows), size.features, generator=torch.Generator().manual_seed(2 + shard))
            writer.write(rows.start, noise_BD.add_(centres_CD[labels_N[rows.start : rows.stop]]).relu_())
            writer.mark(shard)
    file.finish()
    return file


class Bench:
    """The step of the stage on one bank."""

    def __init__(self, size: Size, features_ND: torch.Tensor, will_need: Callable | None = None):
        self.guard, self.done = Guard(CPU), 0
        labels_N = torch.repeat_interleave(size.counts())
        bank = FeatureBank(features_ND, torch.arange(len(labels_N)), torch.ones_like(labels_N), will_need)
        index = ClassIndex(labels_N, size.classes)
        data = Features(bank_reader(bank, 0, CPU), labels_N, index)
        config = RetrainConfig(batch_size=BATCH, meta_batch_size=BATCH, meta_sampler=True)
        head = linear_head(size.features, size.classes)
        loss = BalancedSoftmaxLoss(index.counts).float()
        sampler = MetaSampler(index.counts)
        adam = torch.optim.Adam(sampler.parameters(), lr=config.meta_lr, betas=config.meta_betas, fused=True)
        self.threads = threads_for(head, BATCH, CPU)
        self.step = sampler_step(config, head, make_sgd(head, config), loss, sampler, adam, data, data, None)

    def take(self, steps: int) -> list[tuple[float, float]]:
        """Seconds of each of the next steps: of the clock, and of the processors."""
        spent = []
        for _ in range(steps):
            began = time.perf_counter(), time.process_time()
            self.step(self.done, self.guard)
            spent.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            self.done += 1
        return spent


def process_memory() -> dict[str, int]:
    """Bytes of this process: its own, and pages of files that it has read."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("pages", "RssFile"))}


def work(pipe, size: Size, path: Path, threads: int) -> None:
    """One bank in a process of its own, so that its memory is its own: waits to be told how many steps to take."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library writes to stderr on its own
    torch.set_num_threads(threads)
    Bench(Size("", 1000, 8, 8, 500, 5), torch.randn(1000, 8)).take(2)  # what libraries set aside at their first use
    before = process_memory()
    rows = BankFile(path, size.images, size.features).mapped()
    bench = Bench(size, rows.features, rows.will_need)
    with bench.threads:
        while (steps := pipe.recv()) is not None:
            pipe.send(bench.take(steps))
        after = process_memory()
        used = {name: after[name] - before[name] for name in after}
        pipe.send(used | {"iteration": peak(lambda: bench.take(3), "cpu"), "threads": torch.get_num_threads()})


def milliseconds_to_read(file: BankFile, seed: int) -> float:
    """Median milliseconds to read a batch of random rows."""
    rows, generator, spent = file.mapped(), torch.Generator().manual_seed(seed), []
    for _ in range(ROW_READS):
        rows_B = torch.randint(0, file.rows, (BATCH,), generator=generator)
        began = time.perf_counter()
        rows.will_need(rows_B)
        rows.features.index_select(0, rows_B)
        spent.append(time.perf_counter() - began)
    return 1e3 * statistics.median(spent)


def drop_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(family: list[Size], folder: Path, threads: int, rounds: int, steps: int) -> dict[str, dict]:
    """All figures of banks that are compared with each other."""
    files: dict[tuple[int, int], BankFile] = {}
    for size in family:
        shape = (size.images, size.features)
        files[shape] = files.get(shape) or write_bank(folder / f"{shape[0]}x{shape[1]}.safetensors", size)
    context, pipes, workers = multiprocessing.get_context("spawn"), {}, []
    for size in family:
        pipes[size.name], theirs = context.Pipe()
        path = files[size.images, size.features].target
        workers.append(context.Process(target=work, args=(theirs, size, path, threads), daemon=True))
        workers[-1].start()
        theirs.close()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    for n in range(-1, rounds):
        for name, pipe in pipes.items():
            pipe.send(steps if n >= 0 else 2)
            times[name] += pipe.recv()[steps if n < 0 else 0 :]  # the first two steps only warm up
    memory = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        memory[name] = pipe.recv()
    for worker in workers:
        worker.join()
    found = {}
    for size in family:
        file = files[size.images, size.features]
        warm = milliseconds_to_read(file, 0), milliseconds_to_read(file, 0)  # the second time every page is there
        drop_pages(file.target)
        cold = milliseconds_to_read(file, 1)
        found[size.name] = {
            "images": size.images, "features": size.features, "classes": size.classes,
            "bank_megabytes": round(4 * size.images * size.features / 1e6, 1),
            "threads": memory[size.name]["threads"],
            "seconds_an_iteration": round(statistics.median(wall for wall, _ in times[size.name]), 5),
            "processor_seconds_an_iteration": round(statistics.median(cpu for _, cpu in times[size.name]), 5),
            "peak_megabytes_of_an_iteration": round(memory[size.name]["iteration"] / 1e6, 2),
            "megabytes_of_the_process": {"own": round(memory[size.name]["own"] / 1e6, 1),
                                         "pages of the bank": round(memory[size.name]["pages"] / 1e6, 1)},
            "milliseconds_to_read_512_rows": {"pages in memory": round(warm[1], 2), "pages dropped": round(cold, 2)},
        }  # fmt: skip
    for file in files.values():
        file.target.unlink()
    return found


def ratios(found: dict[str, dict], name: str) -> dict[str, float]:
    """The full size over a tenth of the images and over an eighth of the classes."""
    full, values = found[name], {}
    for part, label in ((f"{name}, N/10", "N over N/10"), (f"{name}, C/8", "C over C/8")):
        for key, what in (("seconds_an_iteration", "time"), ("processor_seconds_an_iteration", "processor time"),
                          ("peak_megabytes_of_an_iteration", "peak memory")):  # fmt: skip
            values[f"{what}, {label}"] = round(full[key] / found[part][key], 2)
    return values


def main(
    folder: Annotated[Path | None, typer.Option(help="Where the banks are written, 3.6 GB at a time.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch, where the stage uses more than one.", min=1)] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write that object here too.")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Small banks and a few steps, to see that it runs.")] = False,
):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the profiler in the workers remarks on what was allocated before it
    setup("cpu", "fp32")
    sizes, rounds, steps = list(SIZES), ROUNDS, STEPS
    if rehearse:
        sizes = [replace(s, images=s.images // 20, classes=s.classes // 20, features=s.features // 8,
                         largest=min(s.largest, s.images // 60)) for s in sizes]  # fmt: skip
        rounds, steps = 1, 2
    load = os.getloadavg()[0]
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        for name in ("ImageNet-LT", "iNaturalist"):
            family = [size for size in sizes if size.name.startswith(name)]
            found |= measure(family, Path(inside), threads, rounds, steps)
    result = {
        "ratios": {name: ratios(found, name) for name in ("ImageNet-LT", "iNaturalist")},
        "must": {"time, N over N/10": "about 1", "peak memory, N over N/10": "about 1"},
        "banks": found, "batch": BATCH, "meta_batch": BATCH, "data": "random features", "precision": "fp32",
        "iterations": f"{rounds} rounds of {steps}", "device": f"cpu, {threads} threads", "load_average_before": round(load, 2),
        "versions": versions(), "date": date.today().isoformat(),
        "command": "python examples/bench_scale.py" + (f" --threads {threads}" if threads != 2 else ""),
    }  # fmt: skip
    if out:
        out.write_text(json_module.dumps(result, indent=1) + "\n")
    if json:
        print(json_module.dumps(result))
        return
    print("bank                        N     D     C  s/iteration  cpu s/iter.  peak MB/iter.   own MB  bank MB  rows ms")
    for name, b in found.items():
        print(f"{name:20}{b['images']:9,}{b['features']:6,}{b['classes']:6,}{b['seconds_an_iteration']:13.4f}"
              f"{b['processor_seconds_an_iteration']:13.4f}"
              f"{b['peak_megabytes_of_an_iteration']:15.1f}{b['megabytes_of_the_process']['own']:9.1f}{b['bank_megabytes']:9.1f}"
              f"{b['milliseconds_to_read_512_rows']['pages in memory']:9.2f}")  # fmt: skip
    for name, values in result["ratios"].items():
        print(f"{name}: " + "; ".join(f"{what} {value}" for what, value in values.items()))


if __name__ == "__main__":
    typer.run(main)
