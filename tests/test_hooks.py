"""The hook under activation checkpointing, sharding and compilation: the same numbers, or a refusal, and no trace left."""

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hook_cases import (
    BATCHES,
    TOKENS,
    Checkpointed,
    Recorder,
    checkpointed,
    fail_alone,
    in_processes,
    seen_by_hook,
    shard_and_record,
    small_llama,
    state_of,
)
from upriver.errors import ModelError

LAYERS = 2 * 7  # gate, up, down, q, k, v, o of two blocks
OLD = torch.__version__.startswith("2.6.")  # the oldest that is supported


@pytest.fixture(scope="module")
def plain():
    seen = seen_by_hook(small_llama())
    assert len(seen) == BATCHES * LAYERS
    for key in seen:  # a row of one visible token gives q and k none
        assert key.endswith(("q_proj/4", "k_proj/4")) or seen[key][1].abs().max() > 0, key
    return seen


def assert_same(seen, plain):
    """To the bit: the operations are the same."""
    named = {key.replace(".block.", "."): pair for key, pair in seen.items()}
    assert named.keys() == plain.keys()
    for key, (a_NTI, g_NTO) in plain.items():
        assert torch.equal(named[key][0], a_NTI), f"a of {key}"
        assert torch.equal(named[key][1], g_NTO), f"g of {key}"


def hooks_of(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


@contextmanager
def untouched(module: nn.Module):
    """Assert that parameters, flags, modes, hooks and outputs are the same bits after as before."""

    def look():
        with torch.no_grad():
            logits = module(input_ids=TOKENS, use_cache=False).logits
        return logits, {k: v.clone() for k, v in module.state_dict().items()}, state_of(module), hooks_of(module)

    logits, weights, state, hooks = look()
    yield
    logits_after, weights_after, state_after, hooks_after = look()
    assert torch.equal(logits, logits_after)
    assert weights.keys() == weights_after.keys()
    assert all(torch.equal(weights[k], weights_after[k]) for k in weights)
    assert state == state_after
    assert hooks == hooks_after
    assert all(p.grad is None for p in module.parameters())


def test_plain_model_is_left_as_it_was():
    module = small_llama()
    with untouched(module):
        seen_by_hook(module)
    assert module.training
    assert not module.model.layers[1].mlp.up_proj.weight.requires_grad


def test_non_reentrant_checkpointing_gives_the_same(plain):
    module = checkpointed(small_llama(), use_reentrant=False)
    with untouched(module):
        before = [block.runs for block in module.model.layers]
        assert_same(seen_by_hook(module), plain)
        runs = [block.runs - first for block, first in zip(module.model.layers, before, strict=True)]
    assert runs == [1 + 2 + 2 * BATCHES] * 2, (
        "to see how the model ends; the check and each batch, forward and again backward"
    )
    assert all(isinstance(block, Checkpointed) for block in module.model.layers)


def test_layers_are_handed_over_while_checkpoints_are_still_computed_again():
    """What a layer needs is let go as soon as it is complete, not kept to the end of the backward pass."""
    module = checkpointed(small_llama(), use_reentrant=False)
    first, last = module.model.layers[0], module.model.layers[-1]

    class Watch(Recorder):
        def __call__(self, layer, a_NTI, g_NTO):
            super().__call__(layer, a_NTI, g_NTO)
            if layer.kind in (
                "gate_proj",
                "up_proj",
            ):  # down_proj gets its own before its block runs again
                assert last.runs - first.runs == layer.block, f"{layer.name} is handed over late"

    seen_by_hook(module, Watch())


def test_checkpointing_switched_on_by_transformers_gives_the_same(plain):
    module = small_llama()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    with untouched(module):
        assert_same(seen_by_hook(module), plain)
    assert module.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own advice for the reentrant kind
def test_reentrant_checkpointing_is_refused():
    module = checkpointed(small_llama(), use_reentrant=True)
    with untouched(module), pytest.raises(ModelError, match="use_reentrant=False"):
        seen_by_hook(module)


def whole(module):
    return torch.compile(module, backend="eager")


def blocks_in_place(module):
    for block in module.model.layers:
        block.compile(backend="eager")
    return module


compiles_whole = pytest.mark.skipif(OLD, reason="torch 2.6 does not compile a whole model of transformers 5")


@pytest.mark.parametrize("compiled", [pytest.param(whole, marks=compiles_whole), blocks_in_place])
def test_compiled_model_gives_the_same(compiled, plain):
    torch._dynamo.reset()
    module = compiled(small_llama())
    with untouched(module):  # compiles it, without any hook of ours
        assert_same(seen_by_hook(module), plain)
        assert_same(seen_by_hook(module), plain)


@compiles_whole
def test_compiled_model_stays_compiled():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = torch.compile(small_llama(), backend=backend)
    with torch.no_grad():
        module(input_ids=TOKENS, use_cache=False)
        compiled = len(graphs)
        seen_by_hook(module)
        assert len(graphs) == compiled > 0, "the hook had a graph compiled"
        module(input_ids=TOKENS, use_cache=False)
    assert len(graphs) == compiled, "the compiled graph was thrown away"


@pytest.mark.skipif(OLD, reason="torch 2.6 shards on accelerators only")
def test_sharded_model_gives_the_same(plain, tmp_path: Path):
    in_processes(2, shard_and_record, tmp_path)
    module = copy.deepcopy(small_llama())
    module(input_ids=TOKENS, use_cache=False).logits.square().sum().backward()
    wanted = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    for rank in range(2):
        flat = load_file(tmp_path / f"seen-{rank}")
        assert_same({key: (flat[f"{key}/0"], flat[f"{key}/1"]) for key in plain}, plain)
        grads = load_file(tmp_path / f"grads-{rank}")
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, msg=name)


def test_the_error_of_one_process_is_raised_on_all(tmp_path: Path):
    in_processes(2, fail_alone, tmp_path)
