"""Continue a prompt on four local ranks that play two nodes.

    yalis make-checkpoint /tmp/tiny-llama
    python examples/generate.py /tmp/tiny-llama "Once upon a time"

Under `torchrun --nproc-per-node 4` the same file works too: its ranks, which must be four, join instead of
being started, and the first prints.
"""

import os
import sys

from yalis import LLM, SamplingParams


def main(model: str, prompt: str) -> None:
    params = SamplingParams(max_tokens=32, temperature=0.8, top_p=0.95, seed=1)
    with LLM(model, tensor_parallel_size=4, num_nodes=2, all_reduce="nvrar") as llm:
        outputs = llm.generate([prompt, "The quick brown fox"], params)
    if os.environ.get("RANK", "0") == "0":
        for output in outputs:
            print(repr(output.prompt), "->", repr(output.text), f"({output.finish_reason})")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            'give a checkpoint and a prompt: python examples/generate.py MODEL "Once upon a time"'
        )
    main(*sys.argv[1:])
