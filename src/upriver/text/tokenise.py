"""Text and records become tokens here, which know where they stand in their text and whether they carry loss.

Axes: T tokens.  Only fast tokenizers know where in the text a token stands, so only they are accepted.
Plain text: every token carries loss.  Prompt and completion are joined, and a token carries loss when it ends beyond the
prompt, or ends the text.  Messages are rendered with the tokenizer's chat template; what the assistant generates carries loss.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import CorpusError, ModelError
from upriver.runtime.artifact import digest
from upriver.text.chat import render
from upriver.text.pieces import PIECE, Cutter, cutter
from upriver.text.records import BadRecords, BadRowError, Record, size_of
from upriver.text.sources import LARGEST, TOO_LARGE

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 2 * PIECE
Spans = list[tuple[int, int]]  # of characters; None where they would be the whole text


class Encoded(NamedTuple):
    """A text was cut into tokens; token ``t`` stands for the characters ``cuts_C[t]`` to ``cuts_C[t + 1]``.

    The cuts partition the text exactly: what the tokenizer gives to no token (a trimmed space) goes to the next one,
    and of several tokens that share one character (the bytes of an emoji) the first holds it, the others nothing.
    """

    tokens_T: np.ndarray  # int64
    cuts_C: np.ndarray  # int64 [T + 1]; positions in a long text are int32
    starts_T: np.ndarray  # int64: where the tokenizer says the token starts; 0 for special tokens added by itself
    ends_T: np.ndarray  # int64: and ends
    special_T: np.ndarray  # bool: added by the tokenizer, not read from the text

    def pieces(self, text: str) -> list[str]:
        """Return the text of each token; joined they are the text."""
        return [text[start:end] for start, end in pairwise(self.cuts_C.tolist())]

    @property
    def is_empty(self) -> bool:
        """Tell whether no token comes from the text."""
        return bool(self.special_T.all())


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special: bool = True, piece: int = PIECE
) -> list[Encoded]:
    """Tokenise ``texts`` as ``tokenizer(text)`` does, special tokens included unless ``add_special`` is false.

    A long text is tokenised in pieces, which give the same tokens, where its tokenizer allows it (`pieces`).

    Raises:
        ModelError: the tokenizer does not tell character offsets.
    """
    require_offsets(tokenizer)
    cut = cutter(tokenizer) if any(len(text) > 2 * piece for text in texts) else None
    ends = [cut.ends(text, piece) if cut else [len(text)] for text in texts]
    short = [text[: end[0]] for text, end in zip(texts, ends, strict=True)]
    encoded = tokenizer(
        short,
        add_special_tokens=add_special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a document may be longer than the model's context: it is cut into windows afterwards
    )
    found = []
    fields = zip(short, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    for text, tokens, offsets, special in fields:
        starts_T, ends_T = np.array(offsets, np.int64).reshape(-1, 2).T
        special_T = np.array(special, bool)
        cuts_C = _cuts(ends_T, special_T, len(text))
        found.append(Encoded(np.array(tokens, np.int64), cuts_C, starts_T, ends_T, special_T))
    return [
        _go_on(first, text, end, cut) if cut and len(end) > 1 else first
        for first, text, end in zip(found, texts, ends, strict=True)
    ]


def _go_on(first: Encoded, text: str, ends: list[int], cut: Cutter) -> Encoded:
    """Tokenise the further pieces of a long text behind its first; what the tokenizer puts behind a text comes last."""
    own = np.flatnonzero(~first.special_T)
    last = int(own[-1]) + 1 if len(own) else len(first.tokens_T)
    parts = [(first.tokens_T[:last], first.starts_T[:last].astype(np.int32), first.ends_T[:last].astype(np.int32))]
    for start, end in pairwise(ends):
        found = cut.later.encode(text[start:end], add_special_tokens=False)
        offsets_T2 = np.array(found.offsets, np.int32).reshape(-1, 2) + np.int32(start)
        parts.append((np.array(found.ids, np.int64), *offsets_T2.T))
    parts.append((first.tokens_T[last:], first.starts_T[last:].astype(np.int32), first.ends_T[last:].astype(np.int32)))
    tokens_T, starts_T, ends_T = (np.concatenate(x) for x in zip(*parts, strict=True))
    special_T = np.zeros(len(tokens_T), bool)
    special_T[: min(last, len(first.special_T))] = first.special_T[:last]
    special_T[len(tokens_T) - len(first.tokens_T) + last :] = True
    return Encoded(tokens_T, _cuts(ends_T, special_T, len(text)), starts_T, ends_T, special_T)


def _cuts(ends_T: np.ndarray, special_T: np.ndarray, length: int) -> np.ndarray:
    """Where each token of a text begins, and where the last one ends."""
    cuts_C = np.zeros(len(ends_T) + 1, ends_T.dtype)
    cuts_C[1:] = np.maximum.accumulate(ends_T)
    from_text = np.flatnonzero(~special_T)
    if len(from_text):
        cuts_C[from_text[-1] + 1 :] = length
    return cuts_C


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', '')!r} gives no character offsets: "
            f"got {type(tokenizer).__name__}, a slow one; "
            "save a fast tokenizer beside the model (AutoTokenizer.from_pretrained(..., use_fast=True)), with its tokenizer.json"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that decides how text becomes tokens: vocabulary, merges, special tokens, chat template.

    Raises:
        ModelError: the tokenizer does not tell character offsets.
    """
    require_offsets(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    backend |= {"truncation": None, "padding": None}  # changed by calls, and never asked for here
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([backend, special, tokenizer.chat_template])


def largest_token(tokenizer: PreTrainedTokenizerBase, added: bool = True) -> int:
    """Return the largest token id that the tokenizer can produce, or can without the tokens that were ``added`` to it."""
    left_out = {} if added else tokenizer.added_tokens_decoder
    return max((i for i in tokenizer.get_vocab().values() if i not in left_out), default=0)


class Document(NamedTuple):
    """A document is a record that was tokenised."""

    record: Record
    text: str  # as tokenised
    special: bool  # special tokens were added; a chat template brings its own
    encoded: Encoded
    loss_T: np.ndarray  # bool


def documents(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, bad: BadRecords
) -> Iterator[list[Document]]:
    """Tokenise records, in chunks; one without a token of its own, or of too much text, is a bad record."""
    for chunk in _chunks(records, tokenizer, bad):
        encoded = {
            special: iter(encode(tokenizer, [text for _, text, added, _ in chunk if added == special], special))
            for special in {added for _, _, added, _ in chunk}
        }
        good = []
        for record, text, special, answers in chunk:
            tokens = next(encoded[special])
            if tokens.is_empty:
                bad.report(record.where, f"the text tokenises to nothing: got {text!r:.60}")
                continue
            loss_T = np.full(len(tokens.tokens_T), answers is None)
            for start, end in answers or ():
                loss_T |= (tokens.ends_T > start) & (tokens.starts_T < end)
            if special and answers:  # the end that the tokenizer puts behind an answer is one that the model gives
                loss_T[len(loss_T) - int(np.argmin(tokens.special_T[::-1])) :] = True
            good.append(Document(record, text, special, tokens, loss_T))
        yield good


def _chunks(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, bad: BadRecords
) -> Iterator[list[tuple[Record, str, bool, Spans | None]]]:
    """Collect a bounded number of documents and, but for the last of each list, of characters, those of further fields too.

    A document is a record, its text, whether the tokenizer adds special tokens, and what of the text carries loss.
    """
    chunk, n_characters = [], 0
    for record in records:
        try:
            text, special, answers = _prepare(record, tokenizer)
        except BadRowError as reason:
            bad.report(record.where, str(reason))
            continue
        if len(text.encode()) > LARGEST:
            bad.report(record.where, TOO_LARGE)
            continue
        chunk.append((record, text, special, answers))
        n_characters += len(text) + size_of(record.metadata)
        if len(chunk) == CHUNK_DOCUMENTS or n_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, n_characters = [], 0
    if chunk:
        yield chunk


def _prepare(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool, Spans | None]:
    parts = record.parts
    if "text" in parts:
        return parts["text"], True, None
    if "prompt" in parts:
        text = parts["prompt"] + parts["completion"]
        return text, True, [(len(parts["prompt"]), len(text))]
    if not tokenizer.chat_template:
        what = f"{record.where}: a record has messages, and the tokenizer has no chat template to render them"
        raise CorpusError(f"{what}; give records with prompt and completion, or a tokenizer with a chat template")
    text, answers = render(parts["messages"], tokenizer, parts.get("tools"))
    return text, False, answers  # a template brings its own special tokens
