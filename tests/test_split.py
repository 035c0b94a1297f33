"""What divides a run changes none of its numbers: groups of layers, batches, rounds of ``until``; and what it promises."""

import gc
import json
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cases import case, close, gradients
from in_memory import TokenCorpus
from test_resume import GIVEN, Count, Died, killed, results, tiny_corpus, tiny_model, tiny_queries
from upriver.curvature.consumers import FIT_PROBES, Agreement
from upriver.curvature.diagonal import fit_diagonal
from upriver.curvature.fit import Factors, fit
from upriver.errors import ConfigError
from upriver.model.check import tracked_layers
from upriver.model.layers import find_layers
from upriver.model.planned import division_file, settled
from upriver.model.shape import module_shape
from upriver.model.sweep import Source, sweep
from upriver.pipeline import trace
from upriver.runtime.artifact import read_json, write_json
from upriver.runtime.cost import Block, LayerSize, Shape
from upriver.runtime.divide import Budget, divide_fit

UNTIL = 0.94


def factors_of(folder) -> dict[str, bytes]:
    return {name: content for name, content in results(folder).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole(name)``: the factors of a case whose layers went together, made once."""

    @cache
    def make(name: str) -> dict[str, bytes]:
        c, out = case(name), tmp_path_factory.mktemp(name)
        fit(c.model, c.data, out, layers=c.spec, **GIVEN)
        return factors_of(out)

    return make


def begun_in_groups(monkeypatch, folder: Path, size: int, work: Callable[[], object]) -> None:
    """Let ``work`` begin, and have it go on as a run that began with less memory: with groups of ``size`` layers."""
    assert killed(monkeypatch, 2, work)  # its key and its division are there
    division = read_json(division_file(folder))
    for name, groups in division["groups"].items():
        n = sum(map(len, groups))
        division["groups"][name] = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    write_json(division_file(folder), division)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "twice", "gpt2"])
def test_groups_of_layers_give_the_same_bits(name, size, whole, tmp_path, monkeypatch):
    """Groups of four cut a block in two, so that a layer and the one whose input it shares are in different ones."""
    c = case(name)
    work = lambda: fit(c.model, c.data, tmp_path, layers=c.spec, **GIVEN)  # noqa: E731
    begun_in_groups(monkeypatch, tmp_path, size, work)
    passes = work().manifest["timings"]["passes"]
    assert passes["covariance"] == passes["correction"] == -(-len(c.names) // size)
    assert factors_of(tmp_path) == whole(name)


def test_a_fit_in_groups_goes_on_where_it_died_and_stays_divided_as_it_began(tmp_path, monkeypatch):
    """Also with more memory than before, as the system happens to have: what was finished counts."""
    model, corpus, said = tiny_model(), tiny_corpus(), []
    fit(model, corpus, tmp_path / "whole", **GIVEN)
    given = {**GIVEN, "memory": "3GB"}
    begun_in_groups(monkeypatch, tmp_path / "parts", 2, lambda: fit(model, corpus, tmp_path / "parts", **given))
    for room in (3, 9, 7):
        assert killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "parts", **given))
    fit(model, corpus, tmp_path / "parts", say=said.append, **{**GIVEN, "memory": "4GB"})
    assert factors_of(tmp_path / "parts") == factors_of(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "parts" / "correction").iterdir()} <= {"lam.safetensors", "key.json"}
    assert sum(line.startswith("memory: the work stays divided as it was when it began") for line in said) == 1
    assert Factors(tmp_path / "parts").manifest["timings"]["passes"]["correction"] == 3


def test_a_scan_in_groups_gives_the_same_scores(tmp_path, monkeypatch):
    model, corpus, given = tiny_model(), tiny_corpus(), {"rank": 4, "top": 3, "held_out": 0, "layer_scores": True}
    given["unit_norm"] = True
    factors = fit(model, corpus, tmp_path / "factors", **GIVEN)

    def run(name: str) -> None:
        trace(model, corpus, tiny_queries(), factors, tmp_path / name, **given, **GIVEN)

    run("whole")
    begun_in_groups(monkeypatch, tmp_path / "parts", 4, lambda: run("parts"))
    for room in (4, 5):
        assert killed(monkeypatch, room, lambda: run("parts"))
    run("parts")
    whole, parts = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(
        whole, parts, rtol=1e-5, atol=1e-5 * float(whole[tiny_queries().ids].abs().max().max())
    )
    units = [[name for name in table if name.endswith("@unit")] for table in (whole, parts)]
    assert len(units[0]) == len(tiny_queries())
    np.testing.assert_allclose(whole[units[0]], parts[units[1]], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "layers.npy") for name in ("whole", "parts")))


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
    early = fit(model, corpus, tmp_path / "early", until=UNTIL, say=said.append, **GIVEN).manifest["fit"]
    assert early["tokens"] < whole["tokens"]
    assert early["halves"]["mean"] >= UNTIL
    agreements = [line for line in said if line.startswith("convergence")]
    assert len(agreements) > 1, "it stopped at once"
    fit(model, corpus, tmp_path / "early", until=UNTIL, say=again.append, **GIVEN)
    assert [line for line in again if line.startswith("convergence")] == agreements[-1:]
    never = fit(model, corpus, tmp_path / "never", until=1.0, say=said.append, **GIVEN).manifest["fit"]
    assert never["tokens"] == whole["tokens"]
    assert any("was not reached" in line for line in said)


def test_until_goes_on_where_it_died_and_decomposes_nothing_again(tmp_path, monkeypatch):
    model, corpus, said, eigen, attempts = tiny_model(), long_corpus(), [], 0, 0
    alone = fit(model, corpus, tmp_path / "alone", until=UNTIL, say=said.append, **GIVEN)
    for room in range(1, 60):  # most of them end while the sums of a round are made
        with monkeypatch.context() as patch:
            count = Count(patch, room, after=False)
            try:
                fit(model, corpus, tmp_path / "killed", until=UNTIL, **GIVEN)
                break
            except Died:
                attempts += 1
            finally:
                eigen += sum("eigen/unit-" in name for name in count.names)
    rounds = sum(line.startswith("convergence") for line in said)
    assert attempts > 3
    assert rounds > 1, "it stopped after one round"
    assert eigen == rounds * len(alone.layers)
    assert results(tmp_path / "killed") == results(tmp_path / "alone")


def test_until_goes_over_the_same_sequences_in_any_batches_and_order(tmp_path):
    """What a round adds is drawn by the sequences' content."""
    model, corpus = tiny_model(), long_corpus()
    order = np.random.default_rng(3).permutation(len(corpus))
    shuffled = TokenCorpus([corpus.tokens[i] for i in order])
    found = [
        fit(model, data, tmp_path / name, until=0.8, batch_tokens=batch_tokens, unit_tokens=60)
        for name, data, batch_tokens in (("one", corpus, 40), ("small", corpus, 13), ("other", shuffled, 40))
    ]
    assert len({factors.manifest["fit"]["tokens"] for factors in found}) == 1
    assert found[0].manifest["fit"]["tokens"] < int(corpus.lengths_N.sum())
    for other in found[1:]:
        for x in other.layers:
            close(other.block(x.name).lam_OI, found[0].block(x.name).lam_OI.double(), 1e-4)


def test_scores_by_the_same_eigenvalues_agree_and_are_those_of_the_oracle(fitted):
    """Pairs of sequences, scored by ``lam`` once and by twice ``lam``: perfectly correlated, one half the other."""
    c, factors = case("llama"), fitted("llama")
    layers = tracked_layers(c.model, c.data, c.spec)
    moments = {x.name: factors.moments(x.name) for x in layers}
    lam = {x.name: factors.block(x.name).lam_OI + 1 for x in layers}
    consumer = Agreement(moments, {n: torch.stack([v, 2 * v]) for n, v in lam.items()})
    source = Source.of(c.data, np.arange(3), 1000)
    sweep(c.model, layers, source, source.rows, consumer)
    (pairs_2LP,) = consumer.parts
    close(pairs_2LP[0], 2 * pairs_2LP[1].double(), 1e-6)
    (order,) = source.batches(source.rows)  # the longest first
    turned = [{n: moments[n].rotate(gradients("llama")[row][n]) for n in c.names} for row in order]
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
        trace(model, corpus, tiny_queries(), factors, out, rank=8, top=50, dtype=dtype, held_out=0, **GIVEN)
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


def test_a_division_that_no_longer_fits_is_made_anew(tmp_path):
    layers = tuple(LayerSize(f"l{i}", 1024, 1024, f"l{i}", i) for i in range(4))
    blocks = tuple(Block(2.0**20, 64.0) for _ in layers)
    shape = Shape(layers, blocks, 0.0, 1e4, 0.5, False, 4 << 20, 50_000.0, 1024, 1000)
    big, small = (divide_fit(shape, Budget(limit, 10**8, 400, 100)) for limit in (10**9, 46 * 10**7))
    more = divide_fit(shape, Budget(10**9, 2 * 10**8, 400, 100))  # is there before it starts
    said, cpu = [], torch.device("cpu")
    assert settled(tmp_path, big, cpu, said.append) == big
    assert settled(tmp_path, more, cpu, said.append) == big
    assert settled(tmp_path, small, cpu, said.append) == small != big
    assert settled(tmp_path, big, cpu, said.append) == small
    assert len(said) == 1
    write_json(division_file(tmp_path), {"of": "another version"})
    assert settled(tmp_path, big, cpu, said.append) == big


@pytest.mark.parametrize("given", [{"fisher": "empirical"}, {}])
def test_batches_of_one_sequence_fit_like_others(given, tmp_path):
    model, corpus = tiny_model(), long_corpus()
    one = fit(model, corpus, tmp_path / "one", batch_tokens=1, **given)
    many = fit(model, corpus, tmp_path / "many", batch_tokens=200, **given)
    assert one.manifest["fit"]["halves"]["mean"] is not None
    for x in many.layers:
        close(one.block(x.name).lam_OI, many.block(x.name).lam_OI.double(), 1e-2)


def test_the_diagonal_in_groups_and_of_what_was_fitted_on(tmp_path, monkeypatch):
    model, corpus, seen = tiny_model(), long_corpus(), []

    @contextmanager
    def progress(what, total):
        seen.append(total)
        yield lambda done: None

    for name in ("whole", "groups"):
        factors = fit(model, corpus, tmp_path / name, until=UNTIL, **GIVEN)
        work = lambda f=factors: fit_diagonal(model, corpus, f, progress=progress)  # noqa: E731
        if name == "groups":
            assert killed(monkeypatch, 1, work)
            division = json.loads(division_file(tmp_path / name).read_text())
            groups = {what: [[0, 1], [2, 3], [4, 5]] for what in division["groups"]}
            write_json(
                division_file(tmp_path / name),
                {k: v for k, v in division.items() if k != "digest"} | {"groups": groups},
            )
            seen.clear()
        work()
        assert set(seen) == {factors.manifest["fit"]["tokens"]} != {int(corpus.lengths_N.sum())}
        assert len(seen) == (3 if name == "groups" else 1)
        assert not division_file(tmp_path / name).exists()
    assert factors_of(tmp_path / "whole") == factors_of(tmp_path / "groups")


@pytest.mark.parametrize("name", ["covariance", "correction"])
def test_what_a_pass_has_summed_up_is_gone_with_its_consumer(name):
    """Hooks and passes know each other: what they hold must not wait until cycles are collected."""
    c = case("llama")
    layers = tracked_layers(c.model, c.data, c.spec)
    source = Source.of(c.data, np.arange(len(c.data)), 30)
    gc.disable()
    try:
        consumer, _ = FIT_PROBES[name](c.model, layers, source, source.rows)
        sweep(c.model, layers, source, source.rows, consumer)
        held = weakref.ref(consumer)
        del consumer
        assert held() is None
    finally:
        gc.enable()
