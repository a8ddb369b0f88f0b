#!/usr/bin/env bash
# What training takes on a GPU: layers of Qwen2.5-7B and of Qwen3-30B-A3B with random weights, at most eight minutes.
#
#     benchmarks/experts_gpu.sh [--tiny] [--out benchmarks/results]      PYTHON=… chooses the interpreter
#
# Estimated against measured peak memory, tokens per second against plain PEFT, one step of the experts, and a saved
# adapter that is read back: see experts_gpu.py. --tiny runs the same on tiny shapes, on a CPU too.
set -euo pipefail
exec timeout 480 "${PYTHON:-python}" "$(dirname "$0")/experts_gpu.py" "$@"
