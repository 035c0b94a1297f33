"""The plan of a run on this machine: one batch of each pass is run, as the run itself would, and the time scaled.

Axes: N sequences, T positions, I inputs of a layer, O outputs, Q queries, R rank.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from upriver.kernels import matmul, one_core_each
from upriver.model.layers import Layer, same_layers
from upriver.model.model import Model, dtype_named
from upriver.model.packed import any_packed
from upriver.model.shape import config_shape, model_shape
from upriver.model.sweep import Consumer, Source, sweep
from upriver.runtime import dist
from upriver.runtime.artifact import read_json, write_json
from upriver.runtime.config import parse_memory, weights_in
from upriver.runtime.cost import Shape
from upriver.runtime.divide import SEQUENCE_BYTES, Budget, Division, still_fits
from upriver.runtime.hardware import Machine, Rates
from upriver.runtime.plan import LIBRARIES, Plan, Request, describe, plan_run
from upriver.runtime.progress import Say, mute, show_bytes
from upriver.runtime.system import (
    DEFAULT_SHARE,
    default_limit,
    give_back,
    peak_memory,
    resident_memory,
    settle_memory,
    start_seconds,
)
from upriver.tensors import eigh
from upriver.text.batch import Sequences, pad

TIMED_FLOP = 5e10  # of one batch that is timed: a third of a second on two cores
EIGEN_SIDE, PRODUCT_SIDE = 768, 1024  # of the matrix that is decomposed, and of a product, to measure
DISK = 5e8  # bytes/s, assumed of this machine: sums are written seldom
ENOUGH = 0.5  # seconds of runs of one operation

Probe = Callable[
    [Model, list[Layer], Source, np.ndarray], tuple[Consumer, float]
]  # a pass's consumer, and its operations
_MEASURED: WeakKeyDictionary[nn.Module, dict[tuple, float]] = WeakKeyDictionary()  # once per process


def announce(say: Say, make: Callable[[], Plan]) -> None:
    """Say what a run will take; nothing is measured where nobody listens."""
    if say is not mute:
        for line in describe(make()):
            say(line)


class Blank(Sequences):
    """A corpus of which only the size is known: ``sequences`` times ``tokens`` of token 0, a few of them here."""

    def __init__(self, sequences: int, tokens: int):
        self.lengths_N = np.full(min(sequences, 1024), tokens, np.int64)
        self.keys_N = np.arange(len(self.lengths_N), dtype=np.uint64)
        self.fingerprint = f"{sequences}x{tokens}"

    def batch(self, rows: np.ndarray):
        zeros = [np.zeros(self.lengths_N[r], np.int64) for r in rows]
        return pad(rows, self.keys_N[rows], zeros, [np.ones(len(x), bool) for x in zeros])


def plan_here(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    request: Request,
    probes: dict[str, Probe],
    division: Division | None = None,
    left: int = 0,
) -> Plan:
    """Plan for this machine, by a few seconds of measuring with the model itself.

    Args:
        probes: of each pass that is timed, its consumer.
        division: how a run has divided its work already; None: as the memory of now asks.
        left: bytes in use here that will not be in a run's own process.

    Raises:
        ConfigError: the run cannot be kept within the memory.
        NumericalError: the model's loss is not finite.
    """
    shape = model_shape(model, layers, data, () if division else [request.dtype, request.scan])
    most = max(map(len, data.plan(request.batch_tokens)))
    request = dataclasses.replace(request, batch_sequences=most)
    machine = _machine(shape, str(model.dtype).removeprefix("torch."), 0, model.device)
    machine = machine._replace(resident=max(0, (machine.resident or 0) - left))
    made = plan_run(request, shape, machine, division)
    tokens = min(d.batch_tokens for d in (made.fit, made.trace) if d)
    rates: dict[str, Rates] = {}
    wanted = [request.dtype] * request.fit + ([request.scan, made.trace.exact] if made.trace else [])
    dtypes = [machine.loaded] if any_packed(model.module) else [machine.loaded, *wanted]
    for dtype in dict.fromkeys(dtypes):
        with model.computing_in(dtype) as computing:
            same = same_layers(layers, model.module, computing.module)
            base, known = _rate(computing, same, data, shape, tokens, "model", nothing), {}
            for name, probe in probes.items():
                group = next(d.groups[name][0] for d in (made.fit, made.trace) if d and name in d.groups)
                some = [same[i] for i in group]
                known[name] = _rate(computing, some, data, shape, tokens, name, probe)
        product = product_rate(dtype_named(weights_in(dtype)), model.device)
        rates[dtype] = Rates(base, product, known)
    machine = machine._replace(rates={"float32": rates[machine.loaded], **rates})
    found = plan_run(request, shape, _timed(machine, shape, model.device), division)
    give_back()
    return found


def _rate(
    model: Model, layers: list[Layer], data: Sequences, shape: Shape, batch_tokens: int, name: str, probe: Probe
) -> float:
    """FLOP/s of a pass over one batch of common length."""
    T = float(np.mean(data.lengths_N))
    each = 2 * (shape.forward(T) + shape.backward(T, layers))
    order = np.argsort(data.lengths_N)
    middle = len(order) // 2
    length = int(data.lengths_N[order[middle]])
    count = max(1, int(min(batch_tokens, TIMED_FLOP / each)) // length)
    start = max(0, min(middle - count // 2, len(order) - count))
    rows = np.sort(order[start : start + count])
    known = _MEASURED.setdefault(model.module, {})
    if (name, str(model.like.dtype), len(rows)) not in known:
        source = Source.of(data, rows, batch_tokens)
        consumer, work = probe(model, layers, source, rows)
        flop = source.tokens(rows) * each + work
        seconds = timed(partial(sweep, model, layers, source, rows, consumer), model.device, 2)
        known[name, str(model.like.dtype), len(rows)] = flop / seconds
    return known[name, str(model.like.dtype), len(rows)]


def plan_config(path: Path, spec: str, request: Request, machine: Machine | None) -> Plan:
    """The plan of a model of which there is only a configuration, on a machine of the table or on one as fast as its products.

    Raises:
        ConfigError: the run cannot be kept within the memory.
        ModelError: the configuration cannot be used, or there is no such layer.
    """
    shape = config_shape(path, spec, [request.dtype, request.scan])[1]
    shape = shape._replace(layers=tuple(x._replace(parts=request.blocks) for x in shape.layers))
    return plan_run(request, shape, machine or _without(shape, request))


def _without(shape: Shape, request: Request) -> Machine:
    device, rates = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for dtype in dict.fromkeys(("float32", *map(weights_in, (request.dtype, request.scan)))):
        product = product_rate(dtype_named(dtype), device)
        rates[dtype] = Rates(product, product)
    return _timed(_machine(shape, "float32", 4 * shape.parameters, device)._replace(rates=rates), shape, device)


def _machine(shape: Shape, loaded: str, to_come: int, device: torch.device) -> Machine:
    """What is known of this machine before anything is measured; ``to_come``: bytes of a model that is not loaded yet."""
    give_back()  # what reading the corpus left, which a fit or a trace gives back before it starts
    resident = (resident_memory() or LIBRARIES + 4 * shape.parameters) + to_come
    cores, memory, own = torch.get_num_threads(), default_limit(resident), device.type != "cpu"
    if device.type == "cuda":
        torch.cuda.empty_cache()
        resident, cores = torch.cuda.memory_allocated(device) + to_come, 1
        memory = resident + int(DEFAULT_SHARE * torch.cuda.mem_get_info(device)[0])
    nothing = {"float32": Rates(1.0, 1.0)}
    return Machine("this machine", dist.world(), memory, cores, 1.0, DISK, 0.0, nothing, resident, loaded, 0, own)


def _timed(machine: Machine, shape: Shape, device: torch.device) -> Machine:
    side = max(max(x.O, x.I) for x in shape.layers)
    peak = 0 if device.type == "cuda" else peak_memory() or 0
    # with the measuring, which every run begins with
    return machine._replace(eigen=_eigen_rate(min(EIGEN_SIDE, side), device), peak=peak, start=start_seconds())


@cache
def _eigen_rate(n: int, device: torch.device) -> float:
    """Seconds over ``n^3``, one matrix in float64 with one thread."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    matrix = x @ x.T
    with one_core_each(1) as pool:
        return pool.submit(timed, lambda: eigh(matrix), device).result() / n**3


