#!/usr/bin/env bash
# The referee's study of one model on a GPU, at most eight minutes a call; call it again until it says "finished".
#
#     benchmarks/referee/gpu.sh MODEL --data trainset.csv --test devset.csv [--work FOLDER] [--minutes 24]
#
# MODEL: folder, hub id, or a folder of pieces (pieces.py). PYTHON=… chooses the interpreter. --tiny runs the same in
# small, on a CPU too. Exit code 0: finished and checked, 1: the checker found something, 2: the study or its options are
# refused, as it says, 3: call again. See gpu.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here:$here/..:$here/../..${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 480 "${PYTHON:-python}" "$here/gpu.py" "$@"
