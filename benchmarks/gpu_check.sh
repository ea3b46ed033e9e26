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
bench() { ranks "$1" -m nvrar.cli bench --device cuda --timeout 30 --plans auto "${@:2}"; }
sizes=1K,4K,16K,64K,128K,256K
echo "== put forced"
NVRAR_TRANSPORT=put bench 60 --no-peers --sizes $sizes --json "${OUT:-.}/put.jsonl"
echo "== host time of a call"
bench 60 --eager --sizes 16K
echo "== beside NCCL and symm_mem"
bench 120 --interleaved --sizes $sizes,512K,1M,2M,4M --json "${OUT:-.}/direct.jsonl"
