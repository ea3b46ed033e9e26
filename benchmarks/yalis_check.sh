#!/usr/bin/env bash
# Where yalis stands on the GPUs of this machine: correct first, then measured, in one call of at most LIMIT_S
# (300) seconds. One GPU does for the first half, two for all. Files go to $OUT (default: a new folder), short
# tables to the terminal. SECTIONS="tokens one" picks some. Needs `pip install '.[cu13,dev]'`.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-$(mktemp -d)}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
small=examples/configs/llama-3.1-8b
large=examples/configs/llama-3.1-70b
all="tokens one idle prefill ranks two large many"
deadline=$((SECONDS + ${LIMIT_S:-300}))

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
pytest() { section "$1" "$2" python3 -m pytest -q --tb=short --durations=4 tests/gpu/test_engine_on_gpu.py "${@:3}"; }

# On the first GPU tokens are compared while the last one is measured.
last=$((gpus - 1))
CUDA_VISIBLE_DEVICES=0 pytest tokens 170 &
[ "$last" -gt 0 ] || wait
(
    export CUDA_VISIBLE_DEVICES=$last
    bench one 110 latency $small --batch-size 1 --batch-size 8 --batch-size 32 --batch-size 256 \
        --prompt-len 128 --output-len 256 --iterations 2 --max-num-seqs 256
    section idle 60 python3 benchmarks/yalis_idle.py $small 1 32
    bench prefill 50 latency $small --batch-size 8 --prompt-len 2048 --output-len 2 --max-num-seqs 8 \
        --max-num-batched-tokens 16384
)
wait
if [ "$gpus" -gt 1 ]; then
    pytest ranks 90 -k "ranks or exchanged"
    bench two 90 latency $small --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 32 \
        --batch-size 1 --batch-size 8 --batch-size 32 --prompt-len 128 --output-len 256 --iterations 2
    bench large 120 latency $large --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 8 \
        --batch-size 1 --prompt-len 128 --output-len 64 --iterations 2
fi
bench many 60 throughput $small --num-prompts 512 --prompt-len 256 --output-len 128

for name in $all; do
    [ -f "$out/$name.txt" ] || continue
    grep "^== $name" "$out/$name.txt"
    case $name in
        tokens | ranks)
            grep -E "^(FAILED|ERROR)|passed|failed|s (call|setup) " "$out/$name.txt" | cut -c1-220 | tail -n 16
            grep -E "^E  " "$out/$name.txt" | cut -c1-160 | sort | uniq -c | sort -rn | head -n 8
            ;;
        idle) grep -v "^== " "$out/$name.txt" | tail -n 26 | cut -c1-200 ;;
        *) grep -v "^== " "$out/$name.txt" | tail -n 10 | cut -c1-230 ;;
    esac
done
echo "== $SECONDS s in all"
