# SPDX-License-Identifier: Apache-2.0
"""One file per family, showing what is particular to it, and the decoder that they share.

`FAMILIES` maps the architecture that config.json names to what reads the family's traits.
"""

from collections.abc import Callable

from yalis.fields import Fields
from yalis.models import llama, mistral, qwen2, qwen3
from yalis.models.traits import Traits

FAMILIES: dict[str, Callable[[Fields], Traits]] = {
    "LlamaForCausalLM": llama.traits,
    "MistralForCausalLM": mistral.traits,
    "Qwen2ForCausalLM": qwen2.traits,
    "Qwen3ForCausalLM": qwen3.traits,
}
