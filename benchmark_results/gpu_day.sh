#!/usr/bin/env bash
# What waits for an NVIDIA GPU, in the order in which it is worth having: tests, speed, memory, results.
#
#     bash benchmark_results/gpu_day.sh            # all of it; a step that is done is not run again
#     bash benchmark_results/gpu_day.sh 1 2 3      # under half an hour
#
# The output of a step is benchmark_results/gpu_day/STEP.txt. A step that fails is named, and the next one goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
out=benchmark_results/gpu_day
mkdir -p "$out"
python -c "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(), torch.__version__)" \
    > "$out/device.txt" || { echo "gpu_day.sh: there is no CUDA here"; exit 1; }
asked=" ${*:-1 2 3 4} "

step() {  # name, command ...
    local name=$1
    shift
    [[ "$asked" == *" ${name%%-*} "* ]] || return 0
    [[ -e "$out/$name.done" ]] && { echo "$name: done before"; return 0; }
    echo "$name: $*"
    if "$@" > "$out/$name.txt" 2>&1; then touch "$out/$name.done"; else echo "$name: failed, see $out/$name.txt"; fi
}

largest() {  # the seeds side by side that still fit, doubled until they do not
    for method in td3_bc cql dt; do
        for seeds in 16 32 64 128 256 512 1024 2048 4096; do
            python benchmark_results/speed.py --device cuda --methods "$method" --seeds "$seeds" --parts updates \
                --rounds 1 --seconds 0.2 || { echo "$method: $seeds seeds do not fit"; break; }
        done
    done
}

step 1-tests pytest -m gpu
step 2-speed python benchmark_results/speed.py --device cuda --methods td3_bc iql cql dt --seeds 1 4 16 64 --rounds 3 \
    --seconds 0.5 --out benchmark_results/speed
step 2-protocol python algorithms/td3_bc.py --device cuda --num-seeds 5 --num-updates 1000000 --eval-every 5000 \
    --eval-workers "$(($(nproc) - 1))" --out-dir runs/gpu_day
step 3-largest largest
step 4-results python benchmark_results/run.py --grid benchmark_results/gpu.toml --devices 0
