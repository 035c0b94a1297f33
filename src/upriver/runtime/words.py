"""Sizes and times in words, and back."""

import re

from upriver.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
ROUNDS_UP = 0.9995  # of a unit: three digits would show a thousand of the one below


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size such as ``8GB``, ``2GiB`` or ``500MB``; None where none is given.

    Raises:
        ConfigError: not a positive number with one of the units.

    Example:
        >>> parse_memory("8GB")
        8000000000
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "?")
    if unit not in UNITS or not 1 <= number * UNITS[unit] < 2**63:
        raise ConfigError(f"bad size of memory: got {text!r}; give a number with its unit, such as 8GB, 2GiB or 500MB")
    return int(number * UNITS[unit])


def in_units(n: float, *units: tuple[float, str]) -> str:
    """``n`` in three digits, in the first of the descending units that it makes one of, or else in the last."""
    unit, name = next(((u, s) for u, s in units if n >= ROUNDS_UP * u), units[-1])
    return f"{n / unit:.3g}{name}"


def show_bytes(n: float) -> str:
    return in_units(n, (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def show_count(n: float) -> str:
    return in_units(n, (1e9, "G tokens"), (1e6, "M tokens"), (1e3, "k tokens"), (1, " tokens"))


def show_flop(n: float) -> str:
    prefixes = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    return in_units(n, *((size, f" {name}FLOP") for size, name in prefixes))


def show_seconds(s: float) -> str:
    if s < 99.5:
        return f"{s:.2g} s" if s < 9.95 else f"{s:.0f} s"
    return next(f"{s / u:.3g} {name}" for u, name in ((86400, "days"), (3600, "h"), (60, "min")) if s >= u)
