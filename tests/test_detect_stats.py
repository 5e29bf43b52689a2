"""``balms detect stats``: numbers that a hand can count."""

import json
import math

import pytest
from PIL import Image

ODDS = math.log(0.1 / 0.9)


@pytest.fixture
def file(tmp_path):
    """20 images: category 5 in ten of them, 9 in two, 2 in none; a crowd region and an image with nothing."""
    triangle = {"bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 9, 1, 9, 9]]}
    rows = [*((i, 5) for i in range(10)), (0, 5), (0, 9), (1, 9), *((i, 7) for i in range(20))]
    content = {"images": [{"id": i, "width": 50, "height": 50, "file_name": f"{i}.png"} for i in range(21)],
               "categories": [{"id": id, "name": name, "frequency": group} for id, name, group in
                              ((9, "auk\x1b[31m", "r"), (5, "[bold]bee", "c"), (7, "cow", "f"), (2, "dab", "r"))],
               "annotations": [{"id": n, "image_id": i, "category_id": c, **triangle}
                               for n, (i, c) in enumerate(rows)]}  # fmt: skip
    content["annotations"].append({"id": 99, "image_id": 3, "category_id": 5, "iscrowd": 1, **triangle})
    (tmp_path / "my_train.json").write_text(json.dumps(content))
    return tmp_path / "my_train.json"


def test_json(balms, file):
    outcome = balms("detect", "stats", file.parent, "--json", "--repeat-threshold", "0.4", "--quiet")
    assert outcome.code == 0 and outcome.err == ""
    found = json.loads(outcome.out)
    assert [found[key] for key in ("images", "instances", "categories")] == [20, 33, 3]
    # Categories in the order of their ids: 5 in half of the images, 7 in all (kept below 1), 9 in a tenth.
    shares = [0.5, 1, 0.1]
    odds = [0, math.log(39), ODDS]
    logs = [math.log(f) for f in (0.5, 0.975, 0.1)]
    per = found["per_category"]
    assert [c["id"] for c in per] == [5, 7, 9] and [c["share"] for c in per] == shares
    assert [c["log_odds"] for c in per] == pytest.approx(odds)
    assert [c["softmax_offset"] for c in per] == pytest.approx([x - sum(logs) / 3 for x in logs])
    assert [c["repeat_factor"] for c in per] == pytest.approx([1, 1, 2])
    assert found["groups"] == {
        "r": {"categories": 1, "images": 2, "instances": 2, "images_a_category": [2, 2],
              "log_odds": pytest.approx([ODDS, ODDS]), "repeat_factor": pytest.approx([2, 2])},
        "c": {"categories": 1, "images": 10, "instances": 11, "images_a_category": [10, 10], "log_odds": [0, 0],
              "repeat_factor": [1, 1]},
        "f": {"categories": 1, "images": 20, "instances": 20, "images_a_category": [20, 20],
              "log_odds": pytest.approx([odds[1]] * 2), "repeat_factor": [1, 1]},
    }  # fmt: skip
    assert found["repeat"] == {"threshold": 0.4, "repeated_images": 2, "largest_factor": pytest.approx(2),
                               "images_an_epoch": pytest.approx(22)}  # fmt: skip
    assert found["log_odds"] == pytest.approx([ODDS, math.log(39)]) and found["categories_without_image"] == ["dab"]
    assert found["left_out"] == {"crowd regions": 1, "categories without an image": 1, "images without a usable annotation": 1}
    assert found["missing_images"] is None


def test_tables_and_the_file_on_stdout(balms, file):
    outcome = balms("detect", "stats", file)
    assert outcome.code == 0 and outcome.out == f"{file}\n"
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in outcome.err.splitlines() if line.startswith("│")]
    assert lines[:3] == [["rare", "1", "2", "2", "2", "-2.20", "1.00"], ["common", "1", "10", "11", "10", "0.00", "1.00"],
                         ["frequent", "1", "20", "20", "20", "3.66", "1.00"]]  # fmt: skip
    assert lines[3:] == [["cow", "7", "f", "20", "20", "100.00%", "3.66", "1.00"],
                         ["[bold]bee", "5", "c", "10", "11", "50.00%", "0.00", "1.00"],
                         ["auk\\x1b[31m", "9", "r", "2", "2", "10.00%", "-2.20", "1.00"]]  # fmt: skip
    assert outcome.err.splitlines()[-5:] == [
        "repeat factors at threshold 0.001: no image comes more than once, as the rarest category is in 10 % of the images; "
        "a --repeat-threshold above 0.1 repeats some",
        "offsets of balanced sigmoid, log(f / (1 - f)): -2.20 to 3.66 logits",
        "offsets of balanced softmax, log f less its mean: -1.30 to 0.98 logits",
        "categories without an image: dab",
        "left out of my_train.json: crowd regions (1), categories without an image (1), images without a usable annotation (1)",
    ]
    many = json.loads(file.read_text())
    many["images"] += [{"id": i, "width": 50, "height": 50, "file_name": f"{i}.png"} for i in range(100, 2100)]
    many["annotations"] += [many["annotations"][-2] | {"id": i, "image_id": i} for i in range(100, 2100)]
    (file.parent / "many.json").write_text(json.dumps(many))
    assert "the rarest category is in 0.099 % of the images; a --repeat-threshold above 0.00099 repeats some" in (
        balms("detect", "stats", file.parent / "many.json", "--repeat-threshold", "0").err)  # fmt: skip
    one = json.loads(file.read_text())
    one["annotations"] = [a for a in one["annotations"] if a["category_id"] == 7]
    (file.parent / "one.json").write_text(json.dumps(one))
    lines = balms("detect", "stats", file.parent / "one.json").err.splitlines()
    assert ("repeat factors at threshold 0.001: no image comes more than once, as the rarest category is in 100 % of the images"
            in lines)  # fmt: skip
    repeated = balms("detect", "stats", file, "--repeat-threshold", "0.4", "--top", "1")
    assert "repeat factors at threshold 0.4: 2 images come more than once, 2.00 times at most; about 22 images an epoch" in (
        repeated.err.splitlines())  # fmt: skip
    assert "the 1 rarest categories" in repeated.err and "bee" not in repeated.err


def test_image_files_are_looked_for_where_asked(balms, file):
    folder = file.parent / "images"
    folder.mkdir()
    for i in range(18):
        Image.new("RGB", (50, 50)).save(folder / f"{i}.png")
    outcome = balms("detect", "stats", file, "--images", folder)
    assert outcome.code == 0 and outcome.err.splitlines()[-1] == "warning: 2 of 20 image files are not there: 18.png ..."
    assert json.loads(balms("detect", "stats", file, "--images", folder, "--json").out)["missing_images"] == 2
    wrong = balms("detect", "stats", file, "--images", file.parent / "none")
    assert wrong.code == 3
    assert wrong.err == f"error: the images' folder {file.parent / 'none'} does not exist: name another by --images\n"


def test_boxes_alone_and_bad_usage(balms, tmp_path, file):
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    refused = balms("detect", "stats", tmp_path / "boxes.json")
    assert refused.code == 3 and refused.err.endswith("boxes alone need no segmentation: --no-masks\n")
    assert json.loads(balms("detect", "stats", tmp_path / "boxes.json", "--no-masks", "--json").out)["instances"] == 33
    assert balms("detect", "stats").code == 2
    assert balms("detect", "stats", file, "--repeat-threshold", "-1").code == 2
