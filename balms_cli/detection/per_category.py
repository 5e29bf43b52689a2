"""AP of each category beside its training images: a table, and files."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..data.aside import inert, printable, replace_file
from ..errors import ConfigError, DataError
from .ground_truth import GroundTruth
from .header import DetectHeader

ENDINGS = (".csv", ".json", ".png")


def category_rows(truth: GroundTruth, scores: dict[str, dict[int, float | None]], header: DetectHeader | None
                  ) -> list[dict[str, Any]]:  # fmt: skip
    """A dictionary a category, in the order of ids: ``train_images`` is of the detector's own training (0: it never saw the
    category), of a results file what the annotations say (LVIS's ``image_count``), or None; ``images`` and ``objects`` are
    those scored on; ``bbox`` and ``segm`` its AP."""
    own = None if header is None else {c.name: c.image_count for c in header.categories}
    trained = truth.train_counts if own is None else {id: own.get(name, 0) for id, name in truth.names.items()}
    images, objects = truth.image_counts(), truth.instance_counts()
    return [{"id": id, "name": name, "frequency": truth.groups[id],
             "train_images": trained.get(id), "images": images[id], "objects": objects[id],
             **{kind: of[id] for kind, of in scores.items()}} for id, name in truth.names.items()]  # fmt: skip


def check_target(path: Path) -> None:
    """Raises ConfigError (exit 2) for a file whose ending is none of those that are written."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--per-category {path}: its ending says what is written, one of {', '.join(ENDINGS)}")
    if path.is_dir():
        raise ConfigError(f"--per-category {path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--per-category {path}: the folder {path.parent} does not exist")


def table_text(scored: list[tuple[str, list[dict[str, Any]]]], ending: str) -> str:
    """The categories of several runs as CSV or JSON, a row a run and category. APs are fractions; empty: not tested."""
    rows = [{"run": name, **row} for name, categories in scored for row in categories]
    if ending == ".json":
        return json.dumps(rows, allow_nan=False, indent=1) + "\n"
    columns = ["run", "id", "name", "frequency", "train_images", "images", "objects", "bbox", "segm"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: inert(printable(str(v))) if key in ("run", "name") else v for key, v in row.items()} for row in rows)
    return text.getvalue()


def write_table(scored: list[tuple[str, list[dict[str, Any]]]], path: Path) -> None:
    replace_file(path, table_text(scored, path.suffix.lower()))


def ends(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Tested categories, the ``count`` with fewest and the ``count`` with most training images, rarest first."""
    tested = sorted((r for r in rows if r["objects"]), key=lambda r: (r["train_images"] or 0, r["id"]))
    return tested if len(tested) <= 2 * count else [*tested[:count], *tested[len(tested) - count :]]


def plotted(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What a plot of AP of ``kind`` against training images can show. Raises DataError where there is nothing."""
    shown = [row for row in rows if row[kind] is not None and row["train_images"] is not None]
    if not shown:
        raise DataError("neither a run nor the annotations (image_count) say how many training images a category had: no plot")
    return shown
