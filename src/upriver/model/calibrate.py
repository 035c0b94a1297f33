"""A plan for this machine: a few seconds of measuring, with the model and the operations that the passes are made of."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from upriver.errors import ConfigError
from upriver.kernels import add_second_moment, matmul, one_core_each
from upriver.model.capture import capture
from upriver.model.layers import Layer
from upriver.model.load import Model, dtype_named
from upriver.model.shape import config_shape, model_shape
from upriver.model.sweep import tracked_layers
from upriver.runtime import dist
from upriver.runtime.config import weights_in
from upriver.runtime.counts import LayerSize, Shape
from upriver.runtime.hardware import LIBRARIES, Machine, Rates, hardware
from upriver.runtime.passes import Request
from upriver.runtime.plan import PAYS, Plan, describe, plan_run, smallest_batch
from upriver.runtime.progress import Say, mute
from upriver.runtime.split import ITEM, FitSplit, TraceSplit
from upriver.runtime.system import (
    DEFAULT_SHARE,
    default_limit,
    free_space,
    give_back,
    peak_memory,
    resident_memory,
    start_seconds,
)
from upriver.tensors import accumulator_dtype, eigh, sequence_gradients
from upriver.text.batch import Batch, Sequences, pad

ENOUGH = 0.5  # seconds of runs of one operation
TIMED_FLOP = 1.5e11  # of one calibration pass through the model: about a second on two cores
EIGEN_SIDE = 768  # of the matrix that is decomposed to measure
LONG = 60.0  # seconds of a run for which it is worth measuring whether bfloat16 pays
MOVED = 32 << 20  # bytes copied to measure bandwidth
WRITTEN = 32 << 20
FEW, HOPELESS = 256, 0.3  # side of a small product; so many times as fast in bfloat16 it is on processors without
ASSUMED_DISK = 5e8  # bytes/s

_MEASURED: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Rates]] = WeakKeyDictionary()  # once per process


def announce(
    say: Say, model: Model, layers: list[Layer], data: Sequences, request: Request, split: FitSplit | TraceSplit
) -> None:
    """Say what a run whose work is divided as ``split`` will take; nothing is measured where nobody listens."""
    if say is not mute:
        for line in describe(plan_here(model, layers, data, request, split)):
            say(line)


def plan_here(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    request: Request,
    split: FitSplit | TraceSplit | None = None,
    left: int = 0,
) -> Plan:
    """Plan for this machine, by a few seconds of measuring with the model itself.

    Args:
        split: how a run has divided its work already; None: as the memory of now asks.
        left: bytes in use here that will not be in a run's own process.

    Raises:
        ConfigError: the run cannot be kept within the memory.
        NumericalError: the model's loss is not finite.
    """
    shape = model_shape(model, layers, data, () if split else request.dtypes)
    most = max(map(len, data.plan(request.batch_tokens)))
    request = dataclasses.replace(request, batch_sequences=most)
    if split is not None:
        request = dataclasses.replace(request, memory=split.made_for.limit)
    machine = machine_here(model, layers, data, shape, request, split and split.batch_tokens)
    machine = machine._replace(resident=max(0, (machine.resident or 0) - left))
    found = plan_run(request, shape, machine, split)
    if sum(p.seconds for p in found.passes) >= LONG and (tokens := _may_pay(request, shape, machine, model.device)):
        rates = _measured(model, layers, data, shape, tokens, ["bfloat16"])
        found = plan_run(request, shape, machine._replace(rates=machine.rates | rates), split)
    give_back()
    return found


def plan_model(
    model: Model | Path, data: Sequences, spec: str, request: Request, hardware_name: str | None, left: int = 0
) -> Plan:
    """What ``upriver plan`` shows: any model, also one of which there is only a configuration, on any machine.

    Args:
        model: a loaded model, or the path of a configuration (:func:`upriver.model.shape.config_only`).
        data: the corpus, or a :class:`Blank` one.
        spec: the layers, as in :func:`upriver.model.layers.find_layers`.
        hardware_name: an entry of the table of machines, such as ``h100x8``; None: this machine.
        left: as for :func:`plan_here`.

    Raises:
        ConfigError: no such hardware, or the run cannot be kept within the memory.
        ModelError: the configuration cannot be used, or there is no such layer.
    """
    machine = hardware(hardware_name) if hardware_name else None
    if isinstance(model, Path):
        shape = config_shape(model, spec, request.dtypes)[1]
        return plan_run(request, shape, machine or machine_without(shape, request))
    layers = tracked_layers(model, data, spec)
    if machine is None:
        return plan_here(model, layers, data, request, left=left)
    return plan_run(request, model_shape(model, layers, data, request.dtypes), machine)


class Blank(Sequences):
    """A corpus of which only the size is known: ``sequences`` times ``tokens`` of token 0, a few of them here."""

    def __init__(self, sequences: int, tokens: int):
        self.lengths_N = np.full(min(sequences, 1024), tokens, np.int64)
        self.keys_N = np.arange(len(self.lengths_N), dtype=np.uint64)
        self.fingerprint = f"{sequences}x{tokens}"

    def batch(self, rows: np.ndarray) -> Batch:
        zeros = [np.zeros(self.lengths_N[r], np.int64) for r in rows]
        return pad(rows, self.keys_N[rows], zeros, [np.ones(len(x), bool) for x in zeros])


def machine_here(
    model: Model, layers: list[Layer], data: Sequences, shape: Shape, request: Request, batch_tokens: int | None = None
) -> Machine:
    """This machine as it runs this model; measured once per process and compute type.

    Args:
        batch_tokens: of the batches that are measured; None: of the largest that keep the limit.

    Raises:
        ConfigError: the run cannot be kept within the memory.
    """
    machine = _machine(shape, str(model.dtype).removeprefix("torch."), 0, model.device)
    tokens = batch_tokens or smallest_batch(request, shape, machine)
    rates = _measured(model, layers, data, shape, tokens, [machine.loaded, *request.dtypes])
    return _timed(machine._replace(rates={"float32": rates[machine.loaded], **rates}), shape, model.device)


def _measured(
    model: Model, layers: list[Layer], data: Sequences, shape: Shape, tokens: int, dtypes: list[str]
) -> dict[str, Rates]:
    """The rates of each compute type, in batches of ``tokens``."""
    known = _MEASURED.setdefault(model.module, {})
    for dtype in dtypes:
        if (dtype, tokens) not in known:
            with model.computing_in(dtype) as computing:
                names = ",".join(x.name for x in layers)
                same = layers if computing is model else tracked_layers(computing, data, names)
                known[dtype, tokens] = _rates(computing, same, data, shape, tokens)
    return {dtype: known[dtype, tokens] for dtype in dtypes}


def _may_pay(request: Request, shape: Shape, machine: Machine, device: torch.device) -> int:
    """Tokens of a batch in which bfloat16 is worth measuring; 0: no product is faster, or no copy of the model in it fits."""
    side = min(2048, max(max(x.O, x.I) for x in shape.layers))
    if machine.loaded != "float32" or request.narrow or _low_precision_speed(side, device) < PAYS:
        return 0
    try:
        rough = dataclasses.replace(request, dtype="bfloat16", scan_dtype="bfloat16")
        return smallest_batch(rough, shape, machine)
    except ConfigError:
        return 0


def machine_without(shape: Shape, request: Request) -> Machine:
    """This machine for a model that is not here: as fast as its products."""
    device, rates = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for dtype in dict.fromkeys(("float32", "bfloat16", *map(weights_in, request.dtypes))):
        like = torch.empty(0, dtype=dtype_named(dtype), device=device)
        largest = max(shape.layers, key=lambda x: x.O * x.I)
        product, symmetric, gradient = _product_rates(largest, max(1, round(request.tokens)), 1024, like)
        rates[dtype] = Rates(product, product, symmetric, gradient, _bandwidth(device))
    return _timed(_machine(shape, "float32", 4 * shape.parameters, device)._replace(rates=rates), shape, device)


def _machine(shape: Shape, loaded: str, to_come: int, device: torch.device) -> Machine:
    """What is known of this machine before anything is measured; ``to_come``: bytes of a model that is not loaded yet."""
    give_back()  # what reading the corpus left, which a fit or a trace gives back before it starts
    resident = (resident_memory() or LIBRARIES + ITEM[loaded] * shape.parameters) + to_come
    cores = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        resident, cores = torch.cuda.memory_allocated(device) + to_come, 1
    memory = default_limit(resident)
    if device.type == "cuda":
        memory = resident + int(DEFAULT_SHARE * torch.cuda.mem_get_info(device)[0])
    own = device.type != "cpu"
    return Machine(
        "this machine", dist.world(), memory, cores, 0.0, 1.0, free_space(Path()), 0.0, {}, resident, loaded, 0, own
    )


def _timed(machine: Machine, shape: Shape, device: torch.device) -> Machine:
    side = max(max(x.O, x.I) for x in shape.layers)
    return machine._replace(
        eigen=_eigen_rate(min(EIGEN_SIDE, side), device),
        disk=_disk_rate(),
        peak=0 if device.type == "cuda" else peak_memory() or 0,
        start=start_seconds(),  # with the measuring, which every run begins with
    )


def _rates(model: Model, layers: list[Layer], data: Sequences, shape: Shape, batch_tokens: int) -> Rates:
    largest = max(shape.layers, key=lambda x: x.O * x.I)
    T = max(1, int(np.mean(data.lengths_N)))
    through = _pass_rate(model, layers, data, shape, batch_tokens)
    return Rates(through, *_product_rates(largest, T, batch_tokens, model.like), _bandwidth(model.device))


def _pass_rate(model: Model, layers: list[Layer], data: Sequences, shape: Shape, batch_tokens: int) -> float:
    """FLOP/s forward and backward, over one batch of common length."""
    T = float(np.mean(data.lengths_N))
    each = 2 * (shape.forward(T) + shape.backward(T))
    order = np.argsort(data.lengths_N)
    length = int(data.lengths_N[order[len(order) // 2]])
    count = max(1, int(min(batch_tokens, TIMED_FLOP / each)) // length)
    middle = len(order) // 2
    start = max(0, min(middle - count // 2, len(order) - count))
    rows = order[start : start + count]

    def run_on(rows: np.ndarray) -> None:
        batch = data.batch(rows).to(model.device)
        run(len(rows), model.task.positions(batch), lambda: model.task.loss(model.module, batch))

    with capture(model.module, layers, lambda *_: None, model.handed) as run:
        run_on(rows[:1])
        seconds = _seconds(lambda: run_on(rows), model.device, 2)
    tokens = float(data.lengths_N[rows].sum())
    return tokens * each / seconds


def _product_rates(layer: LayerSize, T: int, batch_tokens: int, like: Tensor) -> tuple[float, float, float]:
    """Products with the shapes of a layer: tokens times a basis, second moments, gradients of sequences."""
    N = max(1, min(batch_tokens, 2048) // T)
    a_NTI, g_NTO = like.new_ones(N, T, layer.I), like.new_ones(N, T, layer.O)
    basis_II = like.new_ones(layer.I, layer.I)
    total_II = torch.zeros(layer.I, layer.I, dtype=accumulator_dtype(like.dtype), device=like.device)
    M, O, I = N * T, layer.O, layer.I
    product = 2.0 * M * I * I / _seconds(lambda: matmul(a_NTI.flatten(0, 1), basis_II), like.device)
    symmetric = M * I * (I + 1.0) / _seconds(lambda: add_second_moment(total_II, a_NTI.flatten(0, 1)), like.device)
    chunk = max(1, min(N, (64 << 20) // (4 * O * I)))
    formed = _seconds(lambda: sequence_gradients(a_NTI[:chunk], g_NTO[:chunk]), like.device)
    return product, symmetric, 2.0 * chunk * T * O * I / formed


@cache
def _eigen_rate(n: int, device: torch.device) -> float:
    """Seconds over ``n^3``, one matrix in float64 with one thread."""
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    matrix = x @ x.T
    with one_core_each(1) as pool:
        return pool.submit(_seconds, lambda: eigh(matrix), device).result() / n**3


@cache
def _low_precision_speed(n: int, device: torch.device) -> float:
    """How many times as fast as in float32 a product is in bfloat16; a small one tells where a large one would take long."""
    few = _narrow_speed(min(FEW, n), device)
    return few if few < HOPELESS else _narrow_speed(n, device)


def _narrow_speed(n: int, device: torch.device) -> float:
    x, y = torch.ones(min(1024, n), n, device=device), torch.ones(n, n, device=device)
    half_x, half_y = x.bfloat16(), y.bfloat16()
    return _seconds(lambda: matmul(x, y), device) / _seconds(lambda: matmul(half_x, half_y), device)


@cache
def _bandwidth(device: torch.device) -> float:
    x = torch.ones(MOVED // 4, device=device)
    y = torch.empty_like(x)
    return 2 * MOVED / _seconds(lambda: torch.square(x, out=y), device)


@cache
def _disk_rate() -> float:
    """Bytes a second, where temporary files go; assumed where none can be written."""
    block = np.ones(WRITTEN, np.uint8).tobytes()
    try:
        with tempfile.TemporaryFile() as file:
            start = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - start)
    except OSError:
        return ASSUMED_DISK


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 4) -> float:
    """The shortest of a few runs; of two where they take long: the first may begin threads, or meet other work."""
    took: list[float] = []
    while len(took) < 2 or (len(took) < repeats and sum(took) < ENOUGH):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return min(took)
