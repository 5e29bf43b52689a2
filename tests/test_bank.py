"""The feature bank as a file: whole or resumed, one for all readers, and refused before it fills a disk."""

import json
import os
import shutil
import signal
import struct
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from balms_cli.data import bank as bank_module
from balms_cli.data.bank import BankFile, size_text
from balms_cli.data.features import FeatureBank, build_bank, write_bank
from balms_cli.data.feed import InMemory
from balms_cli.data.manifest import Manifest
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter
from balms_cli.stages import features as stage

from .conftest import invoke

FEW = ["--steps", "20", "--set", "meta_batch_size=16", "--batch-size", "16", "--set", "class_rows=8", "--views", "2"]
MEAN, STD = torch.zeros(3), torch.ones(3)
VIEWS = torch.tensor([1, 3, 2, 1, 4, 2, 5, 1, 1])  # 20 rows of 9 images
SHARD = 6  # shards of 6, 6, 6 and 2 rows


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(bank_module, "SHARD_ROWS", SHARD)


def images(shape=(9, 3, 4, 4)) -> InMemory:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return InMemory(pixels, torch.zeros(len(pixels)), torch.device("cpu"))


class Extractor:
    """Features [B, 5] of pixels, a row at a time so that no batch matters; counts what passed through it."""

    def __init__(self):
        self.seen: Counter[bytes] = Counter()
        self.weight = torch.randn(48, 5, generator=torch.Generator().manual_seed(1))

    def __call__(self, images_B: torch.Tensor) -> torch.Tensor:
        self.seen.update(row.contiguous().numpy().tobytes() for row in images_B)
        return torch.stack([(row.flatten()[:, None] * self.weight).sum(0) for row in images_B])


HOW = {"ops": ["crop", "flip"], "seed": 3, "batch_size": 4, "reporter": Reporter()}


def in_memory() -> torch.Tensor:
    return build_bank(Extractor(), images(), VIEWS, MEAN, STD, **HOW).features


def write(file: BankFile, shards: list[int], extract=None) -> None:
    write_bank(extract or Extractor(), images(), VIEWS, MEAN, STD, **HOW, file=file, shards=shards)


def test_the_file_holds_the_rows_of_the_bank_in_memory_and_other_tools_read_it(tmp_path, small_shards):
    file, known = BankFile(tmp_path / "f" / "b.safetensors", 20, 5), in_memory()
    assert file.mapped() is None and file.loaded() is None
    file.begin()
    assert file.missing() == [0, 1, 2, 3]
    write(file, [2, 0])
    assert file.missing() == [1, 3] and not file.target.exists()
    with pytest.raises(DataError, match="2 of 4 shards"):
        file.finish()
    write(file, [1, 3])
    file.finish()
    assert torch.equal(load_file(file.target)["features"], known)
    assert torch.equal(file.mapped().features, known) and torch.equal(file.loaded(), known)
    assert [p.name for p in file.target.parent.iterdir()] == ["b.safetensors"]  # nothing else stays
    save_file({"features": known}, tmp_path / "theirs.safetensors")
    assert file.target.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_rows_drawn_are_the_same_from_memory_and_from_the_file(tmp_path):
    file = BankFile(tmp_path / "b.safetensors", 20, 5)
    file.begin()
    write(file, file.missing())
    file.finish()
    starts, mapped = VIEWS.cumsum(0) - VIEWS, file.mapped()
    wanted = torch.randint(0, 9, (500,))
    drawn = [FeatureBank(features, starts, VIEWS, will_need).rows(wanted, torch.Generator().manual_seed(5))
             for features, will_need in ((in_memory(), None), (mapped.features, mapped.will_need))]  # fmt: skip
    assert torch.equal(*drawn)


