#!/usr/bin/env bash
# The all-reduces of two nodes of two ranks, compared: on a cluster, or on this machine alone.
#
#   HEAD=node17 examples/two_nodes.sh      on each of two nodes, of which node17 is one
#   examples/two_nodes.sh --netns          as root: two network namespaces with a slow link play them
#
# Under Slurm no torchrun is needed:  srun --nodes 2 --ntasks-per-node 2 nvrar bench
# If gloo takes the wrong network:    export GLOO_SOCKET_IFNAME=eth0
# For a good choice of plans:         export MACHINE=..., as `nvrar bench --help` says
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --netns ]]; then
    export HEAD=host0 MACHINE='{"name": "100 Mbit/s between hosts",
        "node_local": {"latency_us": 300, "bandwidth_gbps": 1.0},
        "cross_node": {"latency_us": 500, "bandwidth_gbps": 0.006}}'
    exec python tests/netns.py --hosts 2 --rate 100mbit -- "$0"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --nnodes 2 --nproc-per-node 2 \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?is the name of the first node}:29500" \
    -m nvrar.cli bench --sizes 4K,64K,1M --plans auto,one-shot,two-shot \
    --iterations 5 --machine "${MACHINE:-gloo}" --predict
