"""make-lt end to end: counts, splits, reuse, what is printed; and on real CIFAR where it is there."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from balms_cli.config import MakeLTConfig
from balms_cli.data import aside, longtail
from balms_cli.data.images import load_pixels
from balms_cli.data.manifest import Manifest, newest_manifest
from balms_cli.errors import ConfigError, DataError
from balms_cli.stages.make_lt import Result, run

from .data_helpers import Listener, picture, tree

REAL = os.environ.get("BALMS_TEST_DATA")


def folder(tmp_path: Path) -> Path:
    counts = {"train/big": 12, "train/mid": 9, "train/small": 3, "test/big": 2, "test/mid": 2}
    return tree(tmp_path / "my photos", counts)


def config(source: Path | str, **options: object) -> MakeLTConfig:
    return MakeLTConfig(source=str(source), **options)


def keys(result: Result, split: str = "train") -> set[str]:
    return set(result.manifest.splits[split].keys)


def test_digits_default_has_all_three_groups(tmp_path: Path) -> None:
    result = run(config("digits"), tmp_path)
    told = result.to_json()
    assert told["class_counts"] == [int(128 * 40 ** (-c / 9)) for c in range(10)]
    assert told["groups"] == {"many": 1, "medium": 4, "few": 5}
    assert told["total"] == sum(told["class_counts"]) == told["splits"]["train"]
    assert told["splits"]["test"] == 500
    assert told["manifest"] == str(result.path)
    assert set(told) == {"manifest", "name", "classes", "class_counts", "total", "imbalance_factor", "groups", "splits",
                         "profile", "seed", "manifest_sha256", "skipped", "untested"}  # fmt: skip
    assert json.loads(json.dumps(told)) == told
    assert result.path.name == f"digits-lt-if40-seed0-{told['manifest_sha256'][:8]}"
    assert Manifest.load(result.path).class_counts == told["class_counts"]


def test_higher_imbalance_is_a_subset_and_seeds_differ(tmp_path: Path) -> None:
    lower = run(config("digits", imbalance=10), tmp_path)
    higher = run(config("digits", imbalance=60), tmp_path)
    other = run(config("digits", imbalance=60, seed=1), tmp_path)
    assert keys(higher) < keys(lower)
    assert keys(higher) != keys(other)
    assert keys(higher, "test") == keys(other, "test")


def test_the_same_again_is_the_same_folder(tmp_path: Path) -> None:
    first = run(config("digits"), tmp_path)
    between = run(config("digits", seed=1), tmp_path)
    assert newest_manifest(tmp_path) == between.path
    index = (first.path / "train.csv").stat().st_mtime_ns
    again = run(config("digits"), tmp_path)
    assert (again.path, again.reused, first.reused) == (first.path, True, False)
    assert newest_manifest(tmp_path) == first.path
    assert (first.path / "train.csv").stat().st_mtime_ns == index
    (first.path / "train.csv").write_text("damaged")
    assert run(config("digits"), tmp_path).reused is False
    assert Manifest.load(first.path).sha256 == first.manifest.sha256


def test_the_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    plain, source = run(config("digits"), tmp_path).manifest, folder(tmp_path)
    assert plain.options == {}
    asked = {"imbalance": 3.0, "head_size": 9, "val_per_class": 1, "meta_per_class": 1, "seed": 4, "profile": "step"}
    made = run(config(source, **asked, data_root=str(tmp_path), check=False), tmp_path)
    document = json.loads((made.path / "manifest.json").read_text())
    assert document["options"] == asked == Manifest.load(made.path).options
    # Readers of before pass the key over, and it is no part of what names the split: there, with it and without it.
    sha256 = document["sha256"]
    del document["options"]
    (made.path / "manifest.json").write_text(json.dumps(document))
    assert (Manifest.load(made.path).options, Manifest.load(made.path).sha256) == ({}, sha256)
    assert run(config(source, **asked), tmp_path).reused and Manifest.load(made.path).options == asked


def test_validation_and_meta_are_cut_first(tmp_path: Path) -> None:
    result = run(config("digits", val_per_class=5, meta_per_class=3), tmp_path)
    parts = [keys(result, split) for split in ("train", "val", "meta", "test")]
    assert [len(part) for part in parts[1:]] == [50, 30, 500]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert result.manifest.class_counts[0] == 120
    assert keys(result, "val") == keys(run(config("digits", val_per_class=5, imbalance=2), tmp_path), "val")


def test_profiles_and_head_size(tmp_path: Path) -> None:
    step = run(config("digits", profile="step", imbalance=10, head_size=100), tmp_path)
    assert step.manifest.class_counts == [100] * 5 + [10] * 5
    assert step.manifest.name == "digits-step-if10-seed0"
    assert run(config("digits", imbalance=12.5, head_size=50), tmp_path).manifest.name == "digits-lt-if12.5-seed0"


def image_list(path: Path, counts: list[int]) -> Path:
    """A list of images that are not there."""
    path.write_text("".join(f"train/n{c:08d}/n{c:08d}_{i}.JPEG {c}\n" for c, n in enumerate(counts) for i in range(n)))
    return path


def test_pareto_draw_of_imagenet_says_how_near_it_comes(tmp_path: Path) -> None:
    enough = longtail.class_counts_pareto(1280, 1000, 256) + 9  # the full set has ten times as many, and takes its time
    full = image_list(tmp_path / "imagenet.txt", enough.tolist())
    options = {"check": False, "profile": "pareto", "imbalance": 256, "head_size": 1280, "test_fraction": 1e-9}
    listener = Listener()
    result = run(config(full, **options), tmp_path, listener)
    counts = result.manifest.class_counts
    assert (len(counts), max(counts), min(counts), sum(counts)) == (1000, 1280, 5, 112_235)
    assert result.manifest.name == "imagenet-pareto6-if256-seed0" and result.manifest.profile == "pareto"
    told = next(note for note in listener.notes if "published" in note)
    assert "ImageNet-LT has 115,846 training images, this draw 112,235 (-3.1%); --alpha 6.401 comes nearest" in told
    with pytest.raises(ConfigError, match="exponent of --profile pareto"):
        run(config("digits", alpha=3), tmp_path)


def test_a_published_list_is_kept_as_it_is(tmp_path: Path) -> None:
    counts = longtail.class_counts_pareto(4980, 365, 996, 1.693)
    counts[5] -= counts.sum() - 62_500
    listener = Listener()
    result = run(config(image_list(tmp_path / "Places_LT_train.txt", counts.tolist()), as_is=True, check=False,
                        test_fraction=1e-9), tmp_path, listener)  # fmt: skip
    assert sum(result.manifest.class_counts) == 62_500 - 365  # one image a class is cut where there is no test list
    (tmp_path / "Places_LT_test.txt").write_text("".join(f"val/{c}.jpg {c}\n" for c in range(365)))
    result = run(config(tmp_path / "Places_LT_train.txt", as_is=True, check=False), tmp_path, listener)
    assert result.manifest.class_counts == sorted(counts.tolist(), reverse=True)
    assert any("those of the published Places-LT" in note for note in listener.notes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
def test_two_million_images_in_a_minute(tmp_path: Path) -> None:
    weights = np.arange(1, 8143) ** -0.8
    image_list(tmp_path / "all.txt", (2 + weights / weights.sum() * 1_990_000).astype(int).tolist())
    code = "import resource, sys; from balms_cli.cli.app import main; sys.argv = ['balms', *sys.argv[1:]]\ntry: main()\n" \
           "finally:\n used = resource.getrusage(resource.RUSAGE_SELF)\n" \
           " peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]\n" \
           " print(used.ru_utime + used.ru_stime, peak, file=sys.stderr)"  # fmt: skip
    # Not ru_maxrss: a program started by a large one counts that one's memory too.
    for command in (["make-lt", "all.txt", "--as-is", "--set", "check=false", "-q"], ["audit", "all.txt", "--no-decode", "-q"]):
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True)
        seconds, kilobytes = map(float, done.stderr.split()[-2:])  # of the processor: other work beside it counts for nothing
        print(command[0], f"{seconds:.1f} s, {kilobytes / 1e6:.2f} GB")
        assert done.returncode == 0 and seconds < 60 and kilobytes < 2e6, (command, seconds, kilobytes, done.stderr)


def test_short_classes_keep_what_they_have(tmp_path: Path) -> None:
    listener = Listener()
    result = run(config(folder(tmp_path), imbalance=1.5), tmp_path, listener)
    assert result.manifest.class_counts == [12, 9, 3]  # 12, 9.8 and 8 were asked for
    assert any("1 of 3 classes have fewer" in line and "'small': 3 instead of 8" in line for line in listener.warnings)


def test_folder_as_is(tmp_path: Path) -> None:
    listener = Listener()
    result = run(config(folder(tmp_path), as_is=True), tmp_path, listener)
    assert result.manifest.classes == ["big", "mid", "small"]
    assert result.manifest.class_counts == [12, 9, 3]
    assert (result.manifest.name, result.manifest.profile) == ("my-photos-as-is", "as-is")
    assert result.manifest.imbalance is None
    assert result.manifest.imbalance_factor == 4
    assert result.manifest.untested == ["small"]
    assert any("untested: small" in line for line in listener.warnings)
    assert result.manifest.image_size == [8, 8]
    pixels = load_pixels(Manifest.load(result.path), "train", 8)
    numbers = [int(Path(key).stem) for key in result.manifest.splits["train"].keys]
    assert pixels[:, 0, 0, 0].tolist() == numbers


def test_head_follows_the_test_cut(tmp_path: Path) -> None:
    source = tree(tmp_path / "p", {"a": 20, "b": 19, "tiny": 2})
    result = run(config(source, as_is=True, test_fraction=0.25), tmp_path)
    assert (result.manifest.classes, result.manifest.class_counts) == (["a", "b", "tiny"], [15, 14, 2])
    assert result.manifest.untested == ["tiny"]
    half = run(config(tree(tmp_path / "q", {"a": 3, "b": 2}), as_is=True, test_fraction=0.5), tmp_path)
    assert (half.manifest.classes, half.manifest.class_counts) == (["b", "a"], [2, 1])  # b is too small to be cut


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    source = folder(tmp_path)
    with pytest.raises(ConfigError, match=r"--as-is .* --imbalance N"):
        run(config(source), tmp_path)
    with pytest.raises(ValueError, match="finite"):
        config(source, imbalance=float("inf"))
    with pytest.raises(ConfigError, match="one of the two"):
        run(config(source, as_is=True, imbalance=5), tmp_path)
    with pytest.raises(DataError, match="class 'small' has no training image left"):
        run(config(source, as_is=True, val_per_class=2, meta_per_class=1), tmp_path)


def test_bad_images(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "train" / "big" / "00.png").write_bytes(b"nothing")
    (source / "test" / "mid" / "cut.jpg").write_bytes(picture(tmp_path / "x.jpg", size=(64, 64)).read_bytes()[:500])
    named = r"2 of 29 images .*big/00\.png \(not an image\).*cut\.jpg \(truncated\).*--skip-bad"
    with pytest.raises(DataError, match=named):
        run(config(source, as_is=True), tmp_path / "w")
    assert not (tmp_path / "w").exists()
    listener = Listener()
    result = run(config(source, as_is=True, skip_bad=True), tmp_path / "w", listener)
    assert result.to_json()["skipped"] == 2
    assert result.manifest.class_counts == [11, 9, 3]
    assert Manifest.load(result.path).skipped[0] == {"path": "train/big/00.png", "reason": "not an image"}
    assert any("2 of 29 images left out" in line for line in listener.warnings)
    for i in range(3):
        (source / "train" / "small" / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(DataError, match="class 'small' has no readable training image left"):
        run(config(source, as_is=True, skip_bad=True), tmp_path / "w")


def test_missing_images_of_a_list(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "all.txt").write_text("a.png 0\ngone.png 0\nalso.png 0\n")
    with pytest.raises(DataError, match=r"2 of 3 images cannot be read: gone\.png \(missing\), also\.png \(missing\)"):
        run(config(tmp_path / "all.txt", as_is=True), tmp_path / "w")
    result = run(config(tmp_path / "all.txt", as_is=True, skip_bad=True), tmp_path / "w")
    assert result.manifest.class_counts == [1]
    assert result.manifest.untested == ["0"]


def test_out_folder(tmp_path: Path) -> None:
    out = tmp_path / "o"
    first = run(config("digits"), tmp_path, out=out)
    assert first.path == out
    assert run(config("digits"), tmp_path, out=out).reused
    with pytest.raises(ConfigError, match="--overwrite"):
        run(config("digits", seed=1), tmp_path, out=out)
    with pytest.raises(ConfigError, match="--overwrite"):
        run(config("digits", seed=1), tmp_path, out=out, dry_run=True)
    assert Manifest.load(out).seed == 0
    run(config("digits", seed=1), tmp_path, out=out, overwrite=True)
    assert Manifest.load(out).seed == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(ConfigError):
            run(config("digits"), tmp_path, out=tmp_path / "mine", overwrite=overwrite)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_the_same_data_made_at_once_by_many_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at one time, and all of them with the disk's answer that another was quicker by a moment."""
    tree(tmp_path / "p", {"a": 3, "b": 3})
    barrier, rename = threading.Barrier(8), os.rename

    def together(old: str, new: str) -> None:
        barrier.wait(60)
        rename(old, new)

    monkeypatch.setattr(aside.os, "rename", together)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: run(config(tmp_path / "p", as_is=True), tmp_path / "w").path, range(8)))
    assert len(set(made)) == 1 and os.listdir(tmp_path / "w" / "data") == [made[0].name]
    assert Manifest.load(made[0]).class_counts == [2, 2]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    listener = Listener()
    result = run(config("digits"), tmp_path / "w", listener, dry_run=True)
    assert not (tmp_path / "w").exists()
    assert listener.tables and result.to_json()["total"] == 369