@cache
def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square product."""
    x = torch.ones(PRODUCT_SIDE, PRODUCT_SIDE, dtype=dtype, device=device)
    return 2.0 * PRODUCT_SIDE**3 / timed(lambda: matmul(x, x), device)


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 4) -> float:
    """The shortest of a few runs; of two where they take long: the first may begin threads, or meet other work."""
    took: list[float] = []
    while len(took) < 2 or (len(took) < repeats and sum(took) < ENOUGH):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return min(took)


def nothing(model: Model, layers: list[Layer], source: Source, rows: np.ndarray) -> tuple[Consumer, float]:
    """The probe of the model alone."""

    class Unseen:
        def begin(self, batch: Any) -> None: ...
        def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None: ...

    return Unseen(), 0.0


ROOMY = 1.2  # times the planned peak under the limit: freed memory may be kept, with the holes in it


def memory_budget(
    model: Model, data: Sequences, batch_tokens: int, memory: str | None, dtype: str = "", exact: str = ""
) -> Budget:
    """What the division of the work depends on: on a GPU its own memory, else that of the process.

    Args:
        memory: a limit such as ``8GB``; None: 80 % of what is free.
        dtype: of the passes, where it is not the model's.
        exact: the type of queries and of the second look, likewise.

    Raises:
        ConfigError: not a size.
    """
    asked, accelerator = parse_memory(memory), model.device.type == "cuda"
    if accelerator:
        torch.cuda.empty_cache()  # what an earlier phase left is not free before
        fixed = torch.cuda.memory_allocated(model.device)
        limit = asked or fixed + int(DEFAULT_SHARE * torch.cuda.mem_get_info(model.device)[0])
    else:
        settle_memory()
        give_back()
        resident = resident_memory() or 0
        fixed = resident + SEQUENCE_BYTES * len(data)
        limit = asked or default_limit(resident)
    own = str(model.dtype).removeprefix("torch.")
    cores = 1 if accelerator else torch.get_num_threads()
    most = max(map(len, data.plan(batch_tokens)))
    widest = own if own == "float64" else dtype or own
    copies = model.more_in(dtype or own), model.more_in(exact or own)
    longest = int(data.lengths_N.max())
    return Budget(
        limit, fixed, batch_tokens, longest, widest, cores, most, copies[0], exact or own, copies[1], accelerator
    )


def division_file(folder: Path) -> Path:
    """Where a run that is not done keeps the division of its work."""
    return folder / ".division.json"


def settled(folder: Path, made: Division, device: torch.device, say: Say) -> Division:
    """The division that an interrupted run in ``folder`` began with, if it still fits; otherwise ``made``.

    Finished units are of use in their own division only.  How much memory is free differs from run to run, and from process to
    process: the first process decides for all.  On the CPU the allocator is told what to do with freed memory: to keep it for
    the next tensors where the limit leaves room for holes (:func:`upriver.runtime.system.settle_memory`).
    """
    file = division_file(folder)

    def decide() -> None:
        begun = _read(file)
        if begun is None or not still_fits(begun, made):
            folder.mkdir(exist_ok=True)
            write_json(file, made._asdict())
        elif begun.limit != made.limit:
            limit = show_bytes(begun.limit)
            say(f"memory: the work stays divided as it was when it began, for {limit}; another --out divides it anew")

    dist.on_first(decide)
    found = _read(file)
    assert found is not None
    if device.type != "cuda":
        settle_memory(reuse=ROOMY * max(found.peak.values()) <= made.limit)
    return found


def _read(file: Path) -> Division | None:
    """None: there is none, or what another version wrote."""
    try:
        return Division(**read_json(file)) if file.exists() else None
    except TypeError:
        return None
