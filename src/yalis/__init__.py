# SPDX-License-Identifier: Apache-2.0
"""A small inference engine with swappable collectives: prompt, batch, model over ranks, token, text."""

from yalis.core import RequestOutput
from yalis.errors import CheckpointError, ConfigError, RequestError, WorkerError, YalisError
from yalis.llm import LLM
from yalis.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CheckpointError",
    "ConfigError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "WorkerError",
    "YalisError",
]
