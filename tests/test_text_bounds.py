"""Whatever is given in place of a text, no more of it is read than fits, and what it holds is what was meant or is refused."""

import bz2
import gzip
import json
import lzma
import os
import socket
import tracemalloc
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from text_cases import byte_tokenizer, write_jsonl
from upriver.errors import ConfigError, CorpusError, ModelError, QueryError, UpriverError
from upriver.given import check_plan_file, read_run_file
from upriver.model.load import load_model
from upriver.runtime.artifact import Artifact
from upriver.show.report import report_files
from upriver.text.batch import content_hash
from upriver.text.corpus import Corpus
from upriver.text.places import Places
from upriver.text.queries import Queries

TOKENIZER = byte_tokenizer()
LARGE = 16 << 20
GOOD = {"text": "we the people"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))


def texts(path, policy="error"):
    corpus = Corpus.read(path, TOKENIZER, on_bad_record=policy)
    return [corpus.document_text(d) for d in range(corpus.n_documents)]


def skipped(path):
    corpus = Corpus.read(path, TOKENIZER, on_bad_record="skip")
    return {bad["where"].rpartition(":")[2]: bad["reason"] for bad in corpus.info["skipped"]["first"]}


# ---- nothing whole beyond 16 MB


def zeros(compress, megabytes, head=b"", tail=b""):
    compressor = {"xz": lzma.LZMACompressor, "bz2": lambda: bz2.BZ2Compressor(1)}[compress]()
    parts = [head, *[b"\0" * (1 << 20)] * megabytes, tail]
    return b"".join([*(compressor.compress(part) for part in parts), compressor.flush()])


