#!/usr/bin/env bash
# One backbone, every way to put a classifier on it: CIFAR-LT at imbalance factor 200.
#
#   examples/cifar_lt.sh cifar10 [PRESET] [OUT_FOLDER]       about 10 minutes on 2 CPU cores with the preset quick
#
# Known data is looked for under $BALMS_DATA first. Writes OUT_FOLDER/NAME_if200_PRESET.json (every figure, class by class)
# and the learned sample rates with softmax and with Balanced Softmax.
set -euo pipefail
name=$1 preset=${2:-quick} out=${3:-examples/results}
mkdir -p "$out"
label=${name}_if200_$preset

data=$(balms make-lt "$name" --imbalance 200)
first=$(balms pretrain "$data" --preset "$preset")
runs=("$first")
for options in "--loss softmax" "--loss softmax --sampler class" "--loss balanced" "--loss balanced --sampler class" \
               "--loss balanced --meta-sampler" "--loss softmax --meta-sampler" "--loss balanced --meta-reweigher"; do
  # shellcheck disable=SC2086
  runs+=("$(balms retrain "$first" $options --preset "$preset")")
done
balms evaluate "${runs[@]}" --json > "$out/$label.json"
cp "${runs[6]}/rates.json" "$out/${label}_rates_softmax.json"
cp "${runs[5]}/rates.json" "$out/${label}_rates_balanced.json"
echo "$out/$label.json"
