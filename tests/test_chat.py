"""What of a conversation carries loss: all that the assistant generates, by templates of five families, and nothing else."""

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import pytest

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import CorpusError
from upriver.text.chat import renderings
from upriver.text.corpus import Corpus
from upriver.text.watch import TooLongError, bounded

END = ["<|im_end|>", "<|eot|>", "</s>", "<eot>", "[/INST]"]
CHATML = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{% for m in messages %}[{{ m.role }}]

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}[assistant]

{% endif %}"""
MISTRAL = """{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>\
{% endif %}{% endfor %}"""
THOUGHTS = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}\
{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<eot>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
REASONED = """{% set ns = namespace(last=0) %}\
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>
{{ m.reasoning_content or '' }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED_THOUGHTS = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}\
{{ m.content if loop.last else m.content.split('</think>')[-1] }}<eot>{% endgeneration %}{% else %}{{ m.content }}<eot>\
{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TALK = [
    {"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and yes or no"}, {"role": "assistant", "content": "no"},
]  # fmt: skip
FAMILIES = {
    "chatml": (CHATML, ["yes<|im_end|>", "no<|im_end|>"]),
    "marked": (MARKED, ["yes<|im_end|>", "no<|im_end|>"]),
    "llama": (LLAMA, ["yes<|eot|>", "no<|eot|>"]),
    "mistral, without a generation prompt": (MISTRAL, [" yes</s>", " no</s>"]),
    "thoughts": (THOUGHTS, ["yes<eot>", "no<eot>"]),
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def tokenizer(template: str) -> Any:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": END})
    made.chat_template = template
    return made


def lost(messages: list[dict[str, Any]], template: str, tools: Any = None) -> list[str]:
    text, spans = renderings(messages, tokenizer(template), tools)[-1]
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_goes_to_the_token_that_ends_it(family):
    template, expected = FAMILIES[family]
    assert lost(TALK, template) == expected


def test_a_turn_whose_thoughts_are_left_out_later_is_a_text_of_its_own():
    thought = [TALK[0], {"role": "assistant", "content": "<think>so</think>yes"}, *TALK[2:]]
    texts = renderings(thought, tokenizer(THOUGHTS))
    assert [[text[a:b] for a, b in spans] for text, spans in texts] == [["<think>so</think>yes<eot>"], ["no<eot>"]]
    assert texts[0][0] == "<user>yes?<eot>\n<assistant><think>so</think>yes<eot>\n"
    assert "so" not in texts[1][0]
    last = [*TALK[:3], {"role": "assistant", "content": "<think>so</think>no"}]
    assert lost(last, THOUGHTS) == ["yes<eot>", "<think>so</think>no<eot>"]


def lost_in_turn(messages: list[dict[str, Any]], template: str) -> list[list[str]]:
    return [[text[a:b] for a, b in spans] for text, spans in renderings(messages, tokenizer(template))]


def test_marks_of_a_template_that_leaves_out_earlier_thoughts():
    thought = [TALK[0], {"role": "assistant", "content": "<think>so</think>yes"}, *TALK[2:]]
    assert lost_in_turn(thought, MARKED_THOUGHTS) == [["<think>so</think>yes<eot>"], ["no<eot>"]]
    assert lost_in_turn(TALK, MARKED_THOUGHTS) == [["yes<eot>", "no<eot>"]]


@pytest.mark.parametrize("weight", [0, 1])
def test_thoughts_in_a_field_carry_loss_where_the_template_shows_them(weight):
    """Each of the two in the conversation that ends with it; what the last one leaves of the first is not learned again."""
    first, last = TALK[1] | {"reasoning_content": "so", "weight": weight}, TALK[3] | {"reasoning_content": "well"}
    told = [["<think>\nso\n</think>\n\nyes<|im_end|>"]] * weight + [["<think>\nwell\n</think>\n\nno<|im_end|>"]]
    assert lost_in_turn([TALK[0], first, TALK[2], last], REASONED) == told
    assert lost_in_turn([TALK[0], first | {"weight": 1}, TALK[2], last], CHATML) == [["yes<|im_end|>", "no<|im_end|>"]]


def test_a_turn_without_thoughts_stays_in_its_conversation():
    """The template shows it with empty thoughts as long as it is the last; nothing of what it says is left out later."""
    assert lost_in_turn(TALK, REASONED) == [["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]]


def test_an_answer_that_a_question_holds_is_found_where_it_was_given():
    talk = [{"role": "user", "content": "say yes"}, *TALK[1:]]
    text, spans = renderings(talk, tokenizer(REASONED))[-1]
    assert text[: spans[0][0]].endswith("say yes<|im_end|>\n<|im_start|>assistant\n")


def test_turns_of_a_record_are_sequences_of_one_document(tmp_path):
    thought = [TALK[0], {"role": "assistant", "content": "<think>so</think>yes"}, *TALK[2:]]
    rows = [{"messages": thought, "topic": n} for n in range(2)]
    corpus = Corpus.read(write_jsonl(tmp_path / "chat.jsonl", rows), tokenizer(THOUGHTS))
    assert (corpus.n_documents, corpus.info["records"], len(corpus)) == (2, 2, 4)
    assert corpus.record_of_N.tolist() == [0, 0, 1, 1]
    assert [corpus.metadata(n)["topic"] for n in corpus.document_of_N] == [0, 0, 1, 1]
    assert [record.row["topic"] for record in corpus.records()] == [0, 1]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered", "marked"])
def test_tool_calls_carry_loss_and_what_tools_answer_does_not(template):
    talk = [TALK[0], CALL, {"role": "tool", "content": "yes"}, TALK[3]]
    assert lost(talk, template, [TOOL]) == ["<call>look</call><|im_end|>", "no<|im_end|>"]


def test_tools_go_to_every_render():
    text, _ = renderings([TALK[0], CALL], tokenizer(CHATML), [TOOL])[-1]
    assert text.startswith("<|im_start|>system\n[{")


@pytest.mark.parametrize("template", [CHATML, MARKED, LLAMA], ids=["rendered", "marked", "llama"])
@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}], ids=str)
def test_an_answer_of_weight_zero_carries_none(template, weight):
    found = lost([TALK[0], TALK[1] | weight, *TALK[2:]], template)
    assert [x.startswith("no") for x in found] == [True]


def test_records_with_tools_and_weights_are_read(tmp_path):
    rows = [
        {"messages": [TALK[0], CALL], "tools": [TOOL], "topic": "a"},
        {"messages": [TALK[0], CALL], "tools": json.dumps([TOOL])},
        {"messages": [TALK[0], TALK[1] | {"weight": 0}]},
        {"messages": [TALK[0], TALK[1] | {"weight": 0.5}]},
        {"messages": [TALK[0], CALL], "tools": "look"},
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    corpus = Corpus.read(path, tokenizer(CHATML), on_bad_record="skip")
    assert corpus.document_text(0) == corpus.document_text(1)
    assert '"look"' in corpus.document_text(0)
    said = [x["reason"] for x in corpus.info["skipped"]["first"]]
    wanted = ("has the weight 0", "is 0 or 1", "'tools' is not a list")
    assert [part for part, x in zip(wanted, said, strict=True) if part not in x] == []


def test_the_end_that_a_tokenizer_puts_behind_a_completion_carries_loss(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "the people", "completion": " of the union"}])
    read = [Corpus.read(path, byte_tokenizer(bos=True, eos=eos)).batch(np.arange(1)) for eos in (False, True)]
    without, behind = (batch.inputs["loss"][0] for batch in read)
    assert int(behind.sum()) == int(without.sum()) + 1
    assert bool(behind[-1])


def test_a_field_that_stands_twice_is_a_bad_record(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"id": "a", "text": "the people", "text": "of the union"}\n')
    with pytest.raises(CorpusError, match=r"twice\.jsonl:1: a JSON object has the field 'text' twice"):
        Corpus.read(path, byte_tokenizer())


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_for_ever_is_stopped():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS
    limit = resource.getrlimit(resource.RLIMIT_AS)
    start = time.monotonic()
    with pytest.raises(TooLongError), bounded(0.2):
        tokenizer.apply_chat_template([{"role": "user", "content": "we"}], tokenize=False)
    assert time.monotonic() - start < 5
    with bounded(0.2):  # and nothing of it comes later
        pass
    time.sleep(0.3)
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux")
@pytest.mark.parametrize("mark", ["", "q: {% generation %}the people{% endgeneration %}"])
def test_a_template_that_makes_endless_text_is_a_bad_record(tmp_path, monkeypatch, mark):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        mark + "{% if messages[0].content == 'LOOP' %}{{ 'x' * 100000000000 }}{% endif %}{{ messages[1].content }}"
    )
    turns = [[{"role": "user", "content": x}, {"role": "assistant", "content": "the people"}] for x in ("we", "LOOP")]
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": x} for x in turns])
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: the chat template makes more than 1 GB of text; mend the loop"):
        Corpus.read(path, tokenizer)
    assert Corpus.read(path, tokenizer, on_bad_record="skip").n_documents == 1
