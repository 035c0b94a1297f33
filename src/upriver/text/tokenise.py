"""Records to tokens: which text is tokenised, and which of its tokens carry loss.

Plain text: every token.  Prompt and completion: joined, and a token carries loss when it ends beyond the prompt.
Messages: rendered with the tokenizer's chat template, and the tokens of the assistant's contents carry loss.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import CorpusError
from upriver.text.encode import Encoded, encode
from upriver.text.records import BadRecords, Record
from upriver.text.sources import LARGEST, TOO_LARGE

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1_000_000


class Document(NamedTuple):
    """A record as tokens."""

    record: Record
    text: str  # as tokenised
    special: bool  # special tokens were added; a chat template brings its own
    encoded: Encoded
    loss_T: np.ndarray  # bool


class _Prepared(NamedTuple):
    record: Record
    text: str
    special: bool
    answers: list[tuple[int, int]] | None  # character spans that carry loss; None: everything


def documents(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, bad: BadRecords
) -> Iterator[list[Document]]:
    """The records as tokens, in chunks; one without a token of its own or of too much text is a bad one."""
    for chunk in _chunks(_prepared(records, tokenizer, bad)):
        encoded = _encode_chunk(chunk, tokenizer)
        good = []
        for prepared, tokens in zip(chunk, encoded, strict=True):
            if tokens.is_empty:
                bad.report(prepared.record.where, f"the text tokenises to nothing: got {prepared.text!r:.60}")
            else:
                good.append(_document(prepared, tokens))
        yield good


def _prepared(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, bad: BadRecords) -> Iterator[_Prepared]:
    for record in records:
        try:
            prepared = _prepare(record, tokenizer)
        except _TemplateError as reason:
            bad.report(record.where, str(reason))
            continue
        if len(prepared.text.encode()) > LARGEST:
            bad.report(record.where, TOO_LARGE)
        else:
            yield prepared


def _prepare(record: Record, tokenizer: PreTrainedTokenizerBase) -> _Prepared:
    parts = record.parts
    if "text" in parts:
        return _Prepared(record, parts["text"], True, None)
    if "prompt" in parts:
        text = parts["prompt"] + parts["completion"]
        return _Prepared(record, text, True, [(len(parts["prompt"]), len(text))])
    if not tokenizer.chat_template:
        raise CorpusError(
            f"{record.where}: a record has messages, and the tokenizer has no chat template to render them; "
            "give records with prompt and completion, or a tokenizer with a chat template"
        )
    text, answers = render(parts["messages"], tokenizer)
    return _Prepared(record, text, False, answers)


class _TemplateError(Exception):
    """Why a conversation cannot be rendered."""


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character span of each content of the assistant in it."""
    text = _template(messages, tokenizer)
    position, answers = 0, []
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant":
            position = max(position, _head(text, messages[:index], tokenizer))
        start = text.find(content, position)
        if start < 0 and message["role"] == "assistant":
            raise _TemplateError(
                f"the chat template does not show an answer of the assistant as it is: {content!r:.60}"
            )
        if start >= 0:
            position = start + len(content)
        if content and message["role"] == "assistant":
            answers.append((start, position))
    return text, answers


def _head(text: str, before: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Where an answer begins, if the template renders the messages before it to a beginning of the whole text."""
    try:
        head = _template(before, tokenizer, reply=True) if before else ""
    except _TemplateError:
        return 0
    return len(head) if text.startswith(head) else 0


def _template(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, reply: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
    except Exception as error:  # a template is a program of its own and may raise anything
        raise _TemplateError(f"the chat template refuses the messages: {error}") from error


def _chunks(items: Iterable[_Prepared]) -> Iterator[list[_Prepared]]:
    """Lists of a bounded number of documents and, but for the last document of each, of characters."""
    items = iter(items)
    for first in items:
        chunk, n_characters = [first], len(first.text)
        while len(chunk) < CHUNK_DOCUMENTS and n_characters < CHUNK_CHARACTERS:
            following = next(items, None)
            if following is None:
                break
            chunk.append(following)
            n_characters += len(following.text)
        yield chunk


def _encode_chunk(chunk: list[_Prepared], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    encoded: dict[int, Encoded] = {}
    for special in (True, False):
        which = [i for i, prepared in enumerate(chunk) if prepared.special == special]
        if which:
            found = encode(tokenizer, [chunk[i].text for i in which], special)
            encoded |= dict(zip(which, found, strict=True))
    return [encoded[i] for i in range(len(chunk))]


def _document(prepared: _Prepared, encoded: Encoded) -> Document:
    if prepared.answers is None:
        loss_T = np.ones(len(encoded.tokens_T), bool)
    else:
        loss_T = np.zeros(len(encoded.tokens_T), bool)
        for start, end in prepared.answers:
            loss_T |= (encoded.ends_T > start) & (encoded.starts_T < end)
    return Document(prepared.record, prepared.text, prepared.special, encoded, loss_T)
