"""Checkpoints of which something else would be loaded than was trained are refused, by what would be lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import upriver as up
from text_cases import byte_tokenizer
from upriver.errors import ModelError

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def config(kind: Any, **given: Any) -> Any:
    return kind(**given)


def saved(folder: Path, model: torch.nn.Module, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def llama(folder: Path, kind: type = LlamaForCausalLM, **more) -> Path:
    torch.manual_seed(0)
    return saved(folder, kind(config(LlamaConfig, **SMALL | more)))


def changed(folder: Path, change) -> Path:
    """With other weights in its file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def told(folder: Path, **more) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


def eighth(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, w in weights.items():
        scale = w.abs().max() / 448
        scaled = {name: (w / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale[None]}
        out |= scaled if "mlp" in name else {name: w}
    return out


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=2)
    return saved(folder, GPT2ForSequenceClassification(config))


def run(folder: Path) -> Path:
    for step in (9, 100, 20):
        llama(folder / f"checkpoint-{step}")
    return folder


def run_of_adapters(folder: Path) -> Path:
    for step in (9, 10):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    return folder


FOREIGN = {
    "classifier, tied": (
        lambda f: llama(f, LlamaForSequenceClassification, num_labels=1, tie_word_embeddings=True),
        ["LlamaForSequenceClassification", "score.weight", "task="],
    ),
    "classifier of tokens": (
        lambda f: llama(f, LlamaForTokenClassification, tie_word_embeddings=True),
        ["LlamaForTokenClassification"],
    ),
    "GPT-2 classifier": (gpt2, ["GPT2ForSequenceClassification", "score.weight"]),
    "value head": (
        lambda f: changed(llama(f), lambda w: w | {"v_head.summary.weight": torch.ones(1, 16)}),
        ["1 of them", "v_head.summary.weight", "LlamaForCausalLM"],
    ),
    "fewer layers": (
        lambda f: told(llama(f), num_hidden_layers=1, layer_types=None),
        ["model.layers.1.", "as many layers"],
    ),
    "scales": (lambda f: changed(llama(f), eighth), ["6 scales", "weight_scale", "quantization_config"]),
    "another architecture": (
        lambda f: told(llama(f), architectures=["LlamaForQuestionAnswering"]),
        ["QuestionAnswering"],
    ),
    "folder of a training run of adapters": (run_of_adapters, ["2 checkpoints", "checkpoint-10"]),
    "folder of a training run": (run, ["3 checkpoints", "checkpoint-100"]),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_would_be_lost_is_named(case, tmp_path):
    make, parts = FOREIGN[case]
    with pytest.raises(ModelError) as error:
        up.load_model(make(tmp_path / "model"))
    said = str(error.value)
    assert [part for part in parts if part not in said] == [], said
    assert "\n" not in said


def test_buffers_that_older_versions_stored_are_harmless(tmp_path):
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    plain, more = llama(tmp_path / "plain"), changed(llama(tmp_path / "more"), lambda w: w | stored)
    assert up.load_model(more).fingerprint == up.load_model(plain).fingerprint


def test_a_token_past_the_rows_is_an_error_only_where_it_occurs(tmp_path):
    """As the token for padding that was added for batches, and never trained."""
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(0)
    model = up.load_model(
        saved(tmp_path / "model", LlamaForCausalLM(config(LlamaConfig, **SMALL | {"vocab_size": rows})), tokenizer)
    )
    texts = tmp_path / "plain.jsonl"
    texts.write_text(
        "".join(json.dumps({"id": str(i), "text": "the river runs past the mill"}) + "\n" for i in range(4))
    )
    corpus = up.Corpus.read(texts, model.tokenizer, seq_len=16)
    factors = up.fit(model, corpus, tmp_path / "factors")
    assert factors.manifest["n_train"] > 0
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "a", "text": "the river <pad> runs"}) + "\n")
    with pytest.raises(ModelError, match="the corpus holds a token that the model has no embedding for: got '<pad>'"):
        up.fit(model, up.Corpus.read(other, model.tokenizer, seq_len=16), tmp_path / "others")
    asked = tmp_path / "queries.jsonl"
    asked.write_text(json.dumps({"id": "q", "prompt": "the <pad>", "completion": " mill"}) + "\n")
    queries = up.Queries.read(asked, model.tokenizer)
    with pytest.raises(ModelError, match="query 'q' holds a token"):
        up.trace(model, corpus, queries, factors, out=tmp_path / "scores")