def in_child(action) -> int:
    """Run it in a process of its own; the signal that ended that, or its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def kill_at(moment: str, count: int, monkeypatch) -> None:
    """From now on, the ``count``-th time ``moment`` is reached the process is killed, and nothing is tidied up."""
    left = [count]

    def then_die(original, *, before: bool):
        def call(*args, **kwargs):
            left[0] -= 1
            if before and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    owner, name, before = {
        "row written": (bank_module.ShardWriter, "write", False), "before the mark": (bank_module.ShardWriter, "mark", True),
        "after the mark": (bank_module.ShardWriter, "mark", False), "before the move": (os, "replace", True),
        "after the move": (os, "replace", False),
    }[moment]  # fmt: skip
    monkeypatch.setattr(owner, name, then_die(getattr(owner, name), before=before))


@pytest.mark.parametrize("moment, count, kept", [
    ("row written", 1, 0), ("row written", 3, 1), ("before the mark", 1, 0), ("before the mark", 3, 2),
    ("after the mark", 1, 1), ("after the mark", 4, 4), ("before the move", 1, 4), ("after the move", 1, 4),
])  # fmt: skip
def test_killed_at_any_moment_whole_shards_stay_and_no_row_of_them_is_computed_again(
    tmp_path, small_shards, moment, count, kept, monkeypatch
):
    file = BankFile(tmp_path / "b.safetensors", 20, 5)

    def run() -> None:
        kill_at(moment, count, monkeypatch)
        file.begin()
        write(file, file.missing())
        file.finish()

    assert in_child(run) == signal.SIGKILL
    again = BankFile(tmp_path / "b.safetensors", 20, 5)
    assert (again.mapped() is not None) == (moment == "after the move")
    if moment == "after the move":
        again.tidy()
        assert torch.equal(again.loaded(), in_memory()) and len(list(tmp_path.iterdir())) == 1
        return
    again.begin()
    missing = again.missing()
    assert missing == list(range(kept, 4))
    extract, whole = Extractor(), Extractor()
    write(again, missing, extract)
    again.finish()
    build_bank(whole, images(), VIEWS, MEAN, STD, **HOW)
    assert sum(extract.seen.values()) == 20 - min(20, kept * SHARD) and not extract.seen - whole.seen
    assert torch.equal(again.loaded(), in_memory())


def test_a_growing_file_of_another_shape_or_with_strange_names_beside_it_is_begun_anew(tmp_path, small_shards):
    other = BankFile(tmp_path / "b.safetensors", 20, 7)
    other.begin()
    with other.writer() as writer:
        writer.write(0, torch.ones(6, 7))
        writer.mark(0)
    other.release()
    (other.folder / "notes.txt").write_text("1")
    (other.folder / "٣").touch()  # a digit to Python, no shard of ours
    file = BankFile(tmp_path / "b.safetensors", 20, 5)
    file.begin()
    assert file.missing() == [0, 1, 2, 3]
    write(file, file.missing())
    file.finish()
    assert torch.equal(file.loaded(), in_memory())


def rewrite(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("damage", ["empty", "rubbish", "cut", "longer", "float64", "other name", "two tensors", "huge header",
                                    "folder"])  # fmt: skip
def test_a_damaged_or_foreign_file_is_no_bank(tmp_path, damage):
    path, rows = tmp_path / "b.safetensors", torch.ones(4, 2)
    save_file({"features": rows}, path)
    file = BankFile(path, 4, 2)
    assert torch.equal(file.loaded(), rows) and BankFile(path, 2, 4).loaded() is None and BankFile(path, 4, 3).mapped() is None
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "float64":
        save_file({"features": rows.double()}, path)
    elif damage == "other name":
        save_file({"feature": rows}, path)
    elif damage == "two tensors":
        save_file({"features": rows, "more": rows.clone()}, path)
    else:
        content = {"empty": b"", "rubbish": b"rubbish", "cut": whole[:-1], "longer": whole + b"1",
                   "huge header": struct.pack("<Q", 2**60) + whole[8:]}  # fmt: skip
        path.write_bytes(content[damage])
    assert file.loaded() is None and file.mapped() is None


def test_a_map_takes_no_memory_but_for_the_rows_that_are_read(tmp_path):
    """A bank of 1 GiB (a sparse file of zeros): reading 200 of its rows leaves the process as it was, to a few pages a row."""
    path, rows = tmp_path / "b.safetensors", 2**18
    tensor = {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}
    rewrite(path, {"features": tensor}, b"")
    os.truncate(path, path.stat().st_size + rows * 4096)

    def resident() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024

    mapped = BankFile(path, rows, 1024).mapped()
    bank = FeatureBank(mapped.features, torch.arange(rows), torch.ones(rows, dtype=torch.int64), mapped.will_need)
    before, generator = resident(), torch.Generator().manual_seed(0)
    drawn = bank.rows(torch.randint(0, rows, (200,), generator=generator), generator)
    assert drawn.shape == (200, 1024) and not drawn.any()
    assert resident() - before < 200 * 16 * 4096 + 2**23 < 2**25


def test_a_second_run_at_the_same_bank_waits_for_it_and_takes_it(tmp_path):
    """The first holds it half a second, then finishes; the second is told that it waits, and has nothing to write."""
    file, ready = BankFile(tmp_path / "b.safetensors", 20, 5), tmp_path / "ready"

    def first() -> None:
        file.begin()
        ready.touch()
        time.sleep(0.3)
        write(file, file.missing())
        file.finish()

    child = os.fork()
    if child == 0:
        try:
            first()
        finally:
            os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    second, told = BankFile(tmp_path / "b.safetensors", 20, 5), []
    second.begin(waiting=lambda: told.append(1))
    os.waitpid(child, 0)
    assert told == [1] and second.missing() == []
    second.finish()
    assert torch.equal(second.loaded(), in_memory()) and len(list(tmp_path.iterdir())) == 2


def test_a_bank_that_another_run_has_just_finished_is_not_begun_anew(tmp_path, small_shards):
    """It was not there when this run looked, and is when it wants to write."""
    first, second = (BankFile(tmp_path / "b.safetensors", 20, 5) for _ in range(2))
    first.begin()
    write(first, first.missing())
    first.finish()
    second.begin()
    assert second.missing() == []
    second.finish()
    assert torch.equal(second.loaded(), in_memory()) and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_another_run_takes_away_at_the_wrong_moment_is_made_again(tmp_path, monkeypatch):
    """The other one gave up, just between this one's two steps."""
    file, opened, left = BankFile(tmp_path / "f" / "b.safetensors", 20, 5), os.open, [2]

    def then_gone(path, *args, **kwargs):
        if str(path) == str(file.growing) and left[0]:
            left[0] -= 1
            shutil.rmtree(file.folder)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", then_gone)
    file.begin()
    write(file, file.missing())
    file.finish()
    assert left == [0] and torch.equal(file.loaded(), in_memory())


