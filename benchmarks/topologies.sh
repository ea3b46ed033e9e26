#!/usr/bin/env bash
# What the GPUs of one host can show of many ranks: every topology that they can play, each plan checked, then timed
# beside NCCL and torch's symmetric memory; a table of what is fastest (`nvrar tune`); and the engine at their
# number. In one call of at most LIMIT_S (570) seconds; rows and all output go to $OUT (default: a new folder).
# PARTS="direct put tune engine" picks some: with eight GPUs the first three, and the last in a call of its own.
# RANKS=8 on fewer GPUs checks the plans only; DEVICE=cpu RANKS=4 SIZES=1K,4K tries this script without a GPU.
# Needs `pip install '.[cu13]'`. Exit code 0: everything ran, and was right.
set -u
cd "$(dirname "$0")/.."
. benchmarks/steps.sh

device=${DEVICE:-cuda}
[ "$device" != cuda ] || [ "$gpus" -gt 0 ] || { echo "torch sees no GPU here; DEVICE=cpu tries this script" && exit 2; }
# The communicators of six plans at once; by put each needs more than stores do.
export NVRAR_HEAP_BYTES=${NVRAR_HEAP_BYTES:-$((4 << 30))}
[ "$device" = cuda ] || shared= # CPUs are no GPU that is shared
sizes=${SIZES:-1K,2K,4K,8K,16K,32K,64K,128K,256K,512K,1M,2M,4M,8M}
plans=nvrar,one-shot,two-shot,direct,halving-doubling,auto
small=examples/configs/llama-3.1-70b
large=examples/configs/llama-3.1-405b
case $ranks in
    2) whole="1x2 2x1" some="" ;;
    4) whole="1x4 2x2 4x1" some="1x3" ;;
    8) whole="1x8 2x4 4x2 8x1" some="3x2 2x3 1x7" ;;
    *) echo "RANKS is $ranks; 2, 4 or 8 are known here" && exit 2 ;;
esac
wanted() { case " ${PARTS:-direct put tune engine} " in *" $1 "*) true ;; *) false ;; esac; }
started() { echo $shared python3 -m torch.distributed.run --standalone --nproc-per-node "$1"; }
# Of ranks that share a GPU every result is checked all the same; their times would say nothing.
quick=$([ -z "$shared" ] || echo "--eager --no-peers --iterations 2 --rounds 1 --warmup 1")
shown=$([ -z "$shared" ] && echo '[┃│]|us of|\* ' || echo '^sum of| fell back ')
# bench LIMIT_S NxG OPTION...
bench() {
    local nodes=${2%x*} each=${2#*x} name="$2 ${NVRAR_TRANSPORT:-direct}" limit=$1
    [ -z "$shared" ] || limit=$((2 * limit)) # eight on one GPU take a minute
    step "$limit" "$name" "$shown" $(started $((nodes * each))) -m nvrar bench --device "$device" --nodes "$nodes" \
        --ranks-per-node "$each" --sizes "$sizes" --plans $plans --max-bytes 8M --timeout 20 --predict --json "$out/${name// /-}.jsonl" $quick "${@:3}"
}
# engine LIMIT_S NAME MODEL RANKS OPTION...
engine() {
    step "$1" "$2" ' ms a token|ready in' python3 -m yalis bench latency "$3" --device "$device" --tensor-parallel-size "$4" \
        --all-reduce nvrar --all-reduce torch --batch-size 1 --batch-size 8 --batch-size 32 --prompt-len 128 --output-len 48 \
        --iterations 2 --max-num-seqs 32 --max-model-len 1024 --json "$out/${2// /-}.jsonl" "${@:5}"
}

if wanted direct; then
    for topology in $whole; do bench 60 "$topology"; done
    for topology in $some; do bench 45 "$topology" --no-peers; done
fi
if wanted put; then
    for topology in $whole; do NVRAR_TRANSPORT=put bench 45 "$topology" --no-peers; done
fi
if wanted tune && [ "$device" = cuda ] && [ -z "$shared" ]; then
    step 100 "tune" 'us|table' $(started "$ranks") -m nvrar tune --device cuda --budget 60 --output "$out/tables"
fi
if wanted engine && [ "$device" = cuda ] && [ -z "$shared" ]; then
    [ "$ranks" -lt 8 ] || for nodes in 1 2; do engine 150 "405B on $nodes nodes" $large 8 --num-nodes $nodes; done
    for count in 2 4 8; do
        [ "$count" -gt "$ranks" ] || engine 80 "70B on $count ranks" $small "$count"
    done
fi
# What fell back was not measured, unless a measured table has torch faster.
if grep -ah ' fell back to ' "$said"/* | grep -qv 'measured table'; then
    echo "some plans were left to torch: see 'fell back' above" >>"$said/failed"
fi
end_of_steps