def test_full_disk_and_unwritable_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        run(config("digits"), tmp_path / "file")

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="No space left") as caught:
        run(config("digits"), tmp_path / "w")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_shown(tmp_path: Path) -> None:
    listener = Listener()
    run(config("digits"), tmp_path, listener)
    (title, columns, rows), (labels, values) = listener.tables[0], listener.charts[0]
    assert title == "digits-lt-if40-seed0"
    assert columns == ["class", "train", "test", "group"]
    assert rows[0] == ["0", "128", "50", "many"] and len(rows) == 10
    assert (labels, values[0]) == ([str(c) for c in range(10)], 128)
    summary = "369 training images in 10 classes, from 128 to 3: imbalance factor 42.67"
    assert any(summary in line for line in listener.notes)
    source = tree(tmp_path / "many", {f"c{i:02d}": 3 for i in range(40)})
    run(config(source, imbalance=2), tmp_path, listener)
    rows, (labels, _) = listener.tables[1][2], listener.charts[1]
    head, middle, tail = ([f"c{i:02d}" for i in part] for part in (range(5), range(17, 23), range(35, 40)))
    assert [row[0] for row in rows] == [*head, "...", *middle, "...", *tail]
    assert len(labels) == 20 and (labels[0], labels[-1]) == ("c00", "c39")


