#!/usr/bin/env bash
# Where we stand on the GPUs of this machine: correct first, then measured, in one call.
# Needs `pip install '.[cu13,dev]'`, and two or more GPUs for all but the virtual cluster.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
ranks() { timeout -k 5 "$1" python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" "${@:2}"; }

timeout -k 5 "${VIRTUAL_S:-200}" python3 -m pytest -q -x tests/gpu
[ "$gpus" -gt 1 ] || exit 0
for topology in "1x$gpus" "${gpus}x1"; do
    for transport in direct put; do
        echo "== $topology, $transport"
        NVRAR_TRANSPORT=$transport ranks 100 tests/dist/ranks_script.py "$topology" bits layouts graphs storm
        for fault in late mismatch; do
            NVRAR_TRANSPORT=$transport ranks 40 tests/dist/ranks_script.py "$topology" $fault
        done
    done
done
echo "== put forced, bf16, us"
NVRAR_TRANSPORT=put ranks 60 benchmarks/gpu_all_reduce.py --peers 0 --topology "1x$gpus" \
    --plans "exchange:$gpus" --sizes 1K,4K,16K,64K,128K,256K --json "${OUT:-.}/put.json"
echo "== beside NCCL and symm_mem, bf16, us"
ranks 120 benchmarks/gpu_all_reduce.py --topology "1x$gpus" --plans "exchange:$gpus" --json "${OUT:-.}/direct.json"
