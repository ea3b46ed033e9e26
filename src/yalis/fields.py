# SPDX-License-Identifier: Apache-2.0
"""Reading the fields of a config.json, each checked, with errors that name file, field and value. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yalis.errors import ConfigError


@dataclass(frozen=True)
class Fields:
    """The content of a JSON object, and where it was found. A null counts as absent."""

    raw: Mapping[str, Any]
    where: str

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: {name} is missing; it gives the model its shape")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(
                f"{self.where}: {name} is {value!r}; it must be an integer of at least {least}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return value
