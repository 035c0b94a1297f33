"""The model's own answer to a prompt."""

from typing import Any

import numpy as np
import torch

from upriver.model.capture import frozen
from upriver.model.load import Model


def greedy(model: Model, tokens_T: np.ndarray, most: int) -> str:
    """The text of at most ``most`` tokens, each the likeliest after what stands before; stops at an end token."""
    tokens = torch.as_tensor(np.asarray(tokens_T, np.int64), device=model.device)[None]
    ends = _end_tokens(model)
    with frozen(model.module), torch.no_grad():
        for _ in range(most):
            following = model.module(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if int(following) in ends:
                break
            tokens = torch.cat([tokens, following], 1)
    return _continuation(model.tokenizer, tokens[0].tolist(), len(tokens_T))


def _continuation(tokenizer: Any, tokens: list[int], prompt: int) -> str:
    """What the text grows by: tokens decoded alone may lose the space before them."""
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:prompt], tokens))
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(tokens[prompt:], skip_special_tokens=True)


def _end_tokens(model: Model) -> set[int]:
    config = getattr(model.module, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    found = listed if isinstance(listed, list) else [listed]
    return {t for t in [*found, model.tokenizer.eos_token_id] if t is not None}