# Through the stage


def retrain(chain, out: Path, *options):
    return invoke("retrain", chain.pretrained, *FEW, "--meta-sampler", *options, "--out", out)


def forget(chain) -> None:
    shutil.rmtree(chain.pretrained / "features", ignore_errors=True)


def head(run: Path) -> torch.Tensor:
    return load_file(run / "model.safetensors")["head.weight"]


def test_from_the_disk_or_from_memory_it_is_the_same_run(chain, tmp_path, monkeypatch):
    forget(chain)
    disk = retrain(chain, tmp_path / "disk", "--set", "bank=disk")
    assert disk.code == 0 and "rows x 64 features" in disk.err and "read from the disk" in disk.err
    monkeypatch.setattr(stage, "write_bank", lambda *a, **k: pytest.fail("computed again"))
    for how in ("memory", "auto"):
        done = retrain(chain, tmp_path / how, "--set", f"bank={how}")
        assert done.code == 0 and "feature bank" not in done.err
    assert torch.equal(head(tmp_path / "disk"), head(tmp_path / "memory"))
    assert torch.equal(head(tmp_path / "disk"), head(tmp_path / "auto"))
    rates = [json.loads((tmp_path / how / "rates.json").read_text())["rates"] for how in ("disk", "memory")]
    assert rates[0] == rates[1]


def test_what_does_not_fit_the_memory_comfortably_is_read_from_the_disk(chain, tmp_path, monkeypatch):
    forget(chain)
    monkeypatch.setattr(stage, "available_memory", lambda: 100_000)
    done = retrain(chain, tmp_path / "auto")
    assert done.code == 0 and "read from the disk" in done.err
    monkeypatch.setattr(stage, "available_memory", lambda: 1000)
    refused = retrain(chain, tmp_path / "memory", "--set", "bank=memory")
    assert refused.code == 3 and "1000" not in refused.err and "bank=memory" in refused.err.strip().splitlines()[-1]


