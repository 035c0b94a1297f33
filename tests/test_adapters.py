"""Adapters: their folder is a model, what was trained is tracked, and its scores are those of autograd."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import upriver as up
from architectures import build
from cli_cases import upriver
from text_cases import byte_tokenizer
from upriver.curvature.products import Tracked
from upriver.errors import ConfigError, ModelError
from upriver.model.capture import frozen
from upriver.model.check import tracked_layers
from upriver.model.coverage import coverage
from upriver.model.layers import find_layers

TEXTS = [
    "the river runs past the mill",
    "we the people of the union",
    "it is the end of the war and of the mill",
    "paris",
]
QUERIES = [{"id": "q", "prompt": "the people", "completion": " of the mill"}]
BOTH = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small Llama, whose heads and norms are no ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("models") / "base"
    module = LlamaForCausalLM(config)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    module.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def adapter(base: Path, folder: Path, **given: Any) -> Path:
    """A LoRA whose matrices are random, or an IA3, as ``peft`` saves it."""
    torch.manual_seed(1)
    config = (
        peft.IA3Config(**given)
        if "feedforward_modules" in given
        else peft.LoraConfig(**{"r": 4, "target_modules": BOTH, "init_lora_weights": False} | given)
    )
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for _, p in wrapped.named_parameters():
        p.data += 0.05 * torch.randn_like(p) * p.requires_grad
    with warnings.catch_warnings(action="ignore"):  # peft takes a bias for a shard
        wrapped.save_pretrained(folder, save_embedding_layers="lm_head" in config.target_modules)
    return folder


@pytest.fixture(scope="module")
def lora(base) -> Path:
    return adapter(base, base.parent / "lora")


def given(model: up.Model, folder: Path) -> tuple[up.Corpus, up.Queries]:
    folder.mkdir(exist_ok=True)
    for name, rows in {"corpus": [{"id": str(i), "text": t} for i, t in enumerate(TEXTS)], "queries": QUERIES}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    corpus = up.Corpus.read(folder / "corpus.jsonl", model.tokenizer, seq_len=32)
    return corpus, up.Queries.read(folder / "queries.jsonl", model.tokenizer)


def scores(model: up.Model, folder: Path, **more: Any) -> np.ndarray:
    """Gradient dot products by a trace."""
    corpus, queries = given(model, folder)
    found = up.trace(
        model, corpus, queries, out=folder / "scores", curvature="identity", rank="full", held_out=0, **more
    )
    return found.frame()["q"].to_numpy()


def report_of(scores: Path) -> Path:
    return up.report(scores).with_suffix(".json")


def by_autograd(base: Path, folder: Path, tracked: Any) -> np.ndarray:
    """The same of the model as ``peft`` loads it: ``- grad f . grad L`` over the parameters whose names ``tracked`` accepts."""
    module = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    held = []
    for name, p in module.named_parameters():
        p.requires_grad_(tracked(name))
        held += [p] * p.requires_grad
    tokenizer = byte_tokenizer()

    def gradient(text: str, start: int) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        losses = torch.nn.functional.cross_entropy(module(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses[start:].sum(), held)])

    query = QUERIES[0]
    prompt = len(tokenizer(query["prompt"])["input_ids"])
    of_query = gradient(query["prompt"] + query["completion"], prompt - 1)  # of - f
    return np.array([float(of_query @ gradient(text, 0)) for text in TEXTS])


def factors(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name or ".ia3_l." in name


# Parameters that are left out and that were trained: DoRA's magnitudes, biases of the base, an embedding.
KINDS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "LoRA": ({}, factors, 0),
    "attention alone": ({"target_modules": ["q_proj", "o_proj"]}, factors, 0),
    "rsLoRA, ranks of their own": (
        {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        factors,
        0,
    ),
    "DoRA": ({"use_dora": True}, factors, 2 * (3 * 16 + 24)),
    "with biases": ({"lora_bias": True}, factors, 0),
    "with the base's biases": ({"bias": "lora_only"}, factors, 2 * (3 * 16 + 24)),
    "the head whole": ({"modules_to_save": ["lm_head"]}, lambda n: factors(n) or "lm_head.modules_to_save" in n, 0),
    "the head and the embedding whole": (
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        lambda n: factors(n) or "lm_head.modules_to_save" in n,
        300 * 16,
    ),
    "the head": ({"target_modules": ["lm_head", "down_proj"]}, factors, 0),
    "IA3": ({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, factors, 0),
    "IA3 on inputs": (
        {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["q_proj", "up_proj"]},
        factors,
        0,
    ),
    "IA3, the head whole": (
        {"target_modules": ["o_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
        lambda n: factors(n) or "lm_head.modules_to_save" in n,
        0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_what_was_trained_are_those_of_autograd(kind, base, tmp_path):
    options, tracked, left = KINDS[kind]
    folder = adapter(base, tmp_path / "adapter", **options)
    model = up.load_model(folder)
    ours, theirs = scores(model, tmp_path), by_autograd(base, folder, tracked)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    found = coverage(model.module, find_layers(model.module, "lora"))
    assert found.trained_tracked == found.tracked == found.trained - left
    assert f"{found.tracked:,} of the {found.trained:,} that the adapter trained" in found.line()
    assert sum(u["parameters"] for u in found.untracked if u.get("trained")) == left


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])  # transposed with a bias, and neither
def test_a_lora_on_experts_is_that_of_each_expert(kind, tmp_path):
    place = tmp_path / "base"
    build(kind).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = adapter(place, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = up.load_model(folder)
    ours, theirs = scores(model, tmp_path), by_autograd(place, folder, factors)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    layers = find_layers(model.module, "lora")
    found = coverage(model.module, layers)
    assert found.trained_tracked == found.tracked == found.trained == sum(x.parameters for x in layers)
    assert len({x.pool for x in layers if x.pool}) == 2 * 4
    fitted = up.fit(model, given(model, tmp_path)[0], tmp_path / "factors", fisher="empirical")
    assert len(fitted.layers) == len(layers)
    base = find_layers(model.module, "mlp")
    assert base
    assert not any("lora" in x.name for x in base)


def test_the_other_names_mean_the_base(lora, base, tmp_path):
    model = up.load_model(lora)
    names = [x.name for x in find_layers(model.module, "mlp")]
    assert [x.name for x in find_layers(model.module, "*.up_proj")] == [n for n in names if "up_proj" in n]
    assert len(names) == 6
    assert {x.kind for x in find_layers(model.module, "mlp")} == {"gate_proj", "up_proj", "down_proj"}
    kinds = {f"{name}.lora_{x}" for name in BOTH for x in "AB"}
    assert {x.kind for x in find_layers(model.module, "lora")} == kinds
    both = find_layers(model.module, "mlp,attention")
    assert [x.name for x in find_layers(model.module, "all")] == [x.name for x in both]
    theirs = by_autograd(base, lora, lambda n: ".mlp." in n and "lora_" not in n)
    ours = scores(model, tmp_path, layers="mlp")
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert "0 of the 1,152 that the adapter trained" in coverage(model.module, find_layers(model.module, "mlp")).line()


def test_the_base_is_the_one_given_or_the_one_beside_or_the_one_that_is_named(lora, base, tmp_path):
    named = up.load_model(lora)
    assert (named.info["base"], named.info["adapter"], named.default_layers) == (str(base), "LORA", "lora")
    beside = shutil.copytree(base, tmp_path / "beside")
    for file in lora.glob("adapter_*"):
        shutil.copy(file, beside)
    told = json.loads((beside / "adapter_config.json").read_text())
    (beside / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "some/other"}))
    assert up.load_model(beside).fingerprint == named.fingerprint
    alone = shutil.copytree(lora, tmp_path / "alone")
    shutil.copy(beside / "adapter_config.json", alone)
    with pytest.raises(ModelError, match=r"some/other.*--base PATH"):
        up.load_model(alone)
    assert up.load_model(alone, base=base).fingerprint == named.fingerprint
    with pytest.raises(ConfigError, match=r"bad value for --base: .*holds no adapter_config\.json"):
        up.load_model(base, base=base)
    assert up.load_model(base).fingerprint != named.fingerprint


@pytest.mark.parametrize("beside", [False, True])
def test_without_the_package_the_sentence_names_the_extra(beside, lora, base, tmp_path, monkeypatch):
    folder = shutil.copytree(lora, tmp_path / "model")
    if beside:
        shutil.copytree(base, folder, dirs_exist_ok=True)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ModelError, match=r"holds an adapter \(LORA of .*pip install 'upriver\[peft\]'"):
        up.load_model(folder)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "LOHA"])
def test_other_kinds_are_refused_by_name(kind, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": "x"}))
    with pytest.raises(ModelError, match=f"adapters of the kind {kind} cannot be used"):
        up.load_model(folder)


def test_an_adapter_in_memory_of_another_kind_is_refused_by_name(base):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with pytest.raises(ModelError, match="adapters of the kind PROMPT_TUNING cannot be used: got one in a Peft"):
        up.Model(wrapped, byte_tokenizer())


@pytest.mark.parametrize(("changed", "said"), [(dict, "have no place in the base"), (None, "are missing")])
def test_an_adapter_that_does_not_fit_its_base_is_refused(changed, said, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "model")
    held = load_file(folder / "adapter_model.safetensors")
    key = next(iter(held))
    held = (
        held | {key.replace("layers.0", "layers.7"): held[key].clone()}
        if changed
        else {k: x for k, x in held.items() if k != key}
    )
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"the adapter in .* does not fit its base .*: 1 of its weights {said}"):
        up.load_model(folder)


def test_what_is_scaled_otherwise_is_another_model_and_what_peft_holds_is_the_same(lora, base):
    loaded = up.load_model(lora)
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    model = up.Model(wrapped, loaded.tokenizer)
    assert type(model.module).__name__ == "LlamaForCausalLM"
    assert model.fingerprint == loaded.fingerprint
    layer = wrapped.base_model.model.model.layers[0].mlp.up_proj
    layer.scaling["default"] *= 2
    assert model.fingerprint != loaded.fingerprint


def test_an_adapter_that_is_merged_or_off_is_no_longer_apart(lora, base):
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    model = up.Model(wrapped, byte_tokenizer())
    before = model.fingerprint
    for change in (wrapped.merge_adapter, wrapped.base_model.disable_adapter_layers):
        change()
        assert model.default_layers == "mlp"
        assert model.fingerprint != before
        with pytest.raises(ModelError, match="no adapter that is in use and apart from its base"):
            find_layers(model.module, "lora")
        assert len(find_layers(model.module, "*")) == 2 * 7 + 1  # the base's and its head
        if change == wrapped.merge_adapter:
            wrapped.unmerge_adapter()


def test_another_type_is_made_in_place_and_undone(lora, base):
    model = up.load_model(lora)
    held, print_ = [p.clone() for p in model.module.parameters()], model.fingerprint
    with model.computing_in("bfloat16") as narrow:
        assert narrow.module is model.module
        assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(held, model.module.parameters(), strict=True))
    assert up.load_model(lora, dtype="bfloat16").fingerprint == model.fingerprint == print_


def test_an_adapter_from_the_command_line_with_its_base_and_tokenizer_elsewhere(
    lora, base, tmp_path, capsys, monkeypatch
):
    command = partial(upriver, capsys, monkeypatch)
    folder, bare = shutil.copytree(lora, tmp_path / "adapter"), shutil.copytree(base, tmp_path / "moved")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "some/other"}))
    words = tmp_path / "words"
    words.mkdir()
    for file in bare.glob("tokenizer*"):
        shutil.move(file, words)
    given(up.load_model(lora), tmp_path / "data")
    where = ["--base", str(bare), "--tokenizer", str(words)]
    data, fitted, traced = (str(tmp_path / x) for x in ("data/corpus.jsonl", "factors", "scores"))
    refused = command("fit", str(folder), data, "--base", str(bare), "--out", fitted)
    assert "it holds no file of one" in refused.err
    assert "with --tokenizer" in refused.err
    fit = command("fit", str(folder), data, *where, "--seq-len", "32", "--out", fitted)
    assert fit.status == 0, fit.err
    assert f"an adapter (LORA) over {bare}" in fit.err
    assert " ".join(["upriver trace", str(folder), *where]) in " ".join(fit.err.split())
    queries = str(tmp_path / "data/queries.jsonl")
    trace = command("trace", str(folder), data, queries, *where, "--factors", fitted, "--out", traced)
    assert trace.status == 0, trace.err
    told = json.loads((tmp_path / "scores/manifest.json").read_text())
    assert (told["model"]["base"], told["model"]["tokenizer"]) == (str(bare), str(words))
    assert told["coverage"]["trained_tracked"] == told["coverage"]["trained"] == told["coverage"]["tracked"] == 1152
    told = json.loads(report_of(tmp_path / "scores").read_text())
    assert "Of what the adapter trained" in json.dumps(told["trust"])
    assert up.verify(traced, top=1, random=1, tokens=50)["shown"]["pearson"] is not None


@pytest.fixture(scope="module")
def scaling(base) -> Path:
    """An IA3 on outputs and on inputs."""
    modules = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return adapter(base, base.parent / "ia3", **modules)


def test_a_vector_has_the_curvature_of_a_layer_with_one_input(scaling, tmp_path):
    """``A`` is 1, and ``lam`` the mean of the squared gradients of sequences, by autograd, in the eigenbasis of ``S``."""
    model = up.load_model(scaling, dtype="float64")
    corpus, queries = given(model, tmp_path)
    fitted = up.fit(model, corpus, tmp_path / "factors", fisher="empirical", dtype="float64")
    assert [x.name.split(".", 3)[3] for x in fitted.layers[:3]] == [
        *(f"self_attn.{x}.ia3_l.default" for x in ("k_proj", "v_proj")),
        "mlp.down_proj.ia3_l.default",
    ]
    assert {(x.O, x.I) for x in fitted.layers} == {(16, 1), (24, 1)}
    tracked = Tracked(model, tracked_layers(model, corpus, "lora"))
    with tracked.differentiable():
        rows = [corpus.batch(np.array([n])) for n in range(len(corpus))]
        gradients = torch.stack([tracked.gradient(tracked.theta_P, x) for x in rows])
    for name, grads_NO1 in tracked.space.unflatten(gradients).items():
        moments = fitted.moments(name)
        (Q_A_II, Q_S_OO), eig_A_I = (torch.as_tensor(x) for x in moments[:2]), moments.eig_A_I
        assert float(Q_A_II[0, 0]) ** 2 == float(eig_A_I[0]) == 1
        lam_O1 = (Q_S_OO.T @ grads_NO1).square().mean(0)
        assert torch.allclose(fitted.block(name, "ekfac").lam_OI, lam_O1, rtol=1e-9, atol=1e-12)
    found = {}
    for curvature in ("ekfac", "exact", "cg"):
        options: Any = {"curvature": curvature, "held_out": 0, "damping": 1.0, "rank": "full"}
        traced = up.trace(model, corpus, queries, fitted, tmp_path / curvature, **options)
        found[curvature] = traced.frame()["q"].to_numpy()
    assert np.abs(found["cg"] - found["exact"]).max() <= 1e-3 * np.abs(found["exact"]).max()
    assert np.corrcoef(found["ekfac"], found["exact"])[0, 1] > 0.9


def test_vectors_that_are_on_together_and_one_that_is_merged(scaling, base, tmp_path):
    """Each of two that are on sees what the other gives, and one that is merged is no longer apart."""
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), scaling)
    wrapped.load_adapter(scaling, "other")
    wrapped.base_model.set_adapter(["default", "other"])
    model = up.Model(wrapped, byte_tokenizer())
    corpus = given(model, tmp_path)[0]
    assert len(tracked_layers(model, corpus, "lora")) == 12  # whose gradients are compared with those of autograd
    wrapped.base_model.set_adapter("default")
    assert len(tracked_layers(model, corpus, "lora")) == 6
    assert not [x for x in find_layers(model.module, "*") if "ia3" in x.name and "other" in x.name]
    assert not any("ia3" in x.name for x in find_layers(model.module, "all"))
    before = model.module(torch.arange(8)[None]).logits
    with frozen(model.module):
        assert torch.equal(model.module(torch.arange(8)[None]).logits, before)
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match="no adapter that is in use and apart from its base"):
        find_layers(model.module, "lora")


def test_an_adapter_on_the_hub_is_found_in_what_is_kept_here_by_its_name(lora, base, tmp_path):
    hub = tmp_path / "hub"
    for name, place in {"some/adapter": lora, "some/base": base}.items():
        kept = hub / f"models--{name.replace('/', '--')}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("0" * 40)
        shutil.copytree(place, kept / "snapshots" / ("0" * 40))
    file = next(hub.rglob("adapter_config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "some/base"}))
    code = (
        "import upriver as up\n"
        "model = up.load_model('some/adapter')\n"
        "print(model.fingerprint, model.name, model.info['base'], model.default_layers)\n"
        "print(up.load_model('some/base').default_layers)\n"
        "up.load_model('some/nothing')"
    )
    env = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.stdout.splitlines() == [f"{up.load_model(lora).fingerprint} some/adapter some/base lora", "mlp"]
    assert "no such model on the hub here: got 'some/nothing'" in ran.stderr
