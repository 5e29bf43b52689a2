"""Pixels, boxes and masks of annotated images, and reading them ahead."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from balms_cli.data.decode import BadImage
from balms_cli.detection.annotations import load_annotations
from balms_cli.detection.dataset import AHEAD, DetectImages, find_files, raster, read_pixels, unpacked
from balms_cli.errors import DataError

from .detect_tools import draw_lvis

TRIANGLE = [5, 5, 25, 5, 15, 20]


@pytest.fixture
def drawn(tmp_path):
    """(annotations, images folder) of a few drawn pictures."""
    folder = draw_lvis(tmp_path / "drawn", images=7, categories=3, size=64)
    return load_annotations(folder / "lvis_train.json"), folder / "images"


def one_image(folder: Path, segmentation, width: int = 40, height: int = 30, bbox=(5, 5, 20, 15), name: str = "a.png"):
    """Annotations of a single image with the segmentations given, one instance each."""
    content = {"images": [{"id": 9, "width": width, "height": height, "file_name": name}],
               "categories": [{"id": 4, "name": "x"}],
               "annotations": [{"id": n, "image_id": 9, "category_id": 4, "bbox": list(bbox), "segmentation": s}
                               for n, s in enumerate(segmentation)]}  # fmt: skip
    file = folder / "train.json"
    file.write_text(json.dumps(content))
    return load_annotations(file)


# Masks


def masks_of(info) -> np.ndarray:
    """[I, H, W]"""
    return unpacked(torch.from_numpy(raster(info)), info.width).numpy()


def test_masks_of_real_images_are_those_of_the_lvis_package():
    from lvis import LVIS

    if not os.environ.get("BALMS_TEST_DATA"):
        pytest.skip("BALMS_TEST_DATA names no folder with lvis-mini")
    root = Path(os.environ["BALMS_TEST_DATA"]) / "lvis-mini"
    found, official = load_annotations(root / "lvis_train.json"), LVIS(str(root / "lvis_train.json"))
    data = DetectImages(found, root / "images", workers=0)
    for i in range(0, len(data), 4):
        pixels, target = data.read(i)
        theirs = official.img_ann_map[target["image_id"]]
        with Image.open(root / "images" / data.paths[i]) as image:
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
        masks = unpacked(target["mask_bits"], pixels.shape[2])
        assert masks.shape[1:] == pixels.shape[1:] and masks.dtype == torch.uint8
        for mask, box, label, annotation in zip(masks, target["boxes"], target["labels"], theirs, strict=True):
            assert np.array_equal(mask.numpy(), official.ann_to_mask(annotation))
            x, y, w, h = annotation["bbox"]
            height, width = mask.shape
            assert box.tolist() == pytest.approx([x, y, min(x + w, width), min(y + h, height)])
            assert found.categories[label - 1].id == annotation["category_id"]


@pytest.mark.parametrize("shift", [0, 30])
def test_a_polygon_past_the_edge_is_cut_there(tmp_path, shift):
    rng, found = np.random.default_rng(shift), 0
    for _ in range(60):
        polygon = rng.uniform(-min(shift, 25), 65, 2 * int(rng.integers(3, 7))).round(2)
        large = coco_mask.decode(coco_mask.frPyObjects([(polygon + shift).tolist()], 100, 110))[..., 0]
        canvas = large[shift : shift + 30, shift : shift + 40]
        if canvas.sum() > 50:
            found += 1
            differ = (masks_of(one_image(tmp_path, [[polygon.tolist()]], bbox=(0, 0, 40, 30)).images[0])[0] != canvas).sum()
            assert differ <= (0.1 * canvas.sum() if shift else 0)  # below 0 pycocotools rounds the other way: slopes differ
    assert found > 20


def test_far_polygons_are_cut_without_a_large_canvas(tmp_path):
    far = [-5e8, 10.25, 5e8, 10.25, 5e8, 20.25, -5e8, 20.25]
    mask = masks_of(one_image(tmp_path, [[far]], bbox=(0, 10, 40, 10)).images[0])[0]
    near = coco_mask.decode(coco_mask.frPyObjects([[-9, 10.25, 49, 10.25, 49, 20.25, -9, 20.25]], 30, 40))[..., 0]
    assert np.array_equal(mask, near) and mask.sum() == 400


def test_several_polygons_and_run_lengths(tmp_path):
    parts = [TRIANGLE, [30, 20, 38, 20, 38, 28, 30, 28], [1, 1, 2, 2]]  # the last is no polygon
    union = coco_mask.decode(coco_mask.frPyObjects(parts[:2], 30, 40)).max(-1)
    square = np.zeros((30, 40), np.uint8, order="F")
    square[3:9, 4:14] = 1
    coded = coco_mask.encode(square)
    runs = [4 * 30 + 3, *[6, 24] * 9, 6, 1200 - 4 * 30 - 3 - 6 - 9 * 30]
    masks = masks_of(one_image(tmp_path, [parts, {"size": [30, 40], "counts": coded["counts"].decode()},
                                        {"size": [30, 40], "counts": runs}]).images[0])  # fmt: skip
    assert np.array_equal(masks, [union, square, square])


def test_an_instance_that_covers_no_pixel_has_the_pixels_of_its_box(tmp_path):
    thin = [10.1, 10.1, 10.3, 10.1, 10.3, 12.2, 10.1, 12.2]
    assert not coco_mask.area(coco_mask.frPyObjects([thin], 30, 40)).any()
    info = one_image(tmp_path, [[thin]], bbox=(10.1, 10.1, 0.2, 2.1)).images[0]
    assert list(zip(*map(list, masks_of(info)[0].nonzero()), strict=True)) == [(10, 10), (11, 10)]
    corner = [39.8, 29.8, 39.99, 29.8, 39.99, 29.99]
    info = one_image(tmp_path, [[corner]], bbox=(39.8, 29.8, 0.19, 0.19)).images[0]
    assert masks_of(info)[0].nonzero()[0].tolist() == [29]


def test_masks_are_kept_at_a_bit_a_pixel(tmp_path):
    for width in (1, 7, 8, 9, 40):
        square = [0, 10, width, 10, width, 20, 0, 20]
        info = one_image(tmp_path, [[square]] * 3, width=width, bbox=(0, 10, width, 10)).images[0]
        bits = raster(info)
        assert bits.dtype == np.uint8 and bits.shape == (3, 30, -(-width // 8))
        expected = np.zeros((3, 30, width), np.uint8)
        expected[:, 10:20] = 1
        assert np.array_equal(masks_of(info), expected)


def test_boxes_alone(drawn):
    annotations, folder = drawn
    _, target = DetectImages(annotations, folder, masks=False).read(0)
    assert set(target) == {"boxes", "labels", "image_id"}
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    alone = load_annotations(annotations.path, masks=False)
    assert DetectImages(alone, folder, masks=False).read(0)[1]["boxes"].equal(target["boxes"])
    with pytest.raises(ValueError, match="loaded without masks"):
        DetectImages(alone, folder)


# Pixels


def turned(path: Path, orientation: int, size=(40, 30)) -> np.ndarray:
    """A JPEG file that is to be turned; returns its pixels [H, W, 3] as they are stored."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        return np.asarray(image)


