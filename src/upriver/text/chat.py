"""A conversation as text, and what of it the assistant generates: its text, its tool calls, and what ends its turn."""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from upriver.text.shapes import REASONING, BadRowError, taught
from upriver.text.watch import MORE, SECONDS, TooLongError, bounded

Spans = list[tuple[int, int]]
Messages = list[dict[str, Any]]
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(NamedTuple):
    """The conversation that is rendered: what the template, the tokenizer and its tools make of the messages."""

    messages: Messages
    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None

    @property
    def turns(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def upto(self, i: int) -> "Conversation":
        """The conversation as it was when message ``i`` had been said."""
        return self._replace(messages=self.messages[: i + 1])


def renderings(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None
) -> list[tuple[str, Spans]]:
    """Render a conversation as texts, and find in each the characters of the assistant's turns that carry loss.

    There is one text, and before it a text for each turn that it does not show in full, as where a template leaves out earlier
    thoughts: the conversation up to that turn, with loss on the turn alone, which is how the model came to say it.

    A template that marks the turns (``{% generation %}``) is followed.  Else a turn goes from the generation prompt to its end,
    by rendering what stands before and up to it; where the template then renders something else, the answer is looked up as it
    stands, with the special token behind it.

    Raises:
        BadRowError: the chat template refuses the messages, or does not show an answer as it is.
    """
    talk = Conversation(messages, tokenizer, tools)
    text, spans = _spans(talk)
    if spans is None or all(_shows(text, spans.get(i), messages[i]) for i in talk.turns if taught(messages[i])):
        return [_whole(talk, text, spans)]
    found, kept = [], []
    for i in (i for i in talk.turns if taught(messages[i])):
        own_text, own = (text, spans) if i == len(messages) - 1 else _spans(talk.upto(i))
        span, own_span = spans.get(i), (own or {}).get(i)
        if _shown(own_text, own_span, messages[i]) > _shown(text, span, messages[i]):
            assert own_span
            found.append((own_text, [own_span]))
        elif span:
            kept.append(span)
        elif _generated(messages[i]):
            raise _unseen(messages[i])
    return [*found, (text, kept)] if kept else found


def prompted(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> str:
    """Render what stands before an answer that is still to be given, up to where the assistant begins.

    Raises:
        BadRowError: the chat template refuses the messages.
    """
    return _template(Conversation(messages, tokenizer, tools), reply=True)


def _whole(talk: Conversation, text: str, spans: dict[int, tuple[int, int]] | None) -> tuple[str, Spans]:
    messages = talk.messages
    weighed = {i: taught(messages[i]) for i in talk.turns}
    if spans is None:
        marked = _marked(talk)[1]
        if not all(weighed.values()):
            raise BadRowError(
                f"which of the answers carry loss cannot be told: got {len(weighed)} of them and {len(marked)} marks of the "
                "chat template; leave out the answers of weight 0, or give each a mark"
            )
        return text, marked
    for i in talk.turns:
        if i not in spans and weighed[i] and _generated(messages[i]):
            raise _unseen(messages[i])
    return text, [span for i, span in spans.items() if weighed[i]]


def _unseen(message: dict[str, Any]) -> BadRowError:
    shown = (message.get("content") or "").strip() or message.get("tool_calls") or _generated(message)
    return BadRowError(f"the chat template does not show an answer of the assistant as it is: {shown!r:.60}")


def _generated(message: dict[str, Any]) -> list[str]:
    """The pieces of what the assistant generated: thoughts, answer, names of what it calls."""
    texts = [message.get(name) for name in REASONING] + (message.get("content") or "").split("</think>")
    calls = [
        called.get("name")
        for call in message.get("tool_calls") or ()
        if isinstance(called := call.get("function") or call, dict)
    ]
    pieces = (x.replace("<think>", "").strip() for x in (*texts, *calls) if isinstance(x, str))
    return [x for x in pieces if x]


def _shown(text: str, span: tuple[int, int] | None, message: dict[str, Any]) -> int:
    return sum(piece in text[span[0] : span[1]] for piece in _generated(message)) if span else 0


def _shows(text: str, span: tuple[int, int] | None, message: dict[str, Any]) -> bool:
    return _shown(text, span, message) == len(_generated(message))


def _spans(talk: Conversation) -> tuple[str, dict[int, tuple[int, int]] | None]:
    """The text, and the characters of each turn that it shows; None where marks and turns cannot be told apart."""
    if MARK.search(talk.tokenizer.get_chat_template(tools=talk.tools)):
        text, marked = _marked(talk)
        return text, dict(zip(talk.turns, marked, strict=True)) if len(marked) == len(talk.turns) else None
    text, position, spans = _template(talk), 0, {}
    known = (*talk.tokenizer.all_special_tokens, *talk.tokenizer.added_tokens_decoder.values())
    specials = tuple(map(str, known))
    for i in talk.turns:
        if span := _turn(text, talk.upto(i), position, specials):
            spans[i], position = span, span[1]
    return text, spans


def _turn(text: str, talk: Conversation, position: int, specials: tuple[str, ...]) -> tuple[int, int] | None:
    """The characters of the last message in the text, in which it begins from ``position`` on; None where it is not shown."""
    message = talk.messages[-1]
    content = (message.get("content") or "").strip()
    if not _generated(message):
        return None
    start, end, prompted = _rendered(text, talk) or (position, None, False)
    start = max(start, position)
    if not prompted or end is None:  # a header may go before the answer, or the text goes on otherwise
        after = start if prompted else _after_questions(text, talk, start)
        found = text.find(content, after) if content else -1
        if found < 0 and "</think>" in content:
            content = content.split("</think>")[-1].strip()
            found = text.find(content, after) if content else -1
        if found < 0:
            return None
        if end is None:
            end = found + len(content)
            end += max((len(x) for x in specials if x and text.startswith(x, end)), default=0)
            return start if prompted else found, end
        start = found if text[start:found].strip() else start
    if content.split("</think>")[-1].strip() not in text[start:end]:  # thoughts may be set apart
        return None
    bare = text[:end].rstrip()
    return start, len(bare) if bare.endswith(specials) else len(text[:end])


def _after_questions(text: str, talk: Conversation, position: int) -> int:
    """Where, from ``position`` on, what others said right before the last message ends: they may have said the same."""
    for message in talk.messages[max((0, *talk.turns[:-1])) : -1]:
        said = (message.get("content") or "").strip() if message["role"] in ("user", "tool") else ""
        found = text.find(said, position)
        position = found + len(said) if found >= 0 else position
    return position


def _rendered(text: str, talk: Conversation) -> tuple[int, int | None, bool] | None:
    """Where the last of the messages begins and ends in the text, if it ends so, and whether a generation prompt goes before it;
    None where the template renders the beginning of the conversation otherwise."""
    if len(talk.messages) == 1:
        return None
    try:
        before, head = (_template(talk.upto(len(talk.messages) - 2), reply) for reply in (False, True))
        upto = _template(talk)
    except BadRowError:  # a template need not take the beginning of a conversation
        return None
    if upto.startswith(head) and text.startswith(upto):
        return len(head), len(upto), head != before
    return (len(head), None, True) if head != before and text.startswith(head) else None


def _marked(talk: Conversation) -> tuple[str, Spans]:
    template = talk.tokenizer.get_chat_template(tools=talk.tools)
    try:
        given: Any = {"tools": talk.tools, "chat_template": template, "return_assistant_tokens_mask": True}
        with bounded():
            rendered: Any = render_jinja_template([talk.messages], **given | talk.tokenizer.special_tokens_map)
    except Exception as error:
        raise _refused(error) from error
    texts, spans = rendered
    return str(texts[0]), [(start, end) for start, end in spans[0] if end > start]


def _template(talk: Conversation, reply: bool = False) -> str:
    how = {"tools": talk.tools, "tokenize": False, "add_generation_prompt": reply}
    try:
        with bounded():
            return str(talk.tokenizer.apply_chat_template(talk.messages, **how))
    except Exception as error:  # a template is a program of its own and may raise anything
        raise _refused(error) from error


def _refused(error: Exception) -> BadRowError:
    if isinstance(error, TooLongError):
        return BadRowError(f"the chat template did not end within {SECONDS:.0f} seconds; mend the loop in it")
    if isinstance(error, MemoryError):
        return BadRowError(f"the chat template makes more than {MORE >> 30} GB of text; mend the loop in it")
    return BadRowError(f"the chat template refuses the messages: {error}")
