"""CIFAR: on disk in four forms, hostile archives, and over HTTP."""

import hashlib
import io
import os
import pickle
import random
import socket
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from balms_cli.config import MakeLTConfig
from balms_cli.data import known, unpack
from balms_cli.data.sources import Source, open_source
from balms_cli.errors import ConfigError, DataError
from balms_cli.reporter import Reporter

from .data_helpers import Listener, fake_cifar, tree, web_server


@pytest.fixture(autouse=True)
def no_data_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BALMS_DATA", "BALMS_OFFLINE", "BALMS_CIFAR_MIRROR", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BALMS_CACHE", str(tmp_path / "cache"))


def sizes(source: Source) -> dict[str, int]:
    labels = [label for _, label in source.train]
    return {name: labels.count(label) for label, name in enumerate(source.classes)}


# ---- CIFAR on disk


def test_archives_are_torchvisions() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for name, theirs in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        ours = known.ARCHIVES[name]
        assert (ours.url, ours.md5, ours.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
        assert [list(pair) for pair in ours.train + ours.test] == theirs.train_list + theirs.test_list
    assert (len(known.CIFAR10), len(set(known.CIFAR100))) == (10, 100)
    assert sorted(known.CIFAR100) == known.CIFAR100


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


GOOD = {f"fake/{part}/c{c}/{i}.webp": b"" for part in ("train", "test") for c in (0, 1) for i in range(2)}


def test_zip_is_unpacked_once_and_found_again(tmp_path: Path) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    zip_of(tmp_path / "data" / "fake.zip", GOOD)
    listener = Listener()
    config = MakeLTConfig(source="fake", data_root=str(tmp_path / "data"))
    source = open_source(config, listener, {"fake": archive})
    assert (source.kind, source.known) == ("folder", True)
    assert sizes(source) == {"c0": 2, "c1": 2}
    assert source.hash_key("train/c0/1.webp") == "train/c0/1"
    assert sum("unpacking" in line for line in listener.notes) == 1
    open_source(config, listener, {"fake": archive})
    without = open_source(MakeLTConfig(source="fake", offline=True), listener, {"fake": archive})  # now in the cache
    assert without.root == source.root
    assert sum("unpacking" in line for line in listener.notes) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**GOOD, "../evil.txt": b"x"}, "leads out of its folder: '../evil.txt'"),
        ({**GOOD, "fake/train/../../../evil.txt": b"x"}, "leads out"),
        ({**GOOD, "/abs/evil.txt": b"x"}, "leads out"),
        ({**GOOD, "C:/evil.txt": b"x"}, "leads out"),
        ({**GOOD, "fake\\..\\evil.txt": b"x"}, "leads out"),
        ({**GOOD, "fake/train/c0/bomb.png": b"\0" * 30_000_000}, "would unpack to"),
        ({"other/train/a/x.png": b""}, "holds no folder fake/train/"),
    ],
)
def test_hostile_zips(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    zip_of(tmp_path / "data" / "fake.zip", members)
    with pytest.raises(DataError, match=message):
        unpack.unpack_zip(tmp_path / "data" / "fake.zip", "fake", tmp_path / "cache", Reporter())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing was written


def test_zip_with_a_link(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("fake/train/c0/link.png")
    link.external_attr = 0o120777 << 16
    zip_of(tmp_path / "fake.zip", GOOD)
    with zipfile.ZipFile(tmp_path / "fake.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="symbolic link"):
        unpack.unpack_zip(tmp_path / "fake.zip", "fake", tmp_path / "cache", Reporter())


def test_damaged_zip_leaves_nothing(tmp_path: Path) -> None:
    members = {**GOOD, "fake/train/c0/noise.png": os.urandom(5000)}
    path = zip_of(tmp_path / "data" / "fake.zip", members)
    content = bytearray(path.read_bytes())
    content[content.index(b"noise.png") + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        unpack.unpack_zip(path, "fake", tmp_path / "cache", Reporter())
    assert not (tmp_path / "cache").exists()
    path.write_bytes(content[:500])
    with pytest.raises(DataError, match="not a zip"):
        unpack.unpack_zip(path, "fake", tmp_path / "cache", Reporter())


def test_a_zip_with_a_file_twice(tmp_path: Path) -> None:
    zip_of(tmp_path / "fake.zip", GOOD)
    with zipfile.ZipFile(tmp_path / "fake.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("fake/train/c0/0.webp", b"another")
    with pytest.raises(DataError, match="holds a file twice"):
        unpack.unpack_zip(tmp_path / "fake.zip", "fake", tmp_path / "cache", Reporter())


@pytest.mark.parametrize("names", [
    ["fake/train/a", "fake/train/a/b"], ["fake/train/a/b", "fake/train/a"], ["fake/train/" + "x" * 300]
])  # fmt: skip
def test_a_zip_that_no_disk_can_hold(tmp_path: Path, names: list[str]) -> None:
    path = zip_of(tmp_path / "data" / "fake.zip", dict.fromkeys(names, b""))
    with pytest.raises(DataError, match="is damaged at 'fake/train/"):
        unpack.unpack_zip(path, "fake", tmp_path / "cache", Reporter())
    assert not (tmp_path / "cache").exists()


def test_any_damage_to_an_archive_is_one_line(tmp_path: Path) -> None:
    """Bytes changed at random, in the tables above all, in every way of packing: unpacked or refused, nothing else."""
    rng = random.Random(0)
    whole = []
    for form in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "fake.zip", "w", form) as archive:
            for name in ("fake/train/a/1.png", "fake/train/\u00e9/2.png"):
                archive.writestr(name, bytes(range(200)))
        whole.append((tmp_path / "fake.zip").read_bytes())
    for form in ("w", "w:gz", "w:xz", "w:bz2"):
        with tarfile.open(tmp_path / "fake.zip", form, format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("fake/\u00e9")
            member.size = 200
            archive.addfile(member, io.BytesIO(bytes(200)))
        whole.append((tmp_path / "fake.zip").read_bytes())
    refused = 0
    for i in range(480):
        content = bytearray(whole[i % 8])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content) if i % 8 > 3 or rng.random() < 0.3 else 300)
            content[-at - 1] = rng.choice((0, 0x80, 0xFF, rng.randrange(256)))
        (tmp_path / "fake.zip").write_bytes(content)
        try:
            if i % 8 < 4:
                unpack.unpack_zip(tmp_path / "fake.zip", "fake", tmp_path / "cache", Reporter())
            else:
                unpack.unpack_tar(tmp_path / "fake.zip", "fake", ["\u00e9"], tmp_path / f"cache{i}", Reporter())
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 120 < refused < 480


def test_official_archive_and_batches(tmp_path: Path) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "data")
    source = open_source(MakeLTConfig(source="fake", data_root=str(tar.parent)), Reporter(), {"fake": archive})
    assert (source.kind, sizes(source), len(source.test)) == ("cifar", {"c0": 6, "c1": 6}, 4)
    assert len({key for key, _ in source.train}) == 12
    with pytest.raises(DataError, match="labels, names and pixels do not fit each other"):
        list(known.read_batches(replace(archive, classes=["c0"]), known.cache_dir() / "fake-batches", "train"))
    again = open_source(MakeLTConfig(source="fake", offline=True), Reporter(), {"fake": archive})  # unpacked in the cache
    assert again == source
    tar.write_bytes(tar.read_bytes()[:400])
    with pytest.raises(DataError, match="damaged"):
        unpack.unpack_tar(tar, "fake-batches", ["data_batch_1"], tmp_path / "cache2", Reporter())
    assert not (tmp_path / "cache2").exists()


def test_images_of_one_name_have_keys_of_their_own(tmp_path: Path) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "data", classes=1)
    source = open_source(MakeLTConfig(source="fake", data_root=str(tar.parent)), Reporter(), {"fake": archive})
    assert [key for key, _ in source.train[:3]] == [
        "train/c0/thing_s_000000.png", "train/c0/thing_s_000000.png#2", "train/c0/thing_s_000001.png"]  # fmt: skip


def test_an_archive_with_a_batch_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_MEMBER", 1000)
    with pytest.raises(DataError, match="'fake-batches/data_batch_1' is not a plain file of the size expected"):
        unpack.unpack_tar(fake_cifar(tmp_path)[1], "fake-batches", ["data_batch_1"], tmp_path / "cache", Reporter())


class Evil:
    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def test_pickles_hold_arrays_only(tmp_path: Path) -> None:
    content = pickle.dumps({"data": Evil(tmp_path / "exploded"), "labels": [], "filenames": []}, protocol=2)
    (tmp_path / "b").write_bytes(content)
    archive, _, _ = fake_cifar(tmp_path / "made")
    with pytest.raises(DataError, match="md5 differs"):
        list(known.read_batches(replace(archive, train=(("b", "0" * 32),)), tmp_path, "train"))
    with pytest.raises(DataError, match=r"not in the official format.*not allowed"):
        list(known.read_batches(replace(archive, train=(("b", hashlib.md5(content).hexdigest()),)), tmp_path, "train"))
    assert not (tmp_path / "exploded").exists()


def test_data_root_is_asked_first_then_balms_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    for place in ("one", "two"):
        tree(tmp_path / place / "fake", {f"{part}/c{c}": 1 for part in ("train", "test") for c in (0, 1)})
    monkeypatch.setenv("BALMS_DATA", str(tmp_path / "two"))
    for data_root, place in ((str(tmp_path / "one"), "one"), (None, "two"), (str(tmp_path / "made" / ".."), "two")):
        source = open_source(MakeLTConfig(source="fake", data_root=data_root), Reporter(), {"fake": archive})
        assert Path(source.root) == tmp_path / place / "fake"
    with pytest.raises(DataError, match="is not a folder"):
        open_source(MakeLTConfig(source="fake", data_root=str(tmp_path / "gone")), Reporter(), {"fake": archive})
    (tmp_path / "one" / "fake" / "train" / "c1" / "00.png").unlink()
    (tmp_path / "one" / "fake" / "train" / "c1").rmdir()
    with pytest.raises(DataError, match="lacks class 'c1'"):
        open_source(MakeLTConfig(source="fake", data_root=str(tmp_path / "one")), Reporter(), {"fake": archive})


# ---- CIFAR over HTTP


def download(archive: known.Archive, reporter: Reporter | None = None, **options: object) -> Source:
    return open_source(MakeLTConfig(source="fake", **options), reporter or Reporter(), {"fake": archive})


def test_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "made")
    listener = Listener()
    with web_server(tar.read_bytes()) as server:
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", server.url + "/mirror/")
        source = download(archive, listener)
        assert download(archive) == source
        assert server.ranges == [None]
    assert any(f"downloading {server.url}/mirror/fake-python.tar.gz" in line for line in listener.notes)
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("honours_range", [True, False])
def test_download_goes_on_where_it_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honours_range: bool) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "made")
    content = tar.read_bytes()
    with web_server(content, breaks=1, honours_range=honours_range) as server:
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", server.url)
        assert len(download(archive).train) == 12
        assert server.ranges == [None, f"bytes={len(content) // 2}-"]


