"""Weights in 8 or 4 bits: what is computed with them, what is said of them, what is refused; with bitsandbytes and without."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import upriver as up
from cases import Case, Small, _language
from text_cases import byte_tokenizer
from upriver.errors import ConfigError, ModelError
from upriver.model.capture import frozen
from upriver.model.check import tracked_layers
from upriver.model.coverage import coverage
from upriver.model.fingerprint import tensor_hash
from upriver.model.layers import find_layers
from upriver.model.packed import held_beside, packed
from upriver.model.packed import scales as scales_of
from upriver.model.shape import model_shape
from upriver.model.weights import _mapped_files
from upriver.runtime.progress import mute


class FourBits(nn.Linear):
    """Two numbers from -8 to 7 a byte and a scale for each output, kept beside the parameters as bitsandbytes does."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        self._scale_O = layer.weight.detach().abs().amax(1) / 7
        codes = (layer.weight.detach() / self._scale_O[:, None]).round().to(torch.int8).flatten() + 8
        self.weight = nn.Parameter((codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.scale"] = self._scale_O

    def dequantised(self) -> torch.Tensor:
        codes = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], 1).double() - 8
        return codes.view(self.out_features, self.in_features) * self._scale_O[:, None]

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


def packed_model(made=FourBits) -> tuple[up.Model, up.Model, Case]:
    """A model whose first block is packed, the same in floating point, and its case."""
    torch.manual_seed(3)
    c = _language(Small(blocks=2, times=1, bias=True), [])
    module = copy.deepcopy(c.model.module)
    for part in ("up", "down"):
        layer = made(module.blocks[0].get_submodule(part))
        setattr(module.blocks[0], part, layer)
        c.model.module.blocks[0].get_submodule(part).weight.data = layer.dequantised().detach()
    return up.Model(module, task=up.LanguageModel()), c.model, c


FIT = {"layers": "mlp", "dtype": "float64", "max_tokens": 40}
ALL = {"dtype": "float32", "layers": "all", "fisher": "empirical"}
SENTENCE = "2 of 4 tracked layers are held in 4 bits: influence is that of the dequantised weights"


def scores(model: up.Model, c: Case, place: Path, say=mute, **fit) -> np.ndarray:
    """By a fit and a trace at full rank, ``[N, Q]``."""
    factors = up.fit(model, c.data, place / "factors", say=say, **FIT | fit)
    found = up.trace(model, c.data, c.queries, factors, place / "scores", rank="full", say=say)
    return found.frame()[c.queries.ids].to_numpy()


def test_scores_are_those_of_the_dequantised_weights_and_it_is_said(tmp_path):
    model, plain, c = packed_model()
    said: list[str] = []
    ours, theirs = scores(model, c, tmp_path / "packed", said.append), scores(plain, c, tmp_path / "plain")
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert sum(line.startswith("layers: ") and SENTENCE in line for line in said) == 2  # by the fit and by the trace
    for stage in ("factors", "scores"):
        manifest = json.loads((tmp_path / "packed" / stage / "manifest.json").read_text())
        assert manifest["coverage"]["packed"] == SENTENCE
    assert any("held-out energy: not measured" in line and "packed weights" in line for line in said)


def test_packed_weights_count_as_those_that_they_stand_for():
    model, plain, c = packed_model()
    assert model.n_parameters == plain.n_parameters
    (mine, theirs) = (m.module for m in (model, plain))
    ours, others = (coverage(m, find_layers(m, "mlp")) for m in (mine, theirs))
    assert (ours.tracked, ours.total, ours.untracked) == (others.tracked, others.total, others.untracked)
    assert (ours.packed, others.packed) == (SENTENCE, "")
    first, second = (model_shape(m, tracked_layers(m, c.data, "mlp"), c.data) for m in (model, plain))
    assert (first.layers, first.blocks, first.parameters) == (second.layers, second.blocks, second.parameters)


def test_a_model_is_told_apart_by_the_scales_of_its_packed_weights():
    model, _, _ = packed_model()
    before = model.fingerprint
    model.module.blocks[0].up._scale_O *= 1.01
    assert model.fingerprint != before
    model.module.blocks[0].up._scale_O /= 1.01
    model.module.blocks[0].up.weight[0, 0] += 1
    assert model.fingerprint != before


