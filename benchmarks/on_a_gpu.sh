#!/usr/bin/env bash
# Takes the figures of "On a GPU" in benchmarks/README.md again, in under 8 minutes on an H100: a JSON file a benchmark.
#
#     bash benchmarks/on_a_gpu.sh [FOLDER]            # by default outputs/gpu
#     bash benchmarks/on_a_gpu.sh --quick [FOLDER]    # small sizes, to try the script itself where there is no GPU
#
# Each benchmark has a limit of time; what fails or takes longer is named at the end, and the others are kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

quick=
if [ "${1:-}" = --quick ]; then quick=1; shift; fi
folder=${1:-../outputs/gpu}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python=${PYTHON:-python}
threads=$(( $(nproc) < 8 ? $(nproc) : 8 ))
failed=()

# NAME SECONDS SCRIPT ARGUMENTS...
measure() {
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$python" "$@" --threads "$threads" --output "$folder/$name.json" || failed+=("$name ($?)")
}

if [ -n "$quick" ]; then
    measure sae_train_step 120 sae_train_step.py --setting 64 256 8 128 --rounds 2 --no_memory
    measure sparse_backward 60 sparse_backward.py --hidden_size 64 --num_latents 256 --batch_size 64 --rounds 2
    measure steering_overhead 120 steering_overhead.py --size ViT-B/32 --batch_size 2 --short_rounds 3 --rounds 2
    measure pipeline 180 pipeline_throughput.py --num_images 8 --num_single 2 --stock_batch_sizes 4 --tower_batch_sizes 4 --rounds 1
    measure extraction 120 extraction.py --num_images 16 --num_photographs 8 --batch_size 8 --rounds 1
    measure feeding 120 feeding.py --num_images 64 --processors 1 2 --rounds 1
    measure replay_grid 120 replay_grid.py --num_rows 200 --num_classes 10 --num_latents 256 --top_k 8 --side 3 --replayed_cells 1 --rounds 1
else
    measure sae_train_step 110 sae_train_step.py
    measure sae_train_step_tf32 60 sae_train_step.py --precision high --no_memory
    measure sparse_backward 30 sparse_backward.py
    measure sparse_backward_bf16 30 sparse_backward.py --dtype bfloat16
    measure steering_overhead 60 steering_overhead.py --size ViT-B/32 ViT-B/16 ViT-L/14 --short_rounds 100
    measure pipeline 70 pipeline_throughput.py --stock_batch_sizes 32 --tower_batch_sizes 16 32 --rounds 3
    measure extraction 60 extraction.py --rounds 3
    measure feeding 40 feeding.py --rounds 3
    measure replay_grid 20 replay_grid.py
fi

echo "The results are in $folder."
if [ ${#failed[@]} -gt 0 ]; then
    echo "Without a result (124: out of time): ${failed[*]}"
    exit 1
fi
