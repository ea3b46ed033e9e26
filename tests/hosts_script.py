"""What a rank of tests/host/test_hosts.py runs: looks around, reduces by several plans, says so in JSON.

Started by torchrun: ``torchrun ... tests/hosts_script.py [plan ...]``; one line from each rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys

import torch

from nvrar import Communicator, Topology
from nvrar.launch import join, seat
from nvrar.meeting import exchange_values
from nvrar.topology import from_sightings, sighting
from nvrar.verify import random_inputs

NUM_ELEMENTS = 10_007  # divisible by nothing


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def inputs(num_ranks: int) -> torch.Tensor:
    return random_inputs(num_ranks, NUM_ELEMENTS, torch.float16, seed=7)


def main() -> None:
    logging.basicConfig()
    place = seat(os.environ)
    assert place is not None
    with join(place) as group:
        own = inputs(group.size())[place.rank]
        bits = {}
        for plan in ["auto", *sys.argv[1:]]:
            with Communicator(group, plan=plan) as communicator:
                bits[str(communicator.plan_for(own.nbytes))] = digest(
                    communicator.all_reduce(own).view(torch.uint8)
                )
        # The same without what the launcher says, as under a launcher that we do not know.
        name_only = {"host name": sighting(os.environ)["host name"]}
        by_name = from_sightings(
            exchange_values(group, "names", name_only, 30), range(group.size())
        )
        said = {
            "rank": place.rank,
            "host": socket.gethostname(),
            "topology": str(Topology.detect(group)),
            "topology_by_host_name": str(by_name),
            "bits": bits,
        }
    os.write(1, f"\n{json.dumps(said)}\n".encode())  # whole, whatever the other ranks write


if __name__ == "__main__":
    main()
