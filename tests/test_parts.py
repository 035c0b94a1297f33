"""Weights that no linear layer holds: norms, embeddings and routers, equal to plain autograd."""

import numpy as np
import pytest
import torch

import upriver as up
from architectures import RECORDS, build, expected_dot_products
from text_cases import byte_tokenizer
from upriver.errors import LayerError, ModelError
from upriver.model.check import tracked_layers
from upriver.model.layers import find_layers

NORMS = {
    "llama": ("*layernorm,model.norm", 2 * 2 + 1),
    "qwen3": ("*norm", 2 * 4 + 1),  # of heads too
    "gemma3_text": ("*norm", None),  # of heads in front of the tokens, and one more than the weight
    "gpt2": ("*.ln_1,*.ln_2,*.ln_f", 2 * 2 + 1),  # with a shift
}


def made(name, folder):
    """A model with norms that are no ones, and a corpus and a question."""
    torch.manual_seed(0)
    module = build(name)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p) * (p.ndim == 1)
    tokenizer = byte_tokenizer()
    model = up.Model(module, tokenizer, name=name)
    (folder / "texts").mkdir()
    for i, text in enumerate(RECORDS):
        (folder / "texts" / f"{i}.txt").write_text(text)
    corpus = up.Corpus.read(folder / "texts", tokenizer, seq_len=16, cache=folder / "cache")
    return model, corpus, up.Queries.of([{"id": "q", "prompt": "the people", "completion": " of the union"}], tokenizer)


def traced(model, corpus, queries, folder, **options):
    found = up.trace(model, corpus, queries, out=folder, rank="full", held_out=0, **options)
    return found.frame()["q"].to_numpy()


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_tracked_where_a_glob_names_them(name, tmp_path):
    model, corpus, queries = made(name, tmp_path)
    spec, count = NORMS[name]
    layers = tracked_layers(model, corpus, spec)
    assert len(layers) == count or count is None
    expected = np.array(expected_dot_products(model, corpus, queries, layers))
    for batch_tokens in (16, 64):
        options = {"curvature": "identity", "layers": spec, "batch_tokens": batch_tokens}
        found = traced(model, corpus, queries, tmp_path / str(batch_tokens), **options)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    factors = up.fit(model, corpus, tmp_path / "factors", layers=spec)
    assert np.isfinite(up.trace(model, corpus, queries, factors, tmp_path / "ekfac").frame()["q"]).all()
    assert factors.manifest["coverage"]["tracked"] == sum(x.O * x.I for x in factors.layers)


def test_norms_and_embeddings_go_through_the_solvers_without_a_matrix(tmp_path):
    model, corpus, queries = made("llama", tmp_path)

    def by(curvature, spec):
        folder = tmp_path / f"{curvature} {spec}"
        return traced(model, corpus, queries, folder, curvature=curvature, layers=spec, damping=1.0)

    assert np.abs(by("cg", "*norm") / by("exact", "*norm") - 1).max() <= 1e-3
    spec = "*norm,*embed_tokens,*.up_proj"
    names = [x.name.rpartition(".")[2] for x in tracked_layers(model, corpus, spec)]
    assert names[:3] == ["embed_tokens", "up_proj", "input_layernorm"]
    expected = by("cg", spec)
    for curvature in ("arnoldi", "nystrom", "lissa"):
        assert np.corrcoef(by(curvature, spec), expected)[0, 1] > 0.95, curvature


def test_an_embedding_is_a_matrix_whose_inputs_are_tokens(tmp_path):
    model, corpus, queries = made("llama", tmp_path)
    layers = tracked_layers(model, corpus, "*embed*")
    assert [(x.name, x.O, x.I) for x in layers] == [("model.embed_tokens", 32, 320)]
    found = traced(model, corpus, queries, tmp_path / "scores", curvature="identity", layers="*embed*")
    with pytest.raises(ModelError, match=r"embed_tokens.* cannot be fitted"):
        up.fit(model, corpus, tmp_path / "factors", layers="*embed*")
    expected = np.array(expected_dot_products(model, corpus, queries, layers))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_glob_that_names_linear_layers_means_these_alone(tmp_path):
    model, corpus, _ = made("llama", tmp_path)
    linear = [n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [x.name for x in find_layers(model.module, "*")] == linear
    model.module.get_submodule("lm_head").weight = model.module.get_submodule("model.embed_tokens").weight
    with pytest.raises(LayerError, match="tied embedding"):
        tracked_layers(model, corpus, "*embed*")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # the second with a bias
def test_a_router_that_is_a_bare_matrix_is_a_layer(name, tmp_path):
    model, corpus, queries = made(name, tmp_path)
    spec = {"qwen3_moe": "*.gate", "gpt_oss": "*.router"}[name]
    layers = tracked_layers(model, corpus, spec)
    assert [x.name for x in layers] == [f"model.layers.{i}.mlp{spec[1:]}" for i in range(2)]
    assert {x.bias for x in layers} == {name == "gpt_oss"}
    assert not any(x.name == layers[0].name for x in find_layers(model.module, "mlp"))
    found = traced(model, corpus, queries, tmp_path / "scores", curvature="identity", layers=spec)
    expected = np.array(expected_dot_products(model, corpus, queries, layers))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    options = {"layers": spec, "damping": 1.0}
    by = {c: traced(model, corpus, queries, tmp_path / c, curvature=c, **options) for c in ("exact", "cg")}
    assert np.abs(by["cg"] - by["exact"]).max() <= 1e-3 * np.abs(by["exact"]).max()
