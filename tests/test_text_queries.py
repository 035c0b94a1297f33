"""Queries: the boundary between prompt and completion, and what is refused."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text_cases import byte_tokenizer, fallback_tokenizer, write_jsonl
from upriver.errors import QueryError
from upriver.text.queries import Queries

BYTE, BOS, BOTH = byte_tokenizer(), byte_tokenizer(bos=True), byte_tokenizer(bos=True, eos=True)
TOKENIZERS = {
    "byte": BYTE,
    "bos": BOS,
    "both": BOTH,
    "trimmed": byte_tokenizer(trim=True),
    "fallback": fallback_tokenizer(),
}
CONTRASTED = {"id": "a", "prompt": "the people of", "completion": " the united", "contrast": " the war 日"}
PLAIN = {"id": "b", "prompt": "we", "completion": " the"}


def pieces(queries: Queries, i: int, which: int = 0) -> list[str]:
    """The scored tokens of a query's completion, or of its contrast."""
    return queries.pieces(queries.rows_of_query[i][which])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_completion_is_cut_out_by_characters(name):
    queries = Queries.of([CONTRASTED, PLAIN], TOKENIZERS[name])
    assert "".join(pieces(queries, 0)).strip() == "the united"
    assert "".join(pieces(queries, 0, 1)).strip() == "the war 日"
    assert "".join(pieces(queries, 1)).strip() == "the"
    batch = queries.batch([1, 0])
    assert batch.weight_N is not None
    assert batch.query_N is not None
    assert batch.weight_N.tolist() == [1.0, 1.0, -1.0]
    assert batch.query_N.tolist() == [1, 0, 0]
    assert batch.rows_N.tolist() == [2, 0, 1]
    expected = [
        len(pieces(queries, 1)),
        len(pieces(queries, 0)),
        len(pieces(queries, 0, 1)),
    ]
    assert batch.inputs["loss"].sum(1).tolist() == expected


def test_an_end_token_that_the_tokenizer_adds_is_not_completion():
    queries = Queries.of([PLAIN], BOTH)
    row = queries.batch([0]).inputs
    assert row["tokens"][0, -1] == BOTH.eos_token_id
    assert not row["loss"][0, -1]
    assert queries.prompt_tokens(0).tolist() == BOTH("we")["input_ids"][:-1]


def test_a_token_across_the_boundary_belongs_to_the_completion():
    queries = Queries.of([{"id": "q", "prompt": "we ", "completion": "the people"}], BYTE)
    assert pieces(queries, 0) == [" the", " people"]


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_completion_tokens_cover_the_completion(prompt, completion):
    queries = Queries.of([{"id": "q", "prompt": "x" + prompt, "completion": completion}], BYTE)
    found = "".join(pieces(queries, 0))
    assert ("x" + prompt + completion).endswith(found)
    assert len(found) >= len(completion)
    assert queries.token_ids(0).tolist() == BYTE("x" + prompt + completion)["input_ids"]


def test_token_ids_hold_the_prompt_once():
    queries = Queries.of([CONTRASTED], BOTH)
    joined = BYTE("the people of the united")["input_ids"] + BYTE(" the war 日")["input_ids"]
    assert queries.token_ids(0).tolist() == joined
    assert queries.lengths.tolist() == [queries.batch([0]).inputs["tokens"].numel()]


