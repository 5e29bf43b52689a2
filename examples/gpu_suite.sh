#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of at most 9 minutes:
#
#     examples/gpu_suite.sh DATA_ROOT [--out FILE] [--device cuda] [--limit 540] [--rehearse]
#
# DATA_ROOT holds cifar10.zip and cifar100.zip (or the official archives). Nothing needs to be installed but the packages:
# the checkout itself is what runs. FILE (default: examples/results/gpu_suite.json) is written anew after every part, so a
# run that is cut off leaves what it had. PYTHON=... chooses the interpreter.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$here/gpu_suite.py" "$@"
