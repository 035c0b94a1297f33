"""A question as it is given is checked here field by field, and a chat becomes the text of its prompt and of its answer.

A question is a prompt with a completion, as texts or as the messages of a chat; or a direction in what a layer makes of a text.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from upriver.errors import QueryError
from upriver.text.chat import prompted, renderings
from upriver.text.records import jsonable
from upriver.text.shapes import BadRowError, half_pair

FIELDS = ("id", "prompt", "completion", "contrast", "messages", "tools", "group", "direction", "layer")
RESERVED = ("sequence", "document", "part", "start", "end", "sequences")  # columns of the result's tables
LARGEST_DIRECTION = 16 << 20  # bytes of a file that holds one
Messages = list[dict[str, Any]]


class Chat(NamedTuple):
    """The turns that go before an answer; and the answer with its contrasts, where these are turns too and no texts."""

    turns: Messages
    answer: dict[str, Any] | None
    contrasts: tuple[dict[str, Any], ...]
    tools: list[Any] | None


class Direction(NamedTuple):
    """What is measured is the mean of ``vector . hidden_states[layer]`` over the tokens of the prompt."""

    vector_H: np.ndarray  # float32
    layer: int
    name: str  # of its file, for messages


@dataclass(frozen=True)
class Query:
    """One question, or one member of a set; it has no ``completion`` while the model's own answer is still to be generated.

    Of a chat, ``prompt``, ``completion`` and ``contrasts`` are known once a chat template has rendered them.
    """

    id: str
    prompt: str
    completion: str | None
    contrasts: tuple[str, ...]
    where: str  # file and line, for messages
    generated: bool = False  # the completion is the model's own greedy answer
    group: str | None = None  # the set that it is a member of
    labels: dict[str, Any] = field(default_factory=dict)  # its further fields
    chat: Chat | None = None
    direction: Direction | None = None
    given: dict[str, Any] = field(default_factory=dict)  # the known fields, as they were given

    @property
    def unanswered(self) -> bool:
        return self.completion is None and self.direction is None and (self.chat is None or self.chat.answer is None)

    @property
    def column(self) -> str:
        """The question that it belongs to: its set, or itself."""
        return self.id if self.group is None else self.group

    def again(self) -> dict[str, Any]:
        """Return the fields that the same query is made of, with the model's own answer where it gave one."""
        answer = {"completion": self.completion} if self.generated else {}
        group = {} if self.group is None else {"group": self.group}
        return {"id": self.id, **group, **self.given, **answer, **self.labels}


def checked_query(fields: dict[str, Any], where: str, complete: bool, beside: Path | None = None) -> Query:
    """Check one query.

    Args:
        complete: it may lack its completion.
        beside: the folder that the path of a direction starts from, where there is such a file.

    Raises:
        QueryError: it cannot be used; the message begins with ``where``.
    """
    _no_near_miss(fields, where)
    name = checked_id(fields.get("id"), where)
    group = None if fields.get("group") in (None, "") else checked_id(fields["group"], where, "group")
    known = {key: fields[key] for key in FIELDS[1:] if key != "group" and fields.get(key) is not None}
    given = {key: value if key == "direction" else jsonable(value) for key, value in known.items()}
    labels = {str(key): jsonable(value) for key, value in fields.items() if key not in FIELDS}
    if {"direction", "layer"} & given.keys():
        query = _directed(name, given, where, beside)
    elif "messages" in given or isinstance(given.get("prompt"), list):
        query = _chat(name, given, where)
    else:
        query = _plain(name, given, where)
    if query.unanswered and not complete:
        raise QueryError(no_completion(where, name))
    return dataclasses.replace(query, group=group, labels=labels)


def no_completion(where: str, name: str) -> str:
    what = f"{where}: query {name!r} has no completion"
    return f"{what}; give one, or add --complete N to take the model's own answer of at most N tokens"


