"""Every shape of records that people have: what of it is learned, and what is said of it."""

import json

import numpy as np
import pytest

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import ConfigError, CorpusError
from upriver.text.corpus import Corpus

CHATML = """{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
<call>{{ c.function.name }}</call>{% endfor %}<eos>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
PLAIN, CHAT = byte_tokenizer(), byte_tokenizer()
CHAT.chat_template = CHATML
USER, ANSWER = {"role": "user", "content": "who"}, {"role": "assistant", "content": "the people"}
OTHER = {"role": "assistant", "content": "the war"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))


def read(tmp_path, rows, tokenizer=CHAT, **how) -> Corpus:
    return Corpus.read(write_jsonl(tmp_path / "c.jsonl", rows), tokenizer, **how)


def learned(corpus: Corpus, row: int = 0) -> str:
    loss = corpus.batch(np.array([row])).inputs["loss"][0].tolist()
    return "".join(piece for piece, wanted in zip(corpus.pieces(row), loss, strict=True) if wanted)


CHATS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "the people"}]},
    "sharegpt by roles": {"conversations": [USER, ANSWER]},
    "a conversation as JSON": {"messages": json.dumps([USER, ANSWER])},
    "parts of text": {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "the people"}]}]},
    "prompt and completion": {"prompt": [USER], "completion": [ANSWER]},
    "a prompt and one turn": {"prompt": [USER], "completion": "the people"},
    "preference": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "preference without prompt": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "preference of whole conversations": {"prompt": "who", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "preference after sharegpt": {
        "conversations": [{"from": "human", "value": "who"}],
        "chosen": {"from": "gpt", "value": "the people"},
        "rejected": {"from": "gpt", "value": "the war"},
    },
    "alpaca": {"instruction": "who", "input": "", "output": "the people"},
    "dolly": {"instruction": "who", "context": "", "response": "the people"},
    "question": {"question": "who", "answer": "the people"},
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_in_every_shape_is_the_same_chat(tmp_path, name):
    corpus = read(tmp_path, [CHATS[name] | {"topic": 1}])
    assert corpus.document_text(0) == "<|user|>who<eos>\n<|assistant|>the people<eos>\n"
    assert learned(corpus) == "the people<eos>"
    assert corpus.metadata(0)["topic"] == 1


TEXTS = {
    "preference": ({"prompt": "we the", "chosen": " people", "rejected": " war"}, "we the people", " people"),
    "without prompt": ({"chosen": "we the people", "rejected": "we the war"}, "we the people", " people"),
    "question": ({"question": "who", "answer": "people"}, "Question: who\nAnswer: people", " people"),
    "other words": ({"content": "we the people"}, "we the people", " the people"),
    "other fields": ({"q": "we the", "a": " people"}, "we the people", " people"),
}
FIELDS = {"other words": {"text_field": "content"}, "other fields": {"prompt_field": "q", "completion_field": "a"}}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_joined(tmp_path, name):
    row, text, answer = TEXTS[name]
    corpus = read(tmp_path, [row], PLAIN, **FIELDS.get(name, {}))
    assert (corpus.document_text(0), learned(corpus)) == (text, answer)


def test_the_other_answer_of_a_preference(tmp_path):
    for row in (CHATS["preference"], CHATS["preference without prompt"], CHATS["preference after sharegpt"]):
        assert learned(read(tmp_path, [row], completion_field="rejected")) == "the war<eos>"
    row, _, _ = TEXTS["preference"]
    assert learned(read(tmp_path, [row], completion_field="rejected")) == " war"


def test_alpaca_without_a_chat_template_is_its_own_prompt(tmp_path):
    rows = [
        {"instruction": "name", "input": "who", "output": "people"},
        {"instruction": "name", "output": "people"},
        {"instruction": "name", "output": "people", "system": "be brief"},
    ]
    corpus = read(tmp_path, rows, PLAIN)
    texts = [corpus.document_text(n) for n in range(3)]
    assert texts[0].startswith("Below is an instruction that describes a task, paired with an input")
    assert texts[0].endswith("\n\n### Instruction:\nname\n\n### Input:\nwho\n\n### Response:\npeople")
    assert texts[1].startswith("Below is an instruction that describes a task. Write")
    assert texts[2] == "be brief\n\n### Instruction:\nname\n\n### Response:\npeople"
    assert [learned(corpus, row) for row in range(3)] == ["people"] * 3
    assert [x for x in corpus.info["notes"] if x.startswith("3 records: instruction")]


def test_alpaca_with_a_chat_template_is_a_chat(tmp_path):
    row = {"instruction": "name", "input": "who", "output": "people", "system": "be brief", "history": [["a", "b"]]}
    corpus = read(tmp_path, [row])
    turns = ["system|>be brief", "user|>a", "assistant|>b", "user|>name\nwho", "assistant|>people"]
    assert corpus.document_text(0) == "".join(f"<|{turn}<eos>\n" for turn in turns)
    assert corpus.metadata(0) == {}
    with pytest.raises(CorpusError, match="no chat template"):
        read(tmp_path, [row], PLAIN)


def test_what_calls_and_answers_in_sharegpt(tmp_path):
    call = {"name": "look", "arguments": {}}
    talk = [
        {"from": "system", "value": "be brief"}, {"from": "human", "value": "who"},
        {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "we"},
        {"from": "gpt", "value": "people"},
    ]  # fmt: skip
    corpus = read(tmp_path, [{"conversations": talk, "tools": json.dumps([{"name": "look"}])}])
    assert learned(corpus) == "<call>look</call><eos>people<eos>"


def test_of_prompt_and_completion_earlier_answers_carry_no_loss(tmp_path):
    row = {"prompt": [USER, OTHER, USER], "completion": [ANSWER]}
    assert learned(read(tmp_path, [row])) == "the people<eos>"


def test_tokens_are_taken_as_they_are(tmp_path):
    ids = PLAIN("日 of the people 😀")["input_ids"]
    rows = [
        {"input_ids": ids},
        {"input_ids": [1, 1, *ids], "attention_mask": [0, 0] + [1] * len(ids), "labels": [-100] * 6 + ids[4:]},
        {"input_ids": ids, "completion_mask": [0] * (len(ids) - 1) + [1], "text": "left over"},
    ]
    corpus = read(tmp_path, rows)
    assert [corpus.token_ids(row).tolist() for row in range(3)] == [ids] * 3
    assert {corpus.document_text(n) for n in range(3)} == {"日 of the people 😀"}
    assert [len(learned(corpus, row)) for row in (0, 2)] == [len("日 of the people 😀") - 1, 0]
    loss = corpus.batch(np.array([1])).inputs["loss"][0].tolist()
    assert loss == [False] * 4 + [True] * (len(ids) - 4)
    assert corpus.metadata(2) == {"text": "left over"}
    short = read(tmp_path, rows[:1] * 3, seq_len=3, pack=True)
    assert "".join(short.text(row) for row in range(len(short))) == "日 of the people 😀" * 3
    assert ["".join(short.pieces(row)) == short.text(row) for row in range(len(short))] == [True] * len(short)


BAD = {
    "a second document with the id 'a'; the first is at": [{"id": x, "text": "we the"} for x in "aba"],
    "'labels' are the ids themselves": [{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}],
    "'labels' is not as long as 'input_ids'": [{"input_ids": [5, 6, 7], "labels": [5]}],
    "'attention_mask' has a gap": [{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}],
    "'input_ids' is not a list of whole numbers": [{"input_ids": [[5, 6], [7]]}],
    "is not from 0 to 65535": [{"input_ids": [5, 65536]}],
    "from somebody unknown: got 'narrator'": [{"conversations": [{"from": "narrator", "value": "we"}]}],
    "a function call is not JSON": [{"conversations": [{"from": "function_call", "value": "look"}]}],
    "the answers chosen and rejected are the same": [{"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}],
    "the field 'rejected' is missing": [{"prompt": "we", "chosen": "the"}],
    "the field 'output' is missing": [{"instruction": "we"}],
    "'history' is not a list of pairs": [{"instruction": "we", "output": "the", "history": [1]}],
    "give the field 'prompt'": [{"chosen": "we the", "rejected": "we the people"}],
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_not_as_its_fields_say_is_refused(tmp_path, message):
    with pytest.raises(CorpusError) as error:
        read(tmp_path, BAD[message])
    assert message in str(error.value)
    assert f"c.jsonl:{len(BAD[message])}: " in str(error.value)


def test_a_field_that_was_named_and_is_not_there(tmp_path):
    for how in ({"text_field": "body"}, {"prompt_field": "q"}, {"completion_field": "a"}):
        with pytest.raises(CorpusError, match=f"--{next(iter(how)).replace('_', '-')}"):
            read(tmp_path, [{"text": "we the people", "prompt": "we"}], **how)
    with pytest.raises(ConfigError, match="one or the other"):
        read(tmp_path, [{"text": "we"}], text_field="text", prompt_field="prompt")


def test_how_it_is_read_is_said_and_kept(tmp_path):
    def notes(row, **how):
        return read(tmp_path, [row], **how).info["notes"]

    assert "'chosen' is what is learned" in notes(CHATS["preference"])[0]
    assert "chat template" in notes(CHATS["alpaca"])[0]
    assert "records have text and also messages" in notes({"text": "we the", "messages": [USER, ANSWER]})[0]
    assert notes({"text": "we the"}) == notes(CHATS["sharegpt"]) == []
    corpus = read(tmp_path, [{"body": "we the people"}], text_field="body")
    assert (corpus.info["text_field"], corpus.reading.text_field) == ("body", "body")
    assert [record.row for record in corpus.records()] == [{"body": "we the people"}]


def test_records_of_one_id_are_parts_of_one_document(tmp_path):
    rows = [{"id": name, "text": f"part {n} of {name}", "n": n} for name, n in (("a", 0), ("a", 1), ("b", 2), ("a", 3))]
    corpus = read(tmp_path, rows, on_bad_record="skip", seq_len=4)
    assert (corpus.n_documents, corpus.info["records"], corpus.info["skipped"]["count"]) == (2, 3, 1)
    assert [corpus.named(n) for n in range(3)] == [("a", 0), ("a", 1), ("b", 0)]
    for row in range(len(corpus)):
        assert corpus.text(row) in f"part {corpus.record_of_N[row]} of {'aab'[corpus.record_of_N[row]]}"
        assert corpus.metadata(int(corpus.document_of_N[row])) == {"n": corpus.record_of_N[row]}
    assert [record.row["n"] for record in corpus.records()] == [0, 1, 2]


def test_a_doubled_start_token_is_said_once(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    rows = [{"text": "<bos>we the people"}] * 3 + [{"text": "we <bos>"}, {"text": "<eos>we"}]
    notes = read(tmp_path, rows, tokenizer).info["notes"]
    assert [note.startswith("3 records with two start tokens: their text has one") for note in notes] == [True]
    assert read(tmp_path, rows, PLAIN).info["notes"] == []
