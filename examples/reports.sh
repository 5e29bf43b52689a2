#!/usr/bin/env bash
# Three pages to look at: digits, CIFAR-10-LT and CIFAR-100-LT at imbalance factor 200, preset quick, each with softmax,
# Balanced Softmax and BALMS (three classifier seeds of the last two). Half an hour on two cores.
#
#     bash examples/reports.sh DATA_ROOT OUT
#
# DATA_ROOT holds cifar10.zip and cifar100.zip. Runs that are in OUT already are not made again: their pages are.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
data_root="$(cd "$1" && pwd)"
mkdir -p "$2" && cd "$2"
export BALMS_WORKSPACE=work

[ -f digits/index.html ] || { balms demo --workspace digits-runs -q > /dev/null; balms evaluate digits-runs/runs/{softmax,balanced,balms} --report digits -q > /dev/null; }

for classes in 10 100; do
    at="c$classes"
    run() { local out="$at/$1"; shift; [ -f "$out/model.safetensors" ] || balms "$@" --out "$out" -q > /dev/null; }
    [ -d "$at/data" ] ||
        balms make-lt "cifar$classes" --imbalance 200 --data-root "$data_root" --offline --out "$at/data" -q > /dev/null
    run softmax pretrain "$at/data" --preset quick
    for seed in 0 1 2; do
        run "balanced-$seed" retrain "$at/softmax" --preset quick --loss balanced --seed "$seed"
        run "balms-$seed" retrain "$at/softmax" --preset quick --loss balanced --meta-sampler --seed "$seed"
    done
    # One page for what the methods do, one for the same over seeds.
    balms evaluate "$at"/{softmax,balanced-0,balms-0} --report "$at/report" --overwrite -q > /dev/null
    balms evaluate "$at"/{softmax,balanced-{0,1,2},balms-{0,1,2}} --report "$at/report-seeds" --overwrite -q > /dev/null
    # What the two pages say in figures, for examples/results/.
    python3 - "$at" << 'END' > "$at/figures.json"
import json, sys
pages = [json.load(open(f"{sys.argv[1]}/{name}/report.json")) for name in ("report", "report-seeds")]
first, seeds = pages
print(json.dumps({
    "command": "bash examples/reports.sh DATA_ROOT OUT", "date": first["created"][:10], "device": first["device"],
    "versions": first["versions"], "data": {k: first["data"][k] for k in ("name", "manifest_sha256", "imbalance_factor", "gini")},
    "images": first["images"], "differences": first["differences"], "seeds": seeds["seeds"],
    "runs": [{"name": r["name"], "metrics": r["metrics"], "ece": r["calibration"]["all"]["ece"],
              "never_predicted": r["never_predicted"],
              "p_of_y_by_group": r["marginal"]} for r in first["runs"]],
}, indent=1))
END
done
ls "$PWD"/digits/index.html "$PWD"/c10*/report*/index.html
