"""A conversation as text, and what of it the assistant generates: its text, its tool calls, and what ends its turn."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from upriver.text.records import BadRowError, taught
from upriver.text.watch import MORE, SECONDS, TooLongError, bounded

Spans = list[tuple[int, int]]
Messages = list[dict[str, Any]]
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> tuple[str, Spans]:
    """Render a conversation as text, and find the characters of each of the assistant's turns that carries loss.

    A template that marks them (``{% generation %}``) is followed.  Else a turn goes from the generation prompt to its end, by
    rendering what stands before and up to it; where the template then renders something else, as one that leaves out earlier
    thoughts does, the answer is looked up as it stands, with the special token behind it.

    Raises:
        BadRowError: the chat template refuses the messages, or does not show an answer as it is.
    """
    template = tokenizer.get_chat_template(tools=tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if MARK.search(template):
        text, marked = _marked(messages, tokenizer, tools, template)
        weighed = [taught(messages[i]) for i in turns]
        if len(marked) != len(turns) and not all(weighed):
            raise BadRowError(
                f"which of the answers carry loss cannot be told: got {len(turns)} of them and {len(marked)} marks of the chat "
                "template; leave out the answers of weight 0, or give each a mark"
            )
        return text, [span for i, span in enumerate(marked) if all(weighed) or weighed[i]]
    text, position, spans = _template(messages, tokenizer, tools), 0, []
    specials = tuple(map(str, (*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values())))
    for i in turns:
        span = _turn(text, messages, i, position, tokenizer, tools, specials)
        if span:
            position = span[1]
            spans += [span] if taught(messages[i]) else []
    return text, spans


def _turn(
    text: str, messages: Messages, i: int, position: int, tokenizer: PreTrainedTokenizerBase, tools: Any,
    specials: tuple[str, ...],
) -> tuple[int, int] | None:  # fmt: skip
    content = (messages[i].get("content") or "").strip()
    shown = content or messages[i].get("tool_calls")
    if not shown:
        return None
    unseen = BadRowError(f"the chat template does not show an answer of the assistant as it is: {shown!r:.60}")
    start, end, prompted = _rendered(text, messages[: i + 1], tokenizer, tools) or (position, None, False)
    start = max(start, position)
    if not prompted:  # a header may go before the answer
        found = text.find(content, start) if content else -1
        if found < 0:
            raise unseen
        if end is None:
            end = found + len(content)
            return found, end + max((len(x) for x in specials if x and text.startswith(x, end)), default=0)
        start = found if text[start:found].strip() else start
    if content.split("</think>")[-1].strip() not in text[start:end]:  # thoughts may be set apart
        raise unseen
    bare = text[:end].rstrip()
    return start, len(bare) if bare.endswith(specials) else len(text[:end])


def _rendered(text: str, messages: Messages, tokenizer: Any, tools: Any) -> tuple[int, int | None, bool] | None:
    """Where the last of the messages begins and ends in the text, and whether a generation prompt goes before it; None where the
    template renders the beginning of the conversation otherwise."""
    if len(messages) == 1:
        return None
    try:
        before, head = (_template(messages[:-1], tokenizer, tools, reply=x) for x in (False, True))
        upto = _template(messages, tokenizer, tools)
    except BadRowError:  # a template need not take the beginning of a conversation
        return None
    return (len(head), len(upto), head != before) if upto.startswith(head) and text.startswith(upto) else None


def _marked(messages: Messages, tokenizer: Any, tools: Any, template: str) -> tuple[str, Spans]:
    try:
        given = {"tools": tools, "chat_template": template, "return_assistant_tokens_mask": True}
        with bounded():
            rendered: Any = render_jinja_template([messages], **given, **tokenizer.special_tokens_map)
    except Exception as error:
        raise _refused(error) from error
    texts, spans = rendered
    return str(texts[0]), [(start, end) for start, end in spans[0] if end > start]


def _template(messages: Messages, tokenizer: Any, tools: Any, reply: bool = False) -> str:
    try:
        with bounded():
            return str(
                tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=reply)
            )
    except Exception as error:  # a template is a program of its own and may raise anything
        raise _refused(error) from error


def _refused(error: Exception) -> BadRowError:
    if isinstance(error, TooLongError):
        return BadRowError(f"the chat template did not end within {SECONDS:.0f} seconds; mend the loop in it")
    if isinstance(error, MemoryError):
        return BadRowError(f"the chat template makes more than {MORE >> 30} GB of text; mend the loop in it")
    return BadRowError(f"the chat template refuses the messages: {error}")
