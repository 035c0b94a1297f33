"""Every bad record and file is named by file and line, or skipped and listed."""

import gzip
import json
import lzma
import sys

import pandas as pd
import pytest

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import CorpusError
from upriver.text.corpus import Corpus

TOKENIZER = byte_tokenizer()
GOOD = {"text": "we the people"}
BAD_LINES = {
    b'{"text": "we"': "broken JSON",
    b"[": "a JSON array that goes over several lines",
    b'["we"]': "not a JSON object: got ['we']",
    b'{"text": "\xff"}': "not UTF-8: got 0xff at byte 11 of the line",
    b"{}": "the field 'text' is missing: got the fields none",
    b'{"txt": "we"}': "the field 'text' is missing: got the fields 'txt'",
    b'{"prompt": "we"}': "the field 'completion' is missing",
    b'{"completion": "we"}': "the field 'prompt' is missing",
    b'{"text": 3}': "the field 'text' is not a text: got 3",
    b'{"text": null}': "the field 'text' is missing",
    b'{"text": ""}': "the field 'text' is empty",
    b'{"text": " \\n"}': "the field 'text' is empty",
    b'{"prompt": "we", "completion": ""}': "the field 'completion' is empty",
    b'{"prompt": 1, "completion": "we"}': "the field 'prompt' is not a text",
    b'{"text": "\\ud800"}': "the field 'text' holds half of a surrogate pair: got '\\ud800'; write both halves or neither",
    b'{"text": "we", "id": 1.5}': "the field 'id' is not a text or a whole number: got 1.5",
    b'{"messages": "we"}': "the field 'messages' is not a list",
    b'{"messages": [{"role": "user"}]}': "a message has no text as its 'content'",
    b'{"messages": [{"role": "user", "content": "we"}]}': "no message of the role 'assistant'",
    b'{"text": ' + b"9" * 5000 + b"}": "broken JSON",
    b'{"text": ' + b"[" * 100_000 + b"}": "broken JSON",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:30].decode(errors="replace"))
def test_a_bad_line_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "c.jsonl"
    first = json.dumps({**GOOD, "id": "first"}).encode()
    path.write_bytes(b"\n".join([first, b"", line, json.dumps(GOOD).encode()]))
    with pytest.raises(CorpusError) as error:
        Corpus.read(path, TOKENIZER)
    assert f"{path}:3: {BAD_LINES[line]}" in str(error.value)
    assert "--on-bad-record skip" in str(error.value)
    for _ in range(2):  # and when it is reused
        info = Corpus.read(path, TOKENIZER, on_bad_record="skip").info
        assert (info["documents"], info["skipped"]["count"]) == (2, 1)
        assert info["skipped"]["first"][0]["where"] == f"{path}:3"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="reads what is nested as deeply as JSON allows")