def small_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(bank_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


@pytest.mark.parametrize("why", ["asked for", "too large for memory"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_computed(chain, tmp_path, monkeypatch, why):
    forget(chain)
    small_disk(monkeypatch, 3 * 2**10)
    monkeypatch.setattr(stage, "load_images", lambda *a, **k: pytest.fail("read"))
    if why == "too large for memory":
        monkeypatch.setattr(stage, "available_memory", lambda: 1000)
    done = retrain(chain, tmp_path / "r", *(["--set", "bank=disk"] if why == "asked for" else []))
    told = [line for line in done.err.splitlines() if "error" in line]
    assert done.code == 3 and len(told) == 1
    needed = size_text(4 * 64 * rows_of(chain))
    assert f"needs {needed}" in told[0] and "has 3.0 KiB free" in told[0] and "--features online" in told[0]
    assert not (chain.pretrained / "features").exists()


def rows_of(chain) -> int:
    """Two views an image (FEW), and so many that each class has 8 rows."""
    return sum(n * max(2, -(-8 // n)) for n in Manifest.load(chain.manifest).class_counts)


def test_on_a_small_disk_what_fits_the_memory_is_computed_there(chain, tmp_path, monkeypatch):
    forget(chain)
    assert retrain(chain, tmp_path / "kept").code == 0
    forget(chain)
    small_disk(monkeypatch, 1000)
    done = retrain(chain, tmp_path / "r")
    assert done.code == 0 and "not kept for next time" in done.err and not (chain.pretrained / "features").exists()
    assert torch.equal(head(tmp_path / "kept"), head(tmp_path / "r"))


def test_other_pictures_under_the_same_names_have_a_bank_of_their_own(chain, tmp_path):
    """The same folder in another place, its pictures changed: names and labels are alike, so the manifests' sha256 too."""
    forget(chain)
    shutil.copytree(chain.photos, tmp_path / "photos")
    for file in (tmp_path / "photos").rglob("*.png"):
        Image.eval(Image.open(file), lambda value: 255 - value).save(file)
    data = invoke("make-lt", tmp_path / "photos", "--as-is", "--out", tmp_path / "data", "-q").out.strip()
    assert Manifest.load(data).sha256 == Manifest.load(chain.manifest).sha256
    assert retrain(chain, tmp_path / "a").code == 0 and retrain(chain, tmp_path / "b", "--data", data).code == 0
    one, other = (load_file(file)["features"] for file in (chain.pretrained / "features").iterdir())
    assert one.shape == other.shape and not torch.allclose(one, other, atol=0.1)


ONE_VIEW = ["--views", "1", "--set", "class_rows=0"]


@pytest.mark.parametrize("before, after", [
    ([], ["--views", "3"]), (ONE_VIEW, [*ONE_VIEW, "--set", "augment=false"]), ([], ["--precision", "fp32"]),
])  # fmt: skip
def test_what_the_rows_depend_on_names_the_bank(chain, tmp_path, before, after):
    forget(chain)
    assert retrain(chain, tmp_path / "a", *before).code == 0 and retrain(chain, tmp_path / "b", *after).code == 0
    assert len(list((chain.pretrained / "features").iterdir())) == 2


def test_splits_of_one_size_have_banks_of_their_own(chain):
    data, cpu = Manifest.load(chain.manifest), SimpleNamespace(device=torch.device("cpu"), precision="fp32")
    keys = {stage._bank_key(chain.pretrained / "model.safetensors", data, split, torch.ones(6), [], 0, cpu)
            for split in ("train", "val", "meta")}  # fmt: skip
    assert len(keys) == 3


def test_a_growing_file_that_was_cut_is_begun_anew(tmp_path, small_shards):
    file = BankFile(tmp_path / "b.safetensors", 20, 5)
    file.begin()
    write(file, [0, 1, 2])
    file.release()
    os.truncate(file.growing, 300)
    file.begin()
    assert file.missing() == [0, 1, 2, 3]
    file.release()
    assert not file.folder.exists()


def test_a_bank_kept_by_an_earlier_version_is_used(chain, tmp_path, monkeypatch):
    """Written whole by the safetensors library, as was done before there were shards."""
    forget(chain)
    assert retrain(chain, tmp_path / "a").code == 0
    (kept,) = (chain.pretrained / "features").iterdir()
    rows = load_file(kept)["features"].clone()
    save_file({"features": rows}, kept)
    monkeypatch.setattr(stage, "write_bank", lambda *a, **k: pytest.fail("computed again"))
    for how in ("disk", "memory"):
        assert retrain(chain, tmp_path / how, "--set", f"bank={how}").code == 0
        assert torch.equal(head(tmp_path / how), head(tmp_path / "a"))


def test_a_run_that_was_killed_goes_on_where_it_was(chain, tmp_path, monkeypatch, small_shards):
    """The command line, killed at its fifth shard: the same command computes the other rows only, and says so."""
    forget(chain)
    whole = retrain(chain, tmp_path / "whole")
    assert whole.code == 0 and "are there from" not in whole.err
    forget(chain)

    def killed() -> None:
        kill_at("after the mark", 5, monkeypatch)
        retrain(chain, tmp_path / "r")

    assert in_child(killed) == signal.SIGKILL
    wrote, write_rows = [], bank_module.ShardWriter.write
    monkeypatch.setattr(bank_module.ShardWriter, "write", lambda self, first, out: (wrote.append(len(out)),
                                                                                  write_rows(self, first, out)))  # fmt: skip
    shutil.rmtree(tmp_path / "r", ignore_errors=True)
    done = retrain(chain, tmp_path / "r")
    assert done.code == 0 and "30 rows are there from a run that was stopped" in done.err
    assert sum(wrote) == rows_of(chain) - 30
    assert torch.equal(head(tmp_path / "r"), head(tmp_path / "whole"))
