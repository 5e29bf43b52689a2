"""``balms detect predict``: pictures that can be read, numbers that are those of the detector, and files left alone."""

import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import save_file

from balms_cli.data.decode import BadImage
from balms_cli.detection import predict
from balms_cli.detection.dataset import read_pixels
from balms_cli.detection.draw import _FILL, COLOURS, Detection, caption, draw, lay_labels
from balms_cli.detection.header import read_detect_header
from balms_cli.detection.model import detect, load_detector, save_detector
from balms_cli.detection.predict import Photo, Results

from .detect_tools import IDS, NAMES, draw_lvis, tiny_detector, tiny_header

GREY = (120, 120, 120)
ALL = ("--score-threshold", 0, "--precision", "fp32")


def found(label=1, score=0.5, box=(0, 0, 10, 10), rle=None, name="dog") -> Detection:
    return Detection(label, 100 + label, name, score, box, rle)


def rle_of(mask_HW: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))


class TestDraw:
    def test_masks_tint_boxes_frame_and_nothing_else_changes(self):
        """Against the arithmetic, pixel by pixel. 1,300 pixels wide: neither enlarged nor reduced."""
        rng = np.random.default_rng(0)
        photo_HW3 = rng.integers(0, 256, (500, 1300, 3)).astype(np.uint8)
        mask_HW = np.zeros((500, 1300), bool)
        mask_HW[120:360, 320:700] = True
        picture_HW3 = np.asarray(draw(Image.fromarray(photo_HW3), [found(2, box=(300, 100, 800, 400), rle=rle_of(mask_HW))]))
        assert picture_HW3.shape == photo_HW3.shape
        inside = picture_HW3[125:355, 325:695].astype(float)
        expected = photo_HW3[125:355, 325:695] * (1 - _FILL) + np.array(COLOURS[1]) * _FILL
        assert np.abs(inside - expected).max() <= 1
        assert (picture_HW3[120, 320:700] == COLOURS[1]).all()  # the mask's edge
        assert (picture_HW3[100, 300:799] == COLOURS[1]).all() and (picture_HW3[100:400, 799] == COLOURS[1]).all()
        untouched = np.ones((500, 1300), bool)
        untouched[60:402, 290:802] = False  # the box, and the label above it
        assert (picture_HW3[untouched] == photo_HW3[untouched]).all()
        hollow = ~mask_HW[104:396, 304:796]
        assert (picture_HW3[104:396, 304:796][hollow] == photo_HW3[104:396, 304:796][hollow]).all()

    def test_a_small_photo_is_enlarged_and_its_boxes_with_it(self):
        picture = draw(Image.new("RGB", (128, 96), GREY), [found(box=(32, 24, 64, 72))])
        assert picture.size == (1280, 960)
        changed = np.argwhere((np.asarray(picture)[240:] == COLOURS[0]).all(2))
        assert changed.min(0).tolist() == [0, 320] and changed.max(0).tolist() == [479, 639]

    def test_a_huge_photo_is_reduced(self):
        mask_HW = np.zeros((100, 9000), bool)
        mask_HW[20:80, 4500:9000] = True
        picture = draw(Image.new("RGB", (9000, 100)), [found(box=(4500, 20, 9000, 80), rle=rle_of(mask_HW))])
        assert picture.size == (4096, 46)
        columns = np.flatnonzero(np.asarray(picture).any((0, 2)))
        assert columns.max() == 4095 and abs(columns.min() - 2048) < 5

    @pytest.mark.parametrize("size", [(1, 1), (3, 2), (2000, 3), (5, 900)])
    @pytest.mark.parametrize(
        "box", [(0, 0, 1e9, 1e9), (-9, -9, 1, 1), (1, 1, 1, 1), (50, 50, 40, 40), (9e9, 9e9, 9.1e9, 9.1e9)]
    )
    def test_no_box_and_no_size_is_too_odd(self, size, box):
        every = rle_of(np.ones(size[::-1], bool))
        nothing = rle_of(np.zeros(size[::-1], bool))
        picture = draw(
            Image.new("RGB", size, GREY), [found(box=box, rle=every), found(2, box=box, rle=nothing), found(box=box)]
        )
        assert picture.width / picture.height == size[0] / size[1]

    def test_what_is_no_number_is_not_drawn(self):
        photo = Image.new("RGB", (1280, 40), GREY)
        assert draw(photo, [found(box=(float("nan"), 0, 5, 5))]).tobytes() == photo.tobytes()

    def test_up_to_seven_categories_have_seven_colours_and_mostly_their_own(self):
        """Labels 1, 8 and 15 would all be orange."""

        def colour_of(labels, which):
            detections = [found(label, box=(i * 150, 300, i * 150 + 100, 400)) for i, label in enumerate(labels)]
            return tuple(np.asarray(draw(Image.new("RGB", (1300, 500)), detections))[300, which * 150 + 50].tolist())

        labels = [1, 8, 15, 2, 9, 22, 1203]
        assert len({colour_of(labels, i) for i in range(7)}) == 7
        assert colour_of([8], 0) == colour_of([1, 2], 0) == COLOURS[0] and colour_of([5, 8], 1) == COLOURS[0]
        assert colour_of([*labels, 30, 31], 8) in COLOURS  # more categories than colours

    def test_labels_in_a_crowd(self):
        """None over another or outside, by brute force; each category's best has one."""
        rng = random.Random(0)
        boxes = []
        for _ in range(150):
            x, y = rng.randrange(0, 1100), rng.randrange(0, 700)
            boxes.append((x, y, x + rng.randrange(3, 180), y + rng.randrange(3, 100)))
        sizes = [(rng.randrange(60, 200), 22) for _ in boxes]
        limits = [1e9] * 10 + [1.0] * 140
        spots = lay_labels(sizes, range(150), limits, boxes, (1280, 800), 2)
        placed = [(spot, size) for spot, size in zip(spots, sizes, strict=True) if spot]
        assert all(spots[:10]) and 40 < len(placed) < 150
        for (x1, y1, x2, y2), size in placed:
            assert (x2 - x1, y2 - y1) == size and x1 >= 0 and y1 >= 0 and x2 <= 1280 and y2 <= 800
        for (a, _), (b, _) in itertools.combinations(placed, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    def test_a_label_alone_stands_on_its_box_and_hides_no_small_neighbour(self):
        boxes = [(400, 300, 600, 500), (405, 280, 420, 296)]
        (alone,) = lay_labels([(90, 20)], [0], [1e9], boxes[:1], (1280, 800), 2)
        assert alone[3] <= 300 and alone[3] > 290 and abs(alone[0] - 400) < 5
        (beside,) = lay_labels([(90, 20)], [0], [1e9], boxes, (1280, 800), 2)
        assert beside[2] <= 405 or beside[0] >= 420 or beside[3] <= 280 or beside[1] >= 296


class TestNames:
    def test_a_name_is_drawn_in_a_font_that_has_its_letters(self):
        """By another reader of fonts. Where no font of the machine has them, the id stands for the name."""
        for name in ("dog", "кошка", "Ελλάδα", "قطة سوداء", "חתול", "😀 grin", "猫和狗", "\U000e0fff\U0010fffd"):
            text, path = caption(name, 34)
            letters = TTFont(path, fontNumber=0).getBestCmap()
            assert all(ord(letter) in letters for letter in text) and text in (name, "category 34")
        assert caption("قطة سوداء", 34)[0] == "قطة سوداء" and caption("\U0010fffd", 34)[0] == "category 34"

    def test_odd_names_are_tamed(self):
        assert caption("", 7)[0] == caption(" \u202e\u202e ", 7)[0] == "category 7"
        assert caption("\x1b[31mred\n", 7)[0] == "\\x1b[31mred\\n"
        assert caption("\u202egnp.exe", 7)[0] == "gnp.exe"
        assert len(caption("a" * 9999, 7)[0]) == 28 and caption("a" * 9999, 7)[0].endswith("…")

    def test_marks_that_pile_up_and_halves_of_letters_do_not_crash(self):
        names = ["e" + "\u0301\u0302\u0303" * 40, "\ud800bad", "क्षि", "dog\u200d🦮", "ﷺ", "<b>[red]&"]
        for i, name in enumerate(names):
            marked = draw(Image.new("RGB", (640, 480)), [found(i + 1, name=name)])
            assert marked.mode == "RGB" and marked.getbbox() is not None, name
        together = draw(Image.new("RGB", (640, 480)), [found(i + 1, name=name) for i, name in enumerate(names)])
        assert together.size == marked.size


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """A run of an untrained detector: its scores are alike, so that there is much to draw."""
    run = tmp_path_factory.mktemp("detect") / "run"
    run.mkdir()
    save_detector(run / "model.safetensors", tiny_detector(3), tiny_header(3))
    return run


@pytest.fixture(scope="module")
def lvis(tmp_path_factory) -> Path:
    return draw_lvis(tmp_path_factory.mktemp("lvis") / "set", images=2) / "images"


@pytest.fixture
def photos(lvis, tmp_path) -> Path:
    shutil.copytree(lvis, tmp_path / "photos")
    return tmp_path / "photos"


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


class TestCommand:
    def test_numbers_are_the_detectors(self, balms, detector, photos, tmp_path):
        done = balms("detect", "predict", detector, photos, "--json", "--detections", 7, "--out", tmp_path / "out", *ALL)
        assert done.code == 0, done.err
        told = lines(done.out)
        assert [line["image"] for line in told] == sorted(map(str, photos.iterdir()))
        assert lines((tmp_path / "out" / "predictions.jsonl").read_text()) == told
        model, _ = load_detector(detector / "model.safetensors")
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0, 7
        for line in told:
            pixels = torch.from_numpy(np.asarray(Image.open(line["image"])).copy()).permute(2, 0, 1)
            (answer,) = detect(model, [pixels.float() / 255])
            assert (line["width"], line["height"]) == (128, 96) and len(line["detections"]) == len(answer["scores"]) == 7
            for one, box, label, score in zip(
                line["detections"], answer["boxes"], answer["labels"], answer["scores"], strict=True
            ):
                x, y, w, h = one["box"]
                assert np.allclose([x, y, x + w, y + h], box, atol=0.02) and one["score"] == pytest.approx(
                    float(score), rel=1e-5
                )
                assert one["category_id"] == IDS[label - 1] and one["category"] == NAMES[label - 1]
                mask_HW = coco_mask.decode(one["segmentation"])
                assert mask_HW.shape == (96, 128)
            picture = Image.open(line["picture"])
            assert picture.size == (1280, 960) and picture.format == "JPEG"

    def test_the_folder_is_printed_and_new_in_the_workspace(self, balms, detector, photos, tmp_path):
        for name in ("run", "run-2"):
            done = balms("detect", "predict", detector, photos, "--quiet", "--detections", 3, *ALL)
            assert done.code == 0 and done.err == "" and done.out == f"{tmp_path / 'ws' / 'predictions' / name}\n"
        assert len(list(Path(done.out.strip()).glob("*.jpg"))) == 3

    def test_a_threshold_is_kept(self, balms, detector, photos):
        every = lines(balms("detect", "predict", detector, photos, "--json", "--no-pictures", "--detections", 20, *ALL).out)
        scores = sorted(one["score"] for line in every for one in line["detections"])
        middle = (scores[len(scores) // 2] + scores[len(scores) // 2 - 1]) / 2
        some = lines(
            balms("detect", "predict", detector, photos, "--json", "--no-pictures", *ALL, "--score-threshold", middle).out
        )
        kept = [one["score"] for line in some for one in line["detections"]]
        assert kept and min(kept) > middle and "picture" not in some[0]
        none = balms("detect", "predict", detector, photos, "--no-pictures", "--score-threshold", 0.99)
        assert none.code == 0 and none.out == "" and "a lower --score-threshold" in none.err

    def test_lines_of_text_and_paths_from_stdin(self, balms, detector, photos, tmp_path):
        paths = sorted(map(str, photos.iterdir()))[:2]
        done = balms("detect", "predict", detector, "-", "--no-pictures", "--detections", 2, *ALL, stdin="\n".join(paths))
        fields = [line.split("\t") for line in done.out.splitlines()]
        assert [f[0] for f in fields] == [paths[0]] * 2 + [paths[1]] * 2 and all(len(f) == 7 and f[1] in NAMES for f in fields)
        assert not (tmp_path / "ws").exists()

    def test_the_photo_stands_upright(self, balms, detector, photos, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = Image.open(photos / "val_000.png").transpose(Image.Transpose.ROTATE_90)
        turned.save(tmp_path / "turned.png", exif=exif)
        first, second = lines(balms("detect", "predict", detector, photos / "val_000.png", tmp_path / "turned.png", "--json",
                                    "--no-pictures", *ALL).out)  # fmt: skip
        assert (second["width"], second["height"]) == (128, 96) and second["detections"] == first["detections"]

    def test_bad_images_are_named_and_left_out(self, balms, detector, photos, tmp_path):
        (photos / "a.jpg").write_text("no image")
        (photos / "notes.txt").touch()
        done = balms("detect", "predict", detector, photos, tmp_path / "gone.png", "--json", "--out", tmp_path / "out", "-q")
        told = lines(done.out)
        assert done.code == 0 and told[0] == {"image": str(photos / "a.jpg"), "error": "not an image"}
        assert told[-1]["error"] == "missing" and done.err == ""
        loud = balms("detect", "predict", detector, photos, "--no-pictures")
        assert loud.code == 0 and "a.jpg is left out: not an image" in loud.err
        assert len(list((tmp_path / "out").glob("*.jpg"))) == 3
        nothing = balms("detect", "predict", detector, photos / "a.jpg")
        assert nothing.code == 3 and nothing.out == "" and "no image could be read, of 1; " in nothing.err
        assert "a.jpg: not an image" in nothing.err

    def test_same_names_of_two_folders(self, balms, detector, photos, tmp_path):
        other = shutil.copytree(photos, tmp_path / "other")
        shutil.copy(photos / "val_000.png", photos / "VAL_000.webp")
        done = balms("detect", "predict", detector, other, photos, "--json", "--out", tmp_path / "out")
        told = lines(done.out)
        assert len({line["picture"].casefold() for line in told}) == len(told) == 7
        assert all(Path(line["picture"]).is_file() for line in told)
        assert Path(told[-1]["picture"]).name == "val_000-3.jpg"

    def test_a_full_folder_is_refused(self, balms, detector, photos, tmp_path):
        done = balms("detect", "predict", detector, photos, "--out", photos)
        assert done.code == 2 and "is not empty; add --overwrite" in done.err
        before = {p.name: p.read_bytes() for p in photos.iterdir()}
        done = balms("detect", "predict", detector, photos, "--out", photos, "--overwrite")
        assert done.code == 2 and "--overwrite leaves it alone" in done.err
        assert {p.name: p.read_bytes() for p in photos.iterdir()} == before

    def test_overwrite_replaces_what_predict_wrote_and_nothing_else(self, balms, detector, photos, tmp_path):
        out, secret = tmp_path / "out", tmp_path / "secret.jpg"
        secret.touch()
        assert balms("detect", "predict", detector, photos, "--out", out).code == 0
        (out / "mine.jpg").touch()
        (out / "val_001.txt").touch()
        with (out / "predictions.jsonl").open("a") as file:
            file.write(
                f'no JSON\n[]\n{{"picture": 3}}\n{{"picture": {json.dumps(str(secret))}}}\n{{"picture": "../secret.jpg"}}\n'
            )
        done = balms("detect", "predict", detector, photos / "val_000.png", "--out", out, "--overwrite")
        assert done.code == 0, done.err
        assert sorted(p.name for p in out.iterdir()) == ["mine.jpg", "predictions.jsonl", "val_000.jpg", "val_001.txt"]
        assert secret.is_file() and len(lines((out / "predictions.jsonl").read_text())) == 1

    def test_pictures_are_not_read_as_photos(self, balms, detector, photos):
        out = photos / "z"
        for more in ((), ("--overwrite",)):
            done = balms("detect", "predict", detector, photos, "--out", out, "--json", *more)
            assert done.code == 0, done.err
            read = [line["image"] for line in lines(done.out) if "error" not in line]
            assert len(read) == 3 and all(Path(path).parent == photos for path in read)

    def test_no_folder_is_made_for_a_wrong_detector(self, balms, detector, photos, tmp_path):
        save_file({"w": torch.zeros(1)}, tmp_path / "classifier.safetensors", metadata={"balms": "{}"})
        for run, reason in ((tmp_path / "classifier.safetensors", "is a classifier"), (tmp_path / "gone", "no such checkpoint"),
                            (next(photos.iterdir()), "is not a checkpoint")):  # fmt: skip
            done = balms("detect", "predict", run, photos, "--out", tmp_path / "out")
            assert done.code == 4 and reason in done.err and len(done.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("arguments, words", [
        (("--no-pictures", "--out", "x"), "about the pictures"), (("--no-pictures", "--overwrite"), "about the pictures"),
        (("--set", "top_k=3"), "top_k"), (("--device", "cuda:99"), "cuda:99"),
    ])  # fmt: skip
    def test_wrong_options(self, balms, detector, photos, arguments, words):
        done = balms("detect", "predict", detector, photos, *arguments)
        assert done.code == 2 and words in done.err and done.out == ""

    def test_stdin_is_one_thing(self, balms, detector, monkeypatch):
        assert balms("detect", "predict", "-", "-", stdin="x").code == 2
        assert balms("detect", "predict", "-", "x.png", stdin="a\nb\n").code == 2
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "without torchrun" in balms("detect", "predict", detector, "x.png").err


class TestPython:
    def test_a_huge_photo_is_seen_smaller_and_answered_in_its_own_pixels(self, detector, photos, monkeypatch):
        """The tiny detector sees 64 pixels either way: boxes are the same to a few pixels of 512."""
        photo = Image.open(photos / "train_000.png").resize((512, 384), Image.Resampling.BICUBIC)
        pixels_3HW = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
        predictor = predict.load(detector)
        seen = []
        whole = detect

        def spy(model, images):
            seen.append(tuple(images[0].shape[1:]))
            return whole(model, images)

        monkeypatch.setattr(predict, "detect", spy)
        predictor.model.roi_heads.score_thresh = 0.0
        large = predictor.detections(pixels_3HW)
        monkeypatch.setattr(predict, "BIG", 512 * 384 // 3)
        small = predictor.detections(pixels_3HW)
        assert seen[-2:] == [(384, 512), (192, 256)]
        assert small[0].rle["size"] == [384, 512]
        assert np.allclose(np.mean([d.box for d in small], 0), np.mean([d.box for d in large], 0), atol=40)

    def test_weights_that_are_no_numbers_are_told(self, detector, tmp_path):
        from balms_cli.errors import CheckpointError

        model, header = tiny_detector(3), read_detect_header(detector / "model.safetensors")
        with torch.no_grad():
            model.roi_heads.box_predictor.bbox_pred.bias.fill_(float("nan"))
        save_detector(tmp_path / "model.safetensors", model, header)
        with pytest.raises(CheckpointError, match=r"bbox_pred\.bias' are not finite"):
            predict.load(tmp_path / "model.safetensors")

    def test_names_at_the_limits_of_a_file_system(self, tmp_path):
        results = Results(tmp_path / "out")
        pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
        for path in ("a/" + "é" * 125 + ".jpg", "b/" + "é" * 125 + ".png", os.fsdecode(b"c/\xff\xfe.jpg"), "猫.tiff"):
            picture = results.write(Photo(path, pixels, []))
            assert picture.is_file() and picture.parent == tmp_path / "out"
        assert len(list((tmp_path / "out").iterdir())) == 5
        picture = results.write(Photo("d/x" + "é" * 120 + ".jpg", pixels, []))
        assert picture.name == "x" + "é" * 99 + ".jpg"  # cut between two letters, not within one

    def test_a_full_disk_leaves_no_half_picture(self, tmp_path, monkeypatch):
        from balms_cli.errors import DataError

        def full(self, content):
            self.touch()
            raise OSError(28, "No space left on device")

        results = Results(tmp_path / "out")
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match="free some space"):
            results.write(Photo("a.png", torch.zeros(3, 4, 4, dtype=torch.uint8), []))
        assert list((tmp_path / "out").iterdir()) == []

    def test_photos_are_read_ahead_in_order_and_only_a_few(self, photos, monkeypatch):
        read = []
        monkeypatch.setattr(predict, "read_pixels", lambda path: read.append(path) or read_pixels(path))
        paths = sorted(map(str, photos.iterdir())) * 3
        reader = predict._read_ahead((path, None) for path in paths)
        first, _ = next(reader)
        assert first == paths[0] and len(read) <= predict._AHEAD + 1
        assert [path for path, _ in reader] == paths[1:]
        with pytest.raises(BadImage):
            read_pixels(__file__)
