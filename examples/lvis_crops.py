"""A naturally long-tailed folder of photos of mixed sizes: what stands in the boxes of LVIS-annotated pictures.

    python examples/lvis_crops.py LVIS_MINI OUT [--min-side 24] [--min-pictures 4] [--test-share 0.25]

LVIS_MINI holds ``images/`` and annotations in LVIS's format: every ``lvis_*.json`` in it that lists the same categories as
``lvis_train.json``. OUT gets ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, one file a box, as large as the box. The cut
is by picture, so that nothing of a test picture is ever trained on; rare classes are served first (iterative
stratification, Sechidis et al. 2011), pictures in the order of their names' SHA-256. The same input gives the same folder.
"""

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from PIL import Image

from balms_cli.data.aside import folder_aside
from balms_cli.errors import DataError

QUALITY = 95  # of the JPEG files


class Crop(NamedTuple):
    """One box of a picture: left, top, right, bottom in whole pixels, and the annotation's number, which names the file."""

    picture: str
    category: str
    box: tuple[int, int, int, int]
    name: str


def read_boxes(root: Path) -> list[Crop]:
    """All boxes, in order of pictures and annotations. Raises: DataError where LVIS_MINI is not one."""
    try:
        first = json.loads((root / "lvis_train.json").read_text())
        documents = [("lvis_train", first)]
        for file in sorted(root.glob("lvis_*.json")):
            document = first if file.stem == "lvis_train" else json.loads(file.read_text())
            if document is not first and _names(document) == _names(first):
                documents.append((file.stem, document))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{root} is no folder of pictures with LVIS annotations: {error}") from None
    crops = []
    for part, document in documents:
        names, sizes = _names(document), {i["id"]: i for i in document["images"]}
        for annotation in document["annotations"]:
            image = sizes[annotation["image_id"]]
            left, top, width, height = annotation["bbox"]
            box = (max(0, math.floor(left)), max(0, math.floor(top)),
                   min(image["width"], math.ceil(left + width)), min(image["height"], math.ceil(top + height)))  # fmt: skip
            picture = Path(image["file_name"]).name
            crops.append(Crop(picture, names[annotation["category_id"]], box,
                              f"{Path(picture).stem}-{part.removeprefix('lvis_')}-{annotation['id']}.jpg"))  # fmt: skip
    return sorted(crops)


def _names(document: dict) -> dict[int, str]:
    return {category["id"]: category["name"].replace("/", "-") for category in document["categories"]}


def large_and_frequent(crops: list[Crop], min_side: int, min_pictures: int) -> list[Crop]:
    """Crops whose shorter side is long enough, of classes that enough pictures show."""
    large = [c for c in crops if min(c.box[2] - c.box[0], c.box[3] - c.box[1]) >= min_side]
    pictures = pictures_of(large)
    return [c for c in large if len(pictures[c.category]) >= min_pictures]


def pictures_of(crops: list[Crop]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for crop in crops:
        found[crop.category].add(crop.picture)
    return found


def test_pictures(crops: list[Crop], share: float) -> set[str]:
    """Pictures for the test split: of each class ``share`` of its pictures, one at least, as far as others leave it so."""
    by_class = pictures_of(crops)
    chosen: set[str] = set()
    decided: set[str] = set()
    for category in sorted(by_class, key=lambda name: (len(by_class[name]), name)):
        open_ones = sorted(by_class[category] - decided, key=lambda name: hashlib.sha256(name.encode()).digest())
        wanted = max(1, round(share * len(by_class[category]))) - len(by_class[category] & chosen)
        chosen.update(open_ones[: max(0, wanted)])
        decided |= by_class[category]
    return chosen


def main(
    lvis: Annotated[Path, typer.Argument(metavar="LVIS_MINI")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="must not exist")],
    min_side: Annotated[int, typer.Option(min=1, help="pixels of a box's shorter side")] = 24,
    min_pictures: Annotated[int, typer.Option(min=2, help="pictures that show a class")] = 4,
    test_share: Annotated[float, typer.Option(min=0, max=0.9, help="share of a class's pictures")] = 0.25,
) -> None:
    """Write the crops, and say what was made."""
    if out.exists():
        raise SystemExit(f"{out} is there already: remove it, or name another place")
    try:
        every = read_boxes(lvis)
        crops = large_and_frequent(every, min_side, min_pictures)
        tested = test_pictures(crops, test_share)
        trained = pictures_of([c for c in crops if c.picture not in tested])
        crops = [c for c in crops if c.category in trained]  # a class of test pictures alone teaches nothing
        parts: dict[str, list[Crop]] = {"train": [], "test": []}
        with folder_aside(out) as fresh:
            for crop in crops:
                part = "test" if crop.picture in tested else "train"
                parts[part].append(crop)
                target = fresh / part / crop.category / crop.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(lvis / "images" / crop.picture) as image:
                    image.convert("RGB").crop(crop.box).save(target, quality=QUALITY, subsampling=0)
    except (DataError, OSError) as error:
        raise SystemExit(str(error)) from None
    counts = [sum(c.category == name for c in parts["train"]) for name in trained]
    untested = len(trained) - len({c.category for c in parts["test"]})
    sides = sorted(max(c.box[2] - c.box[0], c.box[3] - c.box[1]) for c in crops)
    pictures = len({c.picture for c in parts["test"]})
    print(f"{out}: {len(parts['train'])} training crops of {len(trained)} classes, {max(counts)} down to {min(counts)} a class")
    print(f"{len(parts['test'])} test crops from {pictures} other pictures; {untested} classes have none")
    print(f"longer side {sides[0]} to {sides[-1]} px, {sides[len(sides) // 2]} in the middle")
    print(f"left out: {len(every) - len(crops)} of {len(every)} boxes, under {min_side} px or of a class in too few pictures")


if __name__ == "__main__":
    typer.run(main)