LONG = {
    "c.jsonl.xz": (lambda: zeros("xz", 24, tail=b"\n" + json.dumps(GOOD).encode()), "1"),
    "c.jsonl.bz2": (lambda: zeros("bz2", 20, json.dumps(GOOD).encode() + b"\n"), "2"),
    "c.txt.xz": (lambda: zeros("xz", 24), "1"),
    "c.csv.xz": (lambda: zeros("xz", 24, b'text\nwe the\n"it', b'"\nof the'), "3"),
    "c.csv.gz": (
        lambda: gzip.compress(b'text\nwe the\n"' + (b'it ""is"" ' * 9999 + b"\n") * 190 + b'"\nof the', 1),
        "3",
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_no_line_and_no_cell_is_held_beyond_16_mb(tmp_path, name):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(LONG[name][0]())
    write_jsonl(folder / "z.jsonl", [GOOD])
    with pytest.raises(CorpusError, match=rf"{name}:{LONG[name][1]}: the document is too large: got more than 16 MB"):
        Corpus.read(folder, TOKENIZER)
    tracemalloc.start()
    found = texts(folder, "skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * LARGE
    assert skipped(folder).keys() == {LONG[name][1]}
    own = {"csv": ["we the", "of the"], "jsonl": [GOOD["text"]]}.get(name.split(".")[1], [])
    assert found == [*own, GOOD["text"]]


def test_a_query_and_a_run_file_are_bounded(tmp_path):
    (tmp_path / "q.jsonl.xz").write_bytes(zeros("xz", 17))
    with pytest.raises(QueryError, match=r"q\.jsonl\.xz:1: the document is too large"):
        Queries.read(tmp_path / "q.jsonl.xz")
    (tmp_path / "run.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match=r"the run file is too large: got .*run\.toml of more than 1 MB"):
        read_run_file(tmp_path / "run.toml")


@pytest.mark.parametrize("count", [1, 18])
def test_a_cell_of_parquet_is_bounded(tmp_path, count):
    """The first is told by the sizes that the file states; the other is stored once for many rows."""
    large = pa.DictionaryArray.from_arrays(
        pa.array([0] * count, pa.int32()), ["x" * (LARGE + (2 << 20 if count == 1 else 1))]
    )
    tables = [pa.table({"text": x}) for x in (pa.array(["we the"]).dictionary_encode(), large)]
    kept = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": LARGE << 1}
    with pq.ParquetWriter(tmp_path / "c.parquet", tables[0].schema, **kept) as writer:
        for table in (*tables, tables[0]):
            writer.write_table(table)
    before = pa.default_memory_pool().max_memory()
    assert texts(tmp_path / "c.parquet", "skip") == ["we the"] * 2
    told = skipped(tmp_path / "c.parquet")
    assert len(told) == min(20, count)
    assert told["2"].startswith("the document is too large")
    assert pa.default_memory_pool().max_memory() < max(before, 600 << 20)


def test_a_column_that_unfolds_from_little_is_refused_by_what_the_file_says(tmp_path):
    """Each cell would fit; all of them are written out one by one, and compressed to almost nothing."""
    table = pa.table({"text": ["we the " * 500_000] * 48})
    pq.write_table(table, tmp_path / "c.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(
        CorpusError, match=r"c\.parquet:1: its row group is too large: got 160 MB in the column 'text', "
    ):
        Corpus.read(tmp_path / "c.parquet", TOKENIZER)


# ---- no file


def pipe(path):
    os.mkfifo(path)
    return path


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as made, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # the name of a socket is short
        made.bind(path.name)
    return path


@pytest.mark.parametrize("make", [pipe, bound_socket, lambda path: path.symlink_to("/dev/zero") or path])
def test_a_pipe_or_device_is_refused_unopened(tmp_path, make):
    for name in ("c.jsonl", "c.txt", "c.parquet"):
        with pytest.raises(
            CorpusError, match=r"cannot be read: got .*, a (pipe|device|socket) and no file; write what"
        ):
            Corpus.read(make(tmp_path / name), TOKENIZER)
    with pytest.raises(QueryError, match="cannot be read: got"):
        Queries.read(tmp_path / "c.jsonl")
    with pytest.raises(ConfigError, match=r"cannot read the run file .* is a (pipe|device|socket) and no file"):
        read_run_file(tmp_path / "c.jsonl")
    with pytest.raises(ModelError, match="no model at"):
        load_model(str(tmp_path / "c.jsonl"))
    with pytest.raises(ConfigError, match="is there and is no plan"):
        check_plan_file(tmp_path / "c.jsonl")
    with pytest.raises(ConfigError):
        report_files(make(tmp_path / "page.html"))
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / "config.json")
    with pytest.raises(
        ModelError, match=r"a file of the model cannot be read: got '.*config\.json', a (pipe|device|so)"
    ):
        load_model(str(folder))
    make(folder / "key.json")
    with pytest.raises(UpriverError, match=r"key\.json is a (pipe|device|socket) and no file"):
        Artifact.open(folder, "fit", {})


def test_a_pipe_in_a_folder_is_refused_or_listed(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    pipe(folder / "a.txt")
    write_jsonl(folder / "z.jsonl", [GOOD])
    with pytest.raises(CorpusError, match=r"cannot be read: got .*a\.txt, a pipe and no file"):
        Corpus.read(folder, TOKENIZER)
    assert texts(folder, "skip") == [GOOD["text"]]
    pipe(folder / "dataset_info.json")
    with pytest.raises(CorpusError, match="is a pipe and no file"):
        Corpus.read(folder, TOKENIZER)


# ---- what is meant

SEPARATED = {
    "id;text\na;we, the\nb;of": ";",
    "text\tid\nwe; the, people\ta\n": "\t",
    '"id"|"text"\n"a"|"we; the"\n': "|",
    "id,text,a|b\n1,we the,2\n": ",",
    "text,id\nwe;the,1\nof;it;is,2\n": ",",
    "text\nwe the people\n": ",",
    "sep=;\nid;text\na;we,the\n": ";",
    "id;text;at\na;we the;0,5\nb;of the;1,5\nbroken;row\n": ";",
}


@pytest.mark.parametrize("content", SEPARATED)
def test_the_separator_of_a_table_is_told_by_its_first_rows(tmp_path, content):
    (tmp_path / "c.csv").write_text(content)
    corpus = Corpus.read(tmp_path / "c.csv", TOKENIZER, on_bad_record="skip")
    used = SEPARATED[content]
    assert corpus.info["separators"] == ({} if used == "," else {"c.csv": used})
    lines = [line for line in content.splitlines() if not line.startswith("sep=")]
    column = lines[0].replace('"', "").split(used).index("text")
    good = [line.split(used) for line in lines[1:] if line.count(used) == lines[0].count(used)]
    assert texts(tmp_path / "c.csv", "skip") == [cells[column].strip('"') for cells in good]


@pytest.mark.parametrize("content", ["id;text,lang\na;we,en\nb;of,en\n", "a;b,c|text\n"])
def test_a_separator_that_cannot_be_told_is_refused(tmp_path, content):
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(CorpusError, match=r"c\.csv:1: which character separates the cells .*: comma .*semicolon"):
        Corpus.read(tmp_path / "c.csv", TOKENIZER)


def test_a_tsv_file_is_separated_by_tabs(tmp_path):
    (tmp_path / "c.tsv").write_text("id,x\ttext\n1,y\twe, the\n")
    assert texts(tmp_path / "c.tsv") == ["we, the"]
    (tmp_path / "one.tsv").write_text("text\nwe, the\n")
    assert texts(tmp_path / "one.tsv") == ["we, the"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "c.csv").write_text("text,id,text\nwe,1,of\n")
    with pytest.raises(CorpusError, match=r"c\.csv:1: two columns have the name 'text'"):
        Corpus.read(tmp_path / "c.csv", TOKENIZER)
    (tmp_path / "n.csv").write_text("text,,\nwe the,1,2\n")
    assert Corpus.read(tmp_path / "n.csv", TOKENIZER).metadata(0) == {"column 2": "1", "column 3": "2"}
    table = pa.Table.from_arrays([pa.array(["we"]), pa.array(["of"])], ["text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=r"c\.parquet: two columns have the name 'text'"):
        Corpus.read(tmp_path / "c.parquet", TOKENIZER, on_bad_record="skip")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-be"])
@pytest.mark.parametrize("name", ["c.csv", "c.jsonl.gz", "c.txt"])
def test_a_file_that_says_its_encoding_is_read(tmp_path, name, encoding):
    text = "we thé “people” 日\U0001f642"
    content = {"c.csv": f'text\n"{text}"\n', "c.txt": text}.get(name) or json.dumps({"text": text}, ensure_ascii=False)
    held = ("\ufeff" if encoding == "utf-16-be" else "") + content
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(held.encode(encoding)))
    assert texts(tmp_path / name) == [text]


def test_an_encoding_that_is_not_told_or_not_kept_is_refused(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le"):
        (tmp_path / "c.txt").write_bytes("we the people".encode(encoding))
        with pytest.raises(CorpusError, match=r"c\.txt:1: not UTF-8: it looks like UTF-16 or UTF-32 without the mark"):
            Corpus.read(tmp_path / "c.txt", TOKENIZER)
    (tmp_path / "c.txt").write_bytes("we the".encode("utf-16") + b"\x00\xd8\x00")
    with pytest.raises(CorpusError, match=r"c\.txt:1: .*utf-16.*; save the file as UTF-8"):
        Corpus.read(tmp_path / "c.txt", TOKENIZER)


def frame(content, window):
    """A frame of zstd whose window is that of ``zstd --long=window``, by RFC 8878."""
    block = (1 | len(content) << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window - 10) << 3]) + block + content


def test_a_long_window_is_read_or_what_reads_it_is_named(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("we the", "of the")]
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(frame(lines[0], 27) + frame(lines[1], 20))
    assert texts(path) == ["we the", "of the"]
    path.write_bytes(frame(lines[0], 31) + frame(lines[1], 20))
    if find_spec("zstandard"):
        assert texts(path) == ["we the", "of the"]
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(CorpusError, match="it ends inside a frame; it is damaged or cut short"):
            Corpus.read(path, TOKENIZER)
    else:
        with pytest.raises(
            CorpusError, match=r"window of more than 128 MB; install what reads it: pip install 'upriver.zstd"
        ):
            Corpus.read(path, TOKENIZER)


def test_what_python_does_not_have_in_a_table_is_text_or_a_bad_record(tmp_path):
    days = pa.array([0, 1 << 30, 3_000_000], pa.int32()).view(pa.date32())
    times = pa.array([0, 1 << 50, 253_402_300_800], pa.int64()).view(pa.timestamp("s"))
    inner = pa.StructArray.from_arrays([days], ["day"])
    columns = {"text": pa.array(["we the", "of the", "it is"]), "day": days, "time": times, "inner": inner}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    corpus = Corpus.read(tmp_path / "c.parquet", TOKENIZER)
    far = f"{1 << 30} days after 1970-01-01"
    assert corpus.metadata(0) == {"day": "1970-01-01", "time": "1970-01-01 00:00:00", "inner": {"day": "1970-01-01"}}
    assert corpus.metadata(1) == {"day": far, "time": f"{1000 << 50} ms after 1970-01-01", "inner": {"day": far}}
    day = str(np.datetime64(3_000_000, "D"))
    assert corpus.metadata(2) == {"day": day, "time": "10000-01-01 00:00:00.000", "inner": {"day": day}}
    bad = pa.array([b"we the", b"of \xff", b"it is"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "b.parquet")
    with pytest.raises(
        CorpusError, match=r"b\.parquet:2: not UTF-8: got 0xff at byte 4 of a text in the column 'text'"
    ):
        Corpus.read(tmp_path / "b.parquet", TOKENIZER)
    assert texts(tmp_path / "b.parquet", "skip") == ["we the", "it is"]


def test_many_ids_take_little_memory_and_none_is_forgotten():
    places, n = Places(), 20_000
    keys = [content_hash(b"%d" % i) for i in range(n)]
    tracemalloc.start()
    assert all(places.setdefault(key, (i % 3, i + 1)) == (i % 3, i + 1) for i, key in enumerate(keys))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 64 * n
    assert all(places.setdefault(key, (9, 9)) == (i % 3, i + 1) for i, key in enumerate(keys))
    assert places.setdefault(0, (7, 1 << 39)) == (7, 1 << 39)


def test_the_further_fields_of_records_bound_how_many_are_held_at_once(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{**GOOD, "page": "x" * 400_000}] * 90)
    tracemalloc.start()
    assert len(texts(path)) == 90
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
