"""What a machine can do: this one, as measured, or one of the table in ``hardware.toml`` that need not be there."""

import difflib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from upriver.errors import ConfigError
from upriver.runtime.config import MIXED

LIBRARIES = 1_000_000_000  # bytes: Python, torch and a device's context, where nothing could be measured
EIGEN_OPERATIONS = 9  # n^3: the convention that the table's share of the peak is given in


class Rates(NamedTuple):
    """What is reached in one compute type on one device."""

    model: float  # FLOP/s, forward and backward through the model
    product: float  # FLOP/s, tokens times a square matrix
    symmetric: float  # FLOP/s, second moments as counted in :func:`upriver.runtime.counts.symmetric`
    gradient: float  # FLOP/s, the gradients of single sequences
    bandwidth: float  # bytes/s of numbers read and written by an elementwise operation


class Machine(NamedTuple):
    """Where a run takes place, or would."""

    name: str
    devices: int
    memory: int  # bytes of one device that may be used
    cores: int  # eigendecompositions at once
    eigen: float  # seconds / n^3, float64, one at a time
    disk: float  # bytes/s
    space: int  # bytes free on the disk
    start: float  # seconds until model and corpus are there
    rates: dict[str, Rates]  # by dtype
    resident: int | None  # bytes in use now, with the model; None: not measured
    loaded: str  # the type that it is in
    peak: int  # the most bytes that were in use so far
    accelerator: bool = False  # with a memory of its own, so that sums may stay in the one beside it

    def of(self, dtype: str) -> Rates:
        if dtype == MIXED and dtype not in self.rates:
            return self.of("bfloat16")._replace(model=self.of("float32").model)
        return self.rates.get(dtype) or self.rates["float32"]


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("hardware.toml").read_text(encoding="utf-8"))


def _names() -> list[str]:
    return [name for name in _table() if name != "assumed"]


def hardware(name: str) -> Machine:
    """A machine of the table: ``h100``, or ``h100x8`` for eight of them.

    Raises:
        ConfigError: no such entry; the nearest known ones are named.
    """
    kind, count = name.strip().lower(), 1
    match = re.fullmatch(r"(.+)x([1-9]\d{0,5})", kind)
    if match and kind not in _names():
        kind, count = match[1], int(match[2])
    if kind not in _names():
        near = difflib.get_close_matches(kind, _names(), 3, 0.4) or _names()
        raise ConfigError(
            f"unknown hardware: got {name!r}; give one of {', '.join(near)}, with x8 behind it for eight devices"
        )
    entry, assumed = _table()[kind], _table()["assumed"]
    rates = {dtype: _rates(entry, assumed, dtype) for dtype in ("float32", "bfloat16", "float64")}
    return Machine(
        name=name,
        devices=count,
        memory=int(entry["memory"]),
        cores=entry["cores"],
        eigen=EIGEN_OPERATIONS / (assumed["eigen"] * entry["float64"] / entry["cores"]),
        disk=assumed["disk"],
        space=int(assumed["space"]),
        start=assumed["start"],
        rates=rates,
        resident=None,
        loaded="float32",
        peak=0,
        accelerator=not entry.get("cpu", False),
    )


def _rates(entry: dict[str, Any], assumed: dict[str, Any], dtype: str) -> Rates:
    peak = entry[dtype]
    product = assumed["product"] * peak
    sums = assumed["product"] * entry["float64" if dtype == "float64" else "float32"]  # whatever the compute type
    return Rates(assumed["model"] * peak, product, sums, product, entry["bandwidth"])
