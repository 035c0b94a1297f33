"""Any causal type of transformers in small, with random weights: its configuration with small numbers in place of its own."""

import dataclasses
import logging
import re
import warnings
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from upriver.model.text_part import auto_class

V = 320
CAUSAL = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEEING = [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL]
NUMBERS = {  # the name of a field -> its number; the first that matches
    r"(unpadded_|audio_|.*_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab": V,
    r"position_embedding_size|num_position_embeddings": V,
    r"(bos|pad|decoder_start)_token_id": 0,
    r"(forced_)?eos_token_id": 1,
    r".*_token_(id|index)|unk_index|mask_index": 5,
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(decoder|encoder)_layers|depth": 2,
    r"num_kv_heads|kv_n_heads|swa_num_key_value_heads": 2,
    r"(num_)?((decoder|encoder)_)?attention_heads|(swa_)?num_(attention_|key_value_)?heads|(index_)?n_heads?": 4,
    r"linear_num_((key|value)_)?heads": 4,
    r"(.*_)?head_dim|kv_channels|dim_head|attention_head_size|d_rel": 8,
    r"(shared_)?(moe|expert)s?_(.*_)?(intermediate|hidden)_size|expert_ffn_hidden_size": 32,
    r"shared_((expert|experts)_)?intermediate_size": 32,
    r"(.*_)?ffn_dim|dff|n_inner|dim_ff|ffn_hidden_size|d_inner|feed_forward_size|mlp_dim": 64,
    r"(dense_)?intermediate_size(_mlp)?": 64,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num": 4,
    r"num_experts_per_tok|moe_topk|moe_k|moe_top_k": 2,
    r"(moe_)?num_shared_experts|n_shared_experts|n_group|topk_group": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"(.*_)?(hidden|embedding)_size(_global)?|d_model|n_embd|embed_dim|emb_dim|word_embed_proj_dim": 32,
    r"lru_width|input_size": 32,
    r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|prompt_mid_dim": 64,
    r"max_(source|target)_positions|(relative_|bias_|position_bias_)max_distance": 64,
    r"sliding_window(_size)?|(attention_)?window_size|local_attention(_window_len)?": 16,
    r"keep_window_size|index_topk|rel_extent|image_size|(mamba_)?chunk_size": 16,
    r"(.*_)?rank|hc_lowrank|hidden_size_per_layer_input|patch_size|state_size|ssm_state_size|mamba_d_state": 8,
    r"mamba_(n|num)_heads": 8,
    r"mamba_d_ssm": 64,
    r"rotary_dim": 4,
}
UNSET = ("num_key_value_heads", "head_dim", "intermediate_size")  # that are given though a type leaves them open


def sections(*sizes: int) -> dict[str, Any]:
    """Of a type that sees, whose rotary frequencies are divided among time, height and width."""
    return {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sizes]}}}


LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
HYBRID = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"]}
MORE: dict[str, dict[str, Any]] = {  # of a type: what its small numbers must be besides
    "bamba": {"attn_layer_indices": [1]},
    "bloom": {"n_head": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"pyramid_num_routed": [-1, 4], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    **{key: {"global_head_dim": 16} for key in ("gemma4_text", "gemma4_unified_text")},
    **{key: {"text_config": {"global_head_dim": 16}} for key in ("gemma4", "gemma4_unified")},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "paddleocr_vl"), sections(2, 1, 1)),
    "glm4v_moe": sections(1, 1, 0),
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": HYBRID | {"mamba_n_heads": 8, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def small(name: str) -> int | None:
    return next((x for pattern, x in NUMBERS.items() if re.fullmatch(pattern, name)), None)


def fields(cls: Any, more: dict[str, Any]) -> dict[str, Any]:
    """What a configuration, and each of its parts, is made with."""
    own = {f.name: f for f in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    for name, f in own.items():
        number, is_number = small(name), isinstance(f.default, int) and not isinstance(f.default, bool)
        if number is not None and (is_number or name in UNSET):
            made[name] = number
    if "kv_lora_rank" not in own and "num_key_value_heads" in made:
        made["num_key_value_heads"] = 2
    if "is_decoder" in own:
        made["is_decoder"] = True
    for part, spec in (getattr(cls, "sub_configs_defaults", None) or {}).items():
        kind = getattr(spec, "model_type", None)
        named = {"model_type": kind} if kind else {}
        inner = CONFIG_MAPPING[kind] if kind else spec if isinstance(spec, type) else spec.config_class
        made[part] = named | fields(inner, more.get(part, {}))
    return made | {name: x for name, x in more.items() if not isinstance(made.get(name), dict)}


def build(name: str, architecture: str | None = None) -> Any:
    """A model of the type; of one that is saved as another class too, this one."""
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(name)
        config.architectures = [architecture] if architecture else None
        module = auto_class(config).from_config(config).eval()
    for p in module.parameters():
        if p.ndim > 1 and not p.any():  # begun with zeros, which let no gradient through
            torch.nn.init.normal_(p, std=0.02)
    return module


def config_of(name: str) -> Any:
    cls = CONFIG_MAPPING[name]
    return cls(**fields(cls, MORE.get(name, {})))
