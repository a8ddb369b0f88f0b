#!/usr/bin/env bash
# One study of the referee, with one thread; started again, it goes on where it was.
#
#   SMOLLM2=FOLDER E2E=FOLDER benchmarks/referee/run.sh smollm2 [--dry-run | --time_only | any option of `study`]
#   STORIES=FOLDER E2E=FOLDER benchmarks/referee/run.sh e2e
#   STORIES=FOLDER SAMSUM=FOLDER benchmarks/referee/run.sh samsum
#   benchmarks/referee/run.sh e2e commit      # registration, ledger and its head as they are now
#
# SMOLLM2, STORIES: the models as Hugging Face folders. E2E: trainset.csv and devset.csv. SAMSUM: train.json and val.json.
# They are linked from runs/referee, so that the registration names no folder of this machine. Results: benchmarks/referee/NAME.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?smollm2, e2e or samsum}; shift
case $name in
    smollm2) file=smollm2.yaml; model=${SMOLLM2:-}; data=${E2E:-}; train=trainset.csv; test=devset.csv ;;
    e2e) file=stories260k_e2e.yaml; model=${STORIES:-}; data=${E2E:-}; train=trainset.csv; test=devset.csv ;;
    samsum) file=stories260k_samsum.yaml; model=${STORIES:-}; data=${SAMSUM:-}; train=train.json; test=val.json ;;
    *) echo "no study of the referee: $name; there are smollm2, e2e and samsum" >&2; exit 2 ;;
esac
root=$PWD; folder=$root/benchmarks/referee/${OUT:-$name}
if [ "${1:-}" = commit ]; then
    git add "$folder"
    git commit -q -m "referee: $name, $(cat "$folder"/runs*.jsonl 2>/dev/null | wc -l) runs" -- "$folder"
    exit
fi
[ -d "$model" ] && [ -d "$data" ] || { echo "give the folders of model and data: see the head of $0" >&2; exit 2; }
mkdir -p "runs/referee/$name"
ln -sfn "$(realpath "$model")" "runs/referee/$name/model"
ln -sfn "$(realpath "$data")" "runs/referee/$name/data"
cd "runs/referee/$name"
export OMP_NUM_THREADS=1 PYTHONPATH=$root
exec "${PYTHON:-python}" -m rankwise.cli study "$root/benchmarks/referee/$file" --model_name model \
    --data_path "data/$train" --test_path "data/$test" --device cpu -o "$folder" "$@"
