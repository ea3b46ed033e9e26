#!/usr/bin/env bash
# One command on all ranks of two nodes, by torchrun. Start it on both nodes:
#
#   HEAD=node17 examples/two_nodes.sh                          compares plans (nvrar bench)
#   HEAD=node17 examples/two_nodes.sh python my_script.py      your own; any command
#   examples/two_nodes.sh --netns                              as root, alone: two network namespaces on
#                                                              this machine play them, with a slow link
#
# HEAD            name or address of one of the two, as both can reach it
# NODES, PORT     default: 2; 29500, which must be free on HEAD
# RANKS_PER_NODE  default: the GPUs that torch sees here, else 2 ranks on CPUs; the same on both nodes
# IFNAME          the network interface to meet on, such as ib0 (nvrar info lists them); default: gloo's,
#                 NCCL's and NVSHMEM's own choices
# ADDRESS         this node's, where its host name does not lead to it from the other
# MACHINE         of CPU ranks, for the choice of plans: see nvrar bench --help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

if [[ ${1:-} == --netns ]]; then
    export HEAD=host0 MACHINE='{"name": "100 Mbit/s between hosts",
        "node_local": {"latency_us": 300, "bandwidth_gbps": 1.0},
        "cross_node": {"latency_us": 500, "bandwidth_gbps": 0.006}}'
    exec python "$here/../tests/netns.py" --hosts 2 --rate 100mbit -- "$here/two_nodes.sh" "${@:2}"
fi

if [[ -z ${HEAD:-} ]]; then
    echo "$0: HEAD is not set; give a name or address of one of the nodes, as both reach it, in front of the" \
        "command: HEAD=node17 $0" >&2
    exit 2
fi
if ! python -c 'import socket, sys; socket.getaddrinfo(sys.argv[1], None)' "$HEAD" 2>/dev/null; then
    echo "$0: HEAD=$HEAD is no host that $(hostname) knows; give a name or address of one of the nodes" >&2
    exit 2
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [[ -n ${IFNAME:-} ]]; then
    export GLOO_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=$IFNAME
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if (($# == 0)) && ((gpus)); then
    set -- nvrar bench --device cuda --out results
elif (($# == 0)); then
    set -- nvrar bench --sizes 4K,64K,1M --plans auto,one-shot,two-shot --iterations 5 \
        --machine "${MACHINE:-gloo}" --predict
fi
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${RANKS_PER_NODE:-$((gpus ? gpus : 2))}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" ${ADDRESS:+--local-addr "$ADDRESS"} \
    --no-python "$@"