def test_download_resumes_a_part_of_an_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "made")
    content = tar.read_bytes()
    part = tmp_path / "cache" / "fake-python.tar.gz.part"
    with web_server(content, breaks=99, honours_range=False) as server:  # never gets beyond the middle
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", server.url)
        with pytest.raises(DataError, match="run again to go on"):
            download(archive)
    assert part.read_bytes() == content[: len(content) // 2]
    with web_server(content) as server:
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", server.url)
        download(archive)
        assert server.ranges == [f"bytes={len(content) // 2}-"]
    assert (tmp_path / "cache" / "fake-python.tar.gz").read_bytes() == content


def test_wrong_checksum_removes_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "made")
    with web_server(tar.read_bytes() + b"more") as server:
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", server.url)
        with pytest.raises(DataError, match=f"expected {archive.md5}"):
            download(archive)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_part_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, tar, _ = fake_cifar(tmp_path / "made")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fake-python.tar.gz.part").write_bytes(b"x" * 100_000)
    with web_server(tar.read_bytes()) as server:
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", server.url)
        with pytest.raises(DataError, match="expected"):
            download(archive)
        assert len(download(archive).train) == 12


def test_offline_names_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    with pytest.raises(DataError, match=r"--data-root DIR, DIR holding fake/, fake\.zip or fake-python\.tar\.gz"):
        download(archive, offline=True)
    monkeypatch.setenv("BALMS_OFFLINE", "1")
    with pytest.raises(DataError, match="--offline forbids"):
        download(archive)


def test_unreachable_network_is_one_quick_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    with socket.socket() as closed:  # a port that nobody listens at
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(DataError, match=r"cannot download http.*Connection refused.*--data-root DIR") as caught:
            download(archive)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    monkeypatch.setattr("balms_cli.data.download.GIVE_UP_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("BALMS_CIFAR_MIRROR", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DataError, match="no answer within"):
            download(archive)


@pytest.mark.parametrize("mirror", ["file:///etc", "ftp://localhost", "/etc"])
def test_only_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: str) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    monkeypatch.setenv("BALMS_CIFAR_MIRROR", mirror)
    with pytest.raises(DataError, match="only http and https"):
        download(archive)


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, _, _ = fake_cifar(tmp_path / "made")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BALMS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="cannot write"):
        download(archive)