def test_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from balms_cli.config import MakeLTConfig;"
        "from balms_cli.stages import make_lt;"
        f"make_lt.run(MakeLTConfig(source='digits'), Path({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- the real thing


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.skipif(not REAL, reason="BALMS_TEST_DATA names no folder with cifar10.zip and cifar100.zip")
@pytest.mark.parametrize(
    ("name", "totals", "few", "mean"),
    [
        ("cifar10", {200: 11203, 100: 12406, 50: 13996, 10: 20431}, 0, (0.4942, 0.4851, 0.4504)),
        ("cifar100", {200: 9502, 100: 10847, 50: 12608, 10: 19573}, 39, (0.5088, 0.4874, 0.4419)),
    ],
)
def test_real_cifar(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    real_cache: Path,
    name: str,
    totals: dict[int, int],
    few: int,
    mean: tuple,
) -> None:
    monkeypatch.setenv("BALMS_CACHE", str(real_cache))
    before: set[str] | None = None
    for factor, total in totals.items():
        listener = Listener()
        result = run(config(name, imbalance=factor, data_root=REAL, offline=True), tmp_path, listener)
        assert result.to_json()["total"] == total
        assert listener.warnings == []
        assert before is None or before < keys(result)
        before = keys(result)
    manifest = run(config(name, imbalance=200, data_root=REAL, offline=True), tmp_path).manifest
    assert int((np.array(manifest.class_counts) < 20).sum()) == few
    assert (manifest.image_size, len(manifest.splits["test"])) == ([32, 32], 10_000)
    pixels = load_pixels(manifest, "test", 32, threads=1)
    assert (pixels.mean((0, 2, 3)) / 255).tolist() == pytest.approx(mean, abs=1e-4)  # the published test set's means