def test_metadata_nested_too_deeply_is_a_bad_record(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"text": "we", "m": ' + "[" * 600 + "]" * 600 + "}\n")
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: its metadata is nested too deeply"):
        Corpus.read(path, TOKENIZER)
    assert Corpus.read(path, TOKENIZER, on_bad_record="skip").info["documents"] == 1


def test_many_bad_lines_are_counted_and_the_first_listed(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": ""}] * 30 + [GOOD])
    skipped = Corpus.read(path, TOKENIZER, on_bad_record="skip").info["skipped"]
    assert (skipped["count"], len(skipped["first"])) == (30, 20)


def test_text_that_tokenises_to_nothing(tmp_path):
    from tokenizers import normalizers

    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    path = write_jsonl(tmp_path / "c.jsonl", [GOOD, {"text": "xxx"}])
    with pytest.raises(CorpusError, match=r"c\.jsonl:2: the text tokenises to nothing: got 'xxx'"):
        Corpus.read(path, tokenizer)
    assert Corpus.read(path, tokenizer, on_bad_record="skip").n_documents == 1


BAD_FILES = [
    ("c.jsonl", b"", "the corpus is empty"),
    ("c.jsonl", b"\n\n", "the corpus is empty"),
    ("c.txt", b"", r"c\.txt:1: the field 'text' is empty"),
    ("c.txt", b"we\nthe \xe9", r"c\.txt:2: not UTF-8: got 0xe9 at byte 5 of the line"),
    ("c.doc", b"we", "not a known type of file: got .*doc; use .jsonl"),
    ("c", b"we", "not a known type of file"),
    ("c.parquet.gz", b"we", "not a known type of file"),
    ("c.jsonl.gz", b"not gzip", r"c\.jsonl\.gz:1: the file cannot be read on"),
    ("c.jsonl.gz", gzip.compress(json.dumps(GOOD).encode(), mtime=0)[:-9], "damaged or cut short"),
    ("c.jsonl.xz", lzma.compress(b'{"text": "we"}\n' * 9999)[:-50], r"c\.jsonl\.xz:\d+: the file cannot be read on"),
    ("c.jsonl.bz2", b"BZh9rubbish", "damaged or cut short"),
    ("c.jsonl.zst", b"rubbish", "damaged or cut short"),
    ("c.parquet", b"PAR1rubbishPAR1", r"c\.parquet:1: the file cannot be read on"),
    ("c.csv", b"title\nwe", r"c\.csv:2: the field 'text' is missing: got the fields 'title'"),
    ("c.csv", b"id,text\n1,we\n\n2,the,people\n", r"c\.csv:4: broken CSV: got 3 cells, the header has 2"),
    ("c.csv", b'id,text\n1,we\n2,"the\npeople', r"c\.csv:3: broken CSV"),
    ("c.csv", b"id,text\n1,\xff\n", r"c\.csv:2: not UTF-8: got 0xff at character 2 of the row"),
    ("c.csv", b"id,text\n1,we\rthe\n", r"c\.csv:2: broken CSV: got a carriage return inside a line; end lines with"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        Corpus.read(tmp_path / name, TOKENIZER)
    assert not list((tmp_path / "cache").rglob("info.json"))


BAD_HEADERS = {
    b"id,text\r1,we\r2,the\r": "broken CSV: got a carriage return inside a line; end lines with LF",
    b'id,"text\n1,we\n': "broken CSV: unexpected end of data; close every quote",
    b'id,"text\n1,"we"\n': "broken CSV: .*; close every quote",
    b"id,t\xe9xt,text\n1,we,we\n": "not UTF-8: got 0xe9 at character 4 of the row; save the file as UTF-8",
}


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("content", BAD_HEADERS)
def test_a_csv_header_that_cannot_be_used_is_an_error(tmp_path, content, policy):
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(CorpusError, match=r"c\.csv:1: the header cannot be used: " + BAD_HEADERS[content]):
        Corpus.read(tmp_path / "c.csv", TOKENIZER, on_bad_record=policy)


def test_the_rows_after_a_broken_one_are_kept(tmp_path):
    lines = [
        b"text,n", b"we,2", b'"we" the,3', b"the people,4", b'"of', b'the",5', b"the\runion,7", b"", b"united,9", b'x"x",y',
        b'"a""b",11', b'"the', b'end" of,12', b"states,14", b'"never closed,15', b"war,16",
    ]  # fmt: skip
    (tmp_path / "c.csv").write_bytes(b"\n".join(lines))
    corpus = Corpus.read(tmp_path / "c.csv", TOKENIZER, on_bad_record="skip")
    found = {corpus.document_id(d): corpus.document_text(d) for d in range(corpus.n_documents)}
    good = {2: "we", 4: "the people", 5: "of\nthe", 9: "united", 10: 'x"x"', 11: 'a"b', 14: "states"}
    assert found == {f"c.csv:{line}": text for line, text in good.items()}
    where = [int(bad["where"].rpartition(":")[2]) for bad in corpus.info["skipped"]["first"]]
    assert where == [3, 7, 12, 15]


LARGE = 16 << 20
LARGE_FILES = {
    "c.txt": lambda: (b"we the people " * 100 + b"\n") * (LARGE // 1400),
    "c.jsonl": lambda: json.dumps({"text": "we the people " * (LARGE // 14 + 1)}).encode(),
    "half.jsonl": lambda: json.dumps({"prompt": "we " * (LARGE // 6), "completion": " we" * (LARGE // 6 + 2)}).encode(),
    "wide.jsonl": lambda: json.dumps({"text": "日" * (LARGE // 3 + 1)}, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("name", LARGE_FILES)
def test_a_document_that_is_too_large_to_tokenise(tmp_path, name):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(LARGE_FILES[name]())
    message = rf"{name}:1: the document is too large: got more than 16 MB of text; give it in several records"
    with pytest.raises(CorpusError, match=message.replace(".", r"\.")):
        Corpus.read(folder, TOKENIZER)
    (folder / "z.txt").write_text("we the people")
    corpus = Corpus.read(folder, TOKENIZER, on_bad_record="skip")
    assert [corpus.document_id(d) for d in range(corpus.n_documents)] == ["z.txt"]
    assert corpus.info["skipped"]["count"] == 1


def test_a_csv_cell_of_several_lines_is_one_document(tmp_path):
    text = 'we, the "people"\nof\r\n' + "x" * 200_000
    pd.DataFrame({"text": ["one", text, "two"]}).to_csv(tmp_path / "c.csv", index=False)
    corpus = Corpus.read(tmp_path / "c.csv", TOKENIZER)
    assert corpus.document_text(1) == text
    assert corpus.document_id(2) == "c.csv:6"


def test_missing_paths(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path / "folder", "none.jsonl", "none"):
        with pytest.raises(CorpusError, match="no such file or folder"):
            Corpus.read(path, TOKENIZER)


def test_a_folder_without_files(tmp_path):
    with pytest.raises(CorpusError, match="holds no file that can be read"):
        Corpus.read(tmp_path, TOKENIZER)


def test_a_strange_file_in_a_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("we the people")
    (folder / "b.png").write_bytes(b"\x89PNG")
    with pytest.raises(CorpusError, match=r"not a known type of file: got .*b\.png"):
        Corpus.read(folder, TOKENIZER)
    info = Corpus.read(folder, TOKENIZER, on_bad_record="skip").info
    assert (info["documents"], info["skipped"]["count"]) == (1, 1)


def test_one_id_in_two_files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(folder / name, [{**GOOD, "id": 5}])
    with pytest.raises(
        CorpusError, match=r"b\.jsonl:1: a second document with the id '5'; the first is at .*a\.jsonl:1"
    ):
        Corpus.read(folder, TOKENIZER)


def test_nothing_to_predict(tmp_path):
    with pytest.raises(CorpusError, match="no sequence has a token to predict"):
        Corpus.read(write_jsonl(tmp_path / "c.jsonl", [{"text": "x"}]), TOKENIZER)


def test_a_damaged_data_set(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(CorpusError, match="cannot read the data set saved in"):
        Corpus.read(tmp_path / "saved", TOKENIZER)


def test_values_that_json_cannot_hold_become_text(tmp_path):
    frame = pd.DataFrame(
        {"text": ["we the people"], "when": [pd.Timestamp("2020-01-02")], "x": [float("inf")], "n": [[1, 2]]}
    )
    frame.to_parquet(tmp_path / "c.parquet")
    assert Corpus.read(tmp_path / "c.parquet", TOKENIZER).metadata(0) == {
        "when": "2020-01-02 00:00:00",
        "x": None,
        "n": [1, 2],
    }
