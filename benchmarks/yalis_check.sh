#!/usr/bin/env bash
# Where yalis stands on the GPUs of this machine: correct first, then measured, in one call of at most LIMIT_S
# (570) seconds. One GPU does for most of it, shared by two ranks where tokens are compared; two do for all. Files
# go to $OUT (default: a new folder), short tables to the terminal. SECTIONS="tokens one" picks some; what the time
# does not suffice for is left out.
# Needs `pip install '.[cu13,dev]'`.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-$(mktemp -d)}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
small=examples/configs/llama-3.1-8b
large=examples/configs/llama-3.1-70b
all="kernels tokens one idle prefill ranks two large many peers beside"
deadline=$((SECONDS + ${LIMIT_S:-570}))

# section NAME LIMIT_S COMMAND...: into a file, with how it ended; one failure does not end the others.
section() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS))
    shift 2
    case " ${SECTIONS:-$all} " in *" $name "*) ;; *) return ;; esac
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "== $name: no time left" >"$out/$name.txt"
        return
    fi
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
    echo "== $name: exit status $?, $((SECONDS - start)) s" >>"$out/$name.txt"
}
bench() {
    local name=$1 limit=$2 kind=$3
    shift 3
    section "$name" "$limit" python3 -m yalis bench "$kind" "$@" --max-model-len 4096 --verbose --json "$out/$name.jsonl"
}
# Without the strictness of addopts: a plugin that is not installed is no reason to test nothing.
pytest() {
    section "$1" "$2" python3 -m pytest -o addopts= -p no:cacheprovider -q --tb=short --durations=3 \
        tests/gpu/test_engine_on_gpu.py "${@:3}"
}
prefill() {
    bench prefill 45 latency $small --batch-size 8 --prompt-len 2048 --output-len 2 --iterations 2 --max-num-seqs 8 \
        --max-num-batched-tokens 16384
}

# On the first GPU tokens are compared while the last one measures: what fails there is in both.
last=$((gpus - 1))
of_ranks="ranks or rank_killed or exchanged"
(CUDA_VISIBLE_DEVICES=0 pytest tokens 150 -k "not ($of_ranks)" && [ "$last" -gt 0 ] && CUDA_VISIBLE_DEVICES=0 prefill) &
[ "$last" -gt 0 ] || wait
(
    export CUDA_VISIBLE_DEVICES=$last
    section kernels 80 python3 benchmarks/yalis_kernels.py --sections check model --budget-s 60
    bench one 80 latency $small --batch-size 1 --batch-size 8 --batch-size 32 --batch-size 256 \
        --prompt-len 128 --output-len 256 --iterations 2 --max-num-seqs 256
    section idle 45 python3 benchmarks/yalis_idle.py $small 1 32 --top 8
    [ "$last" -gt 0 ] || prefill
)
wait
pytest ranks 180 -k "($of_ranks) and not (torch or symm)"
if [ "$gpus" -gt 1 ]; then
    bench two 70 latency $small --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 32 \
        --batch-size 1 --batch-size 8 --batch-size 32 --prompt-len 128 --output-len 192 --iterations 2
    bench large 70 latency $large --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 8 \
        --batch-size 1 --prompt-len 128 --output-len 64 --iterations 2
fi
bench many 45 throughput $small --num-prompts 512 --prompt-len 256 --output-len 128
pytest peers 90 -k "two_ranks and not nvrar"
section beside 150 python3 benchmarks/yalis_peers.py $small # most of it compiles transformers' model

for name in $all; do
    [ -f "$out/$name.txt" ] || continue
    grep "^== $name" "$out/$name.txt"
    case $name in
        tokens | ranks | peers)
            grep -E "^(FAILED|ERROR)|passed|failed|s (call|setup) " "$out/$name.txt" | cut -c1-200 | tail -n 10
            grep -E "^E  " "$out/$name.txt" | cut -c1-160 | sort | uniq -c | sort -rn | head -n 8
            ;;
        idle) grep -v "^== " "$out/$name.txt" | tail -n 20 | cut -c1-160 ;;
        kernels) grep -v "^== kernels" "$out/$name.txt" | tail -n 24 | cut -c1-300 ;;
        beside) grep "ms a token" "$out/$name.txt" ;;
        *) grep -v "^== " "$out/$name.txt" | tail -n 7 | cut -c1-230 ;;
    esac
done
echo "== $SECONDS s in all"
