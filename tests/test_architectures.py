"""Every causal architecture that transformers can build from a configuration goes through fit and trace."""

from pathlib import Path

import numpy as np
import pytest
import torch

import upriver as up
from architectures import CONFIGS, HEADER, ONLY_WITH, build, row
from text_cases import byte_tokenizer
from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.coverage import Coverage
from upriver.model.experts import Expert
from upriver.model.head import decide_ending, ending, whole_logits
from upriver.model.layers import find_layers

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
MIXTURES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "gpt_oss")  # of experts
RECORDS = [
    "we the people of the united states of america",
    "it is the end of the war",
    "the union is strong, my friends",
]
# Raised inside transformers for lack of optional kernels, or by torch about its own operators:
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(RECORDS):
        (folder / f"{i}.txt").write_text(text)
    return up.Corpus.read(folder, tokenizer, seq_len=16, cache=folder / "cache")


@pytest.fixture(scope="module")
def queries(tokenizer):
    return up.Queries.of([{"id": "q", "prompt": "the people", "completion": " of the union"}], tokenizer)


def gradient(module, layers, loss):
    """Plain autograd on the tracked weights, as one vector."""
    modules = [m for x in layers for m in x.modules]
    held = [m.stored.values() if isinstance(m, Expert) else m.parameters(recurse=False) for m in modules]
    weights = list(dict.fromkeys(p for parameters in held for p in parameters))  # all experts of a block are one
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in zip(grads, weights, strict=True)]
    )


def expected_dot_products(model, corpus, queries, spec):
    """Minus the dot product of plain gradients: the influence under the identity curvature."""
    layers = find_layers(model.module, spec)
    f = model.task.measurement(model.module, queries.batch([0])).sum()
    q = gradient(model.module, layers, f)
    rows = [corpus.batch(np.array([n])) for n in range(len(corpus))]
    return [-float(q @ gradient(model.module, layers, model.task.loss(model.module, batch))) for batch in rows]


@pytest.mark.parametrize("name", CONFIGS)
def test_architecture_goes_through_fit_and_trace(name, tokenizer, corpus, queries, tmp_path):
    module, spec = build(name), ONLY_WITH.get(name, "mlp")
    assert row(name, module) in PAGE.splitlines()
    head = module.get_output_embeddings()
    assert all(m is not head for x in find_layers(module, "all") for m in x.modules)
    assert_its_end_is_that_of_the_model(module)
    model = up.Model(module, tokenizer, name=name)
    factors = up.fit(model, corpus, tmp_path / "factors", layers=spec)
    covered = Coverage.of(factors.manifest["coverage"])
    assert 0 < covered.share < 1
    assert any(x.pool for x in factors.layers) == (name in MIXTURES)
    assert "experts" not in covered.line()
    for x in factors.layers:
        lam_OI = factors.block(x.name).lam_OI
        assert torch.isfinite(lam_OI).all()
        assert lam_OI.min() >= 0
        assert lam_OI.sum() > 0 or x.pool  # no sequence may visit an expert
    plain = up.trace(model, corpus, queries, factors, tmp_path / "plain", top=2, curvature="identity", rank="full")
    expected = expected_dot_products(model, corpus, queries, spec)
    np.testing.assert_allclose(plain.frame()["q"], expected, atol=2e-4 * np.abs(expected).max())
    assert plain.manifest["checks"]["token_sum"] < 1e-4


def assert_its_end_is_that_of_the_model(module):
    """In a linear head, or in a tail of its own."""
    tokens_NT = torch.arange(24).view(2, 12)
    decide_ending(module)
    with torch.no_grad(), frozen(module):
        logits_MV, end = whole_logits(module, tokens_NT).flatten(0, 1), ending(module)
        assert end is not None
        hidden_MH = end.hidden(module, tokens_NT).flatten(0, 1)
        torch.testing.assert_close(end.logits(hidden_MH[7:19], False)[0], logits_MV[7:19])


@pytest.mark.parametrize("name", ONLY_WITH)
def test_architecture_without_trackable_mlp_is_refused_with_what_it_has(name):
    with pytest.raises(ModelError, match="matches nothing; this model has linear layers at") as error:
        find_layers(build(name), "mlp")
    assert "expert weights" not in str(error.value)


def test_the_table_in_the_docs_has_each_of_them():
    """What its rows say is compared above."""
    assert PAGE.startswith(f"{HEADER}\n")
    rows = PAGE.removeprefix(f"{HEADER}\n").splitlines()
    assert [line.split(" | ")[0] for line in rows] == [f"| {name}" for name in CONFIGS]