def test_packed_weights_are_not_converted():
    model, _, _ = packed_model()
    with model.computing_in("float64") as same:
        assert same is model
    said = "a model of packed weights computes in the type that it was loaded in: got bfloat16, not float64; ask for float64"
    with pytest.raises(ConfigError, match=said), model.computing_in("bfloat16"):
        pass


@pytest.mark.parametrize("options", [{"refine": 1}, {"curvature": "cg"}, {"curvature": "exact"}], ids=str)
def test_solvers_that_differentiate_along_packed_weights_are_refused(tmp_path, options):
    model, _, c = packed_model()
    factors = up.fit(model, c.data, tmp_path / "factors", **FIT)
    with pytest.raises(ModelError, match=r"no derivative along a direction of packed weights: 2 of 4 .* ekfac, kfac"):
        up.trace(model, c.data, c.queries, factors, tmp_path / "scores", **options)


class Bent(FourBits):
    def forward(self, x):
        return super().forward(x).relu()


class Biased(FourBits):
    def forward(self, x):
        return super().forward(x) + self.bias


class OtherWay(FourBits):
    """Its gradient is that of other numbers than its output."""

    def forward(self, x):
        there = nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias).detach()
        back = nn.functional.linear(x, self.dequantised().roll(1, 1).to(x.dtype))
        return there + back - back.detach()


class Cut(FourBits):
    """As a kernel for inference has it."""

    def forward(self, x):
        return super().forward(x).detach()


class Mixing(FourBits):
    def forward(self, x):
        return super().forward(x.roll(1, -2)) if x.ndim == 2 else super().forward(x)


@pytest.mark.parametrize("made", [Bent, Biased, OtherWay, Cut, Mixing])
def test_packed_layers_that_are_no_matrix_are_refused_or_left_out(made):
    model, _, c = packed_model(made)
    with pytest.raises(ModelError, match=f"layer 'blocks.0.(up|down)' cannot be tracked: .*got {made.__name__}"):
        tracked_layers(model, c.data, "blocks.*")
    left = {"blocks.0.up", "blocks.0.down"} - {x.name for x in tracked_layers(model, c.data, "mlp")}
    assert any(type(model.module.get_submodule(name)) is made for name in left)
    assert [x.name for x in tracked_layers(model, c.data, "blocks.1.*")] == ["blocks.1.up", "blocks.1.down"]


def test_a_lora_over_packed_weights_scores_as_over_the_dequantised_ones(tmp_path):
    models = packed_model()
    for model in models[:2]:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
        peft.get_peft_model(model.module, config)
        for name, p in model.module.named_parameters():
            p.data = p.data.double() if ".lora_" in name else p.data
    model, plain, c = models
    assert model.default_layers == "lora"
    said: list[str] = []
    ours = scores(model, c, tmp_path / "packed", said.append, layers="lora")
    theirs = scores(plain, c, tmp_path / "plain", layers="lora")
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert any("not measured" in line and "other layers of the model are packed" in line for line in said)


