"""Tar shards: what the ``webdataset`` package writes and reads is what is listed and decoded here; hostile ones are refused."""

import gzip
import io
import json
import os
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balms_cli.config import MakeLTConfig
from balms_cli.data import shards, tar_entry
from balms_cli.data.decode import BadImage, read_image
from balms_cli.data.images import inside, load_pixels
from balms_cli.data.manifest import Manifest
from balms_cli.data.sources import Source, open_source
from balms_cli.errors import DataError
from balms_cli.reporter import Reporter
from balms_cli.stages.make_lt import run

webdataset = pytest.importorskip("webdataset", reason="the extra 'webdataset' is not installed")


def open_(source: Path | str, **options: object) -> Source:
    return open_source(MakeLTConfig(source=str(source), **options), Reporter())


def png(value: int, side: int = 8) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def written(folder: Path, split: str, counts: list[int], per_shard: int = 7) -> list[tuple[bytes, int]]:
    """Shards as the package writes them; returns what went in, in order."""
    folder.mkdir(exist_ok=True)
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(0).shuffle(labels)
    samples = [(png(1000 * len(split) + i), label) for i, label in enumerate(labels)]
    with webdataset.ShardWriter(f"{folder}/my-{split}-%03d.tar", maxcount=per_shard, verbose=0) as sink:
        for i, (content, label) in enumerate(samples):
            sink.write({"__key__": f"{split}/sample{i:05d}", "png": content, "cls": label})
    return samples


def content_of(source: Source, key: str) -> bytes:
    return tar_entry.open_entry(inside(source.root, key)).read()


def test_as_the_package_writes_and_reads_them(tmp_path):
    train, test = written(tmp_path / "s", "train", [12, 5, 3]), written(tmp_path / "s", "val", [2, 2, 2])
    source = open_(tmp_path / "s")
    assert (source.kind, source.name, source.classes) == ("shards", "s", ["0", "1", "2"])
    for split, samples in (("train", train), ("test", test)):
        found = sorted((content_of(source, key), int(source.classes[label])) for key, label in getattr(source, split))
        assert found == sorted(samples)
    names = [str(file) for file in sorted((tmp_path / "s").glob("my-train*.tar"))]
    read = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    theirs = {one["png"]: int(one["cls"]) for one in read}
    assert {content_of(source, key): int(source.classes[label]) for key, label in source.train} == theirs
    by_pattern = open_(f"{tmp_path}/s/my-train-{{000..002}}.tar")
    assert (by_pattern.train, by_pattern.test, by_pattern.name) == (source.train, source.test, "my-train")
    few = written(tmp_path / "one", "part", [4])
    assert len(open_(tmp_path / "one" / "my-part-000.tar").train) == len(few)


def test_training_pixels_are_those_of_the_same_files(tmp_path, balms):
    written(tmp_path / "s", "train", [12, 6])
    made = run(MakeLTConfig(source=str(tmp_path / "s"), as_is=True), tmp_path / "ws")
    manifest = Manifest.load(made.path)
    assert manifest.source["kind"] == "shards" and manifest.image_size == [8, 8]
    pixels = load_pixels(manifest, "train", 8)
    for row, key in zip(pixels, manifest.splits["train"].keys, strict=True):
        unpacked = tmp_path / "one.png"
        unpacked.write_bytes(content_of(open_(tmp_path / "s"), key))
        assert np.array_equal(row, read_image(unpacked, 8))
    options = ("--set", "image_size=16", "--backbone", "resnet8", "--steps", "2", "--batch-size", "4", "--quiet")
    assert balms("pretrain", made.path, *options, "--set", "loading=disk").code == 0  # by threads, batch by batch


