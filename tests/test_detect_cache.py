"""The cache of region features: its rows, its size, and what a killed process leaves."""

import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from balms_cli.data import aside
from balms_cli.detection import cache as cache_module
from balms_cli.detection.cache import SHARD_VIEWS, RegionCache, fill
from balms_cli.errors import ConfigError, DataError
from balms_cli.reporter import Reporter

ROWS, FEATURES, CATEGORIES = 6, 5, 3
VIEWS = 2 * SHARD_VIEWS + 3


def some_regions(view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of the view: 1 to ROWS regions."""
    generator = torch.Generator().manual_seed(view)
    rows = 1 + view % ROWS
    return torch.randn(rows, FEATURES, generator=generator), torch.randint(CATEGORIES + 1, (rows,), generator=generator)


def new_cache(folder, **over) -> RegionCache:
    return RegionCache(folder, **{"views": VIEWS, "rows": ROWS, "features": FEATURES, "categories": CATEGORIES} | over)


def filled(folder) -> RegionCache:
    cache = new_cache(folder)
    with cache.held():
        fill(cache, cache.missing(), some_regions, Reporter())
    return cache


def test_every_view_comes_back_as_it_was_but_for_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_OPEN", 1)  # shards are closed and opened again
    cache = filled(tmp_path / "c")
    assert cache.missing() == [] and cache.shards == 3
    for view in [*range(VIEWS), 0, VIEWS - 1, 0]:
        features_RD, labels_R = cache.read(view)
        expected_RD, expected_R = some_regions(view)
        assert torch.equal(features_RD, expected_RD.half()) and torch.equal(labels_R, expected_R)
        assert labels_R.dtype == torch.int64


def test_the_size_that_is_told_is_that_of_full_views_and_never_too_small(tmp_path):
    cache = RegionCache(tmp_path / "c", views=40, rows=64, features=128, categories=3)
    assert "40 views x 64 regions x 128 features, at most" in cache.describe() and "free)" in cache.describe()
    with cache.held():
        fill(cache, cache.missing(), lambda k: (torch.randn(64, 128), torch.zeros(64, dtype=torch.int64)), Reporter())
    on_disk = sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    assert 40 * 64 * (2 * 128 + 4) < on_disk <= cache.bytes() < 1.05 * on_disk


def test_a_killed_extraction_goes_on_with_what_is_missing(tmp_path):
    whole = filled(tmp_path / "whole")

    def killed(k: int):
        if k == SHARD_VIEWS + 5:
            raise KeyboardInterrupt
        return some_regions(k)

    cache = new_cache(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt), cache.held():
        fill(cache, cache.missing(), killed, Reporter())
    again = new_cache(tmp_path / "c")
    assert again.missing() == [1, 2]
    asked = []

    def rest(k: int):
        asked.append(SHARD_VIEWS + k)
        return some_regions(SHARD_VIEWS + k)

    with again.held():
        fill(again, again.missing(), rest, Reporter())
    assert asked == list(range(SHARD_VIEWS, VIEWS))
    files = sorted(whole.folder.iterdir())
    assert [f.name for f in files] == sorted(f.name for f in again.folder.iterdir())
    assert all(f.read_bytes() == (again.folder / f.name).read_bytes() for f in files)


def tensors(rows: int = 8, *, features: int = FEATURES, label: int = 0, views: int = 3) -> dict[str, torch.Tensor]:
    starts = torch.arange(views + 1) * rows // views
    return {"features": torch.zeros(rows, features).half(), "labels": torch.full((rows,), label).int(), "starts": starts}


@pytest.mark.parametrize("content", [
    tensors(features=FEATURES + 1), tensors(label=CATEGORIES + 1), tensors(label=-1), tensors(views=2),
    tensors(rows=3 * ROWS + 3), tensors() | {"more": torch.zeros(1)}, tensors() | {"starts": torch.tensor([0, 8, 2, 8])},
    tensors() | {"starts": torch.tensor([0, 2, 4, 9])}, tensors() | {"features": torch.zeros(8, FEATURES)}, None,
], ids=["features", "label", "negative", "views", "rows", "tensors", "order", "end", "type", "cut"])  # fmt: skip
def test_a_shard_that_is_damaged_or_of_another_cache_is_made_again(tmp_path, content):
    filled(tmp_path / "c")
    last = tmp_path / "c" / "00002.safetensors"
    if content is None:
        last.write_bytes(last.read_bytes()[:-1])
    else:
        save_file(content, last)
    assert new_cache(tmp_path / "c").missing() == [2]
    save_file(tensors(), last)
    assert new_cache(tmp_path / "c").missing() == []  # the test's own shard is fine where nothing is wrong with it


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    cache = new_cache(tmp_path / "c")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2048))
    with pytest.raises(DataError, match=r"needs up to .* KiB .* 2\.0 KiB free: .*views=.*--cache"):
        cache.check_space(cache.shards)
    assert not (tmp_path / "c").exists()


def test_a_second_run_waits_for_the_first_and_finds_nothing_left_to_do(tmp_path):
    first, second = new_cache(tmp_path / "c"), new_cache(tmp_path / "c")
    told, seen = threading.Event(), []

    def come_later():
        assert second.missing() == [0, 1, 2]
        with second.held(told.set):
            seen.append(second.missing())

    with first.held(lambda: pytest.fail("nobody else is there")):
        thread = threading.Thread(target=come_later)
        thread.start()
        assert told.wait(10)
        fill(first, first.missing(), some_regions, Reporter())
        assert seen == []
    thread.join(10)
    assert seen == [[]]
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [f"{n:05}.safetensors" for n in range(3)]


HOLD = """
import sys, time
from pathlib import Path
from balms_cli.detection.cache import RegionCache
with RegionCache(Path(sys.argv[1]), views=9, rows=6, features=5, categories=3).held():
    (Path(sys.argv[1]) / ".new-1-00001.safetensors").write_bytes(b"half")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_holds_nobody_up_and_its_half_written_shard_goes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert (tmp_path / "c" / ".new-1-00001.safetensors").exists()
    with new_cache(tmp_path / "c").held(lambda: pytest.fail("the one that held it is dead")):
        assert list((tmp_path / "c").iterdir()) == []


def test_of_three_runs_one_at_a_time_holds_the_cache(tmp_path):
    """Also the third, which comes when the first has gone and the second, which waited for it, is at work."""
    waits, entered, leave, told = threading.Event(), threading.Event(), threading.Event(), []

    def second():
        with new_cache(tmp_path / "c").held(waits.set):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=second)
    with new_cache(tmp_path / "c").held():
        thread.start()
        assert waits.wait(10)
    assert entered.wait(10)
    with new_cache(tmp_path / "c").held(lambda: (told.append("waited"), leave.set())):
        assert told == ["waited"]
    thread.join(10)


