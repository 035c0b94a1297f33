"""Parity with Kronfluence 1.0.1, whose scores are kept in ``fixtures`` (``make fixture`` makes them again).

Kronfluence was asked for ``grad f^T (G + lambda I)^-1 grad L`` with ``f`` the log-probability of the completion; ours is minus
that (positive: training on the sequence raises ``f``).
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from in_memory import TokenCorpus, TokenQueries, ragged
from upriver.curvature.fit import fit
from upriver.model.load import Model
from upriver.pipeline import trace

FIXTURES = Path(__file__).parent / "fixtures"


def load(name: str) -> tuple[Model, TokenCorpus, TokenQueries, np.ndarray, list[str]]:
    stored = load_file(FIXTURES / f"kronfluence-{name}.safetensors")
    about = json.loads((FIXTURES / f"kronfluence-{name}.json").read_text())
    kind = about["config"].pop("model_type")
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **about["config"]))
    module.load_state_dict({k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")})
    train, asked = (ragged(stored[f"{x}.tokens"].numpy(), stored[f"{x}.length"].numpy()) for x in ("train", "query"))
    corpus = TokenCorpus(train, stored["train.prompt"].tolist())
    queries = TokenQueries(asked, stored["query.prompt"].tolist())
    return Model(module.double()), corpus, queries, -stored["scores"].numpy().T, about["layers"]


@pytest.mark.parametrize("name", ["llama", "neox"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_scores_agree_with_kronfluence(name: str, dtype: str, tmp_path: Path):
    model, corpus, queries, theirs_NQ, layers = load(name)
    assert len(set(corpus.lengths_N)) > 10, "padding is part of the test"
    assert len(set(corpus.prompts)) > 5, "and so are positions without loss"
    factors = fit(model, corpus, tmp_path / "factors", fisher="empirical", layers="mlp", dtype=dtype, batch_tokens=100)
    assert [layer.name for layer in factors.layers] == layers
    ours_NQ = scores(model, corpus, queries, factors, tmp_path / "scores")
    assert np.corrcoef(ours_NQ.ravel(), theirs_NQ.ravel())[0, 1] >= 0.99999
    assert np.abs(ours_NQ - theirs_NQ).max() <= (1e-6 if dtype == "float64" else 1e-3) * np.ptp(theirs_NQ)


def test_the_comparison_tells_curvatures_apart(tmp_path: Path):
    model, corpus, queries, theirs_NQ, _ = load("neox")
    factors = fit(model, corpus, tmp_path / "factors", fisher="empirical", dtype="float64")
    for kind in ("identity", "diagonal", "kfac"):
        other_NQ = scores(model, corpus, queries, factors, tmp_path / kind, curvature=kind)
        assert np.corrcoef(other_NQ.ravel(), theirs_NQ.ravel())[0, 1] < 0.999


def scores(model, corpus, queries, factors, out: Path, **given) -> np.ndarray:
    """Raw scores ``[N, Q]`` at full rank, in the order of the corpus."""
    trace(model, corpus, queries, factors, out, rank="full", top=2, batch_tokens=100, **given)
    table = pd.read_parquet(out / "scores.parquet").sort_values("sequence")
    return table[queries.ids].to_numpy(np.float64)
