"""Refuse a checkpoint of which something else would be loaded than was trained."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upriver.errors import ModelError
from upriver.model.adapter import FILE

BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|rope_freqs\.weight)$")
SCALES = re.compile(
    r"(_scale_inv|_scales?|\.scales?|\.qweight|\.q?zeros|_zero_point|\.g_idx|absmax|quant_map|_packed|_blocks)$"
)
# heads that predict tokens
TOKENS = ("forcausallm", "lmheadmodel", "withlmhead", "model", "forconditionalgeneration")
OWN_LOSS = "for another loss than that of a language model, load it in Python and give up.Model(module, task=...)"


def check_folder(path: Path) -> None:
    """Refuse a folder without a model that holds the checkpoints of a training run, of a model or of an adapter.

    Raises:
        ModelError: it names the newest of them.
    """
    plain = (path / "config.json").exists()
    held = [x for x in path.glob("checkpoint-*") if x.name[11:].isdigit()]
    runs = [x for x in held if (x / "config.json").exists() or (x / FILE).exists()]
    if runs and not plain and not any(path.glob("*.gguf")):
        newest = str(max(runs, key=lambda x: int(x.name[11:])))
        raise ModelError(
            f"{str(path)!r} is the folder of a training run: got {len(runs)} checkpoints and no model beside them; "
            f"give one of them, the newest is {newest!r}"
        )


def check_taken(shown: str, module: Any, unexpected: Iterable[str]) -> None:
    """Refuse what was loaded if weights of the checkpoint were dropped, or if its configuration names another kind of head.

    Args:
        unexpected: keys of the checkpoint that the class of the model does not take.

    Raises:
        ModelError: it says what would be lost, and what to do.
    """
    made, named = type(module).__name__, [str(x) for x in getattr(module.config, "architectures", None) or []]
    lost = sorted(key for key in unexpected if not BUFFERS.search(key))
    other = [x for x in named if x.lower() != made.lower() and not x.lower().endswith(TOKENS)]
    scales = [key for key in lost if SCALES.search(key)]
    if scales:
        raise ModelError(
            f"the weights of {shown} are quantised and its configuration does not say how: {len(scales)} scales would be "
            f"dropped, the first is {scales[0]!r}; give it with its quantization_config, or the model before it was quantised"
        )
    if other:
        without = f", without {lost[0]!r}" if lost else ""
        raise ModelError(
            f"{shown} is not a causal language model: its configuration names {', '.join(other)} and it would be loaded as "
            f"{made}{without}; {OWN_LOSS}"
        )
    if lost:
        raise ModelError(
            f"the weights of {shown} do not fit its configuration: {len(lost)} of them have no place in {made} and "
            f"would be dropped, the first is {lost[0]!r}; give the configuration that they were saved with, with as many "
            "layers, or the weights of the language model alone, without further heads"
        )