def checked_id(value: Any, where: str, what: str = "id") -> str:
    """Return the id of a query as a text.

    Raises:
        QueryError: neither a text nor a whole number, or one that cannot name a column of the results.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer) or value == "":
        article = "an id" if what == "id" else f"a name as its {what}"
        raise QueryError(f"{where}: a query needs {article}: got {value!r}; give a text or a whole number")
    if str(value) in RESERVED:
        name = f"{where}: the {what} {value!r} is the name of a column of the results"
        raise QueryError(f"{name}; choose another than {', '.join(RESERVED)}")
    _text(str(value), what, where)
    return str(value)


def _no_near_miss(fields: dict[str, Any], where: str) -> None:
    """Refuse a field that is nearly a known one: it would be kept as a label, and what it says passed over."""
    for name in (str(name) for name in fields if name not in FIELDS):
        plain = name.strip().lower()
        near = [plain] if plain in FIELDS else get_close_matches(plain, [x for x in FIELDS if len(x) > 2], 1, 0.8)
        if near:
            what = f"{where}: a query has no such field: got {name!r}"
            raise QueryError(f"{what}; did you mean {near[0]!r}? (a label of your own needs another name)")


def _plain(name: str, given: dict[str, Any], where: str) -> Query:
    prompt, completion = (_text(given.get(field), field, where) for field in ("prompt", "completion"))
    if not prompt and not completion:
        raise QueryError(f"{where}: query {name!r} has neither a prompt nor a completion; give at least a completion")
    if "tools" in given:
        raise QueryError(f"{where}: query {name!r} has tools and no messages; tools go to a chat template")
    contrasts = tuple(_contrasts(name, given, where))
    return Query(name, prompt or "", completion or None, contrasts, where, given=given)


def _contrasts(name: str, given: dict[str, Any], where: str) -> list[Any]:
    """The second completions, whether one was given or a list of them."""
    found = given.get("contrast")
    if found is None:
        return []
    single = not isinstance(found, list) or (found and all(isinstance(x, dict) for x in found))
    several = [found] if single else found
    if not several or "" in several or [] in several:
        raise QueryError(f"{where}: the contrast of query {name!r} is empty; give a second completion, or leave it out")
    return [x if isinstance(x, list) else _text(x, "contrast", where) for x in several]


def _directed(name: str, given: dict[str, Any], where: str, beside: Path | None) -> Query:
    if missing := {"direction", "layer", "prompt"} - given.keys():
        what = f"{where}: query {name!r} asks for a direction and has no {', '.join(sorted(missing))}"
        raise QueryError(f"{what}; give direction (a .npy file), layer (as in hidden_states) and a prompt")
    if extra := {"completion", "contrast", "messages", "tools"} & given.keys():
        what = f"{where}: query {name!r} asks for a direction, which is measured on the prompt alone"
        raise QueryError(f"{what}: got {', '.join(sorted(extra))}; leave it out")
    prompt, layer, direction = _text(given["prompt"], "prompt", where), given["layer"], given["direction"]
    number = int(layer) if str(layer).isdecimal() and not isinstance(layer, bool) else 0
    if number < 1:
        what = f"{where}: the layer of query {name!r} is a whole number from 1: got {layer!r}"
        raise QueryError(f"{what}; 1 is what the first block makes, as in hidden_states")
    if isinstance(direction, str | Path):
        path = Path(direction)
        path = beside / path if beside and (beside / path).is_file() else path
        vector_H, source = _vector(path, where), str(path)
        direction = str(path.resolve())
    else:
        vector_H, source = np.asarray(direction), f"the direction of query {name!r}"
        direction = vector_H.tolist()
    if vector_H.ndim != 1 or vector_H.dtype.kind not in "fiu" or not np.isfinite(vector_H).all() or not vector_H.any():
        what = f"{where}: {source} holds no direction: got numbers of type {vector_H.dtype} and shape {list(vector_H.shape)}"
        raise QueryError(f"{what}; give one vector [H] of finite numbers that are not all zero")
    asked = Direction(vector_H.astype(np.float32), number, source)
    given = given | {"direction": direction, "layer": number}
    return Query(name, prompt or "", None, (), where, direction=asked, given=given)


def _vector(path: Path, where: str) -> np.ndarray:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_DIRECTION:
            raise ValueError("no such file" if not path.exists() else "not a file of one vector")
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        what = f"{where}: the direction cannot be read: got {path} ({' '.join(str(error).split())[:100]})"
        raise QueryError(f"{what}; give a .npy file that holds one vector [H]") from error


def _text(value: Any, field: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise QueryError(f"{where}: the field {field!r} is not a text: got {value!r:.200}")
    if fault := half_pair(field, value or ""):
        raise QueryError(f"{where}: {fault}")
    return value


# ---- chats


def _chat(name: str, given: dict[str, Any], where: str) -> Query:
    completion = given.get("completion")
    if "messages" in given and "prompt" in given:
        raise QueryError(f"{where}: query {name!r} has messages and a prompt; give one of them")
    turns = _messages(
        given.get("messages", given.get("prompt")), "messages" if "messages" in given else "prompt", where
    )
    answer = None
    if isinstance(completion, list):
        answer, completion = _answer(completion, "completion", where), None
    elif completion is not None:
        completion = _text(completion, "completion", where) or None
    if turns[-1]["role"] == "assistant":
        if answer or completion:
            what = (
                f"{where}: query {name!r} has two answers: its last message is the assistant's, and it has a completion"
            )
            raise QueryError(f"{what}; leave one of them out")
        *turns, answer = turns
        if not turns:
            raise QueryError(f"{where}: query {name!r} has no message before the answer; give what it answers")
    contrasts: list[Any] = _contrasts(name, given, where)
    contrasts = [_answer(x, "contrast", where) if isinstance(x, list) else x for x in contrasts]
    if answer is None and any(isinstance(x, dict) for x in contrasts):
        what = f"{where}: the contrast of query {name!r} is a message and its completion is none"
        raise QueryError(f"{what}; give both as messages, or both as texts")
    if answer is not None:
        contrasts = [{"role": "assistant", "content": x} if isinstance(x, str) else x for x in contrasts]
    tools = _objects(given["tools"], "tools", where) if given.get("tools") else None
    chat = Chat(turns, answer, tuple(contrasts) if answer else (), tools)
    texts = () if answer else tuple(contrasts)
    return Query(name, "", completion, texts, where, chat=chat, given=given)


def _objects(value: Any, field: str, where: str) -> list[Any]:
    try:  # a cell of a table may hold them as a text
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(x, dict) for x in found):
        raise QueryError(f"{where}: the field {field!r} is not a list of objects: got {value!r:.60}")
    return found


def _messages(value: Any, field: str, where: str) -> Messages:
    found = _objects(value, field, where)
    for message in found:
        called = message.get("role") == "assistant" and message.get("tool_calls")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str) and not (called and message.get(name) is None):
                raise QueryError(f"{where}: a message has no text as its {name!r}: got {message!r:.60}")
            _text(message.get(name) or "", name, where)
    return [{name: x for name, x in m.items() if x is not None or name == "content"} for m in found]


def _answer(value: list[Any], field: str, where: str) -> dict[str, Any]:
    if not all(isinstance(x, dict) for x in value):
        raise QueryError(f"{where}: the field {field!r} is not a text: got {value!r:.200}")
    found = _messages(value, field, where)
    if len(found) != 1 or found[0]["role"] != "assistant":
        what = f"{where}: the {field} of a chat is one message of the assistant: got {[m['role'] for m in found]}"
        raise QueryError(f"{what}; put what goes before it into the prompt")
    return found[0]


def rendered(query: Query, tokenizer: PreTrainedTokenizerBase) -> Query:
    """Give a chat its texts, by the tokenizer's chat template; any other query is returned as it is.

    The prompt goes up to where the assistant begins (the generation prompt), and its answer is all that it then generates: its
    text, its tool calls, and the token that ends its turn.

    Raises:
        QueryError: the tokenizer has no chat template, or the template does not take the messages or show the answer.
    """
    chat = query.chat
    if chat is None:
        return query
    if not tokenizer.chat_template:
        what = f"{query.where}: query {query.id!r} is a chat, and the tokenizer has no chat template to render it"
        raise QueryError(f"{what}; give prompt and completion as texts, or a tokenizer with a chat template")
    try:
        if chat.answer is None:
            prompt = prompted(chat.turns, tokenizer, chat.tools)
            return dataclasses.replace(query, prompt=prompt)
        (prompt, answer), *others = [_turn(chat, x, tokenizer) for x in (chat.answer, *chat.contrasts)]
    except BadRowError as reason:
        raise QueryError(f"{query.where}: {reason}; change the messages, or give the texts themselves") from reason
    if any(before != prompt for before, _ in others):
        what = (
            f"{query.where}: the chat template renders the prompt of query {query.id!r} otherwise before its contrast"
        )
        raise QueryError(f"{what}; give prompt, completion and contrast as texts")
    return dataclasses.replace(query, prompt=prompt, completion=answer, contrasts=tuple(text for _, text in others))


def _turn(chat: Chat, answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What goes before an answer, and what of the text the assistant generates."""
    before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in chat.turns]
    text, spans = renderings([*before, answer], tokenizer, chat.tools)[-1]
    if not spans:
        raise BadRowError(f"the chat template does not show the answer as it is: {answer!r:.60}")
    start, end = spans[-1]
    return text[:start], text[start:end]
