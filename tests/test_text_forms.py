"""Files that hold more than lines: JSON arrays, shards of tokens, folders of a data set, records in memory."""

import gzip
import json

import datasets
import numpy as np
import pandas as pd
import pytest

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import CorpusError, QueryError
from upriver.text.arrays import LARGEST, READ
from upriver.text.corpus import Corpus
from upriver.text.queries import Queries
from upriver.text.shards import LONGEST

TOKENIZER = byte_tokenizer()
TEXTS = ["we the people", "of the union 日", "it is the end"]
ROWS = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))


def texts(corpus: Corpus) -> list[str]:
    return [corpus.document_text(n) for n in range(corpus.info["records"])]


def written(path, content) -> str:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# ---- JSON

ARRAYS = {
    "one line": json.dumps(ROWS),
    "several lines": "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False),
    "object": json.dumps({"version": 1, "data": ROWS}),
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("end", ["json", "json.gz"])
def test_a_json_file_may_be_an_array(tmp_path, name, end):
    corpus = Corpus.read(written(tmp_path / f"c.{end}", ARRAYS[name]), TOKENIZER)
    assert texts(corpus) == TEXTS
    assert [corpus.metadata(n) for n in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert corpus.document_id(1) == f"c.{end}:2"


def test_one_record_over_several_lines_is_one_record(tmp_path):
    row = {"messages": "left", "text": "we the people"}
    assert texts(Corpus.read(written(tmp_path / "c.json", json.dumps(row, indent=1)), TOKENIZER)) == ["we the people"]


def test_of_an_object_with_several_lists_one_is_named(tmp_path):
    path = written(tmp_path / "c.json", json.dumps({"train": ROWS[:2], "test": ROWS[2:]}, indent=1))
    with pytest.raises(CorpusError, match=r"train \(2 records\), test \(1 records\); say which with --split"):
        Corpus.read(path, TOKENIZER)
    assert texts(Corpus.read(path, TOKENIZER, split="test")) == TEXTS[2:]
    assert texts(Corpus.read(path, TOKENIZER, split="all")) == TEXTS
    with pytest.raises(CorpusError, match="say which with --split"):
        Corpus.read(path, TOKENIZER, split="dev")


def test_an_array_is_read_record_by_record(tmp_path):
    """Records end anywhere in what is read at once, and an object larger than a record may be streams as well."""
    rows = [{"text": "we " + "日" * (n % 50), "filler": "x" * n} for n in range(0, 2000, 7)]
    assert len(json.dumps(rows)) > 3 * READ
    for content in (rows, {"note": "x" * 100, "data": rows, "last": 12}):
        corpus = Corpus.read(written(tmp_path / "c.json", json.dumps(content, ensure_ascii=False)), TOKENIZER)
        assert texts(corpus) == [row["text"] for row in rows]
    large = [{"text": "we the people", "filler": "x" * (1 << 20)}] * (LARGEST // (1 << 20) + 2)
    for content, error in (
        ({"data": large}, None),
        ({"data": large, "more": large[:1]}, "several lists: got data, more"),
    ):
        path = written(tmp_path / "large.json", json.dumps(content))
        if error:
            with pytest.raises(CorpusError, match=error):
                Corpus.read(path, TOKENIZER)
        else:
            assert Corpus.read(path, TOKENIZER).info["records"] == len(large)


BROKEN = {
    '[{"text": "we"}, {"text": "the"]': "c.json:2: broken JSON",
    '[{"text": "we"} {"text": "the"}]': "c.json:1: broken JSON: got '{' where ',' is expected",
    '[{"text": "we"}, 3]': "c.json:2: not a JSON object: got 3",
    '[{"text": "we"}, {"text": "a", "text": "b"}]': "c.json:2: a JSON object has the field 'text' twice",
    '{"text": ["we", "the"]}': "c.json:1: the field 'text' is not a text",
    "[]": "the corpus is empty",
    '[{"text": "' + "x" * (LARGEST + 10) + '"}]': "c.json:1: broken JSON, or more than 16 MB of one record",
    b'[{"text": "\xff"}]': "c.json: not UTF-8: got 0xff",
    "[" * 100_000: "c.json:1: broken JSON",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda x: str(x)[:20])
def test_a_broken_array_is_named(tmp_path, content):
    with pytest.raises(CorpusError) as error:
        Corpus.read(written(tmp_path / "c.json", content), TOKENIZER)
    assert BROKEN[content] in str(error.value)


# ---- tokens


def shard(folder, name: str, tokens: np.ndarray):
    path = folder / name
    np.save(path, tokens) if name.endswith(".npy") else tokens.tofile(path)
    return path


@pytest.mark.parametrize(("name", "dtype"), [("a.bin", "uint16"), ("a.bin", "uint32"), ("a.npy", "int64")])
def test_shards_are_cut_at_the_end_token(tmp_path, name, dtype):
    ids = [[*TOKENIZER(text)["input_ids"], 1] for text in TEXTS]
    path = shard(tmp_path, name, np.array(sum(ids, [1]), dtype))
    corpus = Corpus.read(path, TOKENIZER, token_dtype=dtype if name == "a.bin" else None)
    assert texts(corpus) == [text + "<eos>" for text in TEXTS]
    assert [corpus.token_ids(n).tolist() for n in range(3)] == ids
    assert corpus.batch(np.arange(3)).inputs["loss"].sum() == sum(map(len, ids)) - 3
    assert [record.row["input_ids"].tolist() for record in corpus.records()] == ids
    packed = Corpus.read(path, TOKENIZER, token_dtype=dtype if name == "a.bin" else None, pack=True, seq_len=4)
    assert (
        np.concatenate([packed.token_ids(n) for n in range(len(packed))]).tolist()
        == [x for some in ids for x in some][: packed.n_tokens]
    )
    assert "documents end with the end token 1" in corpus.info["notes"][-1]


def test_rows_of_a_matrix_are_documents_and_what_never_ends_is_cut(tmp_path):
    tokens = np.array([TOKENIZER("we the")["input_ids"][:2], TOKENIZER("it is")["input_ids"][:2]])
    assert Corpus.read(shard(tmp_path, "m.npy", tokens), TOKENIZER).n_documents == 2
    endless = Corpus.read(shard(tmp_path, "e.bin", np.full(LONGEST + 5, 7, np.uint16)), TOKENIZER, seq_len=4096)
    assert (endless.n_documents, endless.n_tokens) == (2, LONGEST + 5)


def test_the_header_of_llm_c_is_no_token(tmp_path):
    head, ids = np.zeros(256, "<i4"), np.array(TOKENIZER(TEXTS[0])["input_ids"], np.uint16)
    head[:3] = 20240520, 1, len(ids)
    (tmp_path / "c.bin").write_bytes(head.tobytes() + ids.tobytes())
    assert texts(Corpus.read(tmp_path / "c.bin", TOKENIZER)) == TEXTS[:1]


def test_what_are_no_tokens_is_refused(tmp_path):
    bad = {
        "0 in every second place": ("a.bin", np.arange(40, dtype=np.uint32)),
        "not tokens of uint32": ("b.bin", np.arange(3, dtype=np.uint16)),
        "got float64": ("c.npy", np.ones(4)),
        "a vocabulary of 290 needs": ("d.npy", np.array([5, 70_000])),
    }
    for message, (name, tokens) in bad.items():
        with pytest.raises(CorpusError, match=message):
            Corpus.read(shard(tmp_path, name, tokens), TOKENIZER, token_dtype="uint32" if name == "b.bin" else None)
    (tmp_path / "e.npy").write_bytes(b"we the people")
    with pytest.raises(CorpusError, match=r"not a \.npy file"):
        Corpus.read(tmp_path / "e.npy", TOKENIZER)


def test_tokens_that_the_tokenizer_does_not_know_are_shown_by_number(tmp_path):
    """A model may have more rows than its tokenizer has tokens."""
    corpus = Corpus.read(shard(tmp_path, "a.npy", np.array([*TOKENIZER("we")["input_ids"], 300])), TOKENIZER)
    assert (texts(corpus), corpus.max_token) == (["we<300>"], 300)


# ---- folders


def data_set(folder, *names: str):
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [{"text": f"{name} {n}"}])
    return folder


def test_files_about_the_data_are_left_out_and_counted(tmp_path):
    folder = data_set(tmp_path / "hub", "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")
    for name in ("README.md", "LICENSE", "dataset_infos.json", "load.py", ".gitattributes"):
        (folder / name).write_text("---\nnot this\n")
    info = Corpus.read(folder, TOKENIZER).info
    assert info["left_out"] == {"count": 4, "first": ["LICENSE", "README.md", "dataset_infos.json", "load.py"]}
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert info["sources"] == {"count": 2, "documents": dict.fromkeys(names, 1)}


def test_a_readme_among_texts_is_a_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("README.md", "a.md"):
        (folder / name).write_text("we the people")
    assert Corpus.read(folder, TOKENIZER).n_documents == 2
    (folder / ".gitattributes").write_text("")
    assert Corpus.read(folder, TOKENIZER).n_documents == 1


LAYOUTS = {
    "files": ["train.jsonl", "dev.jsonl", "notes.jsonl"],
    "folders": ["train/a.jsonl", "validation/a.jsonl"],
    "words": ["squad_train_v2.jsonl", "squad-val-00000-of-00001.jsonl"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_splits_are_asked_about(tmp_path, name):
    folder = data_set(tmp_path / "hub", *LAYOUTS[name])
    with pytest.raises(CorpusError, match=r"got .*train \(1 file\).* --split, such as train, or all"):
        Corpus.read(folder, TOKENIZER)
    assert texts(Corpus.read(folder, TOKENIZER, split="dev")) == [f"{LAYOUTS[name][1]} 1"]
    assert Corpus.read(folder, TOKENIZER, split="all").n_documents == len(LAYOUTS[name])
    with pytest.raises(CorpusError, match="which split"):
        Corpus.read(folder, TOKENIZER, split="test")
    train = Corpus.read(folder, TOKENIZER, split="train")
    assert train.info["split"] == "train"
    assert [record.row["text"] for record in train.records()] == texts(train)


def test_one_split_and_names_that_only_hold_the_word(tmp_path):
    assert Corpus.read(data_set(tmp_path / "one", "train-a.jsonl", "train-b.jsonl"), TOKENIZER).n_documents == 2
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("the train to the test.txt", "a test of the train.txt"):
        (folder / name).write_text("we the people")
    assert Corpus.read(folder, TOKENIZER).n_documents == 2
    with pytest.raises(CorpusError, match="a file has no splits"):
        Corpus.read(folder / "a test of the train.txt", TOKENIZER, split="train")


def test_splits_of_a_saved_data_set(tmp_path):
    parts = {
        name: datasets.Dataset.from_list([{"text": f"{name} {n}"} for n in range(2)]) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(CorpusError, match=r"got train \(2 rows\), test \(2 rows\)"):
        Corpus.read(tmp_path / "saved", TOKENIZER)
    assert texts(Corpus.read(tmp_path / "saved", TOKENIZER, split="test")) == ["test 0", "test 1"]
    assert Corpus.read(tmp_path / "saved", TOKENIZER, split="all").n_documents == 4


# ---- from Python


def test_records_in_memory_are_the_same_corpus(tmp_path):
    read = Corpus.read(write_jsonl(tmp_path / "c.jsonl", ROWS), TOKENIZER)
    for given in (ROWS, iter(ROWS), pd.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)):
        corpus = Corpus.of(given, TOKENIZER)
        assert (texts(corpus), corpus.keys_N.tolist()) == (TEXTS, read.keys_N.tolist())
        assert [record.row["n"] for record in corpus.records()] == [0, 1, 2]
        assert corpus.metadata(1) == {"n": 1}
    assert texts(Corpus.of(TEXTS, TOKENIZER)) == TEXTS
    assert Corpus.of(TEXTS, TOKENIZER).reused
    assert Corpus.of(TEXTS, TOKENIZER).fingerprint != Corpus.of(TEXTS[:2], TOKENIZER).fingerprint


@pytest.mark.parametrize("given", ["c.jsonl", 3, [3], []], ids=str)
def test_what_are_no_records(given):
    with pytest.raises(CorpusError, match=r"no record|not a record|not records"):
        Corpus.of(given, TOKENIZER)


def test_several_paths_are_one_corpus(tmp_path):
    folder = data_set(tmp_path / "some", "a/c.jsonl", "b/c.jsonl")
    corpus = Corpus.read([folder / "a" / "c.jsonl", folder / "b"], TOKENIZER)
    assert [corpus.document_id(n) for n in range(2)] == ["a/c.jsonl:1", "b/c.jsonl:1"]
    assert corpus.info["path"] == [str(folder / "a" / "c.jsonl"), str(folder / "b")]
    assert [record.id for record in corpus.records()] == ["a/c.jsonl:1", "b/c.jsonl:1"]


def test_queries_are_no_shards(tmp_path):
    with pytest.raises(QueryError):
        Queries.read(shard(tmp_path, "a.npy", np.arange(4)))
