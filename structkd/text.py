"""Values as people read them."""

from collections.abc import Mapping
from typing import Any

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def cell(value: Any, column: str = "") -> str:
    """A table cell: four decimals for fractions, fewer for more, sizes with a unit, nothing for nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and column.endswith("bytes"):
        return _size(float(value))
    if isinstance(value, float):
        return _decimal(value)
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item, str(key))}" for key, item in value.items())
    return str(value)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings side by side, their keys joined; lists of records are tables of their own and left out."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key} ")
        elif not (isinstance(item, list) and any(isinstance(one, (Mapping, list)) for one in item)):
            found[f"{prefix}{key}"] = item
    return found


def _decimal(value: float) -> str:
    """Four significant decimals or so, in a form that lines up below its like."""
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.3g}"
    places = 4 if size < 10 else 2 if size < 100 else 1 if size < 10_000 else 0
    return f"{value:,.{places}f}"


def _size(number: float) -> str:
    """Bytes in decimal units."""
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 else f"{number:.3g} {_UNITS[unit]}"


def rate_text(rate: float | None) -> str:
    """Items per second, or seconds per item where that is slower."""
    if not rate:
        return ""
    return f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


def time_text(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
