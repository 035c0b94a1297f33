"""What a model is made of, for the plan: counted on a loaded module, or on one that a configuration alone describes."""

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from upriver.errors import ModelError
from upriver.kernels import LONGEST
from upriver.model.capture import capture, frozen
from upriver.model.experts import Expert
from upriver.model.head import hidden_states
from upriver.model.layers import (
    LINEAR,
    Layer,
    block_number,
    find_layers,
    layer_kind,
    probe,
    rows_seen,
    same_layers,
    weight_shape,
)
from upriver.model.model import Model, dtype_named
from upriver.model.packed import floating, packed, parameter_sizes
from upriver.model.parts import Part, is_vector, kept
from upriver.model.text_part import auto_class, text_config, told
from upriver.runtime.cost import Block, LayerSize, Shape, lowest_block
from upriver.text.batch import Batch, Sequences

PROBE_TOKENS = 8  # of a module without weights
BFLOAT16 = "bfloat16"

_SEEN: WeakKeyDictionary[nn.Module, dict[tuple, Shape]] = WeakKeyDictionary()


class Seen(NamedTuple):
    """What one forward pass showed."""

    inputs: dict[str, tuple[float, bool]]  # linear module -> multiplications, and whether a gradient goes on below it
    held: int  # bytes kept for the backward pass
    widest: int  # numbers a token


def module_shape(module: nn.Module, layers: list[Layer], tokens: int, forward: Callable[[], Any]) -> Shape:
    """Count a module by one forward pass over ``tokens`` positions."""
    seen = observe(module, layers, tokens, forward)
    attention, blocks = _attention_width(module), defaultdict(float)
    outside = {True: 0.0, False: 0.0}
    for name, (multiplications, back) in seen.inputs.items():
        block = block_number(name)
        if block is None:
            outside[back] += multiplications
        else:
            blocks[block] += multiplications
    for name, multiplications in _experts(module):
        blocks[block_number(name) or 0] += multiplications
    low = lowest_block(layers)
    passed = [(n, m) for n, (m, back) in seen.inputs.items() if back and block_number(n) == low]
    return Shape(
        layers=tuple(LayerSize(x.name, x.O, x.I, x.A_of, x.block, x.parts, x.rows, x.pool) for x in layers),
        blocks=tuple(Block(blocks[i], attention) for i in range(max(blocks, default=-1) + 1)),
        below=outside[False],
        head=outside[True],
        lowest=sum(m for _, m in passed) / blocks[low] if blocks[low] else 0.0,
        lowest_attention=any(layer_kind(module, n) == "attention" for n, _ in passed),
        parameters=sum(parameter_sizes(module).values()),
        activation=seen.held / tokens / next(floating(module)).element_size(),
        widest=seen.widest,
        vocabulary=_vocabulary(module),
    )


def model_shape(model: Model, layers: list[Layer], data: Sequences, dtypes: Collection[str] = ()) -> Shape:
    """The shape of a loaded model, seen on the sequence that takes the most memory for a token.

    This is the longest; with fused kernels the longest whose attention goes by blocks and keeps its probabilities, if there
    is one.  Each is looked at once in a process: a fit, a trace and their plans all ask.

    Args:
        dtypes: in which passes will compute, where it matters what a bfloat16 copy of the model holds.
    """
    if BFLOAT16 in dtypes and model.dtype != dtype_named(BFLOAT16):
        with model.computing_in(BFLOAT16) as copy:
            narrow = model_shape(copy, same_layers(layers, model.module, copy.module), data).activation
        return model_shape(model, layers, data)._replace(narrow=narrow)
    ascending = np.argsort(data.lengths_N, kind="stable")
    fused, few = _kernel(model) not in (None, "eager"), int((data.lengths_N <= LONGEST).sum())
    batch = data.batch(ascending[[max(0, few - 1) if fused else -1]])
    return batch_shape(model, layers, batch, lambda b: model.task.loss(model.module, b))


def batch_shape(model: Model, layers: list[Layer], batch: Batch, forward: Callable[[Batch], Tensor]) -> Shape:
    """The shape of a loaded model, seen while ``forward`` goes over ``batch``."""
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.module.modules())
    how = model.dtype, _kernel(model), checkpointing  # what decides how much a pass keeps may be switched meanwhile
    form = tuple((name, tuple(x.shape)) for name, x in batch.inputs.items())
    key = (tuple((x.name, x.A_of, x.parts, x.rows) for x in layers), form, model.n_parameters, *how)
    known = _SEEN.setdefault(model.module, {})
    if key not in known:
        batch = model.task.arranged(model.module, batch).to(model.device)
        with torch.no_grad(), frozen(model.module):
            forward(batch)  # the first pass runs the head whole
        tokens = len(batch.rows_N) * (model.task.positions(batch) or 1)
        tokens = int(sum(x.sum() for x in batch.masks)) or tokens
        known[key] = module_shape(model.module, layers, tokens, lambda: forward(batch))
    return known[key]


def _kernel(model: Model) -> str | None:
    """Of its attention; None where the module's configuration names none."""
    return getattr(getattr(model.module, "config", None), "_attn_implementation", None)


def config_only(path: str | Path) -> Path | None:
    """Where a configuration is, when there is one without weights beside it: a ``.json`` file, or a folder."""
    place = Path(path)
    if place.suffix == ".json" and place.is_file():
        return place
    weights = (
        [x for end in ("safetensors", "bin", "gguf", "pt") for x in place.glob(f"*.{end}")] if place.is_dir() else []
    )
    return place if not weights and (place / "config.json").is_file() else None


