"""What divides a run changes none of its numbers: groups of layers and of queries, rounds of ``until``; and what it promises."""

import gc
import weakref
from contextlib import contextmanager
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cases import case, close, gradients
from in_memory import TokenCorpus
from test_resume import killed, results, tiny_corpus, tiny_model, tiny_queries
from upriver.curvature import fit as fitting
from upriver.curvature.agreement import Agreement
from upriver.curvature.fit import fit, fit_diagonal
from upriver.errors import ConfigError
from upriver.influence import stages
from upriver.influence.score import Score
from upriver.model import sweep
from upriver.model.layers import find_layers
from upriver.model.memory import DIVISION, settled_split
from upriver.model.shape import module_shape
from upriver.model.sweep import tracked_layers
from upriver.pipeline import trace
from upriver.runtime.artifact import Artifact, write_json
from upriver.runtime.counts import Block, LayerSize, Shape, contraction
from upriver.runtime.split import SLACK, Asked, Budget, FitSplit, fits, scan_size, split_fit, split_trace

GIVEN = {"batch_tokens": 40}


def factors_of(folder) -> dict[str, bytes]:
    return {name: content for name, content in results(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr(sweep, "UNIT_TOKENS", 60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole(name)``: the factors of a case whose layers went together, made once."""

    @cache
    def make(name: str) -> dict[str, bytes]:
        c, out = case(name), tmp_path_factory.mktemp(name)
        fit(c.model, c.data, out, layers=c.spec, **GIVEN)
        return factors_of(out)

    return make


def in_groups_of(size: int):
    def split(shape, job):
        parts = [list(range(i, min(i + size, len(shape.layers)))) for i in range(0, len(shape.layers), size)]
        return split_fit(shape, job)._replace(covariance=parts, correction=parts)

    return split


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "twice", "gpt2"])
def test_groups_of_layers_give_the_same_bits(name, size, whole, tmp_path, monkeypatch):
    """Groups of four cut a block in two, so that a layer and the one whose input it shares are in different ones."""
    c, expected = case(name), whole(name)
    monkeypatch.setattr(fitting, "split_fit", in_groups_of(size))
    fit(c.model, c.data, tmp_path, layers=c.spec, **GIVEN)
    assert factors_of(tmp_path) == expected


def test_a_fit_in_groups_goes_on_where_it_died(tmp_path, monkeypatch):
    model, corpus = tiny_model(), tiny_corpus()
    fit(model, corpus, tmp_path / "whole", **GIVEN)
    monkeypatch.setattr(fitting, "split_fit", in_groups_of(2))
    for room in (3, 9, 7):
        killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "parts", **GIVEN))
    monkeypatch.setattr(fitting, "split_fit", split_fit)  # with more memory than before
    fit(model, corpus, tmp_path / "parts", **GIVEN)
    assert factors_of(tmp_path / "parts") == factors_of(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "parts" / "correction").iterdir()} <= {"lam.safetensors", "key.json"}


def test_memory_that_is_too_small_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(ConfigError, match=r"too small for this fit: got 1 MB; the least that would do is [\d.]+ [GM]B"):
        fit(tiny_model(), tiny_corpus(), tmp_path / "factors", memory="1MB")
    factors = fit(tiny_model(), tiny_corpus(), tmp_path / "factors")
    with pytest.raises(ConfigError, match=r"too small for this trace: got 1 MB; the least that would do is"):
        trace(tiny_model(), tiny_corpus(), tiny_queries(), factors, tmp_path / "scores", memory="1MB")
    with pytest.raises(ConfigError, match="bad size of memory: got '7 cows'"):
        fit(tiny_model(), tiny_corpus(), tmp_path / "other", memory="7 cows")


def long_corpus() -> TokenCorpus:
    rng = np.random.default_rng(1)
    return TokenCorpus([rng.integers(0, 23, rng.integers(4, 13)) for _ in range(200)])


def test_until_stops_when_the_halves_agree(tmp_path):
    model, corpus, said, again = tiny_model(), long_corpus(), [], []
    whole = fit(model, corpus, tmp_path / "whole", **GIVEN).manifest["fit"]
    early = fit(model, corpus, tmp_path / "early", until=0.94, say=said.append, **GIVEN).manifest["fit"]
    assert early["tokens"] < whole["tokens"]
    assert early["halves"]["mean"] >= 0.94
    agreements = [line for line in said if line.startswith("convergence")]
    assert len(agreements) > 1, "it stopped at once"
    fit(model, corpus, tmp_path / "early", until=0.94, say=again.append, **GIVEN)
    assert [line for line in again if line.startswith("convergence")] == agreements[-1:]
    never = fit(model, corpus, tmp_path / "never", until=1.0, say=said.append, **GIVEN).manifest["fit"]
    assert never["tokens"] == whole["tokens"]
    assert any("was not reached" in line for line in said)


def test_until_goes_on_where_it_died(tmp_path, monkeypatch):
    model, corpus = tiny_model(), long_corpus()
    fit(model, corpus, tmp_path / "alone", until=0.94, **GIVEN)
    for room in (2, 12, 5, 20):
        killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "killed", until=0.94, **GIVEN))
    fit(model, corpus, tmp_path / "killed", until=0.94, **GIVEN)
    assert results(tmp_path / "killed") == results(tmp_path / "alone")


def test_scores_by_the_same_eigenvalues_agree_and_are_those_of_the_oracle(fitted):
    """Pairs of sequences, scored by ``lam`` once and by twice ``lam``: perfectly correlated, one half the other."""
    c, factors = case("llama"), fitted("llama")
    layers = tracked_layers(c.model, c.data, c.spec)
    moments = {x.name: factors.moments(x.name) for x in layers}
    lam = {x.name: factors.block(x.name).lam_OI + 1 for x in layers}
    consumer = Agreement(moments, {n: torch.stack([v, 2 * v]) for n, v in lam.items()}, at_once=3)
    sweep.sweep(c.model, layers, c.data, [np.arange(4)], consumer)  # of which three are compared
    pairs_2LP = consumer.result()
    close(pairs_2LP[0], 2 * pairs_2LP[1].double(), 1e-6)
    turned = [{n: moments[n].rotate(G[n]) for n in c.names} for G in gradients("llama")[:3]]
    for p, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        expected = [(turned[i][n] / lam[n] * turned[j][n]).sum() for n in c.names]
        close(pairs_2LP[0, :, p], torch.stack(expected), 1e-5)


@pytest.mark.parametrize("fitted", ["float32", "bfloat16"])
def test_the_top_is_in_float32_whatever_the_scan_used(fitted, tmp_path):
    """Whatever the factors were fitted in, too; the rank is full here, so a scan in float32 gives the same."""
    model, corpus = tiny_model(), tiny_corpus()
    factors = fit(model, corpus, tmp_path / "factors", dtype=fitted, **GIVEN)
    tables = {}
    for dtype in ("float32", "mixed", "bfloat16"):
        out = tmp_path / str(dtype)
        trace(model, corpus, tiny_queries(), factors, out, rank=8, top=50, dtype=dtype, **GIVEN)
        tables[dtype] = (pd.read_parquet(out / "top.parquet"), pd.read_parquet(out / "scores.parquet"))
    ids = tiny_queries().ids
    whole = tables["float32"][0]
    np.testing.assert_allclose(whole["score"], whole["scan_score"], atol=1e-4 * whole["score"].abs().max())
    exact, *rough = (top.set_index(["query", "sequence"])["score"].sort_index() for top, _ in tables.values())
    scanned, *others = (torch.tensor(scores[ids].to_numpy()) for _, scores in tables.values())
    for top, scores, tolerance in zip(rough, others, (0.005, 0.05), strict=True):
        pd.testing.assert_series_equal(top, exact, rtol=1e-5)
        assert not torch.equal(scores, scanned)
        close(scores, scanned.double(), tolerance)


def test_fewer_sequences_are_compared_where_memory_is_short():
    layers = tuple(LayerSize(f"l{i}", 256, 256, f"l{i}", i) for i in range(4))
    blocks = tuple(Block(256.0 * 256, 64.0) for _ in layers)
    shape = Shape(layers, blocks, 0.0, 1e5, 0.5, False, 4 * 256 * 256, 50_000.0, 256, 1000)
    limits = range(400_000_000, 235_000_000, -1_000_000)
    splits = [split_fit(shape, Budget(limit, 0, 400, longest=100)) for limit in limits]
    found = [split.compared for split in splits]
    with pytest.raises(ConfigError, match="the least that would do"):
        split_fit(shape, Budget(210_000_000, 0, 400, longest=100))
    assert all(split.peak["agreement"] <= limit for split, limit in zip(splits, limits, strict=True))
    assert found == sorted(found, reverse=True)
    assert set(found) == {8, 4, 2}


def test_counting_a_model_keeps_nothing_of_its_pass():
    """An output that the graph keeps for the backward pass must not keep the graph in turn."""
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)
    outputs = []
    net[1].register_forward_hook(lambda m, args, output: outputs.append(weakref.ref(output)))
    gc.disable()
    try:
        module_shape(net, find_layers(net, "*"), 5, lambda: net(x))
        assert [ref() for ref in outputs] == [None]
    finally:
        gc.enable()


def test_an_interrupted_run_stays_divided_as_it_began(tmp_path, monkeypatch):
    """More memory than before, as the system happens to have: what was finished counts, and no group begins again."""
    model, corpus, said, done = tiny_model(), tiny_corpus(), [], []
    monkeypatch.setattr(fitting, "split_fit", in_groups_of(2))
    killed(monkeypatch, 9, lambda: fit(model, corpus, tmp_path / "parts", **GIVEN))
    begun = {p.name for p in (tmp_path / "parts").glob("*/*") if p.name.startswith(("layers-", "unit-"))}
    monkeypatch.setattr(fitting, "split_fit", split_fit)
    monkeypatch.setattr(fitting, "_tidy", lambda folder: done.extend(p.name for p in folder.glob("*/*")))
    fit(model, corpus, tmp_path / "parts", say=said.append, **GIVEN)
    assert begun <= {*done, "layers-0-1"}  # whose covariances go when they are decomposed
    assert "layers-0-1" in done
    assert sum(line.startswith("memory: the work stays divided as it was when it began") for line in said) == 1


def test_a_division_that_no_longer_fits_is_made_anew(tmp_path):
    big, small = Budget(10**9, 10**8, 400, 100), Budget(4 * 10**8, 10**8, 400, 100)
    layers = tuple(LayerSize(f"l{i}", 1024, 1024, f"l{i}", i) for i in range(4))
    shape = Shape(
        layers, tuple(Block(2.0**20, 64.0) for _ in layers), 0.0, 1e4, 0.5, False, 4 << 20, 50_000.0, 1024, 1000
    )
    said = []
    first = settled_split(tmp_path, FitSplit, lambda: split_fit(shape, big), big, said.append)
    busy = big._replace(fixed=2 * 10**8)
    assert settled_split(tmp_path, FitSplit, lambda: split_fit(shape, busy), busy, said.append) == first
    anew = settled_split(tmp_path, FitSplit, lambda: split_fit(shape, small), small, said.append)
    assert anew == split_fit(shape, small) != first
    assert settled_split(tmp_path, FitSplit, lambda: split_fit(shape, big), big, said.append) == split_fit(shape, small)
    assert len(said) == 1
    write_json(tmp_path / DIVISION, {"of": "another version"})
    assert settled_split(tmp_path, FitSplit, lambda: split_fit(shape, big), big, said.append) == first


@pytest.mark.parametrize(("dtype", "times"), [("float32", 1), ("bfloat16", 1), ("float64", 2)])
@pytest.mark.parametrize("copy", [0, 2 * 10**8])  # of the weights, which is as large as it is
def test_a_division_fits_the_limit_that_it_was_made_for_and_none_below_what_it_takes(dtype, times, copy):
    """Sizes are counted as of float32, and those of float64 are twice as large."""
    layers = tuple(LayerSize(f"l{i}", 1024, 1024, f"l{i}", i) for i in range(4))
    blocks = tuple(Block(2.0**20, 64.0) for _ in layers)
    shape = Shape(layers, blocks, 0.0, 1e4, 0.5, False, 4 << 20, 50_000.0, 1024, 1000)
    for limit in range(600 + copy // 10**6, 2600, 20):  # from about the least that would do
        budget = Budget(limit * 10**6, 10**8, 4000, 100, dtype, copy=copy)
        split = split_fit(shape, budget)
        assert fits(split, budget)
        once = budget.fixed + SLACK + copy
        sizes = max(split.peak.values()) - once
        assert not fits(split, budget._replace(limit=once + times * sizes))


@pytest.mark.parametrize("given", [{"fisher": "empirical"}, {}])
def test_batches_of_one_sequence_fit_like_others(given, tmp_path):
    model, corpus = tiny_model(), long_corpus()
    one = fit(model, corpus, tmp_path / "one", batch_tokens=1, **given)
    many = fit(model, corpus, tmp_path / "many", batch_tokens=200, **given)
    assert one.manifest["fit"]["halves"]["mean"] is not None
    for x in many.layers:
        close(one.block(x.name).lam_OI, many.block(x.name).lam_OI.double(), 1e-2)


def test_the_diagonal_in_groups_and_of_what_was_fitted_on(tmp_path, monkeypatch):
    model, corpus = tiny_model(), long_corpus()
    seen = []
    for name, split in (("whole", split_fit), ("groups", in_groups_of(2))):
        factors = fit(model, corpus, tmp_path / name, until=0.94, **GIVEN)
        monkeypatch.setattr(fitting, "split_fit", split)

        @contextmanager
        def progress(what, total):
            seen.append(total)
            yield lambda done: None

        fit_diagonal(model, corpus, factors, progress=progress)
        assert set(seen) == {factors.manifest["fit"]["tokens"]} != {int(corpus.lengths_N.sum())}
        assert not (tmp_path / name / "diagonal" / DIVISION).exists()
    assert factors_of(tmp_path / "whole") == factors_of(tmp_path / "groups")
    assert len(seen) == 1 + 3  # six layers


def rounds_of(model, corpus, folder, **given) -> tuple[int, dict[str, torch.Tensor]]:
    factors = fit(model, corpus, folder, until=0.94, **given)
    return factors.manifest["fit"]["tokens"], {x.name: factors.block(x.name).lam_OI for x in factors.layers}


def test_until_goes_over_the_same_sequences_in_any_batches_and_order(tmp_path, monkeypatch):
    """What a round adds is drawn by the sequences' content.  It stops after the second, whoever is compared with whom."""
    model, corpus, stops = tiny_model(), long_corpus(), []
    monkeypatch.setattr(
        fitting, "agreement", lambda pairs: stops.append(0) or {"what": "", "mean": len(stops) / 2, "worst": 1.0}
    )
    order = np.random.default_rng(3).permutation(len(corpus))
    tokens, lam = rounds_of(model, corpus, tmp_path / "one", batch_tokens=40)
    for name, data, batch_tokens in (
        ("small", corpus, 13),
        ("other", TokenCorpus([corpus.tokens[i] for i in order]), 40),
    ):
        stops.clear()
        found, again = rounds_of(model, data, tmp_path / name, batch_tokens=batch_tokens)
        assert found == tokens < int(corpus.lengths_N.sum())
        for layer, lam_OI in lam.items():
            close(again[layer], lam_OI.double(), 1e-4)


def test_a_kill_early_in_a_round_decomposes_nothing_again(tmp_path, monkeypatch):
    model, corpus, made = tiny_model(), long_corpus(), []
    commit = Artifact.commit

    def committed(stage, unit, tensors):
        commit(stage, unit, tensors)
        made.append((stage.path.name, unit, stage.key.get("units")))

    monkeypatch.setattr(Artifact, "commit", committed)
    for room in range(1, 40):  # most of them end while the sums of a round are made
        try:
            killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "killed", until=0.94, **GIVEN))
        except pytest.fail.Exception:  # it was done before
            break
    decomposed = [(unit, units) for name, unit, units in made if name == "eigen"]
    assert len({units for _, units in decomposed}) > 1, "it stopped after one round"
    assert len(set(decomposed)) == len(decomposed)


def test_what_a_scan_holds_stays_within_what_was_counted(monkeypatch):
    """Whatever the mean batch: where compressed queries do not fit, layers are multiplied out before queries are divided."""
    layers = tuple(
        LayerSize(f"l{i}", *side, f"l{i}", i // 2) for i in range(8) for side in [((512, 2048), (2048, 512))[i % 2]]
    )
    blocks = tuple(Block(2.0 * 512 * 2048, 512.0) for _ in range(4))
    shape = Shape(layers, blocks, 0.0, 1e6, 0.5, False, 12 << 20, 40_000.0, 2048, 8192)
    few = set()
    for limit in range(600, 1400, 50):
        job = Budget(limit * 10**6, 0, 2048, 512, sequences=8)
        split = split_trace(shape, Asked(200, 32, 32), job)
        few.add(split.scan_queries)
        assert split.peak["scan"] <= job.limit
        left = 0.95 * job.limit - SLACK - scan_size(shape, Asked(split.scan_queries, 32, 32), job, split.batch_tokens)
        for M in (400, 1500, 2048):
            for N in (1, 4, 8):
                found = contraction(layers, M, N, split.scan_queries, 32, split.dense_bytes, most=split.token_bytes)
                assert found.held <= left
    assert few == {200}


@pytest.mark.parametrize(("by_layer", "limit"), [(True, "LAYER_SCORES_BYTES"), (False, "SCORES_BYTES")])
def test_scores_are_kept_a_few_sequences_at_a_time(by_layer, limit, tmp_path, monkeypatch):
    model, corpus = tiny_model(), tiny_corpus()
    factors = fit(model, corpus, tmp_path / "factors", **GIVEN)
    monkeypatch.setattr(sweep, "UNIT_TOKENS", 10**6)
    given = {"rank": 4, "top": 3, "layer_scores": by_layer, "batch_tokens": 13}
    trace(model, corpus, tiny_queries(), factors, tmp_path / "whole", **given)
    sizes, tensors = [], Score.tensors
    monkeypatch.setattr(Score, "tensors", lambda self: sizes.append(sum(map(len, self.rows))) or tensors(self))
    monkeypatch.setattr(stages, limit, 4 * 3 * (len(factors.layers) if by_layer else 1) * 5)
    trace(model, corpus, tiny_queries(), factors, tmp_path / "parts", **given)
    assert max(sizes) <= 5
    assert sum(sizes) == len(corpus)
    whole, parts = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)
    if by_layer:
        np.testing.assert_array_equal(*(np.load(tmp_path / name / "layers.npy") for name in ("whole", "parts")))