def test_without_locks_nobody_waits_and_nothing_of_another_run_is_taken_away(tmp_path, monkeypatch):
    def none_here(*_):
        raise OSError(95, "Operation not supported")

    for fcntl in (None, SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=none_here)):
        monkeypatch.setattr(aside, "fcntl", fcntl)
        with new_cache(tmp_path / "c").held():
            (tmp_path / "c" / ".new-1-00001.safetensors").write_bytes(b"another's")
            with new_cache(tmp_path / "c").held(lambda: pytest.fail("there is nothing to wait by")):
                assert (tmp_path / "c" / ".new-1-00001.safetensors").exists()


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(tmp_path):
    (tmp_path / "features").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*features/c: .* or leave out --cache"), \
            new_cache(tmp_path / "features" / "c").held():  # fmt: skip
        pass


def test_features_beyond_half_precision_stay_finite(tmp_path):
    cache = new_cache(tmp_path / "c", views=1)
    with cache.held():
        cache.write(0, [(torch.full((2, FEATURES), 1e6), torch.ones(2, dtype=torch.int64))])
    assert cache.read(0)[0].max() == torch.finfo(torch.float16).max


def test_a_shard_that_is_taken_away_is_one_clear_line(tmp_path):
    cache = filled(tmp_path / "c")
    (tmp_path / "c" / "00001.safetensors").unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        cache.read(SHARD_VIEWS)
