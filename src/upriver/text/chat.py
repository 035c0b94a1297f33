"""A conversation as text, and what of it the assistant generates: its text, its tool calls, and what ends its turn."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from upriver.text.records import BadRowError, taught

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
    if not content and not messages[i].get("tool_calls"):
        return None
    before = head = upto = None
    if i:
        try:
            before, head = (_template(messages[:i], tokenizer, tools, reply=x) for x in (False, True))
            upto = _template(messages[: i + 1], tokenizer, tools)
        except BadRowError:  # a template need not take the beginning of a conversation
            head = None
    whole = head is not None and upto is not None and upto.startswith(head) and text.startswith(upto)
    start = len(head) if whole and head is not None and len(head) >= position else position
    if not (whole and head != before):  # there is no generation prompt: the header goes to where the content begins
        found = text.find(content, start) if content else -1
        if found < 0:
            shown = content or messages[i].get("tool_calls")
            raise BadRowError(f"the chat template does not show an answer of the assistant as it is: {shown!r:.60}")
        start = start if whole and not text[start:found].strip() else found
        if not whole or upto is None:
            end = found + len(content)
            return start, end + max((len(x) for x in specials if x and text.startswith(x, end)), default=0)
    assert upto is not None
    if content.split("</think>")[-1].strip() not in upto[start:]:  # thoughts may be set apart
        raise BadRowError(f"the chat template does not show an answer of the assistant as it is: {content!r:.60}")
    bare = upto.rstrip()
    return start, len(bare) if bare.endswith(specials) else len(upto)


def _marked(messages: Messages, tokenizer: Any, tools: Any, template: str) -> tuple[str, Spans]:
    try:
        given = {"tools": tools, "chat_template": template, "return_assistant_tokens_mask": True}
        rendered: Any = render_jinja_template([messages], **given, **tokenizer.special_tokens_map)
    except Exception as error:
        raise BadRowError(f"the chat template refuses the messages: {error}") from error
    texts, spans = rendered
    return str(texts[0]), [(start, end) for start, end in spans[0] if end > start]


def _template(messages: Messages, tokenizer: Any, tools: Any, reply: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=reply))
    except Exception as error:  # a template is a program of its own and may raise anything
        raise BadRowError(f"the chat template refuses the messages: {error}") from error