def test_another_sharding_is_the_same_draw(tmp_path):
    written(tmp_path / "a", "train", [12, 8], per_shard=7)
    written(tmp_path / "b", "train", [12, 8], per_shard=3)
    draws = [run(MakeLTConfig(source=str(tmp_path / one), imbalance=4), tmp_path / "ws").manifest for one in "ab"]
    names = [[tar_entry.name_of(key) for key in one.splits["train"].keys] for one in draws]
    assert names[0] == names[1] and len(names[0]) < 16


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, form):
    rng = random.Random(form)
    long = "" if form == tarfile.USTAR_FORMAT else "é" * 90 + "/"
    files = [(f"{'d' * 60}/{long if i % 3 else ''}{i:03d}.{'bin' if i % 2 else 'cls'}",
              rng.randbytes(rng.choice((0, 1, 511, 512, 513, 9000))))
             for i in range(200)]  # fmt: skip
    path = shard(tmp_path / "a.tar", files, form)
    with tarfile.open(path, "a", format=form) as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    found = list(tar_entry.members(path))
    with tarfile.open(path) as archive:
        assert [tuple(member) for member, _ in found] == [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    for (member, content), (_, true) in zip(found, files, strict=True):
        assert content == true if member.size <= tar_entry.SMALL else true.startswith(content)


def test_times_of_a_gnu_header_are_no_part_of_the_name(tmp_path):
    path = shard(tmp_path / "a.tar", [("a.png", b"abc")], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[345:356] = b"14751234567"  # the time of the last access, where other tars have the folder
    path.write_bytes(content)
    assert [member.name for member, _ in tar_entry.members(path)] == ["a.png"]


def test_a_sparse_file_is_passed_over(tmp_path):
    """What it holds is a map of its holes and then what lies between them: no image."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("hole.png", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), ("whole.png", {})):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 3, headers
            archive.addfile(member, io.BytesIO(b"abc"))
    assert [member.name for member, _ in tar_entry.members(tmp_path / "a.tar")] == ["whole.png"]


def test_labels_in_every_form(tmp_path):
    one = png(1)
    files = [("a.JPG", one), ("a.txt", "caf\u00e9\n".encode()), ("b.png", one), ("b.json", b'{"label": "dog", "x": 1}'),
             ("c.x.txt", b"not its label"), ("c.png", one), ("c.txt", b"dog"), ("README.txt", b"no image"), ("d.npy", b"0"),
             ("e/f.g.png", one), ("e/f.png", one), ("e/f.json", b'"cat"'), ("e/f.txt", b"a caption"),
             ("g.jpg", one), ("g.png", one), ("g.cls", b"7")]  # fmt: skip
    source = open_(shard(tmp_path / "a.tar", files))
    labels = {tar_entry.name_of(key): source.classes[label] for key, label in source.train}
    assert labels == {"a.JPG": "café", "b.png": "dog", "c.png": "dog", "e/f.png": "cat", "g.jpg": "7"}


@pytest.mark.parametrize(("files", "message"), [
    ([("a.png", b"x")], r"sample 'a' in a\.tar has no label"),
    ([("a.png", b"x"), ("a.cls", b"cat")], "label that cannot be read"),
    ([("a.png", b"x"), ("a.cls", b"1" * 5000)], "label that cannot be read"),
    ([("a.png", b"x"), ("a.json", b"{")], "label that cannot be read"),
    ([("a.png", b"x"), ("a.json", b'{"label": [1]}')], "label that cannot be read"),
    ([("a.png", b"x"), ("a.json", b'{"label": true}')], "label that cannot be read"),
    ([("a.png", b"x"), ("a.json", b"[" * 3000)], "label that cannot be read"),
    ([("a.png", b"x"), ("a.txt", b"two\nlines")], "label that cannot be read"),
    ([("a.png", b"x"), ("a.cls", b"0"), ("b.png", b"x"), ("b.cls", b"0"), ("a.png", b"x"), ("a.cls", b"0")], "there twice"),
    ([("a.png", b"x"), ("a.cls", b"0"), ("b.png", b"x"), ("b.cls", b"2")], "class 1 has no images in the shards"),
    ([("a.npy", b"x")], "train shards hold no images"),
])  # fmt: skip
def test_bad_samples(tmp_path, files, message):
    with pytest.raises(DataError, match=message) as caught:
        open_(shard(tmp_path / "a.tar", files))
    assert "\n" not in str(caught.value)


def test_names_that_lead_out_never_do(tmp_path):
    files = [("../../etc/x.png", png(1)), ("../../etc/x.cls", b"0"), ("/abs.png", png(2)), ("/abs.cls", b"0"),
             ("ok.png", png(3)), ("ok.cls", b"0"), ("n\nl.png", png(4)), ("n\nl.cls", b"0"),
             ("b.tar/@512+9/y.png", png(5)), ("b.tar/@512+9/y.cls", b"0")]  # fmt: skip
    (tmp_path / "s").mkdir()
    source = open_(shard(tmp_path / "s/a.tar", files))
    assert [tar_entry.name_of(key) for key, _ in source.train] == ["ok.png", "b.tar/@512+9/y.png"]
    assert len(source.bad) == 3 and {reason for _, reason in source.bad} == {
        "a member name that leads out of the shard or holds a control character"}  # fmt: skip
    assert [content_of(source, key) for key, _ in source.train] == [png(3), png(5)]
    with pytest.raises(DataError, match="3 of 5 images cannot be read"):
        run(MakeLTConfig(source=str(tmp_path / "s"), as_is=True), tmp_path / "ws")
    assert len(run(MakeLTConfig(source=str(tmp_path / "s"), as_is=True, skip_bad=True), tmp_path / "ws").manifest.skipped) == 3


def test_damaged_and_hostile_tars(tmp_path):
    whole = shard(tmp_path / "a.tar", [("a.png", png(1, 64)), ("a.cls", b"0")]).read_bytes()
    cases = {"not a tar file": b"nothing at all" * 100, "is compressed": gzip.compress(whole),
             r"ends in the middle of 'a\.png'": whole[:3000], "no images": b"\0" * 10240,
             "damaged: no header at byte": whole[: -(-len(png(1, 64)) // 512) * 512 + 512] + b"x" * 4096}  # fmt: skip
    for message, content in cases.items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_(tmp_path / "a.tar")
    huge = tarfile.TarInfo("a.png")
    huge.size = 1 << 40
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "a.tar").write_bytes(huge.tobuf(form) + b"\0" * 2048)
        with pytest.raises(DataError, match="ends in the middle"):
            open_(tmp_path / "a.tar")
    back = bytearray(tarfile.TarInfo("a.png").tobuf())
    back[124:136] = b"-1000".ljust(12, b"\0")  # 512 bytes back, to this header again
    (tmp_path / "a.tar").write_bytes(whole[: -(-len(png(1, 64)) // 512) * 512 + 512] + back + b"\0" * 2048)
    with pytest.raises(DataError, match="damaged: no header"):
        open_(tmp_path / "a.tar")
    name = tarfile.TarInfo("x")
    name.size, name.type = 1 << 30, tarfile.GNUTYPE_LONGNAME
    (tmp_path / "a.tar").write_bytes(name.tobuf() + b"\0" * 2048)
    with pytest.raises(DataError, match="damaged or hostile"):
        open_(tmp_path / "a.tar")


def test_any_damage_is_one_line_or_nothing(tmp_path):
    """Bytes changed at random, in headers above all: what is listed can be opened or refused, and nothing else happens."""
    rng = random.Random(0)
    files = [(f"{'n' * 120}é{i}.{ending}", content) for i in range(3) for ending, content in (("png", png(i)), ("cls", b"0"))]
    whole = shard(tmp_path / "a.tar", files, tarfile.PAX_FORMAT).read_bytes()
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(0, len(whole) // 512) * 512 + rng.choice((rng.randrange(512), rng.randrange(120, 160)))] = \
                rng.choice((0, 0x20, 0x2F, 0x30, 0x37, 0x80, 0xFF, rng.randrange(256)))  # fmt: skip
        (tmp_path / "a.tar").write_bytes(content[: rng.choice((len(whole), len(whole), rng.randrange(len(whole))))])
        try:
            source = open_(tmp_path / "a.tar")
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        for key, _ in source.train:
            with suppress(BadImage):
                read_image(inside(source.root, key), 8)
    assert 40 < refused < 400


def test_a_manifest_of_a_stranger_reads_nothing_else(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    outside = shard(tmp_path / "out.tar", [("s.png", png(9))])
    mine = shard(root / "a.tar", [("m.png", png(1)), ("m.cls", b"0")])
    (root / "link.tar").symlink_to(outside)
    (root / "pipe.tar").unlink(missing_ok=True)
    os.mkfifo(root / "pipe.tar")
    size = len(png(1))
    assert read_image(inside(str(root), f"a.tar/@512+{size}/m.png"), 8).shape == (3, 8, 8)
    reasons = {f"link.tar/@512+{len(png(9))}/s.png": "a link that leaves the folder", "gone.tar/@512+9/s.png": "missing",
               f"a.tar/@0+{size}/m.png": "the tar file has changed", f"a.tar/@513+{size}/m.png": "the tar file has changed",
               f"a.tar/@512+{size - 1}/m.png": "the tar file has changed",
               "a.tar/@999999999999+5/m.png": "the tar file has changed",
               "a.tar/@512+9999999999/m.png": "over 256 MiB: not read",
               "pipe.tar/@512+9/m.png": "not a regular file"}  # fmt: skip
    for key, reason in reasons.items():
        with pytest.raises(BadImage, match=reason):
            read_image(inside(str(root), key), 8)
    with pytest.raises(DataError, match="not a regular file"):
        list(tar_entry.members(root / "pipe.tar"))
    shard(mine, [("other.png", png(2, 30)), ("m.cls", b"0")])
    with pytest.raises(BadImage, match="the tar file has changed"):
        read_image(inside(str(root), f"a.tar/@512+{size}/m.png"), 8)
    shard(mine, [("m.png", b"no image"), ("m.cls", b"0"), ("n.png", b""), ("n.cls", b"0")])
    with pytest.raises(BadImage, match="not an image"):
        read_image(inside(str(root), "a.tar/@512+8/m.png"), 8)
    assert [key for key, _ in open_(mine).train] == ["a.tar/@512+8/m.png", "a.tar/@2560+0/n.png"]
    with pytest.raises(BadImage, match="empty"):
        read_image(inside(str(root), "a.tar/@2560+0/n.png"), 8)


def test_a_folder_that_is_called_like_a_shard(tmp_path):
    folder = tmp_path / "a.tar" / "@512+9"
    folder.mkdir(parents=True)
    (folder / "m.png").write_bytes(png(1))
    assert read_image(folder / "m.png", 8).shape == (3, 8, 8)


@pytest.mark.parametrize(("pattern", "names"), [
    ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]), ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
    ("{x,y}{1..2}.tar", ["x1.tar", "x2.tar", "y1.tar", "y2.tar"]), ("plain.tar", ["plain.tar"]), ("{z}.tar", ["{z}.tar"]),
])  # fmt: skip
def test_patterns(pattern, names):
    from braceexpand import braceexpand  # what the package expands with

    assert shards.expand(pattern) == names == list(braceexpand(pattern))


def test_patterns_that_are_refused(tmp_path):
    for pattern in ("{0..999999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(DataError, match="more than 100000 shards"):
            shards.expand(pattern)
    shard(tmp_path / "a-0.tar", [("a.png", b"x"), ("a.cls", b"0")])
    with pytest.raises(DataError, match=r"2 of 3 shards of .* are not there, such as .*a-1\.tar"):
        open_(f"{tmp_path}/a-{{0..2}}.tar")
    with pytest.raises(DataError, match="not there"):
        open_(tmp_path / "none.tar")


def test_shards_on_several_disks(tmp_path):
    first, second = (written(tmp_path / disk, "train", [5, 4], per_shard=3) for disk in ("one", "two"))
    written(tmp_path / "two", "val", [1, 1])
    source = open_(f"{tmp_path}/{{one,two}}/my-train-{{000..002}}.tar")
    assert source.root == str(tmp_path.resolve()) and len(source.test) == 2
    assert sorted(content_of(source, key) for key, _ in source.train) == sorted(content for content, _ in first + second)
    (tmp_path / "three").mkdir()
    (tmp_path / "three/my-train-000.tar").symlink_to(tmp_path / "one/my-train-000.tar")
    with pytest.raises(DataError, match="is a link that leaves"):
        open_(tmp_path / "three")


def test_audit_reads_images_in_shards(balms, tmp_path):
    written(tmp_path / "s", "train", [8, 5])
    twice = [("x.png", png(7)), ("x.cls", b"0"), ("y.png", png(7)), ("y.cls", b"1"), ("z.png", b"junk!"), ("z.cls", b"0")]
    shard(tmp_path / "s/my-train-900.tar", twice)
    shard(tmp_path / "s/my-test-000.tar", [("t.png", png(7)), ("t.cls", b"1")])
    done = balms("audit", tmp_path / "s", "--json")
    told = json.loads(done.out)
    assert told["kind"] == "shards" and told["splits"] == {"train": 16, "test": 1}
    assert told["unreadable"]["reasons"] == {"not an image": 1}
    assert told["duplicates"]["groups"] == 1 and told["duplicates"]["images"] == 3
    assert told["images"]["width"]["q50"] == 8
    assert json.loads(balms("audit", tmp_path / "s", "--no-decode", "--json").out)["unreadable"]["images"] == 0
    assert balms("make-lt", tmp_path / "s", "--as-is").code == 3
    assert balms("make-lt", tmp_path / "s", "--as-is", "--skip-bad").code == 0
    assert balms("audit", "--strict").code == 3  # the manifest: one content under two labels


def test_audit_tells_of_samples_that_make_lt_stops_at(balms, tmp_path):
    shard(tmp_path / "a.tar", [("a.png", png(1)), ("b.png", png(2)), ("b.cls", b"0"), ("c.png", png(3)), ("c.cls", b"1")])
    done = balms("audit", tmp_path / "a.tar", "--json")
    assert done.code == 0, done.err
    told = {one["kind"]: one for one in json.loads(done.out)["findings"]}
    assert told["listed-sample"]["stops_make_lt"] and "sample 'a' in a.tar has no label" in told["listed-sample"]["examples"][0]


def test_samples_without_an_image_that_can_be_read_are_told(balms, tmp_path):
    files = [("a.heic", b"x"), ("a.cls", b"0"), ("b.png", png(2)), ("b.cls", b"0"), ("c.png", png(3)), ("c.cls", b"1"),
             ("d.e.png", png(4)), ("d.cls", b"1"), ("e.npy", b"0"), ("f.txt", b"a caption")]  # fmt: skip
    done = balms("make-lt", shard(tmp_path / "a.tar", files), "--as-is")
    assert done.code == 0 and "2 samples have a label but no image that can be read (1 .heic, 1 .e.png)" in done.err
    findings = json.loads(balms("audit", tmp_path / "a.tar", "--json").out)["findings"]
    assert {one["kind"]: one["count"] for one in findings if one["level"] == "problem"} == {"undecoded": 2}


def test_a_pattern_names_each_shard_once_and_all_of_them_are_training(tmp_path):
    written(tmp_path / "s", "train", [3, 2]), written(tmp_path / "s", "val", [2, 2])
    both = open_(f"{tmp_path}/s/my-{{train,val}}-000.tar")
    assert len(both.train) == 9 and both.test is None
    with pytest.raises(DataError, match=r"means my-val-000\.tar twice"):
        open_(f"{tmp_path}/s/my-{{val,val}}-000.tar")
    (tmp_path / "t").symlink_to(tmp_path / "s")
    with pytest.raises(DataError, match="twice"):
        open_(f"{tmp_path}/{{s,t}}/my-val-000.tar")


@pytest.mark.parametrize("record", [
    "11 size=\u00b2\n".encode(), b"000000010" + b"0" * 4300 + b" path=x\n", b"9" * 30 + b" path=x\n"
])  # fmt: skip
def test_extended_attributes_with_odd_numbers_are_passed_over(tmp_path, record):
    head = tarfile.TarInfo("x")
    head.type, head.size = b"x", len(record)
    rest = shard(tmp_path / "a.tar", [("a.png", png(1)), ("a.cls", b"0")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(head.tobuf() + record.ljust(-(-len(record) // 512) * 512, b"\0") + rest)
    source = open_(tmp_path / "a.tar")
    assert [content_of(source, key) for key, _ in source.train] == [png(1)]
