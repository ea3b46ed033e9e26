#!/usr/bin/env bash
# Where yalis stands on the GPUs of this machine: correct first, then measured, in one call of at most LIMIT_S
# (570) seconds. One GPU does for most of it, shared by two ranks where tokens are compared; two do for all. Short
# lines go to the terminal; all that was said, and the rows of the benches, to $OUT (default: a new folder).
# SECTIONS="tokens one" picks some; GPT_FAST, a clone of gpt-fast, lets it take part. Needs
# `pip install '.[cu13,dev]'`. Exit code 0: everything ran, and was right.
set -u
cd "$(dirname "$0")/.."
. benchmarks/steps.sh
unset OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM=false
[ "$gpus" -gt 0 ] || { echo "torch sees no GPU here" && exit 1; }

small=examples/configs/llama-3.1-8b
large=examples/configs/llama-3.1-70b
of_ranks="ranks or rank_killed or exchanged"
wanted() { case " ${SECTIONS:-kernels tokens one idle prefill ranks peers two large many beside} " in *" $1 "*) true ;; *) false ;; esac; }
# section NAME LIMIT_S PATTERN COMMAND...
section() { if wanted "$1"; then step "$2" "$1" "${@:3}"; fi; }
# bench NAME LIMIT_S KIND OPTION...
bench() {
    section "$1" "$2" ' ms a token| tokens/s|ready in' python3 -m yalis bench "${@:3}" --max-model-len 4096 --verbose --json "$out/$1.jsonl"
}
# Without the strictness of addopts: a plugin that is not installed is no reason to test nothing.
tests() {
    section "$1" "$2" '^(FAILED|ERROR)|passed|failed|s (call|setup) ' python3 -m pytest -o addopts= -p no:cacheprovider \
        -q --tb=short --durations=3 tests/gpu/test_engine_on_gpu.py -k "$3"
}
prefill() {
    bench prefill 45 latency $small --batch-size 8 --prompt-len 2048 --output-len 2 --iterations 2 --max-num-seqs 8 \
        --max-num-batched-tokens 16384
}

# On the first GPU tokens are compared while the last one measures: what fails there is in both.
last=$((gpus - 1))
(
    export CUDA_VISIBLE_DEVICES=0
    tests tokens 150 "not ($of_ranks)"
    [ "$last" = 0 ] || prefill
) &
[ "$last" -gt 0 ] || wait
(
    export CUDA_VISIBLE_DEVICES=$last
    section kernels 80 . python3 benchmarks/yalis_kernels.py --sections check model --budget-s 60
    bench one 80 latency $small --batch-size 1 --batch-size 8 --batch-size 32 --batch-size 256 \
        --prompt-len 128 --output-len 256 --iterations 2 --max-num-seqs 256
    section idle 45 . python3 benchmarks/yalis_idle.py $small 1 32 --top 8
    [ "$last" -gt 0 ] || prefill
)
wait
tests ranks 180 "($of_ranks) and not (torch or symm)"
if [ "$gpus" -gt 1 ]; then
    bench two 70 latency $small --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 32 \
        --batch-size 1 --batch-size 8 --batch-size 32 --prompt-len 128 --output-len 192 --iterations 2
    bench large 70 latency $large --tensor-parallel-size 2 --all-reduce nvrar --all-reduce torch --max-num-seqs 8 \
        --batch-size 1 --prompt-len 128 --output-len 64 --iterations 2
fi
tests peers 90 "two_ranks and not nvrar"
bench many 45 throughput $small --num-prompts 512 --prompt-len 256 --output-len 128
# Most of it compiles the others' models.
section beside 300 'ms a token| / yalis ' python3 benchmarks/yalis_peers.py $small ${GPT_FAST:+--gpt-fast "$GPT_FAST"}
end_of_steps