def test_an_image_is_turned_only_where_the_annotations_fit_it_turned(tmp_path):
    stored = turned(tmp_path / "a.jpg", 6)
    as_stored = read_pixels(tmp_path / "a.jpg", (40, 30)).permute(1, 2, 0).numpy()
    upright = read_pixels(tmp_path / "a.jpg", (30, 40)).permute(1, 2, 0).numpy()
    assert np.array_equal(as_stored, stored) and np.array_equal(upright, np.rot90(stored, -1))
    assert np.array_equal(read_pixels(tmp_path / "a.jpg").permute(1, 2, 0).numpy(), upright)
    stored = turned(tmp_path / "b.jpg", 3)  # upside down: both sizes are the same, and it stays as it is stored
    assert np.array_equal(read_pixels(tmp_path / "b.jpg", (40, 30)).permute(1, 2, 0).numpy(), stored)
    with pytest.raises(BadImage, match="40x30 pixels, where the annotations say 40x31"):
        read_pixels(tmp_path / "a.jpg", (40, 31))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "TIFF"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    image = Image.fromarray(np.full((30, 40), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((30, 40), 200 * 257, np.uint16))
    elif mode != "TIFF":
        image = image.convert(mode, dither=Image.Dither.NONE)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "TIFF") else "a.png")
    image.save(file)
    pixels = read_pixels(file, (40, 30))
    assert pixels.shape == (3, 30, 40) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert pixels.unique().tolist() == [255 if mode == "1" else 200]


# Files