def test_batches_of_lengths_hold_the_padding_of_contrasts():
    plain = {"id": "b", "prompt": "the people", "completion": " of the united states"}
    queries = Queries.of([CONTRASTED, plain], BOTH)
    assert queries.batch([0, 1]).inputs["tokens"].numel() <= 2 * queries.lengths.max()


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_read_equals_of(tmp_path, name):
    content = "\n".join(json.dumps(query) for query in (CONTRASTED, PLAIN)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    read = Queries.read(tmp_path / name, BYTE)
    assert read.fingerprint == Queries.of([CONTRASTED, PLAIN], BYTE).fingerprint
    assert read.ids == ["a", "b"]
    assert read.fingerprint != Queries.of([PLAIN, CONTRASTED], BYTE).fingerprint
    assert read.fingerprint != Queries.read(tmp_path / name, BOS).fingerprint


def test_a_tokenizer_may_come_later(tmp_path):
    queries = Queries.read(write_jsonl(tmp_path / "q.jsonl", [PLAIN]))
    assert pieces(queries.bound(BYTE), 0) == [" the"]
    with pytest.raises(QueryError, match="no tokenizer"):
        queries.batch([0])


def test_an_answer_of_the_model_takes_the_place_of_a_completion():
    queries = Queries.of([PLAIN, {"id": "open", "prompt": "we the"}], BYTE, complete=5)
    assert queries.needs_completion == [1]
    with pytest.raises(QueryError, match="--complete N"):
        queries.batch([0])
    completed = queries.completed({"open": " people"})
    assert pieces(completed, 1) == [" people"]
    assert [query.generated for query in completed.records] == [False, True]
    with pytest.raises(QueryError, match="is empty"):
        queries.completed({"open": ""})


def test_an_empty_prompt_needs_a_context():
    empty = {"id": "q", "prompt": "", "completion": "the"}
    with pytest.raises(QueryError, match="has no context"):
        Queries.of([empty], BYTE)
    assert pieces(Queries.of([empty], BOS), 0) == ["the"]
    assert pieces(Queries.of([{**empty, "completion": "the people"}], BYTE), 0) == [" people"]


BAD = {
    "two queries have one id: got 'b', also at": [PLAIN, PLAIN],
    "2: query 'c' has no completion; give one, or add --complete N": [PLAIN, {"id": "c", "prompt": "we"}],
    "1: query 'c' has neither": [{"id": "c"}],
    "is empty; give a second completion": [{**PLAIN, "contrast": ""}],
    "1: the field 'prompt' is not a text: got 3": [{**PLAIN, "prompt": 3}],
    "1: the field 'completion' is not a text: got ['x']": [{**PLAIN, "completion": ["x"]}],
    "the field 'completion' holds half of a surrogate pair: got '\\ud800'; write both": [
        {**PLAIN, "completion": "\ud800"}
    ],
    "1: a query has no such field: got 'completions'; did you mean 'completion'?": [{"id": "c", "completions": "we"}],
    "1: a query needs an id: got None": [{"prompt": "we", "completion": " the"}],
    "1: a query needs an id: got 1.5; give a text or a whole number": [{**PLAIN, "id": 1.5}],
    "1: a query needs an id: got True": [{**PLAIN, "id": True}],
    "the id 'start' is the name of a column": [{**PLAIN, "id": "start"}],
    "is too long: got 8 tokens with its prompt, at most 6": [PLAIN, {**PLAIN, "id": "c", "prompt": "x" * 7}],
    "no query in it": [],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_queries(tmp_path, message):
    path = write_jsonl(tmp_path / "q.jsonl", BAD[message])
    with pytest.raises(QueryError) as error:
        Queries.read(path, BYTE, seq_len=6)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_completion_without_a_token_of_its_own():
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(QueryError, match="no token of its own: got '  '"):
        Queries.of([{**PLAIN, "completion": "  "}], tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"id": "a"', "q.jsonl:1: broken JSON"),
        ("q.jsonl", b'\n[1]\n', "q.jsonl:2: not a JSON object"),
        ("q.jsonl", b'{"id": "\xff"}', "q.jsonl:1: not UTF-8: got 0xff at byte 9"),
        ("q.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "cut short"),
        ("q.csv", b"id\n1", "q.csv:2: query '1' has neither"),
        ("q.txt", b"id\n1", "queries are no plain text or tokens"),
        ("q.json", b'[{"id": 1}, 2', "q.json:2: not a JSON object"),
        ("q.doc", b"", "not a known type of file"),
    ],
)  # fmt: skip
def test_files_that_hold_no_queries(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QueryError, match=message.replace(".", r"\.")):
        Queries.read(tmp_path / name, BYTE)


def test_a_missing_file(tmp_path):
    with pytest.raises(QueryError, match="no such file"):
        Queries.read(tmp_path / "none.jsonl", BYTE)
