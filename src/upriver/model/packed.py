"""Linear layers whose weights are held in 8 or 4 bits, as ``bitsandbytes`` has them.

Such a weight is frozen and its numbers are packed, so that neither its type nor its shape is that of the matrix.  The layer still
gives ``W a + b`` of the dequantised ``W_OI``, whose gradient is ``g a^T`` as ever: that is what is tracked.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upriver.errors import ModelError

NEEDED = "bitsandbytes", "accelerate"
OTHERWISE = "give the model in 16 or 32 bits, or in 8 or 4 bits of bitsandbytes"


def packed(module: nn.Module) -> bool:
    """Whether the numbers of a linear module's weight stand for others: they are whole, or have a state of quantisation."""
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or weight is None:
        return False
    return not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None


def any_packed(module: nn.Module) -> bool:
    return any(map(packed, module.modules()))


def floating(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are in floating point; packed ones may be stored as such and are not."""
    hidden = {id(m.weight) for m in module.modules() if packed(m)}
    return (p for p in module.parameters() if p.is_floating_point() and id(p) not in hidden)


def parameter_sizes(module: nn.Module) -> dict[Tensor, int]:
    """How many weights each parameter stands for."""
    sizes: dict[Tensor, int] = {p: p.numel() for p in module.parameters()}
    linear = (m for m in module.modules() if isinstance(m, nn.Linear) and packed(m))
    return sizes | {m.weight: m.out_features * m.in_features for m in linear}


def scales(module: nn.Module) -> dict[str, Tensor]:
    """What is kept beside packed weights, without which they mean nothing."""
    return {
        f"{name}.{key}": x
        for name, m in module.named_modules()
        if packed(m)
        for key, x in m.state_dict(keep_vars=True).items()
        if key not in m._parameters
    }


def rest_in(module: Any, dtype: torch.dtype) -> Any:
    """The module, with all that is not packed in ``dtype``: transformers leaves it as the checkpoint has it."""
    for p in floating(module):
        p.data = p.data.to(dtype)
    return module


def held_beside(module: nn.Module) -> list[Tensor]:
    """All tensors that belong to packed weights and are neither parameters nor buffers; codes of 8 bits stand there once more."""
    holders = [x for m in module.modules() if packed(m) for x in (m._parameters["weight"], getattr(m, "state", None))]
    codes = (getattr(x, "CB", None) for x in holders)
    return [*scales(module).values(), *(x for x in codes if x is not None)]


def held_in(modules: Iterable[nn.Module]) -> str:
    """How many of the tracked layers are packed and what that means; nothing where none is."""
    found = list(modules)
    linear = [m for m in found if isinstance(m, nn.Linear) and packed(m)]
    each = Counter(round(8 * m.weight.nbytes / (m.out_features * m.in_features)) for m in linear)
    parts = " and ".join(f"{count} of {len(found)} tracked layers are held in {b} bits" for b, count in each.items())
    return f"{parts}: influence is that of the dequantised weights" if parts else ""


def check_numbers(module: nn.Module) -> None:
    """Refuse weights that are tensors of ``torchao``, which have neither addresses nor gradients of their own."""
    for name, p in module.named_parameters():
        if type(p).__module__.startswith("torchao."):
            raise ModelError(
                f"weights quantised by torchao cannot be used: got {type(p).__name__} {name!r}; {OTHERWISE}"
            )


def packed_checkpoint(place: str) -> bool:
    """Whether the configuration of a model says that ``bitsandbytes`` packed its weights.

    Raises:
        ModelError: they are quantised in another way, or the package is not there; the sentence names it.
    """
    told = _quantisation(place)
    scheme = str(told.get("quant_method") or ("bitsandbytes" if told else ""))
    if scheme not in ("", "bitsandbytes"):
        raise ModelError(f"weights quantised by {scheme} cannot be used: got {place!r}; {OTHERWISE}")
    if scheme and not all(map(find_spec, NEEDED)):
        raise ModelError(
            f"the weights of {place!r} are quantised by bitsandbytes, which is not installed: pip install 'upriver[bnb]'"
        )
    return bool(scheme)


def _quantisation(place: str) -> dict[str, Any]:
    """``quantization_config`` of a model's configuration; nothing where there is none, or none that can be read."""
    from transformers import AutoConfig

    file = Path(place, "config.json")
    try:
        read = json.loads(file.read_text("utf-8")) if Path(place).exists() else None
        held = AutoConfig.from_pretrained(place, trust_remote_code=False).to_dict() if read is None else read
        told = held.get("quantization_config") or {}
        return told if isinstance(told, dict) else told.to_dict()
    except Exception:  # whoever loads the model says what is wrong with it
        return {}
