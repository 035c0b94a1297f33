"""Whatever bytes a reader is given, a command ends with status 0, 1 or 2 and at most one sentence, and leaves nothing behind.

UPRIVER_FUZZ=300 python -m pytest tests/test_fuzz.py     # so many inputs for each reader; 10 otherwise
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cli_cases import save_model
from text_cases import chat_tokenizer
from upriver import cli
from upriver.given import answered, read_corpus, read_run_file
from upriver.model.load import load_model
from upriver.runtime.config import RunOptions, options
from upriver.text.queries import Queries

COUNT = int(os.environ.get("UPRIVER_FUZZ", "10"))
FIELDS = (
    "text", "prompt", "completion", "messages", "id", "tools", "role", "content", "contrast", "weight", "input_ids", "labels",
    "conversations", "instruction", "output", "chosen", "rejected",
)  # fmt: skip
QUERY = ("id", "prompt", "completion", "contrast")
words = st.sampled_from(
    ["we the people", "of", "", " ", "é日\U0001f642", "\ud800", "\x00", '"', "\u2028", "assistant", "user", "1e999"]
)
texts = words | st.text(max_size=12) | st.lists(words, max_size=4).map("".join)
numbers = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats()
names = st.sampled_from(FIELDS) | st.text(max_size=4)
values = st.recursive(
    texts | numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | values, "content": texts | values}
)
sound = st.fixed_dictionaries({"text": texts}, optional={"id": values, "x": values}) | st.fixed_dictionaries(
    {"messages": st.lists(message, max_size=3)}, optional={"tools": values}
)
records = st.lists(sound | sound | st.dictionaries(names, values, max_size=4) | values, min_size=1, max_size=5)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4)), max_size=3)


def mutated(content: bytes, changes) -> bytes:
    """The bytes with some cut out, put in, or replaced."""
    for where, cut, new in changes:
        at = int(where * len(content))
        content = content[:at] + new + content[at + cut :]
    return content


def json_lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table(rows) -> bytes:
    """A Parquet file of a column of each kind that has bytes, numbers or dates which Python does not have."""
    columns = {
        "text": pa.array([str(x).encode("utf-8", "surrogatepass") for x in rows]).view(pa.string()),
        "at": pa.array([hash(str(x)) % 2**60 for x in range(len(rows))], pa.int64()).view(pa.timestamp("us")),
        "day": pa.array([len(str(x)) % 200 * 10**7 for x in rows], pa.int32()).view(pa.date32()),
        "l": pa.array([[{"a": str(n)}] for n in range(len(rows))]),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def plain(*forms):
    return st.tuples(st.lists(texts, min_size=1, max_size=6), st.sampled_from(forms)).map(
        lambda x: "\n".join(x[0]).encode(x[1], "surrogatepass")
    )


def cells(separators):
    row = st.lists(texts, min_size=1, max_size=4)
    head = st.just("text") | st.just("id,text") | st.just("text;id") | texts

    def lay_out(drawn):
        head, rows, separator = drawn
        return "\n".join([head, *(separator.join(row) for row in rows)]).encode("utf-8", "surrogatepass")

    return st.tuples(head, st.lists(row, max_size=5), st.sampled_from(separators)).map(lay_out)


def zstandard(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


lines = records.map(json_lines)
toml = st.lists(st.tuples(st.sampled_from([*RunOptions.model_fields, "x"]), values.map(repr)), max_size=4).map(
    lambda pairs: "".join(f"{name} = {value}\n" for name, value in pairs).encode("utf-8", "surrogatepass")
)
READERS = {
    "c.jsonl": lines | st.binary(max_size=40),
    "c.json": records.map(lambda rows: json.dumps(rows).encode()),
    "c.jsonl.gz": lines.map(lambda x: gzip.compress(x, 1)),
    "c.jsonl.xz": lines.map(lzma.compress),
    "c.txt.bz2": plain("utf-8").map(bz2.compress),
    "c.jsonl.zst": lines.map(zstandard),
    "c.csv": cells(",;\t|") | st.binary(max_size=40),
    "c.tsv": cells("\t"),
    "c.parquet": records.map(table),
    "c.txt": plain("utf-8", "utf-16", "utf-32", "utf-16-le") | st.binary(max_size=40),
    "q.jsonl": st.lists(st.dictionaries(st.sampled_from(QUERY), texts | values), max_size=3).map(json_lines),
    "run.toml": toml | st.binary(max_size=40),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model") / "m", tokenizer=chat_tokenizer())))


@pytest.mark.parametrize("name", READERS)
def test_whatever_is_read_a_command_ends_well(name, model, tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["upriver"])
    path = tmp_path / "input" / name
    path.parent.mkdir()

    def read(policy):
        if name.startswith("q."):
            answered(Queries.read(path), model, None)
        elif name.startswith("run."):
            options(RunOptions, read_run_file(path), f"{path}: ")
        else:
            corpus = read_corpus(str(path), model, 16, {"on_bad_record": policy})
            for row in range(len(corpus)):
                assert "".join(corpus.pieces(row)) == corpus.text(row)
            named = list(dict.fromkeys(record.id for record in corpus.records()))  # parts of a document share its id
            assert named == [corpus.document_id(d) for d in range(corpus.n_documents)]

    @settings(
        max_examples=COUNT, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(READERS[name], edits, st.sampled_from(["error", "skip"]))
    def ends_well(content, changes, policy):
        path.write_bytes(mutated(content, changes))
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                cli.main(lambda *_, **how: read(policy))
                status = 0
            except SystemExit as end:
                status = end.code
        told = said.getvalue()
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert status in (0, 1, 2), told
        assert len(errors) == (status != 0), told
        assert "Traceback" not in told, told
        assert "unexpected" not in "".join(errors)[:20], told
        assert os.listdir(path.parent) == [name]
        assert not list((tmp_path / "cache").rglob("*.partial"))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    ends_well()
