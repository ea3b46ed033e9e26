# SPDX-License-Identifier: Apache-2.0
"""One file per family, showing what is particular to it, and the decoder that they share.

`FAMILIES` maps the architecture that config.json names to its family.
"""

from yalis.models import llama, mistral, qwen2, qwen3
from yalis.models.traits import Family

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "MinistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
}
