#!/usr/bin/env bash
# Where yalis stands on the GPUs of this machine: correct first, then measured, in one call. One GPU does
# for the first half, two for all. Files go to $OUT (default: a new folder), short tables to the terminal.
# Needs `pip install '.[cu13,dev]'`. `SECTIONS="tokens one"` picks some.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-$(mktemp -d)}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
small=examples/configs/llama-3.1-8b
large=examples/configs/llama-3.1-70b
all="tokens one idle prefill many ranks two large"
begin=$SECONDS

# section NAME LIMIT_S COMMAND...: into a file, with how it ended; one failure does not end the others.
section() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    case " ${SECTIONS:-$all} " in *" $name "*) ;; *) return ;; esac
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
    echo "== $name: exit status $?, $((SECONDS - start)) s" >>"$out/$name.txt"
}
latency() { python3 -m yalis bench latency "$@" --max-model-len 4096; }
export -f latency
bench() { local name=$1 limit=$2; shift 2; section "$name" "$limit" bash -c 'latency "$@"' - "$@" --json "$out/$name.jsonl"; }

# On the first GPU tokens are compared while the last one is measured.
last=$((gpus - 1))
CUDA_VISIBLE_DEVICES=0 section tokens 170 python3 -m pytest -q --tb=short --durations=4 tests/gpu/test_yalis_engine.py &
[ "$last" -gt 0 ] || wait
(
    export CUDA_VISIBLE_DEVICES=$last
    bench one 110 $small --batch-size 1 --batch-size 8 --batch-size 32 --batch-size 256 \
        --prompt-len 128 --output-len 256 --iterations 2 --max-num-seqs 256 --verbose
    section idle 70 python3 benchmarks/yalis_idle.py $small 1 32
    bench prefill 60 $small --batch-size 8 --prompt-len 2048 --output-len 2 --max-num-batched-tokens 16384 \
        --max-num-seqs 8
    section many 60 python3 -m yalis bench throughput $small --num-prompts 512 --prompt-len 256 --output-len 128 \
        --max-model-len 4096 --json "$out/many.jsonl"
)
wait
if [ "$gpus" -gt 1 ]; then
    section ranks 100 python3 -m pytest -q --tb=short -k "ranks or exchanged" tests/gpu/test_yalis_engine.py
    bench two 110 $small --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 32 \
        --batch-size 1 --batch-size 8 --batch-size 32 --prompt-len 128 --output-len 256 --iterations 2
    bench large 150 $large --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 8 \
        --batch-size 1 --prompt-len 128 --output-len 64 --iterations 2
fi

for name in $all; do
    [ -f "$out/$name.txt" ] || continue
    grep "^== $name" "$out/$name.txt"
    case $name in
        tokens | ranks)
            grep -E "^(FAILED|ERROR)|passed|failed|s (call|setup) " "$out/$name.txt" | cut -c1-220 | tail -n 16
            grep -E "^E  " "$out/$name.txt" | cut -c1-160 | sort | uniq -c | sort -rn | head -n 8
            ;;
        *) grep -v -e "^== " -e "^  warn" "$out/$name.txt" | tail -n "$([ "$name" = idle ] && echo 26 || echo 10)" | cut -c1-230 ;;
    esac
done
echo "== $((SECONDS - begin)) s in all"
