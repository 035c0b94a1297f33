"""The model's own answers to prompts."""

from typing import Any

import numpy as np
import torch

from upriver.errors import QueryError
from upriver.model.capture import frozen
from upriver.model.check import check_token
from upriver.model.model import Model
from upriver.text.queries import Queries


def greedy(model: Model, tokens_T: np.ndarray, most: int) -> str:
    """The text of at most ``most`` tokens, each the likeliest after what stands before; stops at an end token."""
    tokens = torch.as_tensor(np.asarray(tokens_T, np.int64), device=model.device)[None]
    told = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    ends = {model.tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])} - {None}
    with frozen(model.module), torch.no_grad():
        for _ in range(most):
            following = model.module(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if int(following) in ends:
                break
            tokens = torch.cat([tokens, following], 1)
    return _continuation(model.tokenizer, tokens[0].tolist(), len(tokens_T))


def _continuation(tokenizer: Any, tokens: list[int], prompt: int) -> str:
    """What the text grows by, where it can be told: tokens decoded alone may lose the space before them."""
    parts = (tokens[:prompt], tokens, tokens[prompt:])
    before, whole, after = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    return whole[len(before) :] if whole.startswith(before) else after


def complete(model: Model, queries: Queries, most: int) -> Queries:
    """Queries without a completion get the model's own greedy answer of at most ``most`` tokens, marked as such.

    Raises:
        QueryError: a prompt has no token, or prompt and answer together could be longer than the model takes.
    """
    answers, longest = {}, model.longest
    for i in queries.needs_completion:
        tokens_T, query = queries.prompt_tokens(i), queries.records[i]
        if not len(tokens_T):
            raise QueryError(
                f"{query.where}: the prompt of query {query.id!r} has no token that the model could go on from: "
                f"got {query.prompt!r}; write more of it, or give a completion"
            )
        check_token(model, int(tokens_T.max()), f"query {query.id!r}")
        if longest and len(tokens_T) + most > longest:
            raise QueryError(
                f"the prompt of query {query.id!r} leaves no room for an answer: got {len(tokens_T)} tokens and {most} "
                f"of the answer, the model takes {longest}; shorten one of them"
            )
        answers[query.id] = greedy(model, tokens_T, most)
    return queries.completed(answers)
