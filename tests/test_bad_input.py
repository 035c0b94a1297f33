"""Bad input through the command line: one clear error, the right exit status, no traceback, nothing in the way afterwards."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from cli_cases import (
    POSITIONS,
    QUERIES,
    RECORDS,
    Tiny,
    assert_one_error,
    broken_weights,
    build_fitted,
    copy_model,
    fit,
    save_model,
    tiny_llama,
    trace,
    upriver,
)
from text_cases import byte_tokenizer, write_jsonl

WEIGHT = "model.layers.1.mlp.up_proj.weight"
SHORT = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return build_fitted(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def call(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    return lambda *args: upriver(capsys, monkeypatch, *args)


# ------------------------------------------------------------------------------------------------------- models


def broken_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Tiny, Path], Path]:
    def make(tiny: Tiny, folder: Path) -> Path:
        path = copy_model(tiny, folder) / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        return folder

    return make


def empty_folder(tiny: Tiny, folder: Path) -> Path:
    folder.mkdir()
    return folder


def slow_tokenizer(tiny: Tiny, folder: Path) -> Path:
    (copy_model(tiny, folder) / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return folder


def encoder(tiny: Tiny, folder: Path) -> Path:
    return save_model(folder, BertForMaskedLM(BertConfig(**SHORT, intermediate_size=48, max_position_embeddings=32)))


def encoder_decoder(tiny: Tiny, folder: Path) -> Path:
    config = T5Config(vocab_size=290, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    return save_model(folder, T5ForConditionalGeneration(config))


def gguf_rubbish(tiny: Tiny, folder: Path) -> Path:
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUFrubbish")
    return folder / "m.gguf"


BAD_MODELS = {
    "missing folder": (lambda tiny, folder: folder, ["no model at", "/model'", "save_pretrained"]),
    "folder without a model": (empty_folder, ["no model in the folder", "without a config.json"]),
    "broken config": (broken_file("config.json", lambda c: c[:20]), ["config.json", "not a valid JSON"]),
    "unknown architecture": (broken_file("config.json", lambda c: b'{"model_type": "zeppelin"}'), ["zeppelin"]),
    "truncated safetensors": (
        broken_file("model.safetensors", lambda c: c[: len(c) // 2]),
        ["incomplete", "a complete copy"],
    ),
    "no weights": (broken_file("model.safetensors", lambda c: None), ["model.safetensors"]),
    "NaN weights": (broken_weights(lambda w: w[WEIGHT][3].fill_(float("nan"))), ["NaN or infinity", WEIGHT]),
    "missing weights": (broken_weights(lambda w: w.pop(WEIGHT)), ["1 missing keys", WEIGHT, "at random"]),
    "weights of another shape": (
        broken_weights(lambda w: w.update({WEIGHT: w[WEIGHT][:10].clone()})),
        ["1 mismatched keys", WEIGHT, "[10, 32]"],
    ),
    "vocabulary does not fit": (
        lambda tiny, folder: save_model(folder, tiny_llama(vocab_size=200)),
        ["embeds 200 tokens", "up to 289"],
    ),
    "no tokenizer": (broken_file("tokenizer.json", lambda c: None), ["no tokenizer could be loaded", "tokenizer.json"]),
    "broken tokenizer": (broken_file("tokenizer.json", lambda c: b"{}"), ["no tokenizer could be loaded"]),
    "slow tokenizer": (slow_tokenizer, ["no character offsets", "fast tokenizer"]),
    "encoder": (encoder, ["not a causal language model", "loaded as"]),
    "encoder and decoder": (encoder_decoder, ["not a causal language model", "T5"]),
    "rubbish GGUF": (gguf_rubbish, ["m.gguf"]),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(tiny, tmp_path, call, case):
    make, parts = BAD_MODELS[case]
    model = make(tiny, tmp_path / "model")
    assert_one_error(call(*fit(tiny, tmp_path / "out", model=model)), 2, *parts)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- corpora

GOOD = json.dumps(RECORDS[0]).encode() + b"\n"
BAD_CORPORA = {
    "missing": ("c.jsonl", None, ["no such file or folder", "c.jsonl"]),
    "empty": ("c.jsonl", b"", ["the corpus is empty", "c.jsonl"]),
    "broken JSON on line 3": ("c.jsonl", GOOD + b'\n{"text": "we\n', ["c.jsonl:3: broken JSON"]),
    "wrong encoding": ("c.jsonl", GOOD + '{"text": "café"}'.encode("latin-1"), ["c.jsonl:2: not UTF-8", "0xe9"]),
    "empty text": ("c.jsonl", GOOD + b'{"text": ""}', ["c.jsonl:2: the field 'text' is empty"]),
    "neither text nor prompt": ("c.jsonl", b'{"body": "we"}', ["c.jsonl:1: the field 'text' is missing", "'body'"]),
    "prompt without completion": ("c.jsonl", b'{"prompt": "we"}', ["c.jsonl:1: the field 'completion' is missing"]),
    "duplicate ids": (
        "c.jsonl",
        GOOD + b'{"text": "we"}\n' + GOOD,
        ["c.jsonl:3: a second document with the id 'union'", "c.jsonl:1"],
    ),
    "one token in all": ("c.jsonl", b'{"text": "x"}', ["no sequence has a token to predict"]),
    "corrupt gz": ("c.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], ["c.jsonl.gz:", "damaged or cut short"]),
    "corrupt xz": ("c.jsonl.xz", lzma.compress(b'{"text": "we"}\n' * 999)[:-40], ["c.jsonl.xz:", "damaged or cut short"]),
    "corrupt parquet": ("c.parquet", b"PAR1rubbishPAR1", ["c.parquet:1", "damaged or cut short"]),
    "unknown file type": ("c.docx", b"we", ["not a known type of file", "c.docx", ".jsonl"]),
    "messages without a template": (
        "c.jsonl", b'{"messages": [{"role": "assistant", "content": "we"}]}', ["c.jsonl:1", "no chat template"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "case"),
    [*(("fit", case) for case in BAD_CORPORA), ("trace", "missing"), ("trace", "broken JSON on line 3")],
)
def test_bad_corpus(tiny, tmp_path, call, verb, case):
    name, content, parts = BAD_CORPORA[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    command = {"fit": fit, "trace": trace}[verb]
    assert_one_error(call(*command(tiny, tmp_path / "out", corpus=tmp_path / name)), 2, *parts)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("info.json"))


# ------------------------------------------------------------------------------------------------------- queries

Q = QUERIES[0]
BAD_QUERIES = {
    "missing": (None, ["no such file or folder", "q.jsonl"]),
    "empty": ([], ["q.jsonl: no query in it"]),
    "no completion": ([Q, {"id": "a", "prompt": "we"}], ["q.jsonl:2", "query 'a' has no completion", "--complete N"]),
    "neither prompt nor completion": ([{"id": "a"}], ["q.jsonl:1", "neither a prompt nor a completion"]),
    "completion without tokens": ([{**Q, "completion": "ZZ"}], ["q.jsonl:1", "has no token of its own: got 'ZZ'"]),
    "a first token alone": ([{"id": "a", "completion": "w"}], ["q.jsonl:1", "its only token 'w'", "give a prompt"]),
    "duplicate ids": ([Q, Q], ["q.jsonl:2: two queries have one id: got 'people'", "q.jsonl:1"]),
    "reserved id": ([{**Q, "id": "start"}], ["q.jsonl:1: the id 'start'", "choose another than"]),
    "half a surrogate pair as id": (
        [{**Q, "id": "\ud800"}],
        ["q.jsonl:1: the field 'id' holds half of a surrogate pair"],
    ),
    "no id": ([{"prompt": "we", "completion": " the"}], ["q.jsonl:1: a query needs an id", "got None"]),
    "too long": ([{**Q, "prompt": "we " * 40}], ["q.jsonl:1", "is too long: got 81 tokens", f"at most {POSITIONS}"]),
    "unknown field": ([{**Q, "promt": "we"}], ["q.jsonl:1", "got 'promt'", "did you mean 'prompt'?"]),
    "not a text": ([{**Q, "prompt": 7}], ["q.jsonl:1: the field 'prompt' is not a text: got 7"]),
}


@pytest.fixture(scope="module")
def forgetful(tiny):
    """The tiny model with a tokenizer that drops every Z."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Z", "")
    return save_model(tiny.root / "forgetful", tokenizer=tokenizer)


