# SPDX-License-Identifier: Apache-2.0
"""A small inference engine with swappable collectives: prompt, batch, model over ranks, token, text."""

from yalis.errors import CheckpointError, ConfigError, RequestError, WorkerError, YalisError
from yalis.llm import LLM
from yalis.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, Update
from yalis.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Logprob",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Update",
    "WorkerError",
    "YalisError",
]
