#!/usr/bin/env bash
# Where we stand on the GPUs of this machine: correct first, then measured, in one call of some minutes.
# Needs `pip install '.[cu13,dev]'`, and two or more GPUs for all but the virtual cluster.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
out="${OUT:-.}"
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
ranks() { timeout -k 5 "$1" python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" "${@:2}"; }
checks() { ranks "$1" tests/dist/ranks_script.py "${@:2}" 2>&1 | grep -a -E 'passed|Error|assert'; }
bench() { ranks "$1" -m nvrar.cli bench --device cuda --plans auto --timeout 20 "${@:2}" 2>/dev/null | grep -a -E '│|us'; }

if [ "$gpus" -gt 1 ]; then
    for topology in "1x$gpus" "${gpus}x1"; do
        for transport in direct put; do
            echo "== $topology, $transport"
            export NVRAR_TRANSPORT=$transport
            checks 100 "$topology" bits layouts graphs norm storm
            for alone in late mismatch; do checks 40 "$topology" $alone; done
        done
    done
    unset NVRAR_TRANSPORT
    echo "== beside others"
    checks 60 "1x$gpus" streams groups memory
    checks 40 "1x$gpus" foreign_nvshmem
    sizes=1K,4K,16K,64K,128K,256K
    echo "== beside NCCL and symm_mem"
    bench 120 --interleaved --sizes $sizes,512K,1M,2M,4M --json "$out/direct.jsonl"
    echo "== put forced"
    NVRAR_TRANSPORT=put bench 60 --no-peers --sizes $sizes --json "$out/put.jsonl"
    echo "== large messages"
    bench 60 --no-peers --max-bytes 8M --sizes 8M,16M,32M,64M
    echo "== host time of a call"
    bench 60 --no-peers --eager --sizes 16K
    echo "== sum, residual and norm in one launch"
    ranks 90 benchmarks/gpu_norm.py 2>/dev/null
fi
echo "== sanitizers"
for tool in memcheck racecheck initcheck; do
    timeout -k 5 90 compute-sanitizer --tool $tool --report-api-errors no \
        python3 -m pytest -q tests/gpu -k "wraps or poisoned" 2>&1 | grep -a -E 'SUMMARY|passed|failed'
done
echo "== virtual cluster"
timeout -k 5 "${VIRTUAL_S:-300}" python3 -m pytest -q -x tests/gpu 2>&1 | tail -5
