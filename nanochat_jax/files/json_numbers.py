"""JSON has neither NaN nor Infinity: Python writes them as words that other readers refuse."""

import math
from typing import Any


def finite_or_null(value: Any) -> Any:
    """The value with None, JSON's null, for every float in it that is not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite_or_null(part) for name, part in value.items()}
    return [finite_or_null(part) for part in value] if isinstance(value, list | tuple) else value
