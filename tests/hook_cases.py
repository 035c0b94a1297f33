"""A small Llama whose blocks can be wrapped, what the hook sees of it, and its run as a sharded model in several processes."""

import copy
import datetime
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from cases import case
from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.check import tracked_layers
from upriver.model.load import Model
from upriver.model.sweep import Source, sweep

BATCH_TOKENS, BATCHES = 24, 4
TOKENS = torch.arange(10)[None]
Seen = dict[str, tuple[Tensor, Tensor]]
MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "gpt_neox")]
LIBRARIES = ["pytest", "hypothesis.strategies", "upriver.pipeline", *MODELS]


def small_llama() -> LlamaForCausalLM:
    """A model in training mode with one parameter frozen by its owner."""
    module = copy.deepcopy(case("llama").model.module).train()
    module.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    return module


class Recorder:
    """Consumer: keeps every ``a_NTI`` and ``g_NTO`` by layer and batch."""

    def __init__(self) -> None:
        self.seen: Seen = {}
        self.batches = 0

    def begin(self, batch: Any) -> None:
        self.batches += 1

    def __call__(self, layer: Any, a_NTI: Tensor, g_NTO: Tensor) -> None:
        key = f"{layer.name.replace('_orig_mod.', '')}/{self.batches}"
        assert key not in self.seen, "a layer is handed over once a pass"
        self.seen[key] = (a_NTI.clone(), g_NTO.clone())


def seen_by_hook(module: nn.Module, recorder: Recorder | None = None) -> Seen:
    """All that one pass over the corpus shows of ``module``, in a few batches with padding."""
    model, data, recorder = Model(module), case("llama").data, recorder or Recorder()
    source = Source.of(data, np.arange(len(data)), BATCH_TOKENS)
    sweep(model, tracked_layers(model, data, "all"), source, source.rows, recorder)
    assert recorder.batches == BATCHES
    return recorder.seen


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module, use_reentrant: bool):
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant
        self._runs = 0  # what a module notes under a name without the underscore is put back after a pass
        block.register_forward_pre_hook(self._count)

    @property
    def runs(self) -> int:
        return self._runs

    def _count(self, *_: Any) -> None:
        self._runs += 1

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        block = partial(self.block, **kwargs)  # the reentrant kind takes no keywords
        return checkpoint(block, hidden, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


def checkpointed(module: LlamaForCausalLM, use_reentrant: bool) -> LlamaForCausalLM:
    blocks = module.model.layers
    for i, block in enumerate(blocks):
        blocks[i] = Checkpointed(block, use_reentrant)
    return module


def in_processes(world: int, work: Callable, folder: Path, seconds: float = 120.0) -> None:
    """Run ``work(rank, folder)`` in ``world`` processes joined by gloo; whatever happens, they are gone afterwards.

    Raises:
        AssertionError: a process failed (its traceback is on stderr), or the time is over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meet").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)  # imported once for all processes
    processes = [context.Process(target=_process, args=(rank, world, work, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + seconds
        while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < end, f"not done after {seconds} s"
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1)
        codes = [p.exitcode for p in processes]
        assert codes == [0] * world, f"the processes ended with {codes}"
    finally:
        for process in processes:
            process.kill()
            process.join()


def _process(rank: int, world: int, work: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world, timeout=wait)
    try:
        work(rank, folder)
    finally:
        dist.destroy_process_group()


def shard_and_record(rank: int, folder: Path) -> None:
    """The body of the FSDP2 test: each block and the root sharded over the processes, the same batches on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, module = init_device_mesh("cpu", (dist.get_world_size(),)), small_llama()
    for block in module.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    with pytest.raises(ModelError, match="give every process the whole model"):  # as a whole run they are refused
        _ = Model(module).fingerprint
    with torch.no_grad():
        before = module(input_ids=TOKENS, use_cache=False).logits
    flags, modes = state_of(module)
    seen = seen_by_hook(module)
    assert state_of(module) == (flags, modes)
    assert all(p.grad is None for p in module.parameters())
    with torch.no_grad():
        assert torch.equal(module(input_ids=TOKENS, use_cache=False).logits, before)
    save_file({f"{key}/{i}": x for key, pair in seen.items() for i, x in enumerate(pair)}, folder / f"seen-{rank}")
    with frozen(module), torch.no_grad():  # gathers the weights and, as nothing goes backward, leaves them so
        module(input_ids=TOKENS, use_cache=False)
    # training goes on as if nothing had been: the gradients of the sharded weights are those of the plain model
    module(input_ids=TOKENS, use_cache=False).logits.square().sum().backward()
    grads = {name: p.grad.full_tensor() for name, p in module.named_parameters() if p.grad is not None}
    save_file(grads, folder / f"grads-{rank}")


def state_of(module: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    return flags, {name: m.training for name, m in module.named_modules()}


ROUNDS = ({"until": 1.0, "fisher": "empirical"}, {"curvature": "diagonal", "layer_scores": True})


def fit_and_trace(rank: int, folder: Path, fitted: dict | None = None, traced: dict | None = None) -> None:
    """Fit and trace a tiny case in ``folder``, in units of a few sequences."""
    from upriver import fit, trace

    c = case("llama")
    given = {"layers": c.spec, "dtype": "float64", "batch_tokens": 8, "unit_tokens": 16} | (fitted or {})
    factors = fit(c.model, c.data, folder / "factors", **given)
    asked = {"rank": 2, "top": 3, "batch_tokens": 8, "unit_tokens": 16} | (traced or {})
    trace(c.model, c.data, c.queries, factors, folder / "scores", **asked)


def fail_alone(rank: int, folder: Path) -> None:
    """One process fails in its part of a sum: the others do not wait for it, and every process is told why."""
    from upriver.errors import NumericalError
    from upriver.runtime.artifact import Artifact, Tensors
    from upriver.runtime.units import total

    def add(unit: int, sums: Tensors) -> None:
        if unit == 1:
            raise NumericalError("unit 1 holds NaN")
        sums["x"] = sums.get("x", torch.zeros(2)) + 1

    stage = Artifact.open(folder / "stage", "sum", {})
    with pytest.raises(NumericalError, match="unit 1 holds NaN"):
        total(stage, 4, add, torch.device("cpu"))
