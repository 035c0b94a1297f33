"""Tiny random models of the causal architectures of transformers; run it to print the table of docs/architectures.md.

python tests/architectures.py
"""

import logging
import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from upriver.errors import ModelError
from upriver.model.coverage import Coverage, coverage
from upriver.model.experts import experts_of
from upriver.model.layers import find_layers

V = 320
COMMON: dict[str, Any] = dict(  # noqa: C408
    vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GPT2: dict[str, Any] = dict(  # noqa: C408
    vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HEAD = {"head_dim": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "codegen": {**GPT2, "rotary_dim": 4},
    "ctrl": {**GPT2, "dff": 64},
    "openai-gpt": GPT2,
    "gpt_neo": {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "gpt_neox": COMMON,
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "xglm": {"vocab_size": V, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "biogpt": COMMON,
    "llama": COMMON,
    "mistral": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, **HEAD},
    "gemma": {**COMMON, **HEAD},
    "gemma2": {**COMMON, **HEAD, "query_pre_attn_scalar": 8},
    "gemma3_text": {**COMMON, **HEAD, "query_pre_attn_scalar": 8},
    "phi": COMMON,
    "phi3": COMMON,
    "stablelm": COMMON,
    "cohere": COMMON,
    "cohere2": COMMON,
    "granite": COMMON,
    "olmo": COMMON,
    "olmo2": COMMON,
    "olmo3": COMMON,
    "smollm3": COMMON,
    "starcoder2": COMMON,
    "glm": {**COMMON, **HEAD},
    "nemotron": COMMON,
    "exaone4": COMMON,
    "persimmon": COMMON,
    "helium": {**COMMON, **HEAD},
    "arcee": COMMON,
    "seed_oss": {**COMMON, **HEAD},
    "ernie4_5": {**COMMON, **HEAD},
    "hunyuan_v1_dense": {**COMMON, **HEAD},
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {**COMMON, **HEAD, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "rwkv": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "qwen2_moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**COMMON, **EXPERTS, **HEAD},
    "olmoe": {**COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**COMMON, **HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {**COMMON, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
}
ONLY_WITH = {  # nothing to track by default; --layers that works
    "mamba": "*.in_proj,*.x_proj,*.out_proj", "mamba2": "all",
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()


def covered(module: torch.nn.Module, spec: str) -> Coverage | None:
    try:
        return coverage(module, find_layers(module, spec))
    except ModelError:
        return None


def row(name: str, module: torch.nn.Module | None = None) -> str:
    module = module or build(name)
    shares = []
    for spec in ("mlp", "attention", "all"):
        found = covered(module, spec)
        shares.append(f"{found.share:.0%}" if found else "none: refused")
    total = sum(p.numel() for p in module.parameters())
    experts = {p for m in module.modules() for x in experts_of(m).values() for p in x.stored.values()}
    note = f"{sum(p.numel() for p in experts) / total:.0%} are experts" if experts else ""
    return f"| {name} | {type(module).__name__} | {' | '.join(shares)} | {note} |"


HEADER = """# Architectures

Tiny random models of these architectures go through `fit` and `trace` in `tests/test_architectures.py`, and their
scores are compared there with plain autograd. The shares are of these tiny models (width 32, vocabulary 320), where
embeddings weigh much; your model's share is printed by every fit. In mixtures `mlp` means the experts and
what all tokens share, not the routers. Mamba goes only
with `--layers "*.in_proj,*.x_proj,*.out_proj"`, as it uses the weight of `dt_proj` without calling it.
This table is printed by `python tests/architectures.py`, and a test compares the two.

| type | class | `--layers mlp` | `attention` | `all` | note |
|---|---|---|---|---|---|"""


def table() -> str:
    return "\n".join([HEADER, *map(row, CONFIGS)]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