def config_shape(path: str | Path, spec: str, dtypes: Collection[str] = ()) -> tuple[str, Shape]:
    """The architecture and shape of a model of which only the configuration is there; nothing of its size is allocated.

    Args:
        path: a ``config.json``, or a folder with one.
        dtypes: as for :func:`model_shape`.

    Raises:
        ModelError: no configuration there, or a module that does not run without weights.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
        return _fake_shape(config, spec, dtypes)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds here
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(
            f"no model can be planned from the configuration alone at {str(path)!r}: {reason}; "
            "give a config.json of a causal language model, or the model itself"
        ) from error


def _fake_shape(config: Any, spec: str, dtypes: Collection[str]) -> tuple[str, Shape]:
    """Build and run the module with shapes alone; its experts may run in bfloat16 only, and it may have no fused attention.

    Of a model that sees too and looks at its tokens it is the text part, as a model of its own.
    """
    error: Exception = ModelError("it cannot be built")
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        how = ({"attn_implementation": "sdpa"}, {}, {"dtype": torch.bfloat16})
        configs = {id(x): x for x in (config, config.get_text_config())}.values()
        for given_config, options in ((x, options) for x in configs for options in how):
            auto = auto_class(given_config)
            try:
                with FakeTensorMode(), warnings.catch_warnings():
                    # experts look at addresses, of which torch 2.6 complains
                    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
                    module = auto.from_config(copy.deepcopy(given_config), **options)
                    shape = _run_fake(module, spec)
                    if BFLOAT16 in dtypes:
                        more = options | {"dtype": torch.bfloat16}
                        narrow = auto.from_config(copy.deepcopy(given_config), **more)
                        shape = shape._replace(narrow=_run_fake(narrow, spec).activation)
                    return type(module).__name__, shape
            except (ValueError, RuntimeError) as failed:
                error = failed
    finally:
        logger.setLevel(level)
    raise error


def _run_fake(module: Any, spec: str) -> Shape:
    head, tokens_1T = module.get_output_embeddings(), torch.zeros(1, PROBE_TOKENS, dtype=torch.int64)

    def forward() -> Tensor:
        return hidden_states(module, head, tokens_1T)

    with frozen(module):
        layers = probe(find_layers(module, spec), forward, PROBE_TOKENS, {})
    return module_shape(module, layers, PROBE_TOKENS, forward)


def observe(module: nn.Module, layers: list[Layer], tokens: int, forward: Callable[[], Any]) -> Seen:
    """Run ``forward`` as a captured pass does, and note what goes through the linear modules and what stays in memory.

    Memory is that of all storages kept for the backward pass, each once, parameters left out, with the inputs of the
    tracked layers; it does not depend on the device.
    """
    weights = {x.untyped_storage()._cdata for x in [*module.parameters(), *module.buffers()]}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # an address is used again once its tensor is gone
    inputs: dict[str, tuple[float, bool]] = {}
    widest = 0

    def keep(x: Tensor) -> Tensor:
        x, storage = x.detach(), x.untyped_storage()  # with its graph, a tensor that the graph keeps would keep itself
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(x)
        return x

    def note(name: str) -> Callable:
        def hook(m: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal widest
            a = kept(m, args, kwargs)
            O, I = weight_shape(m)
            before, back = inputs.get(name, (0.0, False))
            rows = rows_seen(m, a)
            rows = 0 if isinstance(m, Expert) else rows  # whose weights are counted as parameters
            inputs[name] = (before + rows * O * I / tokens, back or a.requires_grad)
            wide = max(O, I) if not isinstance(m, nn.Conv2d) else int(rows * O // tokens)
            widest = max(widest, wide) if layer_kind(module, name) else widest
            if name in tracked or packed(m):  # which keep it where no hook on saved tensors sees it
                keep(a.detach())

        return hook

    tracked = {n for n, m in module.named_modules() if any(m is t for x in layers for t in x.modules)}
    linear = [(n, m) for n, m in module.named_modules() if isinstance(m, LINEAR)]
    linear += [(x.name, m) for x in layers for m in x.modules if isinstance(m, Part) or is_vector(m)]
    tracked |= {x.name for x in layers}
    hooks = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in linear]
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    try:
        with capture(module, layers, lambda *_: None), torch.enable_grad(), saving:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(inputs, sum(sizes.values()), widest)


def _attention_width(module: Any) -> float:
    """Heads times the width of one; 0 for a module that does not say."""
    config = text_config(module)
    heads, hidden, width = (told(config, name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    return float(heads * width if heads and width else hidden or 0 if heads else 0)


def _experts(module: nn.Module) -> list[tuple[str, float]]:
    """Expert weights of three axes, which no linear module holds: a token goes through a few of them."""
    chosen = told(text_config(module), "num_experts_per_tok")
    held = [(n, p) for n, p in module.named_parameters() if p.ndim == 3 and "expert" in n]
    return [(n, p.numel() * min(1.0, (chosen or 1) / p.shape[0])) for n, p in held]


def _vocabulary(module: Any) -> int:
    find = getattr(module, "get_input_embeddings", None)
    weight = getattr(find() if find else None, "weight", None)
    return 1 if weight is None else int(weight.shape[0])