def test_missing_files_are_named_and_counted(drawn):
    annotations, folder = drawn
    for name in ("train_002.png", "train_004.png"):
        (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        DetectImages(annotations, folder)
    assert str(caught.value) == (f"2 of 7 images are not in {folder}: train_002.png and 1 more; name the images' folder by "
                                 "--images, or leave them out: --set skip_bad=true")  # fmt: skip
    with pytest.raises(DataError) as caught:
        DetectImages(annotations, folder.parent, skip_bad=True)
    assert str(caught.value) == (f"7 of 7 images are not in {folder.parent}: train_000.png and 6 more; name the images' "
                                 "folder by --images")  # fmt: skip
    with pytest.raises(DataError, match="does not exist: name another by --images"):
        DetectImages(annotations, folder / "nowhere")


def test_skip_bad_leaves_out_what_cannot_be_read_and_counts_anew(drawn):
    annotations, folder = drawn
    before = {c.id: c.image_count for c in annotations.categories}
    gone = {"train_001.png", "train_002.png", "train_004.png", "train_005.png"}
    (folder / "train_001.png").unlink()
    (folder / "train_002.png").write_bytes((folder / "train_002.png").read_bytes()[:300])
    (folder / "train_004.png").write_bytes(b"no image")
    Image.new("RGB", (64, 64)).save(folder / "train_005.png")
    present = {image.file_name: {annotations.categories[label - 1].id for label in image.labels.tolist()}
               for image in annotations.images}  # fmt: skip
    data = DetectImages(annotations, folder, skip_bad=True)
    assert data.annotations is annotations  # whoever holds it sees the images that are read
    assert [image.file_name for image in annotations.images] == ["train_000.png", "train_003.png", "train_006.png"]
    after = {c.id: c.image_count for c in annotations.categories}
    assert after == {id: n for id in before if (n := sum(id in ids for name, ids in present.items() if name not in gone))}
    assert annotations.left_out == {"missing images": 1, "unreadable images": 3} and annotations.num_images == 3
    assert data.read(2)[1]["image_id"] == annotations.images[2].id and data.paths[2] == "train_006.png"


def test_an_image_that_cannot_be_read_is_named(drawn):
    annotations, folder = drawn
    data = DetectImages(annotations, folder)
    Image.new("RGB", (64, 64)).save(folder / "train_000.png")
    (folder / "train_001.png").write_bytes(b"")
    rest = "; bring the right file back, or leave it out: --set skip_bad=true"
    for i, what in ((0, "64x64 pixels, where the annotations say 85x64"), (1, "empty")):
        with pytest.raises(DataError) as caught:
            data.read(i)
        assert str(caught.value) == f"train_00{i}.png: {what}{rest}"


def test_names_are_looked_for_with_and_without_their_folder(tmp_path):
    for name in ("train2017/1.jpg", "000000391895.jpg", "2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def find(name: str):
        return find_files(one_image(tmp_path, [[TRIANGLE]], name=name).images, tmp_path)[0]

    assert find("train2017/1.jpg") == "train2017/1.jpg" and find("val2017/2.jpg") == "2.jpg"
    assert find("COCO_train2014_000000391895.jpg") == "000000391895.jpg"
    assert find("1.jpg") is None and find("a\ud800/b.jpg") is None and find("n" * 5000 + "/b.jpg") is None


def test_links_out_of_the_folder_are_refused_at_the_start(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "images"
    outside.mkdir()
    folder.mkdir()
    Image.new("RGB", (40, 30)).save(outside / "a.png")
    (folder / "a.png").symlink_to(outside / "a.png")
    (folder / "sub").symlink_to(outside)
    for name in ("a.png", "sub/a.png"):
        with pytest.raises(DataError, match="is a link that leaves the images' folder: name the folder it leads to by "):
            DetectImages(one_image(tmp_path, [[TRIANGLE]], name=name), folder)
    (tmp_path / "linked").symlink_to(outside)
    assert len(DetectImages(one_image(tmp_path, [[TRIANGLE]]), tmp_path / "linked")) == 1


# Reading ahead


def same(one, two) -> bool:
    return all(a[0].equal(b[0]) and a[1]["boxes"].equal(b[1]["boxes"]) and a[1]["mask_bits"].equal(b[1]["mask_bits"])
               and a[1]["image_id"] == b[1]["image_id"] for a, b in zip(one, two, strict=True))  # fmt: skip


@pytest.mark.parametrize("workers", [0, 3])
def test_a_reader_gives_the_images_of_any_step(drawn, workers):
    annotations, folder = drawn
    data = DetectImages(annotations, folder, workers=workers)

    def draw(step: int) -> np.ndarray:
        return np.array([step % 7, (3 * step + 1) % 7])

    read = data.reader(draw, 6)
    for step in (2, 3, 4, 5, 0, 3, 5, 5, 8):
        assert same(read(step), [data.read(int(i)) for i in draw(step)])
        assert len(read.pending) <= AHEAD  # what an earlier order had begun is dropped
    read.close()


def test_the_next_steps_are_read_while_one_is_used(drawn):
    annotations, folder = drawn
    data = DetectImages(annotations, folder, workers=2)
    seen, enough, drawn_steps = [], threading.Event(), []
    plain = data.read

    def watched(i: int):
        seen.append(i)
        if len(seen) == 1 + AHEAD:
            enough.set()
        return plain(i)

    def draw(step: int) -> list[int]:
        drawn_steps.append(step)
        return [step]

    data.read = watched
    read = data.reader(draw, 5)
    assert read(0)[0][1]["image_id"] == annotations.images[0].id
    assert enough.wait(10) and drawn_steps == [0, 1, 2]
    for step in (1, 2, 3, 4):
        read(step)
    assert drawn_steps == [0, 1, 2, 3, 4] and sorted(seen) == [0, 1, 2, 3, 4]  # each once, and none past the end
    read.close()


def test_closing_the_images_ends_all_their_readers(drawn):
    data = DetectImages(*drawn, workers=1)
    readers = [data.reader(lambda step: [step], 5) for _ in range(2)]
    for read in readers:
        read(0)
    data.close()
    for read in readers:
        with pytest.raises(RuntimeError, match="shutdown"):
            read(3)
