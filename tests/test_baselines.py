"""Baselines against direct computation.  Axes: N sequences, Q queries, H width of the hidden states."""

import lzma
from pathlib import Path

import bm25s
import numpy as np
import pytest
import torch

import upriver as up
from cases import case, close, gradients, measured
from upriver.errors import ConfigError
from upriver.evaluate.baselines import BASELINES

DEMO = Path(up.__file__).parent / "demo"


def scored(name: str, of: str, **given) -> torch.Tensor:
    c = case(of)
    found = up.baseline(name, c.model, c.data, c.queries, **{"layers": c.spec, **given})
    assert found.shape == (len(c.data), len(c.queries))
    assert found.dtype == np.float64
    return torch.from_numpy(found)


def flat(each: list) -> torch.Tensor:
    return torch.stack([torch.cat([g[layer].double().flatten() for layer in g]) for g in each])


@pytest.mark.parametrize("name", ["llama", "shared", "classifier"])
def test_gradients(name):
    G, q = flat(gradients(name)), flat(measured(name))
    close(scored("cosine", name), -torch.cosine_similarity(G[:, None], q[None], dim=2), 1e-5)
    close(scored("gradient_norm", name), G.norm(dim=1)[:, None].expand(-1, len(q)), 1e-6)


@pytest.mark.parametrize("name", ["llama", "regressor"])
def test_loss(name):
    c = case(name)
    each = torch.stack([c.loss(row)(c.model.module).detach() for row in range(len(c.data))])
    close(scored("loss", name), each[:, None].expand(-1, len(c.queries)).double(), 1e-6)


def states(tokens: np.ndarray) -> torch.Tensor:
    """What the head of the tiny Llama is given, one sequence at a time: ``[T, H]``."""
    return case("llama").model.module.model(torch.from_numpy(tokens)[None]).last_hidden_state[0].detach().double()


def test_hidden_states_of_a_language_model():
    c = case("llama")
    h_NH = torch.stack([states(t).mean(0) for t in c.data.tokens])
    asked = c.queries.windows
    whole_QH = torch.stack([states(asked.tokens[rows[0][0]]).mean(0) for rows in c.queries.rows])
    close(scored("repsim", "llama"), torch.cosine_similarity(h_NH[:, None], whole_QH[None], dim=2), 1e-6)
    answers = [states(t)[torch.from_numpy(m)].mean(0) for t, m in zip(asked.tokens, asked.loss, strict=True)]
    mean_H = h_NH.mean(0)
    directions = [answers[0] - mean_H, answers[1] - mean_H, answers[2] - answers[3]]
    wanted = torch.stack([(h_NH - mean_H) @ (d / d.norm()) for d in directions], 1)
    close(scored("activations", "llama"), wanted, 1e-6)


def test_hidden_states_of_a_classifier():
    c = case("classifier")
    h_NH, h_QH = (c.model.module[:2](x.inputs["x"]).detach() for x in (c.data, c.queries.examples))
    close(scored("repsim", "classifier"), torch.cosine_similarity(h_NH[:, None], h_QH[None], dim=2), 1e-9)
    directions = torch.nn.functional.normalize(h_QH - h_NH.mean(0), dim=1)
    close(scored("activations", "classifier"), (h_NH - h_NH.mean(0)) @ directions.T, 1e-9)


def test_random_numbers_follow_the_seed():
    first, again, other = (scored("random", "classifier", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture(scope="module")
def speeches(tmp_path_factory):
    file = tmp_path_factory.mktemp("speeches") / "corpus.jsonl"
    with lzma.open(DEMO / "speeches.jsonl.xz", "rt") as lines:
        file.write_text("".join(line for _, line in zip(range(2), lines, strict=False)))
    model = up.load_model(DEMO / "speech-model")
    return (
        model,
        up.Corpus.read(file, model.tokenizer, seq_len=128),
        up.Queries.read(DEMO / "queries.jsonl", model.tokenizer),
    )


def test_bm25_is_that_of_another_implementation(speeches):
    model, corpus, queries = speeches
    found = up.baseline("bm25", model, corpus, queries)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([[str(t) for t in corpus.token_ids(row)] for row in range(len(corpus))], show_progress=False)
    for q in range(len(queries)):
        wanted = index.get_scores([str(t) for t in queries.token_ids(q)])
        close(torch.from_numpy(found[:, q]), torch.from_numpy(wanted).double(), 1e-5)
    assert (found.max(0) > 0).all()


def test_every_baseline_scores_text(speeches):
    model, corpus, queries = speeches
    for name in BASELINES:
        found = up.baseline(name, model, corpus, queries)
        assert found.shape == (len(corpus), len(queries))
        assert np.isfinite(found).all()
        assert found.std() > 0


def test_what_is_no_baseline_is_refused():
    c = case("classifier")
    with pytest.raises(ConfigError, match="no such baseline: got 'tfidf'; give one of bm25, cosine, repsim"):
        up.baseline("tfidf", c.model, c.data, c.queries)
    with pytest.raises(ConfigError, match="bm25 compares words"):
        up.baseline("bm25", c.model, c.data, c.queries)
