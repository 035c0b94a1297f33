"""A copy of a model in another type computes what the model does, as far as the type allows."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import architectures
from upriver.model.load import Model
from upriver.model.tasks import Classification, Regression
from upriver.model.weights import converted, in_dtype
from upriver.text.examples import Examples


def llama(**given) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None, **given,
        )
    ).eval()  # fmt: skip


def test_rotary_frequencies_stay_as_they_are(tmp_path):
    """As ``from_pretrained(dtype=torch.bfloat16)`` has it: in bfloat16 far positions would be turned by another angle."""
    module = llama()
    module.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with Model(module).computing_in("bfloat16") as computing:
        ours = computing.module
        assert in_dtype(ours, torch.bfloat16)
        assert torch.equal(ours.model.rotary_emb.inv_freq, module.model.rotary_emb.inv_freq)
        tokens_NT = torch.randint(50, (1, 3000))
        with torch.no_grad():
            assert torch.equal(ours(input_ids=tokens_NT).logits, theirs(input_ids=tokens_NT).logits)


def test_shared_weights_stay_shared_and_the_model_is_left_alone():
    module = llama(tie_word_embeddings=True)
    before = copy.deepcopy(module.state_dict())
    copied = converted(module, torch.bfloat16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight.data_ptr() != module.lm_head.weight.data_ptr()
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert {id(p) for p in copied.parameters()}.isdisjoint(id(p) for p in module.parameters())


@pytest.mark.parametrize("name", ["openai-gpt", "xglm"])
def test_models_that_keep_other_numbers_unsaved(name):
    module, tokens_NT = architectures.build(name), torch.arange(24).view(2, 12)
    with torch.no_grad():
        exact = module(input_ids=tokens_NT).logits
        found = converted(module, torch.bfloat16)(input_ids=tokens_NT).logits.float()
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_a_model_of_two_types_is_brought_into_one(first):
    other = torch.bfloat16 if first == torch.float32 else torch.float32
    net = nn.Sequential(nn.Linear(3, 4).to(first), nn.Linear(4, 2).to(other))
    for dtype in ("float32", "bfloat16"):
        with Model(net, task=Classification()).computing_in(dtype) as computing:
            assert in_dtype(computing.module, getattr(torch, dtype))


@pytest.mark.parametrize("task", [Classification(), Regression()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_examples_are_given_in_the_type_of_the_model(task, dtype):
    y = torch.tensor([0, 1, 1]) if isinstance(task, Classification) else torch.randn(3, 2)
    batch = Examples({"x": torch.randn(3, 4, dtype=torch.float64), "y": y}).batch([0, 1, 2])
    with Model(nn.Linear(4, 2), task=task).computing_in(dtype) as computing:
        assert torch.isfinite(task.loss(computing.module, batch))
        assert torch.isfinite(task.measurement(computing.module, batch)).all()