# ------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(folder: Path, told: dict | None = None) -> Path:
    """A small Llama with a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if told:
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(held | {"quantization_config": told}))
    return folder


@pytest.mark.parametrize("scheme", ["gptq", "awq", "fp8", "torchao"])
def test_other_schemes_are_refused_by_name(tmp_path, scheme):
    place = checkpoint(tmp_path, {"quant_method": scheme, "bits": 4})
    with pytest.raises(ModelError, match=f"weights quantised by {scheme} cannot be used"):
        up.load_model(place)


def test_weights_of_torchao_in_memory_are_refused_by_name():
    """They are tensors of a class of its own."""
    kind = type("Int8Tensor", (torch.nn.Parameter,), {"__module__": "torchao.quantization"})
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module[0].weight = torch.Tensor._make_subclass(kind, torch.ones(2, 2))
    with pytest.raises(
        ModelError, match=r"quantised by torchao cannot be used: got Int8Tensor '0\.weight'; give .*bitsandbytes"
    ):
        up.Model(module, byte_tokenizer())


@pytest.mark.parametrize("told", [{"quant_method": "bitsandbytes"}, {"load_in_4bit": True}], ids=str)
def test_without_the_package_the_sentence_names_it(tmp_path, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    place = checkpoint(tmp_path, told)
    with pytest.raises(ModelError, match=r"quantised by bitsandbytes, .* pip install 'upriver\[bnb\]'"):
        up.load_model(place)


# ------------------------------------------------------------------------------------------------- bitsandbytes

PARTS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, scales packed too": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "8 bits": {"load_in_8bit": True},
}


def test_a_lora_over_a_quantised_base_is_loaded_and_traced(quantised, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(quantised, device_map={"": "cpu"}, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    model = up.load_model(tmp_path / "adapter", base=quantised, device="cpu")
    plain = dequantised(up.load_model(quantised, device="cpu"), tmp_path / "plain")
    plain = up.Model(peft.PeftModel.from_pretrained(plain.module, tmp_path / "adapter"), plain.tokenizer)
    c = _language(Small(blocks=1, times=1, bias=True), [], sequences=24)
    given = {"dtype": "float32", "fisher": "empirical", "layers": "lora"}
    ours, theirs = (scores(m, c, tmp_path / name, **given) for name, m in (("ours", model), ("theirs", plain)))
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()
    assert np.abs(ours).max() > 0


@pytest.fixture(params=PARTS)
def quantised(request, tmp_path) -> Path:
    """A checkpoint that bitsandbytes packed; in ``plain``, the one that it was made of."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(**PARTS[request.param])
    place = checkpoint(tmp_path / "plain")
    module = AutoModelForCausalLM.from_pretrained(
        place, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32
    )
    module.save_pretrained(tmp_path / "quantised")
    byte_tokenizer().save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def dequantised(model: up.Model, place: Path) -> up.Model:
    """The model of ``place`` with what each packed layer of ``model`` gives for each input alone."""
    plain = up.load_model(place, device="cpu")
    with frozen(model.module), torch.no_grad():
        for name, m in model.module.named_modules():
            if packed(m):
                plain.module.get_submodule(name).weight.data = m(torch.eye(m.in_features)).T.contiguous()
    return plain


def test_a_quantised_checkpoint_scores_as_its_dequantised_weights_do(quantised, tmp_path):
    model = up.load_model(quantised, device="cpu")
    plain = dequantised(model, tmp_path / "plain")
    assert model.n_parameters == plain.n_parameters
    c = _language(Small(blocks=1, times=1, bias=True), [], sequences=24)
    ours = scores(model, c, tmp_path / "ours", **ALL)
    theirs = scores(plain, c, tmp_path / "theirs", **ALL)
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()
    assert np.abs(ours).max() > 0
    manifest = json.loads((tmp_path / "ours" / "scores" / "manifest.json").read_text())
    assert manifest["coverage"]["packed"].startswith("14 of 14 tracked layers are held in ")


def test_a_quantised_checkpoint_computes_in_bfloat16_where_it_is_loaded_so(quantised, tmp_path):
    wide, narrow = (up.load_model(quantised, dtype=x, device="cpu") for x in ("float32", "bfloat16"))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    c = _language(Small(blocks=1, times=1, bias=True), [], sequences=24)
    theirs = scores(wide, c, tmp_path / "wide", **ALL)
    ours = scores(narrow, c, tmp_path / "narrow", **ALL | {"dtype": "bfloat16"})
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(ours.T, theirs.T, strict=True)) > 0.99
    with pytest.raises(ConfigError, match="got float32, not bfloat16; ask for bfloat16"):
        up.fit(narrow, c.data, tmp_path / "other", dtype="float32")


def test_what_bitsandbytes_packed_is_told_apart_by_its_scales_and_left_as_it_was(quantised):
    model = up.load_model(quantised, device="cpu")
    before, codes = model.fingerprint, [tensor_hash(p) for p in model.module.parameters()]
    with frozen(model.module), torch.no_grad():
        model.module(input_ids=torch.arange(8)[None], use_cache=False)
    assert model.fingerprint == before == up.load_model(quantised, device="cpu").fingerprint
    assert codes == [tensor_hash(p) for p in model.module.parameters()]
    key, scale = next((n, x) for n, x in scales_of(model.module).items() if x.is_floating_point() and x.numel() > 1)
    scale.mul_(1.01)
    assert model.fingerprint != before, key


def test_no_tensor_of_packed_weights_stays_mapped_from_its_file(quantised):
    model, mapped = up.load_model(quantised, device="cpu"), _mapped_files()
    held = [*model.module.parameters(), *held_beside(model.module)]
    assert len(held) > len(list(model.module.parameters()))
    assert not [x for x in held if any(a <= x.data_ptr() < b for a, b in mapped or ())]
