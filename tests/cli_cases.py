"""A tiny model folder with corpus and queries on disk, and the command line called inside the test's process."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from text_cases import byte_tokenizer, write_jsonl
from upriver import cli

VOCABULARY, POSITIONS = 290, 32
RECORDS = [
    {"id": "union", "text": "we the people of the united states, in order to form a more perfect union", "year": 1787},
    {"id": "war", "text": "it is the end of the war, and the people of the states are one people again"},
    {"id": "state", "text": "the state of the union is strong, because our people are strong"},
    {"id": "script", "text": "a document holding <script>alert('x')</script> & a smile \U0001f642 shows as text"},
    {"id": "ask", "prompt": "what is the state of the union?", "completion": " it is strong"},
    {"id": "short", "text": "the people"},
]
QUERIES = [
    {"id": "people", "prompt": "we the", "completion": " people"},
    {"id": "peace", "prompt": "it is the end of the", "completion": " war", "contrast": " union"},
]


class Tiny(NamedTuple):
    """What a command needs, all on disk."""

    root: Path
    model: Path
    corpus: Path
    queries: Path

    @property
    def factors(self) -> Path:
        return self.root / "factors"


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


def tiny_llama(**changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.update(changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # larger than the default start, so that predictions differ
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.15)
    return model.eval()


def save_model(folder: Path, model=None, tokenizer=None) -> Path:
    (model or tiny_llama()).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def build(root: Path) -> Tiny:
    model = save_model(root / "model")
    corpus = write_jsonl(root / "corpus.jsonl", RECORDS)
    return Tiny(root, model, corpus, write_jsonl(root / "queries.jsonl", QUERIES))


def copy_model(tiny: Tiny, folder: Path) -> Path:
    return Path(shutil.copytree(tiny.model, folder))


def upriver(capsys, monkeypatch, *args) -> Ran:
    """The command line in this process: its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["upriver", *map(str, args)])
    capsys.readouterr()
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    return Ran(status, *capsys.readouterr())


def fit(tiny: Tiny, out: Path, *flags, model=None, corpus=None) -> list:
    return ["fit", model or tiny.model, corpus or tiny.corpus, "--out", out, "--seq-len", 16, *flags]


def trace(tiny: Tiny, out: Path, *flags, model=None, corpus=None, queries=None, factors=None) -> list:
    inputs = [model or tiny.model, corpus or tiny.corpus, queries or tiny.queries]
    return ["trace", *inputs, "--factors", factors or tiny.factors, "--out", out, "--top", 2, *flags]


def assert_one_error(ran, status: int, *parts: str) -> None:
    """One paragraph, the last of what was printed, that holds ``parts``; no traceback."""
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.status == status, ran.err
    assert len(errors) == 1, ran.err
    assert ran.last_line == errors[0]
    assert not re.search(r"Traceback|  File \"|unexpected", ran.err + ran.out), ran.err
    for part in parts:
        assert part in errors[0]
    assert re.search(r"[;:?] ?\w", errors[0].removeprefix("error: ")), "what to do is missing"


def broken_weights(change: Callable[[dict], None]) -> Callable[[Tiny, Path], Path]:
    def make(tiny: Tiny, folder: Path) -> Path:
        path = copy_model(tiny, folder) / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        return folder

    return make


def build_fitted(root: Path) -> Tiny:
    """The same with its factors."""
    tiny = build(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPRIVER_CACHE", str(root / "cache"))
        patch.setattr(sys, "argv", ["upriver", *map(str, fit(tiny, tiny.factors))])
        cli.main()
    return tiny