@pytest.mark.parametrize("case", BAD_QUERIES)
def test_bad_query(tiny, tmp_path, call, forgetful, case):
    records, parts = BAD_QUERIES[case]
    if records is not None:
        write_jsonl(tmp_path / "q.jsonl", records)
    model = forgetful if case == "completion without tokens" else None
    assert_one_error(call(*trace(tiny, tmp_path / "out", queries=tmp_path / "q.jsonl", model=model)), 2, *parts)
    assert not (tmp_path / "out").exists()


def test_content_in_the_place_of_a_file(tiny, tmp_path, call):
    content = "\n".join(json.dumps(query) for query in QUERIES * 9)
    for place in ({"corpus": content}, {"queries": content}):
        parts = ["not a path that can be opened", '{"id": ', "File name too long", "give the path of a file"]
        assert_one_error(call(*trace(tiny, tmp_path / "out", **place)), 2, *parts)


# ------------------------------------------------------------------------------------------------------- flags

BAD_FLAGS = {
    ("fit", "--layers", "nothing.*"): ["'nothing.*' matches nothing", "model.layers.*.mlp.up_proj"],
    ("fit", "--layers", "attention,mpl"): ["'mpl' matches nothing", "model.layers.*.mlp.up_proj"],
    ("fit", "--seq-len", "33"): ["--seq-len", "got 33", "at most 32 tokens"],
    ("fit", "--seq-len", "1"): ["--seq-len", "got '1'", "greater than or equal to 2"],
    ("fit", "--seq-len", "many"): ["--seq-len", "got 'many'", "integer"],
    ("fit", "--dtype", "float16"): ["'dtype'", "got 'float16'", "'bfloat16'"],
    ("fit", "--fisher", "true"): ["'fisher'", "got 'true'", "'empirical'"],
    ("fit", "--fisher", "exact"): ["takes a pass for each output", "causal language model", "--draws K"],
    ("fit", "--draws", "2", "--fisher", "empirical"): ["'draws'", "got 2", "sampled"],
    ("fit", "--device", "toaster"): ["'toaster'", "use auto, cpu"],
    ("fit", "--device", "meta"): ["'meta'", "use auto, cpu"],
    ("fit", "--max-tokens", "-5"): ["--max-tokens", "got '-5'"],
    ("fit", "--batch-tokens", "0"): ["--batch-tokens", "got '0'"],
    ("fit", "--seed", "-1"): ["--seed", "got '-1'"],
    ("fit", "--seed", str(2**70)): ["'seed'", str(2**70)],
    ("fit", "--on-bad-record", "ignore"): ["--on-bad-record", "got 'ignore'", "error or skip"],
    ("fit", "--sed", "1"): ["--sed", "--seed", "upriver fit --help"],
    ("fit", "--memory", "7 cows"): ["bad size of memory: got '7 cows'"],
    ("trace", "--memory", "7 cows"): ["bad size of memory: got '7 cows'"],
    ("trace", "--damping", "-1"): ["'damping'", "got '-1'", "0.1x"],
    ("trace", "--damping", "nan"): ["'damping'", "got 'nan'", "0.1x"],
    ("trace", "--damping", "ten"): ["'damping'", "got 'ten'", "0.1x"],
    ("trace", "--rank", "0"): ["'rank'", "got '0'", "full"],
    ("trace", "--rank", "half"): ["'rank'", "got 'half'", "full"],
    ("trace", "--curvature", "hessian"): ["'curvature'", "got 'hessian'", "'kfac'"],
    ("trace", "--top", "-3"): ["--top", "got '-3'"],
    ("trace", "--candidates", "0"): ["--candidates", "got '0'"],
    ("trace", "--complete", "0"): ["--complete", "got '0'"],
    ("trace", "--device", "cuda:99"): ["'cuda:99'", "use auto, cpu"],
}


@pytest.mark.parametrize("case", BAD_FLAGS, ids=" ".join)
def test_bad_flag(tiny, tmp_path, call, case):
    verb, *flag = case
    command = {"fit": fit, "trace": trace}[verb]
    assert_one_error(call(*command(tiny, tmp_path / "out", *flag)), 2, *BAD_FLAGS[case])
    if (tmp_path / "out").exists():  # what was begun there is not in the way
        assert call(*command(tiny, tmp_path / "out")).status == 0


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["fit"], ["missing argument", "MODEL", "upriver fit --help"]),
        (["fit", "m", "c"], ["missing option '--out'"]),
        (["report"], ["missing argument", "SCORES"]),
        (["fitt"], ["no such command 'fitt'", "'fit'"]),
        (["--colour"], ["no such option: --colour"]),
    ],
    ids=str,
)
def test_bad_command(call, args, parts):
    assert_one_error(call(*args), 2, *parts)
