#!/usr/bin/env bash
# For scripts that do one thing after the other within a time, by GPUs that are lent for it: sourced, from a folder
# of this repository. Short lines go to the terminal; all that was said to the script's file in $OUT (default: a
# new folder).
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
out=${OUT:-$(mktemp -d)}
said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
deadline=$((SECONDS + ${LIMIT_S:-570}))
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())') ||
    { echo "python3 cannot import torch; activate the environment that has it" && exit 2; }
ranks=${RANKS:-$((gpus > 1 ? gpus : 2))}
# Where ranks outnumber GPUs they share them: that shows what is right, and no times. The prefix of such commands.
shared=
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$ranks" ]; then shared="env SHARED_GPU_RANKS=$ranks PYTHONPATH=tests/shared_gpu:$PYTHONPATH"; fi

# step LIMIT_S NAME PATTERN COMMAND...: shows the lines that match; of a failure also the last that was said.
step() {
    echo "$2" >>"$said/steps" # a file: some steps are those of a subshell
    local limit=$1 name=$2 pattern=$3 start=$SECONDS left=$((deadline - SECONDS)) status log
    shift 3
    log=$(mktemp "$said/XXXXXX")
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "$name: no time left" | tee -a "$said/failed"
        return
    fi
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    status=$?
    {
        echo "== $name: exit status $status, $((SECONDS - start)) s"
        grep -a -E "$pattern" "$log" | cut -c1-180
        [ $status = 0 ] || { grep -a -E 'Error|rror:|^E  ' "$log" | sort -u | tail -n 8 && tail -n 2 "$log"; } | cut -c1-240
    } >"$log.short"
    cat "$log.short" # at once: steps run side by side
    [ $status = 0 ] || echo "$name: exit status $status" >>"$said/failed"
    { cat "$log.short" && cat "$log"; } >>"$out/$(basename "$0" .sh).txt"
}

# end_of_steps: what was not right, and the exit code.
end_of_steps() {
    echo "== $SECONDS s in all"
    [ -s "$said/steps" ] || echo "nothing ran; look at what was picked" >>"$said/failed"
    [ ! -s "$said/failed" ] || { echo "not right:" && cat "$said/failed" && exit 1; }
}
