"""Every causal architecture that transformers can build from a configuration goes through fit and trace."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import upriver as up
from architectures import CONFIGS, ONLY_WITH, build, table
from text_cases import byte_tokenizer
from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.head import Heads
from upriver.model.layers import find_layers

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
    weights = [p for x in layers for m in x.modules for p in m.parameters(recurse=False)]
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
    model = up.Model(build(name), tokenizer, name=name)
    spec = ONLY_WITH.get(name, "mlp")
    factors = up.fit(model, corpus, tmp_path / "factors", layers=spec)
    assert 0 < factors.manifest["coverage"]["share"] < 1
    result = up.trace(model, corpus, queries, factors, tmp_path / "scores", top=2)
    scores = result.frame()["q"].to_numpy()
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() > 0
    assert result.manifest["checks"]["token_sum"] < 1e-4
    plain = up.trace(model, corpus, queries, factors, tmp_path / "plain", top=2, curvature="identity", rank="full")
    expected = expected_dot_products(model, corpus, queries, spec)
    np.testing.assert_allclose(plain.frame()["q"], expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ONLY_WITH)
def test_architecture_without_trackable_mlp_is_refused_with_what_it_has(name):
    with pytest.raises(ModelError, match="matches nothing; this model has linear layers at"):
        find_layers(build(name), "mlp")


@pytest.mark.parametrize("name", CONFIGS)
def test_no_architecture_holds_all_its_logits_after_its_first_pass(name):
    module, heads, tokens_NT = build(name), Heads(), torch.arange(24).view(2, 12)
    with torch.no_grad(), frozen(module):
        logits_MV = heads.logits(module, tokens_NT).flatten(0, 1)
        ending = heads.ending(module)
        assert ending is not None
        hidden_MH = ending.hidden(module, tokens_NT).flatten(0, 1)
        torch.testing.assert_close(ending.logits(hidden_MH[7:19], False)[0], logits_MV[7:19])


def test_the_table_in_the_docs_is_what_the_code_says():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (Path(__file__).parent.parent / "docs" / "architectures.md").read_text() == table()
