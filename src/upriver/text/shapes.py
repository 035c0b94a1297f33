"""The shapes of records that people have: what of a row is given, and what of it is learned (the table of ``docs/formats.md``).

Whatever its shape, a row becomes one of four things: a text; a prompt with its completion; messages (with tools, and with what
they are where the tokenizer has no chat template); or tokens, of which it is known which carry loss.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from upriver.text.reading import Reading

Row = dict[str, Any]
Messages = list[dict[str, Any]]
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message that a template may show
MASKS = ("completion_mask", "assistant_masks", "loss_mask")  # beside tokens: 1 where there is loss
MEAN = (
    "a record has text, or prompt and completion, or messages, or another shape of docs/formats.md; "
    "or name its fields with --text-field, or with --prompt-field and --completion-field"
)
PREFERENCE = (
    "of preference records the field 'chosen' is what is learned, and not the preference itself "
    "(--completion-field rejected takes the other)"
)
ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
ASKED = "instruction (and input) is the prompt and output what is learned, "
QUESTION = "question is the prompt and answer what is learned, "
CHAT = "as two turns of the chat template"


class BadRowError(Exception):
    """A row is not a record, or a record cannot become text; the message says why."""


class Plain(NamedTuple):
    """What becomes of messages where the tokenizer has no chat template."""

    prompt: str
    completion: str
    note: str


class Shape(NamedTuple):
    """What a row is."""

    parts: dict[str, Any]  # text; or prompt, completion; or messages, tools, plain; or tokens, loss
    fields: tuple[str, ...]  # of the row that are in them; the others are metadata
    note: str = ""  # what is said of it, once


def shaped(row: Row, reading: Reading) -> Shape:
    """Find the shape of a row, by the names of its fields.

    Raises:
        BadRowError: it has none, or a field does not hold what its name says.
    """
    have = {name for name, value in row.items() if value is not None}
    preferred = {"chosen", "rejected"} <= have and reading.prompt_field is None
    if reading.text_field:
        return _one(row, _named(row, reading.text_field, "text-field"))
    if (reading.prompt_field or reading.completion_field) and not (
        preferred and reading.completion_field in ("chosen", "rejected")
    ):
        prompt = _named(row, reading.prompt_field or "prompt", "prompt-field")
        return _pair(row, prompt, _named(row, reading.completion_field or "completion", "completion-field"))
    fits = [(needs, read) for needs, read in SHAPES if needs <= have]
    if not fits:
        lack = {"chosen": "rejected", "prompt": "completion", "completion": "prompt", "instruction": "output"}
        missing = next((f"the field {lack[name]!r} is missing" for name in lack if name in have), None)
        missing = missing or f"the field 'text' is missing: got the fields {', '.join(map(repr, row)) or 'none'}"
        raise BadRowError(f"{missing}; {MEAN}")
    shape = fits[0][1](row, reading)
    if (taken := next(iter(fits[0][0]))) in ("input_ids", "text") and len(fits) > 1:
        also = " and ".join(sorted(fits[1][0]))
        return shape._replace(
            note=f"records have {taken} and also {also}: all of {taken} is learned (leave it out to read the other)"
        )
    return shape


def is_record(row: Row) -> bool:
    """Whether the fields of an object are those of a record."""
    return any(needs <= row.keys() for needs, _ in SHAPES)


def _named(row: Row, name: str, flag: str) -> str:
    if row.get(name) is None:
        raise BadRowError(
            f"the field {name!r} is missing: got the fields {', '.join(map(repr, row)) or 'none'}; "
            f"name the one that is meant with --{flag}"
        )
    return name


def _one(row: Row, name: str) -> Shape:
    """A field that holds the whole of a record: a text, or a conversation."""
    if isinstance(row[name], str):
        return Shape({"text": text_of(name, row[name])}, (name,))
    return _chat(row, messages_of(name, row[name]), (name,))


def _pair(row: Row, prompt: str, completion: str) -> Shape:
    """Texts are joined as they are; where one of the two is a list of messages, a text is one turn."""
    first, second, fields = row[prompt], row[completion], (prompt, completion)
    if not any(isinstance(x, list | dict) for x in (first, second)):
        return Shape({"prompt": text_of(prompt, first, empty=True), "completion": text_of(completion, second)}, fields)
    return _chat(row, _turns(prompt, first, "user"), fields, _turns(completion, second, "assistant"))


def _turns(name: str, value: Any, role: str) -> Messages:
    return [{"role": role, "content": text_of(name, value)}] if isinstance(value, str) else messages_of(name, value)


def _chat(row: Row, messages: Messages, fields: tuple[str, ...], answer: Messages | None = None) -> Shape:
    """A conversation; where the ``answer`` stands apart, it alone carries loss."""
    system = row.get("system") if messages[:1] and messages[0]["role"] != "system" else None
    if system:
        messages, fields = [{"role": "system", "content": text_of("system", system)}, *messages], (*fields, "system")
    if answer is not None:
        said = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages]
        messages = [*({name: x for name, x in m.items() if name != "train"} for m in said), *answer]
    _check_answers(messages)
    parts: dict[str, Any] = {"messages": messages}
    if row.get("tools"):
        parts["tools"], fields = _tools(row["tools"]), (*fields, "tools")
    return Shape(parts, fields)


def _preference(row: Row, reading: Reading) -> Shape:
    name = "rejected" if reading.completion_field == "rejected" else "chosen"
    answer, other = row[name], row["chosen" if name == "rejected" else "rejected"]
    prompt = next((x for x in ("conversations", "prompt") if row.get(x) is not None), None)
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, str):
        if prompt:
            return _pair(row, prompt, name)._replace(note=PREFERENCE)
        shared = _common(text_of(name, answer), text_of("the other answer", other))
        return Shape({"prompt": answer[:shared], "completion": answer[shared:]}, (name,), PREFERENCE)
    full = messages_of(name, answer)
    before = _turns(prompt, row[prompt], "user") if prompt else []
    fields = (name,) if prompt is None else (prompt, name)
    if prompt is None or (full[0]["role"] != "assistant" and full[: len(before)] == before):  # answers hold it too
        pairs = zip(full, messages_of("the other answer", [other] if isinstance(other, dict) else other), strict=False)
        same = len(before) or next((i for i, (a, b) in enumerate(pairs) if a != b), len(full))
        before, full = full[:same], full[same:]
    if not full:
        raise BadRowError("the answers chosen and rejected are the same; leave the record out")
    return _chat(row, before, fields, full)._replace(note=PREFERENCE)


def _common(answer: str, other: str) -> int:
    """Characters that two texts begin with in common, back to the end of a word."""
    same = next((i for i, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), None)
    if same is None or not answer[same:].strip():
        raise BadRowError(
            "of the answers chosen and rejected one is the beginning of the other; give the field 'prompt'"
        )
    while same and not answer[same - 1].isspace():
        same -= 1
    return same - 1 if same and answer[same - 1] == " " else same  # a space goes with the word behind it


def _alpaca(row: Row, given: str, output: str) -> Shape:
    asked, answer = text_of("instruction", row["instruction"]), text_of(output, row[output])
    more = text_of(given, row[given], empty=True) if row.get(given) else ""
    fields = ("instruction", given, output)
    turns: Messages = [{"role": "user", "content": f"{asked}\n{more}" if more else asked}]
    if row.get("history"):  # pairs of earlier turns
        fields = (*fields, "history")
        try:
            earlier = [(text_of("history", a), text_of("history", b)) for a, b in row["history"]]
        except (TypeError, ValueError):
            raise BadRowError("the field 'history' is not a list of pairs of texts; leave it out") from None
        turns = [*({"role": r, "content": x} for p in earlier for r, x in zip(TURN, p, strict=True)), *turns]
    shape = _chat(row, [*turns, {"role": "assistant", "content": answer}], fields)
    preface = "Below is an instruction that describes a task"
    preface += ", paired with an input that provides further context. " if more else ". "
    preface = f"{row['system']}\n\n### Instruction:\n" if row.get("system") else preface + ALPACA
    prompt = f"{preface}{asked}\n\n" + (f"### Input:\n{more}\n\n" if more else "") + "### Response:\n"
    if not row.get("history"):
        shape.parts["plain"] = Plain(prompt, answer, ASKED + "in Alpaca's own prompt (docs/formats.md)")
    return shape._replace(note=ASKED + CHAT)


def _question(row: Row, _: Reading) -> Shape:
    asked, answer = text_of("question", row["question"]), text_of("answer", row["answer"])
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    shape = _chat(row, turns, ("question", "answer"))
    note = QUESTION + "written as 'Question: ..', 'Answer: ..'"
    shape.parts["plain"] = Plain(f"Question: {asked}\nAnswer:", f" {answer}", note)
    return shape._replace(note=QUESTION + CHAT)


def _tokens(row: Row, _: Reading) -> Shape:
    """Ids of tokens, with what is padding and what carries no loss; labels are those of the ids themselves, not shifted."""
    fields = tuple(name for name in ("input_ids", "labels", "attention_mask", *MASKS) if row.get(name) is not None)
    found = {name: _whole_numbers(name, row[name]) for name in fields}
    ids = found["input_ids"]
    for name, x in found.items():
        if len(x) != len(ids):
            raise BadRowError(f"{name!r} is not as long as 'input_ids': got {len(x)} and {len(ids)} numbers")
    labels, real = found.get("labels", ids), found.get("attention_mask", np.ones(len(ids))) != 0
    lost = labels != -100
    wrong = np.flatnonzero(lost & (labels != ids))
    if len(wrong):
        t = int(wrong[0])
        raise BadRowError(
            f"'labels' are the ids themselves, or -100 where there is no loss: got {labels[t]} at place {t}, where the id "
            f"is {ids[t]}; do not shift them"
        )
    for name in MASKS:
        lost &= found.get(name, ids + 1) != 0
    at = np.flatnonzero(real)
    if not len(at) or not real[at[0] : at[-1] + 1].all():
        raise BadRowError("'attention_mask' has a gap, or nothing in it; give each sequence in a record of its own")
    return Shape({"tokens": ids[real], "loss": lost[real]}, fields)


def _whole_numbers(name: str, value: Any) -> np.ndarray:
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.empty((0, 0))
    if found.ndim != 1 or found.dtype.kind not in "iub" or not len(found):
        raise BadRowError(f"the field {name!r} is not a list of whole numbers: got {value!r:.60}")
    return found.astype(np.int64)


TURN = ("user", "assistant")
SHAPES: tuple[tuple[set[str], Callable[[Row, Reading], Shape]], ...] = (
    ({"input_ids"}, _tokens),
    ({"text"}, lambda row, _: Shape({"text": text_of("text", row["text"])}, ("text",))),
    ({"prompt", "completion"}, lambda row, _: _pair(row, "prompt", "completion")),
    ({"chosen", "rejected"}, _preference),
    ({"messages"}, lambda row, _: _chat(row, messages_of("messages", row["messages"]), ("messages",))),
    ({"conversations"}, lambda row, _: _chat(row, messages_of("conversations", row["conversations"]), ("conversations",))),
    ({"instruction", "output"}, lambda row, _: _alpaca(row, "input", "output")),
    ({"instruction", "response"}, lambda row, _: _alpaca(row, "context", "response")),
    ({"question", "answer"}, _question),
)  # fmt: skip


# ---- fields


def text_of(name: str, value: Any, empty: bool = False) -> str:
    """A field that is a text.

    Raises:
        BadRowError: it is none, or is ``empty`` where it may not be, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise BadRowError(f"the field {name!r} is not a text: got {value!r:.60}")
    check_unicode(name, value)
    if not empty and not value.strip():
        raise BadRowError(f"the field {name!r} is empty: got {value!r:.60}")
    return value


