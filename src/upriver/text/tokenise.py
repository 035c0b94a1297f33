"""Text and records become tokens here, which know where they stand in their text and whether they carry loss.

Axes: T tokens.  Only fast tokenizers know where in the text a token stands, so only they are accepted.
Plain text: every token carries loss.  Prompt and completion are joined, and a token carries loss when it ends beyond the
prompt, or ends the text.  Messages are rendered with the tokenizer's chat template; what the assistant generates carries loss.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import CorpusError, ModelError
from upriver.runtime.artifact import digest
from upriver.text.chat import renderings
from upriver.text.records import BadRecords, Record
from upriver.text.shapes import BadRowError
from upriver.text.sources import LARGEST, TOO_LARGE

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1_000_000
UNKNOWN, LONGEST = "\ufffd", 16  # what stands for bytes that are no character yet; tokens that one may be made of
Spans = list[tuple[int, int]]  # of characters; None where they would be the whole text


class Encoded(NamedTuple):
    """A text was cut into tokens; token ``t`` stands for the characters ``cuts_C[t]`` to ``cuts_C[t + 1]``.

    The cuts partition the text exactly: what the tokenizer gives to no token (a trimmed space) goes to the next one,
    and of several tokens that share one character (the bytes of an emoji) the first holds it, the others nothing.
    """

    tokens_T: np.ndarray  # int64
    cuts_C: np.ndarray  # int64 [T + 1]
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
    found = []
    fields = zip(texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    for text, tokens, offsets, special in fields:
        starts_T, ends_T = np.array(offsets, np.int64).reshape(-1, 2).T
        special_T = np.array(special, bool)
        cuts_C = np.zeros(len(tokens) + 1, np.int64)
        cuts_C[1:] = np.maximum.accumulate(ends_T)
        from_text = np.flatnonzero(~special_T)
        if len(from_text):
            cuts_C[from_text[-1] + 1 :] = len(text)
        found.append(Encoded(np.array(tokens, np.int64), cuts_C, starts_T, ends_T, special_T))
    return found


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


class Text(NamedTuple):
    """A text of a record, before it is tokenised; or tokens, which have been."""

    record: Record
    text: str
    special: bool | None  # the tokenizer adds special tokens; a chat template brings its own; None: tokens as they came
    answers: Spans | None  # what of it carries loss; None: all
    note: str  # what is said of it, once
    encoded: Encoded | None = None


class Document(NamedTuple):
    """A document is a text that was tokenised: of a record, of a part of one, or of a turn of its conversation."""

    record: Record
    text: str  # as tokenised
    special: bool | None  # as of `Text`
    encoded: Encoded
    loss_T: np.ndarray  # bool
    note: str
    doubled: bool  # it begins with two start tokens


def documents(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, bad: BadRecords
) -> Iterator[list[Document]]:
    """Tokenise records, in chunks; one without a token of its own, or of too much text, is a bad record."""
    for chunk in _chunks(records, tokenizer, bad):
        encoded = {
            special: iter(encode(tokenizer, [x.text for x in chunk if x.special == special], special))
            for special in {x.special for x in chunk if x.special is not None}
        }
        good = []
        for x in chunk:
            tokens = x.encoded or next(encoded[bool(x.special)])
            if tokens.is_empty:
                bad.report(x.record.where, f"the text tokenises to nothing: got {x.text!r:.60}")
                continue
            good.append(
                Document(x.record, x.text, x.special, tokens, _loss(x, tokens), x.note, _doubled(tokens, tokenizer))
            )
        yield good


def _loss(given: Text, encoded: Encoded) -> np.ndarray:
    if given.special is None:
        return given.record.parts["loss"]
    loss_T = np.full(len(encoded.tokens_T), given.answers is None)
    for start, end in given.answers or ():
        loss_T |= (encoded.ends_T > start) & (encoded.starts_T < end)
    if given.special and given.answers:  # the end that the tokenizer puts behind an answer is one that the model gives
        loss_T[len(loss_T) - int(np.argmin(encoded.special_T[::-1])) :] = True
    return loss_T


def _doubled(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its start token before a text that begins with it."""
    start = [tokenizer.bos_token_id] * 2
    return bool(encoded.special_T[0]) and encoded.tokens_T[:2].tolist() == start and not encoded.special_T[1]


