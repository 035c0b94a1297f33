"""A corpus: its windows partition the text, its loss lies where it should, and it is tokenised once."""

import errno
import fcntl
import gzip
import json
import lzma
import os
import subprocess
import sys
from itertools import chain, permutations
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text_cases import byte_tokenizer, chat_tokenizer, fallback_tokenizer, write_jsonl
from upriver.errors import ConfigError, CorpusError, ModelError
from upriver.text.corpus import Corpus

TEXTS = [
    "the people of the united states",
    "we the people 😀 of 日本",
    "a\u0301 combined, مرحبا right to left",
    "the end",
]
TOKENIZERS = {
    "byte": byte_tokenizer(), "bos": byte_tokenizer(bos=True), "bos-eos": byte_tokenizer(bos=True, eos=True),
    "trimmed": byte_tokenizer(trim=True), "fallback": fallback_tokenizer(),
}  # fmt: skip
unicode_text = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the people of 😀👩‍👩‍👧日本éa\u0301مر\n\t ")),
    min_size=1,
    max_size=60,
).filter(lambda text: text.strip())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def read(records, tmp_path, tokenizer="byte", **options):
    return Corpus.read(write_jsonl(tmp_path / "corpus.jsonl", records), TOKENIZERS[tokenizer], **options)


def loss_pieces(corpus, row):
    loss = corpus.batch([row]).inputs["loss"][0].tolist()
    return [piece for piece, wanted in zip(corpus.pieces(row), loss, strict=True) if wanted]


def check_windows(kept_texts, kept_tokens, text, tokens):
    """The windows hold the text and its tokens in order; a last one of a single token, which predicts nothing, is out."""
    kept = list(chain.from_iterable(kept_tokens))
    assert kept == tokens[: len(kept)]
    assert len(tokens) - len(kept) <= 1
    assert text.startswith("".join(kept_texts))
    assert len(kept) < len(tokens) or "".join(kept_texts) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(unicode_text, min_size=1, max_size=4), seq_len=st.integers(2, 9), pack=st.booleans())
def test_windows_partition_text_and_tokens(shared, name, texts, seq_len, pack):
    tokenizer, texts = TOKENIZERS[name], [*texts, "the people of the united states"]
    path = write_jsonl(shared / "corpus.jsonl", [{"text": text} for text in texts])
    corpus = Corpus.read(path, tokenizer, seq_len=seq_len, pack=pack, cache=shared / "cache")
    pieces, tokens = ([part(row) for row in range(len(corpus))] for part in (corpus.pieces, corpus.token_ids))
    shown = [corpus.text(row) for row in range(len(corpus))]
    assert ["".join(part) for part in pieces] == shown
    assert [len(part) for part in pieces] == [len(part) for part in tokens] == corpus.lengths_N.tolist()
    whole = [tokenizer(text)["input_ids"] for text in texts]
    if pack:
        end = [] if name == "bos-eos" else [tokenizer.eos_token_id]
        stream = list(chain.from_iterable(end + ids for ids in whole))[len(end) :]
        assert set(corpus.lengths_N[:-1].tolist()) <= {seq_len}
        return check_windows(shown, tokens, "".join(texts), stream)
    for document, ids in enumerate(whole):
        rows = np.flatnonzero(corpus.document_of_N == document)
        check_windows([shown[row] for row in rows], [tokens[row] for row in rows], texts[document], ids)
        edges = [0, *corpus.span_N2[rows, 1].tolist()]
        assert corpus.span_N2[rows, 0].tolist() == edges[:-1]
    return None


def test_a_packed_span_ends_with_its_first_document(tmp_path):
    corpus = read([{"text": text} for text in TEXTS], tmp_path, seq_len=16, pack=True)
    for row in range(len(corpus)):
        start, end = corpus.span_N2[row]
        assert corpus.text(row).startswith(corpus.document_text(corpus.document_of_N[row])[start:end])


