#!/usr/bin/env bash
# Where nvrar stands on the GPUs of this machine: correct first, then measured, in one call of at most LIMIT_S
# (570) seconds. Two GPUs do for all; one, for the virtual cluster and, shared by two ranks (RANKS=8 by eight), for
# what ranks must do right together. Short lines go to the terminal; all that was said, and the rows of the benches,
# to $OUT (default: a new folder). PARTS="checks bench" picks some.
# Needs `pip install '.[cu13]' pytest pytest-timeout`. Exit code 0: everything ran, and was right.
set -u
cd "$(dirname "$0")/.."
. benchmarks/steps.sh

[ "$ranks" -gt 1 ] || { echo "RANKS is $ranks; it must be 2 or more" && exit 2; }
torchrun() { echo $shared python3 -m torch.distributed.run --standalone --nproc-per-node "$ranks"; }
checks() { step "$1" "${*:3} on $2 ${NVRAR_TRANSPORT:-}" 'passed' $(torchrun) tests/dist/ranks_script.py "${@:2}"; }
bench() { step "$1" "$2" '[┃│]|us of|\* ' $(torchrun) -m nvrar bench --device cuda --plans auto --timeout 20 "${@:3}"; }
tests() { step "$1" "$2" 'passed|failed|^FAILED|^ERROR' python3 -m pytest -q --tb=short -p no:cacheprovider "${@:3}"; }
wanted() { case " ${PARTS:-checks bench alone} " in *" $1 "*) true ;; *) false ;; esac; }

if [ "$gpus" -gt 0 ] && wanted checks; then
    case $ranks in
        2 | *[13579]) several="" ;;
        4) several=2x2 ;;
        *) several="2x$((ranks / 2)) $((ranks / 2))x2" ;;
    esac
    several="$several ${ranks}x1"
    for transport in direct put; do
        export NVRAR_TRANSPORT=$transport
        checks 100 "1x$ranks" bits layouts graphs norm
        for topology in $several; do checks 80 "$topology" bits norm; done
        for topology in "1x$ranks" $several; do checks 50 "$topology" late mismatch; done
    done
    unset NVRAR_TRANSPORT
    (
        # Under MPS several kernels of a rank would keep its peers' from a place on the GPU that they share.
        [ -z "$shared" ] || export CUDA_MPS_PIPE_DIRECTORY=$said
        checks 60 "1x$ranks" streams groups
        NVRAR_TRANSPORT=put checks 60 "1x$ranks" streams
        checks 40 "1x$ranks" foreign_nvshmem
    )
    for example in all_reduce graph; do
        step 60 "examples/$example.py" 'nvrar.Communicator' $(torchrun) examples/$example.py
    done
    # Last, since ranks that take turns on a GPU need minutes for so many calls.
    [ -z "$shared" ] || echo "two ranks that share a GPU need a tenth of the time with nvidia-cuda-mps-control -d"
    checks 120 "1x$ranks" storm memory successors
    NVRAR_TRANSPORT=put checks 90 "1x$ranks" storm successors
fi
if [ "$gpus" -ge "$ranks" ] && wanted bench; then
    sizes=1K,4K,16K,64K,128K,256K
    bench 120 "beside NCCL and symm_mem" --interleaved --sizes $sizes,512K,1M,2M,4M --json "$out/direct.jsonl"
    NVRAR_TRANSPORT=put bench 60 "put forced" --no-peers --sizes $sizes --json "$out/put.jsonl"
    bench 60 "large messages" --no-peers --max-bytes 8M --sizes 8M,16M,32M,64M
    bench 60 "host time of a call" --no-peers --eager --sizes 16K
    step 90 "sum, residual and norm in one launch" 'ours us|^ *[0-9]+ +[0-9]+ +[0-9.]+ ' $(torchrun) benchmarks/gpu_norm.py
fi
if [ "$gpus" -gt 0 ] && wanted alone; then
    # Each on a GPU of its own where there are two.
    (
        export CUDA_VISIBLE_DEVICES=$((gpus - 1))
        for tool in memcheck racecheck initcheck; do
            # initcheck counts what torch does too, so that its number is for a reader. racecheck knows barriers
            # only, and takes the marks for races by which the warps of a row wait for each other.
            code=$([ $tool = initcheck ] || echo --error-exitcode 9)
            which=$([ $tool = racecheck ] && echo wraps || echo "wraps or poisoned")
            step 120 "$tool" 'SUMMARY|passed|failed' compute-sanitizer --tool $tool $code \
                --report-api-errors no python3 -m pytest -q -p no:cacheprovider tests/gpu/test_virtual.py \
                -k "$which" &
        done
        wait
    ) &
    [ "$gpus" -gt 1 ] || wait
    CUDA_VISIBLE_DEVICES=0 tests 300 "virtual cluster" tests/gpu/test_virtual.py
    wait
    tests 120 "yalis's kernels" tests/gpu/test_kernels_on_gpu.py tests/gpu/test_yalis_model.py
fi
[ "$gpus" -gt 0 ] || echo "torch sees no GPU here" | tee -a "$said/failed"
end_of_steps
