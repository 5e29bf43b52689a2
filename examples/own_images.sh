#!/usr/bin/env bash
# The whole chain on folders of one's own, a ResNet-18 at 64 pixels, in minutes on a CPU:
#
#     examples/own_images.sh DATA_ROOT OUT [RESULT.json]
#
# DATA_ROOT holds cifar100.zip (a folder cifar100/train/CLASS/*, cifar100/test/CLASS/*) and lvis-mini/ (COCO pictures with
# LVIS annotations). (a) CIFAR-100, unpacked as a folder and made long-tailed; (b) crops of lvis-mini by their boxes, 24 to
# 640 pixels long, long-tailed as they are. OUT gets the folders, the runs and a report each; RESULT.json (default:
# OUT/own_images.json) the figures. Steps that OUT holds already are not repeated. PYTHON=... chooses the interpreter.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-python3}"
source "$here/steps.sh"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
data_root="$(cd "$1" && pwd)"
mkdir -p "$2"
result="$(realpath -m "${3:-$2/own_images.json}")"
cd "$2"
export BALMS_WORKSPACE=work

# chain NAME FOLDER EPOCHS MAKE-LT-OPTIONS...
chain() {
    local at="$1" folder="$2" epochs="$3"
    shift 3
    step "$at/audit" balms audit "$folder"
    step "$at/make-lt" balms make-lt "$folder" "$@" --out "$at/data"
    step "$at/pretrain" balms pretrain "$at/data" --preset quick --backbone resnet18 --image-size 64 --epochs "$epochs" \
        --out "$at/softmax"
    for seed in 0 1 2; do
        step "$at/retrain-$seed" balms retrain "$at/softmax" --loss balanced --seed "$seed" --out "$at/balanced-$seed"
        step "$at/retrain-meta-$seed" balms retrain "$at/softmax" --loss balanced --meta-sampler --seed "$seed" \
            --out "$at/balms-$seed"
    done
    # One page for what the methods do, one for the same over seeds.
    step "$at/evaluate" balms evaluate "$at"/{softmax,balanced-0,balms-0} --report "$at/report" --overwrite
    step "$at/evaluate-seeds" balms evaluate "$at"/{softmax,balanced-{0,1,2},balms-{0,1,2}} --report "$at/report-seeds" --overwrite
}

[ -d "my photos" ] || {
    rm -rf unpacked
    "$PYTHON" -m zipfile -e "$data_root/cifar100.zip" unpacked
    mv unpacked/cifar100 "my photos"
    rmdir unpacked
}
step crops-made "$PYTHON" "$here/lvis_crops.py" "$data_root/lvis-mini" crops
chain cifar100 "my photos" 5 --imbalance 100
chain lvis-crops crops 20 --as-is

"$PYTHON" - "$result" << 'END'
import json
import os
import sys
from pathlib import Path

from balms_cli.data.aside import replace_file

found = {}
for place in ("cifar100", "lvis-crops"):
    report = json.loads(Path(place, "report-seeds", "report.json").read_text())
    data = report["data"]
    found[place] = {
        "data": {key: data[key] for key in ("manifest_sha256", "train_images", "imbalance_factor", "gini", "groups")}
        | {"classes": len(data["classes"]), "test_images": report["images"], "untested": data["untested"]},
        "runs": {run["name"]: {"seed": run["seed"], "classifier": run["classifier"], "loss": run["loss"],
                               "sampler": run["sampler"], **run["metrics"]} for run in report["runs"]},
        "seeds": report["seeds"], "points_more_than_softmax": report["differences"],
        "seconds": {file.stem: float(file.read_text()) for file in sorted(Path(place).glob("*.seconds"))},
    }
document = {
    "command": "examples/own_images.sh DATA_ROOT OUT", "date": report["created"][:10],
    "made": Path("crops-made.out").read_text().splitlines(), "backbone": "resnet18 at 64 px, from scratch",
    "epochs": {"cifar100": 5, "lvis-crops": 20}, "backbone_seed": 0, "classifier_seeds": [0, 1, 2],
    "intervals": report["intervals"], "device": report["device"], "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    "versions": report["versions"], **found,
}  # fmt: skip
replace_file(Path(sys.argv[1]), json.dumps(document, indent=1) + "\n")
END
echo "$result"