def _chunks(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, bad: BadRecords) -> Iterator[list[Text]]:
    """Collect a bounded number of texts and, but for the last of each list, of characters."""
    chunk, n_characters, decoder = [], 0, Decoder(tokenizer)
    for record in records:
        try:
            texts = _prepare(record, tokenizer, decoder)
        except BadRowError as reason:
            bad.report(record.where, str(reason))
            continue
        if any(len(x.text.encode()) > LARGEST for x in texts):
            bad.report(record.where, TOO_LARGE)
            continue
        chunk += texts
        n_characters += sum(len(x.text) for x in texts)
        if len(chunk) >= CHUNK_DOCUMENTS or n_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, n_characters = [], 0
    if chunk:
        yield chunk


def _prepare(record: Record, tokenizer: PreTrainedTokenizerBase, decoder: "Decoder") -> list[Text]:
    parts, note = record.parts, record.note
    if "tokens" in parts:
        encoded = decoder.decoded(parts["tokens"])
        return [Text(record, encoded[0], None, None, note, encoded[1])]
    if "text" in parts:
        return [Text(record, parts["text"], True, None, note)]
    if "plain" in parts and not tokenizer.chat_template:
        plain = parts["plain"]
        return [_answered(record, plain.prompt, plain.completion, plain.note)]
    if "prompt" in parts:
        return [_answered(record, parts["prompt"], parts["completion"], note)]
    if not tokenizer.chat_template:
        what = f"{record.where}: a record has messages, and the tokenizer has no chat template to render them"
        raise CorpusError(f"{what}; give records with prompt and completion, or a tokenizer with a chat template")
    found = renderings(parts["messages"], tokenizer, parts.get("tools"))
    return [Text(record, text, False, answers, note) for text, answers in found]


def _answered(record: Record, prompt: str, completion: str, note: str) -> Text:
    text = prompt + completion
    return Text(record, text, True, [(len(prompt), len(text))], note)


class Decoder:
    """Tokens as text, each with its piece of it, as `Encoded` says; pieces are looked up once.

    A model may have more tokens than its tokenizer: those are shown by their ids, and refused where the model has no such row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.largest = tokenizer, largest_token(tokenizer)
        self.pieces: dict[int, str] = {}

    def decoded(self, tokens_T: np.ndarray) -> tuple[str, Encoded]:
        """The text of tokens.

        Raises:
            BadRowError: an id that no vocabulary of such a size has.
        """
        low, high, most = int(tokens_T.min()), int(tokens_T.max()), 2 ** (16 if self.largest < 2**16 else 32) - 1
        if low < 0 or high > most:
            raise BadRowError(
                f"the id of a token is not from 0 to {most}, as a vocabulary of {self.largest + 1:,} needs: got "
                f"{low if low < 0 else high}; give the tokenizer that made the tokens"
            )
        self._look_up(np.unique(tokens_T).tolist())
        found, t, tokens = [], 0, tokens_T.tolist()
        while t < len(tokens):
            piece, n = self.pieces[tokens[t]], 1
            while UNKNOWN in piece and n < LONGEST and t + n < len(tokens):  # bytes of a character that goes on
                n += 1
                piece = self._decode(tokens[t : t + n])
            found += [piece, *[""] * (n - 1)]
            t += n
        cuts_C = np.cumsum([0, *map(len, found)], dtype=np.int64)
        nothing = np.zeros(len(tokens), bool)
        return "".join(found), Encoded(tokens_T, cuts_C, cuts_C[:-1], cuts_C[1:], nothing)

    @cached_property
    def before(self) -> list[int]:
        return self.tokenizer.encode("a", add_special_tokens=False)[-1:]

    def _decode(self, tokens: list[int]) -> str:
        """As after another token: at the start of a text some decoders drop a space."""
        backend: Any = self.tokenizer.backend_tokenizer  # pyright: ignore
        before = self.before
        whole, head = (backend.decode(x, skip_special_tokens=False) for x in ([*before, *tokens], before))
        return whole[len(head) :] if whole.startswith(head) else backend.decode(tokens, skip_special_tokens=False)

    def _look_up(self, tokens: list[int]) -> None:
        for token in tokens:
            if token not in self.pieces:
                self.pieces[token] = self._decode([token]) if token <= self.largest else f"<{token}>"
