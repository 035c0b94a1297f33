"""What a machine can do: this one, as measured, or one of the table in ``hardware.toml`` that need not be there."""

import difflib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from upriver.errors import ConfigError
from upriver.runtime.config import MIXED
from upriver.runtime.cost import ITEM

EIGEN_OPERATIONS = 9  # n^3: the convention that the table's share of the peak is given in


class Rates(NamedTuple):
    """What is reached in one compute type, in FLOP/s: through the model, in products, and in whole passes that were measured."""

    model: float
    product: float
    passes: dict[str, float] = {}  # noqa: RUF012 - never written to

    def seconds(self, name: str, through: float, work: float) -> float:
        if name in self.passes:
            return (through + work) / self.passes[name]
        return through / self.model + work / self.product


class Machine(NamedTuple):
    """Where a run takes place, or would."""

    name: str
    devices: int
    memory: int  # bytes of one device that may be used
    cores: int  # eigendecompositions at once
    eigen: float  # seconds / n^3, float64, one at a time
    disk: float  # bytes/s
    start: float  # seconds until model and corpus are there
    rates: dict[str, Rates]  # by dtype
    resident: int | None  # bytes in use now, with the model; None: not measured
    loaded: str  # the type that it is in
    peak: int = 0  # the most bytes that were in use so far
    accelerator: bool = False  # with a memory of its own

    def of(self, dtype: str) -> Rates:
        if dtype == MIXED and dtype not in self.rates:
            return self.of("bfloat16")._replace(model=self.of("float32").model, passes={})
        return self.rates.get(dtype) or self.rates["float32"]


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("hardware.toml").read_text(encoding="utf-8"))


def hardware(name: str) -> Machine:
    """A machine of the table: ``h100``, or ``h100x8`` for eight of them.

    Raises:
        ConfigError: no such entry; the nearest known ones are named.
    """
    kind, count, known = name.strip().lower(), 1, [x for x in _table() if x != "assumed"]
    match = re.fullmatch(r"(.+)x([1-9]\d{0,5})", kind)
    if match and kind not in known:
        kind, count = match[1], int(match[2])
    if kind not in known:
        near = difflib.get_close_matches(kind, known, 3, 0.4) or known
        raise ConfigError(
            f"unknown hardware: got {name!r}; give one of {', '.join(near)}, with x8 behind it for eight devices"
        )
    entry, assumed = _table()[kind], _table()["assumed"]
    rates = {x: Rates(assumed["model"] * entry[x], assumed["product"] * entry[x]) for x in ITEM if x != MIXED}
    eigen = EIGEN_OPERATIONS / (assumed["eigen"] * entry["float64"] / entry["cores"])
    return Machine(
        name, count, int(entry["memory"]), entry["cores"], eigen, assumed["disk"], assumed["start"], rates,
        resident=None, loaded="float32", accelerator=not entry.get("cpu", False),
    )  # fmt: skip
