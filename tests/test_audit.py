"""balms audit: every problem made with real files and counted by hand, hostile data, advice and its sources."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balms_cli.data import audit_files, known
from balms_cli.data.audit import case_clashes
from balms_cli.data.index import index_sha256
from balms_cli.data.manifest import Manifest
from balms_cli.stages import audit as stages_audit
from balms_cli.stages import audit_advice
from balms_cli.stages.audit_show import curve

from .conftest import draw_photos
from .data_helpers import fake_cifar, picture, tree

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def never_for_ever():
    """A pipe that is opened, or a circle of links that is followed, is a failure and not a test that never ends."""

    def stop(*_):
        raise TimeoutError("audit hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> Path:
    """An image that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def photos(root: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    """``counts`` different images a folder (the names may hold slashes)."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed += 1
            noise(root / name / f"{i:03}.png", seed, mode=mode)
    return root


def bomb(path: Path, width: int, height: int) -> None:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(99)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b""))


def audit(balms, *arguments) -> dict:
    done = balms("audit", *arguments, "--json", "--quiet")
    assert done.code == 0, done.err
    assert done.err == ""
    return json.loads(done.out)


def found(document: dict) -> dict[str, int]:
    return {one["kind"]: one["count"] for one in document["findings"]}


def problems(document: dict) -> dict[str, int]:
    return {one["kind"]: one["count"] for one in document["findings"] if one["level"] == "problem"}


# --- counts and the tail


def test_counts_and_the_tail_against_hand_arithmetic(balms, tmp_path):
    counts = {"a": 300, "b": 50, "c": 20, "d": 10, "e": 4, "f": 101}
    lines = [f"{name}/{i}.jpg {name}" for name, n in counts.items() for i in range(n)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "test.txt").write_text("\n".join(f"t/{name}{i}.jpg {name}" for name in "abcd" for i in range(12)))
    told = audit(balms, tmp_path / "train.txt", "--no-decode")
    assert [(c["name"], c["train"], c["test"], c["group"]) for c in told["per_class"]] == [
        ("a", 300, 12, "many"), ("f", 101, 0, "many"), ("b", 50, 12, "medium"), ("c", 20, 12, "medium"),
        ("d", 10, 12, "few"), ("e", 4, 0, "few")]  # fmt: skip
    tail, n = told["tail"], list(counts.values())
    brute = sum(abs(x - y) for x in n for y in n) / (2 * len(n) ** 2 * (sum(n) / len(n)))
    assert tail["gini"] == pytest.approx(brute, rel=1e-5)
    assert (tail["images"], tail["largest"], tail["smallest"], tail["imbalance_factor"]) == (485, 300, 4, 75)
    assert tail["head_share"] == pytest.approx(300 / 485, rel=1e-5)  # 10 % of six classes, rounded up: one
    assert {g: tuple(v.values()) for g, v in tail["groups"].items()} == {"many": (2, 401), "medium": (2, 70), "few": (2, 14)}
    assert found(told)["near-empty"] == 1 and found(told)["untested"] == 2
    assert found(told)["unreadable"] == 485 + 48  # none of the files is there
    assert told["splits"] == {"train": 485, "test": 48} and told["images"] is None


def test_the_tables_stand_on_stderr_and_the_path_on_stdout(balms, tmp_path):
    folder = photos(tmp_path / "my photos", {"cat": 6, "dog": 5})
    done = balms("audit", folder)
    assert done.code == 0 and done.out == f"{folder}\n"
    for words in ("imbalance factor", "cat", "few-shot", "no test split", f"balms make-lt '{folder}' --as-is", "RGB"):
        assert words in done.err
    assert balms("audit", folder, "--quiet").err == ""


@pytest.mark.parametrize(("counts", "line"), [([100, 10, 1], "█▅▁"), ([5, 0], "█·"), ([1, 1], "▁▁"), ([], ""), ([0], "·")])
def test_the_curve_is_logarithmic(counts, line):
    assert curve(counts) == line


def test_many_classes_share_the_marks_of_the_curve():
    assert curve([1000] * 600 + [1] * 600) == "█" * 30 + "▁" * 30


# --- twins


def test_twins_are_those_that_brute_force_finds(balms, tmp_path):
    root = photos(tmp_path / "p", {"train/a": 9, "train/b": 7, "test/a": 4, "test/b": 3})
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        noise(path, i, (20 + i, 20))  # files of as many sizes
    shutil.copy(root / "train/a/000.png", root / "test/a/leak.png")
    shutil.copy(root / "train/a/001.png", root / "test/b/leak under another label.png")
    shutil.copy(root / "train/a/002.png", root / "train/b/wrong.png")
    shutil.copy(root / "train/b/000.png", root / "train/b/copy.png")
    os.link(root / "train/b/001.png", root / "train/b/hard.png")
    (root / "train/b/soft.png").symlink_to("002.png")
    same_size = (root / "train/a/003.png").read_bytes()
    (root / "train/a/other.png").write_bytes(same_size[:-1] + bytes([same_size[-1] ^ 1]))  # as long, one bit differs
    told = audit(balms, root)

    by_hash, sizes = defaultdict(set), defaultdict(set)
    for path in root.rglob("*.png"):
        by_hash[hashlib.sha256(path.read_bytes()).hexdigest()].add(str(path.relative_to(root)))
        sizes[path.stat().st_size].add(path.stat().st_ino)
    truth = {frozenset(paths) for paths in by_hash.values() if len(paths) > 1}
    assert {frozenset(one["path"] for one in group) for group in told["duplicates"]["list"]} == truth and len(truth) == 6
    assert told["checked"]["hashed_files"] == sum(len(inodes) for inodes in sizes.values() if len(inodes) > 1) < 15
    twins = told["duplicates"]
    assert twins["train_test"] == {"groups": 2, "images": {"train": 2, "test": 2}}
    assert twins["two_labels"] == {"groups": 2, "images": 4, "within_one_split": 1}
    assert twins["within"] == {"groups": 3, "extra_images": 3}
    assert [group[0]["path"] for group in twins["list"][:3]] == ["train/a/000.png", "train/a/001.png", "train/a/002.png"]
    assert told["findings"][0]["kind"] == "train-test-leak"  # named first
    assert problems(told) == {"train-test-leak": 2, "two-labels": 2}
    assert found(told)["copies"] == 3
    without = audit(balms, root, "--no-hash")
    assert without["duplicates"]["groups"] == 2 and without["checked"]["hashed_files"] == 0  # links are seen without it
    assert audit(balms, root, "--no-decode")["duplicates"]["groups"] == 2
    assert audit(balms, root, "--no-decode", "--hash")["duplicates"]["groups"] == 6


def test_long_lists_stop_and_the_totals_count_all(balms, tmp_path, monkeypatch):
    monkeypatch.setattr(stages_audit, "MOST_LISTED", 5)
    root = photos(tmp_path / "p", {"a": 6, "b": 5})
    for i in range(3):
        shutil.copy(root / f"a/00{i}.png", root / f"a/copy{i}.png")
    for i in range(4):
        for name in "ab":
            (root / name / f"bad{i}.png").write_bytes(b"no image %d" % i)
    told = audit(balms, root)
    assert [len(group) for group in told["duplicates"]["list"]] == [2, 2] and told["duplicates"]["groups"] == 3
    assert len(told["unreadable"]["list"]) == 5 and told["unreadable"]["images"] == 8


def test_twins_in_training_and_validation(balms, tmp_path):
    root = photos(tmp_path / "p", {"train/a": 9, "train/b": 7, "val/a": 2, "val/b": 2, "test/a": 3, "test/b": 3})
    shutil.copy(root / "train/a/000.png", root / "val/a/same.png")
    shutil.copy(root / "train/a/001.png", root / "val/b/under another label.png")
    shutil.copy(root / "train/a/002.png", root / "train/b/wrong.png")
    told = audit(balms, root)
    assert problems(told) == {"split-leak": 1, "two-labels": 2}
    assert told["duplicates"]["two_labels"] == {"groups": 2, "images": 4, "within_one_split": 1}
    assert told["duplicates"]["other_splits"] == {"groups": 1}
    assert [group[0]["path"] for group in told["duplicates"]["list"]] == [
        "train/a/001.png", "train/a/002.png", "train/a/000.png"]  # fmt: skip


def test_copies_are_a_problem_where_the_test_split_is_yet_to_be_cut(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})
    shutil.copy(root / "a/000.png", root / "a/copy.png")
    assert problems(audit(balms, root)) == {"copies": 1}


def test_the_listed_commands_name_what_to_take_out(balms, tmp_path, monkeypatch):
    if shutil.which("jq") is None:
        pytest.skip("there is no jq")
    root = photos(tmp_path / "p", {"train/a": 5, "train/b": 5, "test/a": 2, "test/b": 2})
    shutil.copy(root / "test/b/001.png", root / "train/b/leak.png")
    shutil.copy(root / "train/a/004.png", root / "train/b/wrong.png")
    told = audit(balms, root)
    lines = [command for one in told["advice"] for command in one["commands"] if "| jq" in command]
    answers = []
    for line in lines:
        words = shlex.split(line.partition(" | ")[2])
        answers.append(subprocess.run(words, input=json.dumps(told), capture_output=True, text=True, check=True).stdout)
    assert answers[0] == "train/b/leak.png\n"
    assert [one["path"] for one in json.loads(answers[1])] == ["train/a/004.png", "train/b/wrong.png"]


def test_arrays_are_hashed_too(balms, tmp_path, monkeypatch):
    archive, tar, pixels = fake_cifar(tmp_path / "raw")
    monkeypatch.setitem(known.ARCHIVES, "fake", archive)
    told = audit(balms, "fake", "--data-root", tar.parent)
    assert told["splits"] == {"train": 12, "test": 4} and told["checked"]["hashed_files"] == 16
    assert told["images"]["width"]["q50"] == 32 and told["duplicates"]["groups"] == 0
    listing = audit_files.known  # the module that reads the batches: give it one image twice
    real = listing.read_batches

    def twice(*arguments):
        for keys, labels, images in real(*arguments):
            images = images.copy()
            images[1] = images[0] if len(images) == 12 else pixels[0]
            yield keys, labels, images

    monkeypatch.setattr(listing, "read_batches", twice)
    told = audit(balms, "fake", "--data-root", tar.parent)
    assert [len(group) for group in told["duplicates"]["list"]] == [3]
    assert problems(told)["train-test-leak"] == 1 and problems(told)["two-labels"] == 1


def test_digits_have_no_files_and_no_twins(balms):
    told = audit(balms, "digits")
    assert told["splits"] == {"train": 1297, "test": 500} and told["duplicates"]["groups"] == 0
    assert told["images"]["modes"] == {"L": 1797} and problems(told) == {}


# --- files and names


def test_bad_files_are_told_apart(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 12, "b": 6})
    whole = (root / "a/000.png").read_bytes()
    (root / "a/000.png").write_bytes(whole[: len(whole) // 2])
    (root / "a/001.png").write_bytes(b"")
    (root / "a/002.png").write_text("words")
    bomb(root / "a/bomb.png", 60_000, 60_000)
    (root / "a/gone.png").symlink_to("nowhere.png")
    (root / "a/notes.txt").write_text("x")
    (root / "a/.hidden.png").write_text("x")
    with (root / "a/sparse.png").open("wb") as file:
        file.truncate(3 << 30)
    noise(root / "stray.png", 1)
    told = audit(balms, root)
    assert told["unreadable"]["reasons"] == {
        "truncated": 1, "empty": 1, "not an image": 1, "too many pixels": 1, "missing": 1,
        "over 1 GiB: not read": 1}  # fmt: skip
    assert {one["path"]: one["reason"] for one in told["unreadable"]["list"]}["a/001.png"] == "empty"
    assert {c["name"]: c["unreadable"] for c in told["per_class"]} == {"a": 6, "b": 0}
    kinds = found(told)
    assert (kinds["unreadable"], kinds["other-files"], kinds["stray"]) == (6, 2, 1)
    assert audit(balms, root, "--no-decode")["unreadable"]["reasons"] == {"empty": 1, "missing": 1, "over 1 GiB: not read": 1}


def test_without_decoding_no_file_is_opened(balms, tmp_path, monkeypatch):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})

    def refuse(*_):
        raise AssertionError("a file was read")

    monkeypatch.setattr(audit_files, "_read", refuse)
    told = audit(balms, root, "--no-decode")
    assert told["checked"] == {"decoded": False, "hashed": False, "hashed_files": 0} and told["problems"] == 0
    assert audit(balms, root)["problems"] > 0  # the refusal is noticed where files are read


def test_classes_without_images_here_or_there(balms, tmp_path):
    root = photos(tmp_path / "p", {"train/a": 6, "train/b": 5, "test/a": 2, "test/fox": 1, "test/owl": 3})
    (root / "train/void").mkdir()
    (root / "val/a").mkdir(parents=True)
    told = audit(balms, root)
    assert problems(told) == {"untrained": 2, "empty": 1}
    assert found(told)["untested"] == 1 and found(told)["beside"] == 1
    assert [(c["name"], c["train"], c["test"], c["group"]) for c in told["per_class"]] == [
        ("a", 6, 2, "few"), ("b", 5, 0, "few"), ("fox", 0, 1, None), ("owl", 0, 3, None), ("void", 0, 0, None)]  # fmt: skip
    assert told["tail"]["empty"] == 3 and told["tail"]["imbalance_factor"] == pytest.approx(6 / 5)
    (advice,) = [one["do"] for one in told["advice"] if "cannot be learned" in one["why"]]
    places = ", ".join(str(root / name) for name in ("test/fox", "test/owl", "train/void"))
    assert advice == f"give each of these training images, or remove it: {places}"
    done = balms("make-lt", root, "--as-is")
    assert done.code == 3  # what the audit calls stops_make_lt


def test_names_that_differ_by_case_or_normal_form(balms, tmp_path):
    assert case_clashes(["Cat", "cat", "dog", "caf\u00e9", "cafe\u0301", "STRASSE", "stra\u00dfe"]) == [
        ["Cat", "cat"], ["cafe\u0301", "caf\u00e9"], ["STRASSE", "stra\u00dfe"]]  # fmt: skip
    root = photos(tmp_path / "p", {"Emu": 5, "emu": 5, "fox": 5})
    noise(root / "fox/A.png", 77)
    noise(root / "fox/a.png", 78)
    told = audit(balms, root)
    assert problems(told) == {"class-case": 1} and found(told)["name-case"] == 1
    assert next(one for one in told["findings"] if one["kind"] == "name-case")["examples"] == ["fox/A.png / fox/a.png"]


def test_sizes_and_modes(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 8, "b": 6})
    photos(root, {"gray": 6}, mode="L")
    noise(root / "a/tiny.png", 90, (9, 9))
    noise(root / "a/long.png", 91, (4100, 40))
    noise(root / "a/clear.png", 92, mode="RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 60)).save(root / "b/turned.jpg", exif=exif)
    told = audit(balms, root)
    kinds, images = found(told), told["images"]
    assert (kinds["small"], kinds["huge"], kinds["elongated"], kinds["modes"], kinds["mode-tells-class"]) == (1, 1, 1, 3, 1)
    assert images["modes"] == {"RGB": 17, "L": 6, "RGBA": 1} and images["formats"] == {"PNG": 23, "JPEG": 1}
    assert (images["width"]["q0"], images["width"]["q50"], images["width"]["q100"]) == (9, 40, 4100)
    assert images["height"]["q100"] == 40  # upright, the turned one is 60 wide
    assert images["decoded"] == 24


def test_threads_change_nothing(balms, tmp_path):
    root = photos(tmp_path / "p", {"train/a": 150, "train/b": 20, "test/a": 5})
    (root / "train/a/003.png").write_text("words")
    shutil.copy(root / "train/a/000.png", root / "test/a/leak.png")
    one, four = (audit(balms, root, "--workers", n) for n in (1, 4))
    for document in (one, four):
        del document["created"], document["seconds"]
    assert one == four


# --- hostile data


def test_hostile_folder_ends_and_is_counted(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})
    outside = noise(tmp_path / "outside" / "x.png", 1)
    a = root / "a"
    os.mkfifo(a / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(a):
        server.bind("socket.png")
    (a / "self.png").symlink_to("self.png")
    (a / "self folder").symlink_to("self folder")
    (a / "out.png").symlink_to(outside)
    (a / "zero.png").symlink_to("/dev/zero")
    (a / "out").symlink_to(outside.parent)
    (a / "circle").symlink_to(".")
    (a / "new\nline.png").write_bytes(outside.read_bytes())
    with open(os.fsencode(a) + b"/not-utf8-\xff.png", "wb") as file:
        file.write(outside.read_bytes())
    noise(a / "[red]markup[blink].png", 200)
    (root / "esc\x1b[31m").mkdir()
    with contextlib.chdir(root / "b"):
        for _ in range(700):
            os.mkdir("d")
            os.chdir("d")
    told = audit(balms, root)
    assert told["splits"] == {"train": 11}
    assert told["unreadable"]["reasons"] == {
        "not a regular file": 2, "a link in a circle": 1, "a link that leaves the folder": 3,
        "a control character or not UTF-8 in its name": 2, "more than 100 folders deep": 1}  # fmt: skip
    assert problems(told) == {"refused": 9, "listed-class-name": 1} and found(told)["links-again"] == 1
    (message,) = [one["message"] for one in told["findings"] if one["kind"] == "refused"]
    assert message.startswith("9 entries not read: a link that leaves the folder (3), ")
    done = balms("audit", root)
    assert done.code == 0 and "\x1b" not in done.err and "[red]markup[blink]" not in done.out
    made = balms("make-lt", root / "a" / "..", "--as-is")  # and make-lt says so in a line, where it once waited for the pipe
    assert made.code == 3 and len(made.err.strip().splitlines()) == 1


def test_links_that_multiply_are_not_followed_to_the_end(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})
    for i in range(40):  # 2 ** 40 ways
        (root / f"a/d{i}").mkdir()
    for i in range(39):
        (root / f"a/d{i}/left").symlink_to(f"../d{i + 1}")
        (root / f"a/d{i}/right").symlink_to(f"../d{i + 1}")
    told = audit(balms, root)
    assert told["splits"] == {"train": 10} and found(told)["links-again"] == 78


def test_a_pipe_that_appears_late_is_not_waited_for(balms, tmp_path, monkeypatch):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})
    real = audit_files._files

    def swap(*arguments):  # after the files were looked at, before they are read
        (root / "a/000.png").unlink()
        os.mkfifo(root / "a/000.png")
        return real(*arguments)

    monkeypatch.setattr(audit_files, "_files", swap)
    assert audit(balms, root)["unreadable"]["reasons"] == {"a pipe, not a file": 1}


def test_what_stops_make_lt_is_advised_before_the_commands_that_it_stops(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 10, "b": 6, "empty class": 0})
    for name in "xy":
        (root / "a" / f"{name}.png").symlink_to(tmp_path)
    for name in "uv":
        (root / "b" / f"{name}.png").symlink_to(noise(tmp_path / "outside.png", 1))
    told = audit(balms, root)
    (message,) = [one["message"] for one in told["findings"] if one["kind"] == "refused"]
    assert message == "4 entries not read: a link that leaves the folder"
    first, second = told["advice"][:2]
    assert first["do"] == f"give each of these training images, or remove it: {root}/empty class" and not first["commands"]
    (command,) = second["commands"]
    assert balms(*shlex.split(command)[1:]).code == 3
    (root / "empty class").rmdir()
    assert balms(*shlex.split(command)[1:], "--quiet").code == 0


def test_a_moved_root_is_found_by_balms_data(balms, tmp_path, monkeypatch):
    photos(tmp_path / "p", {"a": 10, "b": 6})
    made = Path(balms("make-lt", tmp_path / "p", "--as-is", "--quiet").out.strip())
    (tmp_path / "there").mkdir()
    (tmp_path / "p").rename(tmp_path / "there" / "p")
    told = audit(balms, made)
    assert problems(told) == {"root-gone": 1} and "BALMS_DATA" in told["advice"][0]["do"]
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "there"))
    done = balms("audit", made)
    assert not audit(balms, made)["problems"] and done.err.count(f"read from {tmp_path / 'there' / 'p'} (BALMS_DATA)") == 1


def test_a_strangers_manifest_leads_nowhere(balms, tmp_path):
    photos(tmp_path / "p", {"a": 10, "b": 6})
    made = Path(balms("make-lt", tmp_path / "p", "--as-is", "--quiet").out.strip())
    outside = noise(tmp_path / "outside.png", 1)
    shutil.rmtree(tmp_path / "p" / "b")
    (tmp_path / "p" / "b").symlink_to(outside.parent)
    (tmp_path / "p" / "a" / "000.png").unlink()
    os.mkfifo(tmp_path / "p" / "a" / "000.png")
    reasons = audit(balms, made)["unreadable"]["reasons"]
    assert reasons == {"a link that leaves the folder": 6, "a pipe, not a file": 1}
    shutil.rmtree(tmp_path / "p")
    assert problems(audit(balms, made)) == {"root-gone": 1}


def test_what_a_strangers_manifest_may_name_without_a_file_being_opened(balms, tmp_path):
    photos(tmp_path / "p", {"a": 3, "b": 3})
    made = Path(balms("make-lt", tmp_path / "p", "--as-is", "--quiet").out.strip())
    manifest = Manifest.load(made)
    (tmp_path / "p/s.tar").write_bytes(bytes(1024))
    keys = ["d/" * 101 + "x.png", "s.tar/@512+513/x.png", "s.tar/@512+512/x.png"]
    train = replace(manifest.splits["train"], keys=keys + manifest.splits["train"].keys[3:])
    changed = replace(manifest, splits=manifest.splits | {"train": train})
    replace(changed, sha256=index_sha256(changed.classes, changed.index_texts())).save(tmp_path / "m")
    assert audit(balms, tmp_path / "m", "--no-decode")["unreadable"]["reasons"] == {
        "more than 100 folders deep": 1, "missing: the tar file ends before it": 1}  # fmt: skip


# --- lists


def test_lists_with_problems(balms, tmp_path):
    photos(tmp_path, {"x": 12})
    os.mkfifo(tmp_path / "x/pipe.png")
    (tmp_path / "x/out.png").symlink_to("/etc/passwd")
    train = [f"x/{i:03}.png {i % 2}" for i in range(8)]
    train += ["x/000.png 1", "x/001.png 1", "alone", "../out.png 0", "x/008.png -1", "x/pipe.png 0", "x/out.png 1"]
    train += ["x/009.png 3"]
    (tmp_path / "my train.txt").write_text("\n".join(train))
    (tmp_path / "my test.txt").write_text("x/010.png 0\nx/000.png 0\nx/011.png 7\n")
    told = audit(balms, tmp_path / "my train.txt")
    assert problems(told) == {
        "train-test-leak": 1, "untrained": 1, "empty": 1, "unreadable": 2, "listed-line": 2, "listed-two-labels": 1,
        "listed-listed-twice": 1, "listed-label": 1}  # fmt: skip
    assert {c["name"]: (c["train"], c["test"]) for c in told["per_class"]} == {
        "0": (5, 2), "1": (5, 0), "3": (1, 0), "2": (0, 0), "7": (0, 1)}  # fmt: skip
    assert told["unreadable"]["reasons"] == {"a pipe, not a file": 1, "a link that leaves the folder": 1}
    assert balms("make-lt", tmp_path / "my train.txt", "--as-is").code == 3


def test_nothing_to_look_at_is_one_line(balms, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "odd.json").write_text("[]")
    (tmp_path / "far.txt").write_text("a.png 0\nb.png 999999999\n")  # not a billion classes
    for data in (
        tmp_path / "far.txt",
        tmp_path / "empty",
        tmp_path / "empty.txt",
        tmp_path / "odd.json",
        tmp_path / "nowhere",
        "digit",
    ):
        done = balms("audit", data)
        assert done.code == 3 and done.out == "" and len(done.err.strip().splitlines()) == 1
    assert "did you mean 'digits'" in done.err
    assert balms("audit").code == 3  # no manifest in the workspace
    for stdin in ('{"runs": []}', '{"runs":' * 100_000, '{"runs": 3}'):
        done = balms("audit", "-", stdin=stdin)
        assert done.code == 3 and done.out == "" and len(done.err.strip().splitlines()) == 1


# --- the contract of the streams


def test_pipe_default_and_manifest(balms, tmp_path):
    draw_photos(tmp_path / "p", {"cat": 8, "dog": 5})
    made = balms("make-lt", tmp_path / "p", "--as-is", "--quiet", "--json").out
    folder = json.loads(made)["manifest"]
    for arguments, stdin in ((["-"], made), (["-"], folder + "\n"), ([], None), ([Path(folder) / "manifest.json"], None)):
        done = balms("audit", *arguments, "--quiet", stdin=stdin)
        assert (done.code, done.out) == (0, folder + "\n")
    told = audit(balms, folder)
    assert (told["kind"], told["manifest"], told["splits"]) == ("manifest", folder, {"train": 10, "test": 3})
    assert told["manifest_sha256"] == json.loads(made)["manifest_sha256"]
    commands = [command for one in told["advice"] for command in one["commands"]]
    assert f"balms pretrain {folder} --out runs/softmax" in commands and "make-lt" not in str(commands)
    assert balms("audit", "-", "--quiet", stdin="").code == 3


def test_strict_stops_a_pipe(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})
    assert balms("audit", root, "--strict", "--quiet").code == 0  # notes alone do not stop it
    (root / "a/000.png").write_text("words")
    done = balms("audit", root, "--strict", "--quiet")
    assert (done.code, done.out) == (3, "") and "unreadable (1)" in done.err
    done = balms("audit", root, "--strict", "--quiet", "--json")
    assert done.code == 3 and json.loads(done.out)["problems"] == 1
    assert balms("audit", root, "--quiet").code == 0


def test_the_file_of_out(balms, tmp_path):
    root = photos(tmp_path / "p", {"a": 5, "b": 5})
    out = tmp_path / "audit.json"
    done = balms("audit", root, "--json", "--out", out, "--quiet")
    assert json.loads(done.out) == json.loads(out.read_text())
    before = out.read_text()
    for refused in (["--out", out], ["--out", tmp_path], ["--out", tmp_path / "no" / "such.json"]):
        done = balms("audit", root, *refused)
        assert done.code == 2 and done.out == "" and len(done.err.strip().splitlines()) == 1
    assert out.read_text() == before
    assert balms("audit", root, "--out", out, "--overwrite", "--quiet").code == 0
    assert json.loads(out.read_text())["created"] > json.loads(before)["created"]


def test_configuration_is_that_of_every_command(balms, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[audit]\ndecode = false\n")
    done = balms("audit", "digits", "--config", file, "--workers", 2, "--print-config")
    assert "decode = false" in done.out and 'decode = "file c.toml"' in done.out and 'workers = "flag"' in done.out
    assert balms("audit", "digits", "--set", "decod=false").code == 2
    assert balms("audit", "--config", file).code == 3  # the file names no data, and there is no manifest
    file.write_text('[audit]\ndata = "digits"\n')
    assert balms("audit", "--config", file, "--quiet").out == "digits\n"


# --- advice


def test_measured_figures_are_those_of_the_committed_tables():
    for name, rows in audit_advice.MEASURED.items():
        table = json.loads((ROOT / audit_advice._RESULTS.format(name)).read_text())
        assert table["imbalance"] == 200 and table["preset"] == "quick"
        for row, figures in rows.items():
            for figure, value in figures.items():
                assert round(100 * table["rows"][row][figure][0], 1) == value, (name, row, figure)


def test_published_figures_are_those_of_the_paper():
    tables = json.loads((ROOT / "examples/paper_figures.json").read_text())["tables"]
    for factor, sets in audit_advice.PAPER.items():
        for name, rows in sets.items():
            for row, value in rows.items():
                assert tables["table2"][row][f"{name}/{factor}"][0] == value
    for name, rows in audit_advice.ABLATION.items():
        for row, value in rows.items():
            assert tables["ablation"][row][f"{name}/200"][0] == value


def listed(tmp_path: Path, counts: list[int], test: int = 20) -> Path:
    (tmp_path / "train.txt").write_text("\n".join(f"{c}/{i}.jpg class{c}" for c, n in enumerate(counts) for i in range(n)))
    if test:
        (tmp_path / "test.txt").write_text("\n".join(f"t{c}/{i}.jpg class{c}" for c in range(len(counts)) for i in range(test)))
    return tmp_path / "train.txt"


@pytest.mark.parametrize(("counts", "says", "never"), [
    ([100, 90, 80], "plain softmax suffices", "meta sampler"),
    ([12, 11, 10], "plain softmax suffices", "meta sampler"),
    ([150, 60, 30], "start with softmax and adjust it afterwards", "meta sampler"),
    ([1000, 100, 25], "Balanced Softmax and the meta sampler (imbalance factor 40)", "merge them"),
    ([500, 60, 3], "1 classes below 20 images", "suffices"),
])  # fmt: skip
def test_advice_follows_the_tail(balms, tmp_path, counts, says, never):
    told = audit(balms, listed(tmp_path, counts), "--no-decode")
    text = json.dumps(told["advice"])
    assert says in text and never not in text
    assert all(one["why"] and one["source"] for one in told["advice"])
    assert ("collect images" in text) == (min(counts) < 5)
    assert "no balancing changes" in text if max(counts) < 20 else "no balancing changes" not in text


def test_advice_on_the_test_split(balms, tmp_path):
    assert "bring a test split" in json.dumps(audit(balms, listed(tmp_path, [50, 40], test=0), "--no-decode")["advice"])
    (tmp_path / "test.txt").write_text("\n".join(f"t{i}.jpg class{int(i >= 90)}" for i in range(100)))
    told = audit(balms, tmp_path / "train.txt", "--no-decode")
    assert "test-imbalanced" in found(told) and "compare by balanced_accuracy" in json.dumps(told["advice"])


def test_few_photos_want_a_pretrained_backbone(balms, tmp_path):
    root = tree(tmp_path / "p", {"a": 4, "b": 4})
    for i, path in enumerate(root.rglob("*.png")):
        noise(path, i, (200, 120))
    assert "--weights imagenet" in json.dumps(audit(balms, root)["advice"])
    told = audit(balms, tree(tmp_path / "q", {"a": 4, "b": 4}))  # 8 px
    assert "--weights imagenet" not in json.dumps(told["advice"]) and "small" not in found(told)  # as all are


@pytest.mark.parametrize("counts", [[40, 38], [80, 30, 20], [600, 40, 2]])
def test_every_command_of_the_advice_exists(balms, tmp_path, counts):
    from typer.main import get_command

    from balms_cli.cli.app import app

    group = get_command(app)
    told = audit(balms, listed(tmp_path, counts, test=0), "--no-decode")
    commands = [command for one in told["advice"] for command in one["commands"]]
    assert commands
    for command in commands:
        words = shlex.split(command.partition(" | ")[0])
        assert words[0] == "balms"
        known_options = {option for p in group.commands[words[1]].params for option in p.opts}
        assert {w for w in words[2:] if w.startswith("--")} <= known_options, command


def test_the_commands_name_the_data_as_the_audit_was_told(balms, tmp_path):
    photos(tmp_path / "my photos", {"1": 6, "2": 3})
    (tmp_path / "all.txt").write_text("".join(f"{1 + (i > 5)}/{i % 6:03}.png {int(i > 5)}\n" for i in range(9)))
    (tmp_path / "names").write_text("ant\nbee\n")
    told = audit(balms, tmp_path / "all.txt", "--images", tmp_path / "my photos", "--names", tmp_path / "names")
    made = [command for one in told["advice"] for command in one["commands"] if "make-lt" in command]
    assert made and balms(*shlex.split(made[0])[1:]).code == 0
    assert f"--images '{tmp_path}/my photos' --names {tmp_path}/names" in made[0]
    told = audit(balms, tmp_path / "my photos", "--leaf-classes")
    assert "--leaf-classes --as-is" in str(told["advice"])


def test_what_no_list_and_no_folder_gives_is_told(balms, tmp_path):
    (tmp_path / "all.txt").write_text("/etc/passwd cat\n")
    assert problems(audit(balms, tmp_path / "all.txt")) == {"listed-line": 1}
    root = photos(tmp_path / "p", {"Train/a": 5, "Test/a": 5})
    for name in ("Train/a/1.heic", "Train/a/2.heic", "Test/a/3.dng", "Test/a/n.txt"):
        (root / name).write_bytes(b"")
    told = audit(balms, root)
    assert problems(told) == {"split-names": 2, "undecoded": 3} and found(told)["other-files"] == 1


@pytest.mark.slow
def test_the_advice_can_be_typed_as_it_stands(balms, tmp_path, monkeypatch):
    """Three classes of few images, and every command of the advice but the downloads."""
    root = draw_photos(tmp_path / "my photos", {"cat": 130, "dog": 20, "emu": 6})
    monkeypatch.chdir(tmp_path)
    done: set[str] = set()
    for one in audit(balms, "my photos")["advice"]:
        for command in one["commands"]:
            words = shlex.split(command)[1:]
            if command in done or "imagenet" in command:
                continue
            done.add(command)
            short = {"pretrain": ["--steps", "8", "--backbone", "resnet8"], "retrain": ["--steps", "8"]}.get(words[0], [])
            ended = balms(*words, *short, "--quiet")
            assert ended.code == 0, (command, ended.err)
    assert len(done) > 6 and root.is_dir()


@pytest.mark.slow
def test_two_hundred_thousand_entries_take_little_memory(tmp_path):
    path = listed(tmp_path, [200_000 // (1 + c) // 6 for c in range(200)], test=5)
    entries = len(path.read_text().splitlines())
    code = ("import re, sys; from balms_cli.cli.app import app\n"
            "try: app(['audit', sys.argv[1], '--no-decode', '--quiet'])\n"
            "except SystemExit as end: assert end.code == 0\n"
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")  # fmt: skip
    if not Path("/proc/self/status").exists():
        pytest.skip("there is no /proc to read the peak of memory from")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=300)
    megabytes = int(done.stdout.split()[-1]) / 1024
    assert entries > 190_000 and megabytes < 250  # measured: 129; of two million entries: 865


@pytest.mark.slow
def test_real_cifar_has_the_twins_that_brute_force_finds(balms, monkeypatch, tmp_path):
    data = os.environ.get("BALMS_TEST_DATA")
    if not data or not (Path(data) / "cifar100.zip").is_file():
        pytest.skip("BALMS_TEST_DATA names no folder with cifar100.zip")
    monkeypatch.setenv("BALMS_CACHE", str(tmp_path / "cache"))
    signal.alarm(600)
    told = audit(balms, "cifar100", "--data-root", data)
    root = next((tmp_path / "cache" / "unpacked").glob("cifar100-*")) / "cifar100"
    by_hash = defaultdict(set)
    for path in root.rglob("*.webp"):
        by_hash[hashlib.sha256(path.read_bytes()).digest()].add(str(path.relative_to(root)))
    truth = {frozenset(paths) for paths in by_hash.values() if len(paths) > 1}
    assert {frozenset(one["path"] for one in group) for group in told["duplicates"]["list"]} == truth and len(truth) == 12
    assert told["duplicates"]["train_test"]["images"] == {"train": 5, "test": 5}
    assert sum(told["splits"].values()) == sum(map(len, by_hash.values())) == 29_573


def test_help_names_it(balms):
    assert "audit" in balms("--help").out
    assert "--no-decode" in balms("audit", "--help").out


def test_picture_helper_makes_equal_files(balms, tmp_path):
    """The guard of the tests above: images of one colour are twins, so noise is used where none may be."""
    root = tmp_path / "p"
    for i in range(3):
        picture(root / "a" / f"{i}.png", 1)
        picture(root / "b" / f"{i}.png", 2)
    assert audit(balms, root)["duplicates"]["groups"] == 2


def test_sizes_and_reasons_are_those_of_reading(balms, tmp_path):
    """A TIFF file that EXIF turns, which Pillow turns by itself, is 6 x 10 upright; a phone's HEIC photo is named as one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (10, 6), (i, len(name), i)).save(tmp_path / "p" / name / f"{i}.tif", exif=exif)
    (tmp_path / "p" / "b" / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    told = audit(balms, tmp_path / "p")
    assert (told["images"]["width"]["q100"], told["images"]["height"]["q0"]) == (6, 10)
    assert "a HEIC photo: convert it to JPEG" in json.dumps(told)
