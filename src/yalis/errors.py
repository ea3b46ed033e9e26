# SPDX-License-Identifier: Apache-2.0
"""What can go wrong. Each message names the value, the bound and the remedy."""


class YalisError(Exception):
    """The root of every error that yalis raises on purpose."""


class ConfigError(YalisError, ValueError):
    """An option, or the model's own config.json, asks for something that cannot be."""


class CheckpointError(YalisError, ValueError):
    """A file of the checkpoint is missing, damaged, or not what config.json says it is."""


class RequestError(YalisError, ValueError):
    """A prompt or its sampling parameters cannot be served; the engine itself is unharmed."""


class WorkerError(YalisError, RuntimeError):
    """A rank died or raised; the job is down and every other rank has been stopped."""
