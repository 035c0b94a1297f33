"""Text to tokens, with the place of every token in the text.

Axes: T tokens.  Only fast tokenizers know where in the text a token stands, so only they are accepted.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import ModelError
from upriver.runtime.artifact import digest


class Encoded(NamedTuple):
    """A text as tokens; token ``t`` stands for the characters ``cuts_C[t]`` to ``cuts_C[t + 1]``.

    The cuts partition the text exactly: what the tokenizer gives to no token (a trimmed space) goes to the next one,
    and of several tokens that share one character (the bytes of an emoji) the first holds it, the others nothing.
    """

    tokens_T: np.ndarray  # int64
    cuts_C: np.ndarray  # int64 [T + 1]
    starts_T: np.ndarray  # int64: where the tokenizer says the token starts; 0 for special tokens added by itself
    ends_T: np.ndarray  # int64: and ends
    special_T: np.ndarray  # bool: added by the tokenizer, not read from the text

    def pieces(self, text: str) -> list[str]:
        """The text of each token; joined they are the text."""
        return [text[start:end] for start, end in pairwise(self.cuts_C.tolist())]

    @property
    def is_empty(self) -> bool:
        """No token comes from the text."""
        return bool(self.special_T.all())


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special: bool = True) -> list[Encoded]:
    """Tokenise ``texts`` as ``tokenizer(text)`` does, special tokens included unless ``add_special`` is false.

    Raises:
        ModelError: the tokenizer does not tell character offsets.
    """
    require_offsets(tokenizer)
    encoded = tokenizer(
        list(texts),
        add_special_tokens=add_special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a document may be longer than the model's context: it is cut into windows afterwards
    )
    fields = zip(texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return [_encoded(*field) for field in fields]


def _encoded(text: str, tokens: list[int], offsets: list[tuple[int, int]], special: list[int]) -> Encoded:
    starts_T, ends_T = np.array(offsets, np.int64).reshape(-1, 2).T
    special_T = np.array(special, bool)
    cuts_C = np.zeros(len(tokens) + 1, np.int64)
    cuts_C[1:] = np.maximum.accumulate(ends_T)
    from_text = np.flatnonzero(~special_T)
    if len(from_text):
        cuts_C[from_text[-1] + 1 :] = len(text)
    return Encoded(np.array(tokens, np.int64), cuts_C, starts_T, ends_T, special_T)


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', '')!r} gives no character offsets: "
            f"got {type(tokenizer).__name__}, a slow one; "
            "save a fast tokenizer beside the model (AutoTokenizer.from_pretrained(..., use_fast=True)), with its tokenizer.json"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how text becomes tokens: vocabulary, merges, special tokens, chat template.

    Raises:
        ModelError: the tokenizer does not tell character offsets.
    """
    require_offsets(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    backend |= {"truncation": None, "padding": None}  # changed by calls, and never asked for here
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([backend, special, tokenizer.chat_template])


def largest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id that the tokenizer can produce."""
    return max(tokenizer.get_vocab().values())
