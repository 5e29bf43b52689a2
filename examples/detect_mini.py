"""The figures of detect_mini.sh in one file: mean and standard error over the classifier's seeds, and paired differences."""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from balms_cli.data.aside import replace_file

SEEDS = (0, 1, 2)
METHODS = {
    "softmax": ("softmax", "softmax"), "balanced softmax": ("softmax", "balanced-softmax"),
    "sigmoid": ("sigmoid", "sigmoid"), "balanced sigmoid": ("sigmoid", "balanced-sigmoid"),
    "balanced sigmoid + reweigher (BALMS)": ("sigmoid", "balms"),
}  # fmt: skip
PLAIN = {"softmax": "softmax", "sigmoid": "sigmoid"}  # what a method of each family is compared with


def figures(file: Path) -> dict[str, float | None]:
    """What the table shows of one evaluation, in percent."""
    found = json.loads(file.read_text())
    values = {f"{kind} {metric}": found[kind][metric] for kind in ("bbox", "segm") for metric in ("AP", "AP_r", "AP_c", "AP_f")}
    values |= {f"accuracy at true boxes, {group}": found["gt_box_accuracy"][group] for group in ("all", "r", "c", "f")}
    return {name: None if value is None else round(100 * value, 3) for name, value in values.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard error."""
    return {"mean": round(statistics.mean(values), 2), "se": round(statistics.stdev(values) / len(values) ** 0.5, 2)}


def over_seeds(runs: list[dict[str, float | None]]) -> dict[str, dict[str, float] | None]:
    return {name: None if runs[0][name] is None else spread([run[name] for run in runs]) for name in runs[0]}


def collect(place: Path) -> dict[str, Any]:
    runs = {method: [figures(place / family / f"evaluate-{name}-{seed}.out") for seed in SEEDS]
            for method, (family, name) in METHODS.items()}  # fmt: skip
    differences = {}
    for method, (family, _) in METHODS.items():
        if method != (plain := PLAIN[family]):
            pairs = [{name: a[name] - b[name] for name in a if a[name] is not None}
                     for a, b in zip(runs[method], runs[plain], strict=True)]  # fmt: skip
            differences[f"{method} minus {plain}"] = over_seeds(pairs)
    one = json.loads((place / "softmax" / "evaluate-base.out").read_text())
    data = json.loads((place / "stats.out").read_text())
    reports = {family: json.loads((place / family / "base" / "report.json").read_text()) for family in PLAIN}
    return {
        "command": "examples/detect_mini.sh LVIS_MINI OUT", "date": one["date"], "device": one["device"],
        "threads": os.environ.get("OMP_NUM_THREADS", "default"), "versions": one["versions"],
        "data": {k: data[k] for k in ("annotations_sha256", "images", "instances", "categories")}
        | {"categories_by_group": {group: found["categories"] for group, found in data["groups"].items()},
           "scored_on": "lvis_val.json", "scored_images": one["images"]},
        "note": "seconds and peak memory were taken beside other work",
        "seeds": "of the classifier's tuning (order of the images); the detector and the cached views are the same",
        "base": {family: {k: report[k] for k in ("steps", "seconds", "final_loss", "peak_memory_gb")}
                 | figures(place / family / "evaluate-base.out") for family, report in reports.items()},
        "tuned": {method: over_seeds(found) for method, found in runs.items()},
        "differences": differences,
        "seconds": {str(file.relative_to(place)).removesuffix(".seconds"): float(file.read_text())
                    for file in sorted(place.rglob("*.seconds"))},
    }  # fmt: skip


if __name__ == "__main__":
    replace_file(Path(sys.argv[2]), json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