def messages_of(name: str, value: Any) -> Messages:
    """Messages with ``role`` and ``content``, also of those that have ``from`` and ``value``.

    Raises:
        BadRowError: something else.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a table holds them
        value = _parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise BadRowError(f"the field {name!r} is not a list of objects: got {value!r:.60}")
    return [_message(message) for message in value]


def _message(given: dict[str, Any]) -> dict[str, Any]:
    # a template may ask whether there is a content: it is there, and null, beside tool calls
    message = {name: x for name, x in given.items() if x is not None or name == "content"}
    if "from" in message and "role" not in message:
        message = _of_sharegpt(message)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(x, dict) and isinstance(x.get("text"), str) for x in content):
        message["content"] = "".join(x["text"] for x in content)
    answers = message.get("role") == "assistant"
    called = answers and (message.get("tool_calls") or any(message.get(x) for x in REASONING))
    for name in ("role", "content"):
        if not isinstance(message.get(name), str) and not (called and message.get(name) is None):
            raise BadRowError(f"a message has no text as its {name!r}: got {given!r:.60}")
        check_unicode(name, message.get(name) or "")
    return message


def _of_sharegpt(given: dict[str, Any]) -> dict[str, Any]:
    role = ROLES.get(str(given["from"]).lower())
    if role is None:
        raise BadRowError(
            f"a message is from somebody unknown: got {given['from']!r:.60}; known are {', '.join(ROLES)}"
        )
    message = {name: x for name, x in given.items() if name not in ("from", "value")}
    if given["from"] != "function_call":
        return {"role": role, "content": given.get("value"), **message}
    calls = _parsed(given.get("value"))
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in calls):
        raise BadRowError(f"a function call is not JSON with name and arguments: got {given.get('value')!r:.60}")
    return {
        "role": role,
        "content": None,
        "tool_calls": [{"type": "function", "function": x} for x in calls],
        **message,
    }


def _check_answers(messages: Messages) -> None:
    answers = [
        m
        for m in messages
        if m["role"] == "assistant"
        and ((m.get("content") or "").strip() or m.get("tool_calls") or any(m.get(x) for x in REASONING))
    ]
    if not answers:
        raise BadRowError("no message of the role 'assistant' has a content; its answer is what is learned")
    if not sum(taught(m) for m in answers):  # each is looked at
        raise BadRowError("every answer of the assistant has the weight 0; leave the record out")


def taught(message: dict[str, Any]) -> bool:
    """Whether an answer carries loss: not with ``weight: 0`` or ``train: false``."""
    given = {name: message[name] for name in ("weight", "train") if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRowError(f"the field {name!r} of a message is 0 or 1, or false or true: got {value!r:.60}")
    return all(given.values())


def _tools(tools: Any) -> list[Any]:
    found = _parsed(tools) if isinstance(tools, str) else tools
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise BadRowError(f"the field 'tools' is not a list of objects: got {tools!r:.60}")
    return found


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def check_unicode(name: str, value: str) -> None:
    if fault := half_pair(name, value):
        raise BadRowError(fault)


def half_pair(name: str, value: str) -> str | None:
    """Say what is wrong with a field that holds half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        return f"the field {name!r} holds half of a surrogate pair: got {half!r}; write both halves or neither"
    return None