def test_text_has_loss_everywhere_but_at_the_first_position(tmp_path):
    corpus = read([{"text": TEXTS[0]}], tmp_path, "bos-eos", seq_len=4)
    batch = corpus.batch(np.arange(len(corpus)))
    assert batch.real_NT is not None
    expected = batch.real_NT.clone()
    expected[:, 0] = False
    assert (batch.inputs["loss"] == expected).all()
    assert (batch.inputs["tokens"][~batch.real_NT] == 0).all()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_loss_of_prompt_and_completion_is_on_the_completion(tmp_path, name):
    corpus = read([{"prompt": "we the people of", "completion": " the united 😀"}], tmp_path, name)
    assert "".join(loss_pieces(corpus, 0)).strip() == "the united 😀"


def test_windows_without_an_answer_are_dropped_and_counted(tmp_path):
    corpus = read([{"prompt": "x" * 10, "completion": "yz"}, {"text": "z" * 5}], tmp_path, seq_len=4)
    assert corpus.info["windows_without_loss"] == 3  # two of the prompt alone, one of a single token
    assert [corpus.text(row) for row in range(len(corpus))] == ["xxyz", "zzzz"]
    assert loss_pieces(corpus, 0) == ["y", "z"]


def test_loss_of_messages_is_on_the_answers(tmp_path):
    messages = [
        {"role": "user", "content": "assistant Yes?"}, {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Yes or no"}, {"role": "assistant", "content": " no 日 "},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages, "topic": "yes"}])
    corpus = Corpus.read(path, chat_tokenizer())
    assert "".join(loss_pieces(corpus, 0)).replace(" ", "") == "Yes\nno日\n"  # with what ends a turn
    assert corpus.document_text(0).startswith("<user>assistant Yes?")
    assert corpus.token_ids(0).tolist().count(0) == 0  # the template's text gets no second beginning token
    with pytest.raises(CorpusError, match=r"chat\.jsonl:1: .*no chat template"):
        Corpus.read(path, TOKENIZERS["byte"])


def test_a_template_that_refuses_or_rewrites_is_a_bad_record(tmp_path):
    ask = {"role": "user", "content": "so"}
    records = [{"messages": [ask, {"role": "assistant", "content": text}]} for text in ("fine", "REFUSE", "REWRITE")]
    path = write_jsonl(tmp_path / "chat.jsonl", records)
    info = Corpus.read(path, chat_tokenizer(), on_bad_record="skip").info
    assert info["documents"] == 1
    assert ["refuses" in s["reason"] for s in info["skipped"]["first"]] == [True, False]


def test_batches_follow_the_plan(tmp_path):
    corpus = read([{"text": "x" * n} for n in (3, 9, 2, 9, 30, 5)], tmp_path, seq_len=10)
    planned = corpus.plan(20)
    assert sorted(np.concatenate(planned).tolist()) == list(range(len(corpus)))
    for rows in planned:
        batch = corpus.batch(rows)
        assert batch.inputs["tokens"].numel() <= 20
        assert int(batch.real_NT.sum()) == corpus.lengths_N[rows].sum()
        assert (batch.keys_N == corpus.keys_N[rows]).all()


def test_keys_and_samples_do_not_depend_on_order(tmp_path):
    texts = ["we the people", "united", "united", "the end of it", "states"]
    one = read([{"text": text} for text in texts], tmp_path)
    other = read([{"text": text} for text in reversed(texts)], tmp_path)
    assert len(set(one.keys_N.tolist())) == len(texts)
    assert {one.text(r): one.keys_N[r] for r in (0, 3, 4)} == {other.text(r): other.keys_N[r] for r in (4, 1, 0)}
    assert set(one.keys_N.tolist()) == set(other.keys_N.tolist())
    for seed in range(5):
        chosen = one.sample(12, seed)
        assert one.lengths_N[chosen].sum() <= 12
        assert set(one.keys_N[chosen].tolist()) == set(other.keys_N[other.sample(12, seed)].tolist())


def test_keys_of_equal_tokens_with_other_losses_do_not_depend_on_order(tmp_path):
    records = [
        {"id": "text", "text": "we the people"}, {"id": "answer", "prompt": "we the", "completion": " people"},
        {"id": "other", "text": "states"},
    ]  # fmt: skip
    found = []
    for order in permutations(records):
        corpus = read(order, tmp_path)
        assert len({tuple(corpus.token_ids(row)) for row in range(3)}) == 2
        found.append({corpus.document_id(int(corpus.document_of_N[row])): int(corpus.keys_N[row]) for row in range(3)})
    assert all(keys == found[0] for keys in found)
    assert len(set(found[0].values())) == 3


def test_what_never_carries_loss_does_not_enter_a_key(tmp_path):
    """The first token is predicted from nothing: a text, and an answer without a prompt, are learned alike."""
    corpus = read([{"text": "we the people"}, {"prompt": "", "completion": "we the people"}], tmp_path, "bos")
    again = read([{"text": "we the people"}, {"text": "we the people"}], tmp_path, "bos")
    assert corpus.keys_N.tolist() == again.keys_N.tolist()


def test_ids_and_metadata_are_kept(tmp_path):
    corpus = read([{"id": 7, "text": "one", "year": 1999, "x": float("nan")}, {"text": "two", "by": ["é"]}], tmp_path)
    assert [corpus.document_id(d) for d in range(2)] == ["7", "corpus.jsonl:2"]
    assert [corpus.metadata(d) for d in range(2)] == [{"year": 1999, "x": None}, {"by": ["é"]}]
    assert (corpus.n_documents, corpus.n_tokens) == (2, 6)
    assert corpus.max_token == max(max(corpus.token_ids(row)) for row in range(2))


def forms(folder):
    """The same four records in every form."""
    frame = pd.DataFrame({"id": list("abcd"), "text": TEXTS, "year": ["1", "2", "3", "4"]})
    lines = "".join(json.dumps(record) + "\n" for record in frame.to_dict("records")).encode()
    (folder / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n")
    (folder / "c.json.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    frame.to_parquet(folder / "c.parquet")
    frame.to_csv(folder / "c.csv", index=False)
    frame.to_csv(folder / "c.csv.bz2", index=False)
    with pa.output_stream(folder / "c.jsonl.zst", compression="zstd") as sink:
        sink.write(lines)
    datasets.Dataset.from_pandas(frame).save_to_disk(str(folder / "arrow"))
    datasets.DatasetDict({"train": datasets.Dataset.from_pandas(frame)}).save_to_disk(str(folder / "arrows"))
    return ["c.jsonl", "c.json.gz", "c.jsonl.xz", "c.jsonl.zst", "c.parquet", "c.csv", "c.csv.bz2", "arrow", "arrows"]


def test_every_form_gives_the_same_corpus(tmp_path):
    for name in forms(tmp_path):
        corpus = Corpus.read(tmp_path / name, TOKENIZERS["byte"])
        assert [corpus.text(row) for row in range(len(corpus))] == TEXTS, name
        assert [corpus.document_id(d) for d in range(4)] == list("abcd"), name
        assert corpus.metadata(2) == {"year": "3"}, name


def test_a_folder_of_text_files_is_a_document_each(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text(TEXTS[1], encoding="utf-8", newline="")
    (folder / "deep" / "a.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo\n"))
    (folder / ".hidden").write_text("not this")
    corpus = Corpus.read(folder, TOKENIZERS["byte"])
    assert [corpus.document_id(d) for d in range(2)] == ["b.txt", "deep/a.txt.gz"]
    assert [corpus.document_text(d) for d in range(2)] == [TEXTS[1], "one\r\ntwo\n"]


def test_tokenised_once_and_again_when_anything_changes(tmp_path):
    records = [{"text": text} for text in TEXTS]
    first = read(records, tmp_path)
    assert not first.reused
    assert not read(records, tmp_path, "bos").reused
    assert not read(records, tmp_path, seq_len=8).reused
    assert not read(records, tmp_path, pack=True).reused
    assert not read(records[:2], tmp_path).reused
    again = read(records, tmp_path, progress=lambda done, total: pytest.fail("tokenised again"))
    assert again.reused
    assert again.fingerprint == first.fingerprint
    assert {**again.info, "path": ""} == {**first.info, "path": ""}
    (tmp_path / "elsewhere").mkdir()
    assert read(records, tmp_path / "elsewhere").reused


def test_truncation_left_over_from_a_call_changes_nothing(tmp_path):
    tokenizer = byte_tokenizer()
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": TEXTS[0]}])
    first = Corpus.read(path, tokenizer)
    tokenizer("something long enough", truncation=True, max_length=3, padding="max_length")
    assert Corpus.read(path, tokenizer).reused
    assert len(Corpus.read(path, tokenizer, seq_len=64).token_ids(0)) == len(first.token_ids(0))


def test_a_document_far_longer_than_the_context(tmp_path, capfd):
    text = "the people of 日本 " * 20_000
    corpus = read([{"text": text}], tmp_path, seq_len=512)
    assert sum(len(corpus.text(row)) for row in range(len(corpus))) == len(text)
    assert "longer than" not in capfd.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files is Linux's")
def test_text_and_tokens_are_read_and_not_mapped(tmp_path):
    """A mapped page that was touched counts as resident memory, so a pass over a mapped corpus would hold all of it."""
    corpus = read([{"text": text} for text in TEXTS], tmp_path, seq_len=8)
    for rows in corpus.plan(64):
        corpus.batch(rows)
        assert corpus.text(int(rows[0]))
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".bin")]


def test_progress_reaches_the_end(tmp_path):
    seen = []
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in TEXTS])
    Corpus.read(path, TOKENIZERS["byte"], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_a_build_that_was_killed_leaves_nothing_half_made(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in TEXTS])
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from text_cases import byte_tokenizer; from upriver.text.corpus import Corpus\n"
        "Corpus.read(sys.argv[2], byte_tokenizer(), cache=sys.argv[3], progress=lambda done, total: os._exit(9))"
    )
    arguments = [sys.executable, "-c", program, str(Path(__file__).parent), str(path), str(tmp_path / "cache")]
    assert subprocess.run(arguments, check=False).returncode == 9
    corpus = Corpus.read(path, byte_tokenizer(), cache=tmp_path / "cache")
    assert not corpus.reused
    assert [corpus.text(row) for row in range(len(corpus))] == TEXTS
    assert not list((tmp_path / "cache" / "corpus").glob("*.partial"))


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="got Slow"):
        Corpus.read(write_jsonl(tmp_path / "c.jsonl", [{"text": "one"}]), Slow())  # pyright: ignore


def test_packing_needs_an_end_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end token"):
        Corpus.read(write_jsonl(tmp_path / "c.jsonl", [{"text": "one"}]), tokenizer, pack=True)


def test_options_that_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="at least 2"):
        read([{"text": "one"}], tmp_path, seq_len=1)
    with pytest.raises(ConfigError, match="'error' or 'skip'"):
        read([{"text": "one"}], tmp_path, on_bad_record="ignore")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="UPRIVER_CACHE"):
        read([{"text": "one"}], tmp_path, cache=tmp_path / "closed")


def test_a_cache_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"):
        corpus = read([{"text": text} for text in TEXTS], tmp_path)
    assert [corpus.text(row) for row in range(len(corpus))] == TEXTS


def test_a_cache_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="UPRIVER_CACHE"):
        read([{"text": "one"}], tmp_path, cache=tmp_path / "file")
