"""What several passes see is kept on the disk: the numbers are those of the model, whatever becomes of the disk."""

import errno
import os

import numpy as np
import pytest
import torch
from upriver.model.kept import Kept
from upriver.runtime.passes import Request
from upriver.runtime.split import keeping

from cases import CASES, case
from test_plan import HERE, SMALL
from test_resume import killed, tiny_corpus, tiny_model
from test_split import GIVEN, factors_of, in_groups_of, long_corpus
from upriver.curvature import fit as fitting
from upriver.curvature.agreement import probed
from upriver.curvature.factors import Factors
from upriver.curvature.fit import fit
from upriver.model import kept, sweep
from upriver.model.layers import Layer
from upriver.model.shape import model_shape
from upriver.model.sweep import check_loss, tracked_layers
from upriver.runtime.plan import describe, plan_run

ROWS = [np.array([3, 1]), np.array([2])]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    monkeypatch.setattr(sweep, "UNIT_TOKENS", 60)


def layers_of(name: str) -> list[Layer]:
    c = case(name)
    return tracked_layers(c.model, c.data, c.spec)


def run(model, corpus, out, spec: str = "mlp", **given) -> int:
    """Fit, and count how often the model is run."""
    calls = []
    model_shape(model, tracked_layers(model, corpus, spec), corpus)  # looked at once in a process
    check_loss(model, corpus, drawn=False)  # which looks at causality once
    hook = model.module.register_forward_hook(lambda *_: calls.append(1))
    try:
        fit(model, corpus, out, layers=spec, **GIVEN, **given)
    finally:
        hook.remove()
    return len(calls)


@pytest.fixture
def any_disk(monkeypatch):
    """Keep, however long writing takes: the models are tiny."""
    monkeypatch.setattr(kept, "TRIAL", 10**9)


@pytest.fixture
def no_space(monkeypatch):
    return lambda: monkeypatch.setattr(fitting, "free_space", lambda folder: 0)


@pytest.mark.parametrize("name", CASES)
def test_the_second_pass_reads_what_the_first_saw(name, tmp_path, any_disk, no_space):
    c = case(name)
    read = run(c.model, c.data, tmp_path / "kept", c.spec, fisher="empirical", dtype="float64")
    no_space()
    computed = run(c.model, c.data, tmp_path / "computed", c.spec, fisher="empirical", dtype="float64")
    batches = c.data.plan(GIVEN["batch_tokens"])
    assert computed - read == len(batches) + len(
        probed(batches, len(c.data), 8)
    )  # correction, and how the halves agree
    assert factors_of(tmp_path / "kept") == factors_of(tmp_path / "computed")
    halves = [Factors(tmp_path / x).manifest["fit"]["halves"] for x in ("kept", "computed")]
    assert halves[0] == halves[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_run_the_model_once_for_each_draw_of_labels(dtype, tmp_path, monkeypatch, any_disk, no_space):
    model, corpus = tiny_model(), tiny_corpus()
    monkeypatch.setattr(fitting, "split_fit", in_groups_of(2))
    read = run(model, corpus, tmp_path / "kept", dtype=dtype)
    no_space()
    computed = run(model, corpus, tmp_path / "computed", dtype=dtype)
    assert computed > 2 * read
    assert factors_of(tmp_path / "kept") == factors_of(tmp_path / "computed")


def test_rounds_run_the_model_on_what_is_new(tmp_path, any_disk, no_space):
    model, corpus = tiny_model(), long_corpus()
    read = run(model, corpus, tmp_path / "kept", until=1.0)
    no_space()
    computed = run(model, corpus, tmp_path / "computed", until=1.0)
    assert computed > 1.2 * read
    assert factors_of(tmp_path / "kept") == factors_of(tmp_path / "computed")


def test_a_fit_that_died_has_kept_nothing_and_goes_on(tmp_path, monkeypatch):
    model, corpus = tiny_model(), tiny_corpus()
    fit(model, corpus, tmp_path / "whole", fisher="empirical", **GIVEN)
    for room in (3, 5, 4):
        killed(monkeypatch, room, lambda: fit(model, corpus, tmp_path / "parts", fisher="empirical", **GIVEN))
        assert not [p for p in (tmp_path / "parts").iterdir() if p.name.startswith("tmp")]
    fit(model, corpus, tmp_path / "parts", fisher="empirical", **GIVEN)
    assert factors_of(tmp_path / "parts") == factors_of(tmp_path / "whole")


@pytest.mark.parametrize("written", [0, 1, 40])
def test_a_full_disk_costs_time_only(written, tmp_path, monkeypatch, any_disk):
    model, corpus, real, count = tiny_model(), tiny_corpus(), os.pwritev, []
    fit(model, corpus, tmp_path / "whole", fisher="empirical", **GIVEN)

    def full(*args):
        count.append(1)
        if len(count) > written + 1:  # the first call tries the disk
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwritev", full)
    cut, truncate = [], os.ftruncate
    monkeypatch.setattr(os, "ftruncate", lambda file, size: cut.append(size) or truncate(file, size))
    fit(model, corpus, tmp_path / "full", fisher="empirical", **GIVEN)
    assert cut == [0], "what was written stays in the way of the rest"
    assert len(count) > written + 1, "the disk was never full"
    assert factors_of(tmp_path / "full") == factors_of(tmp_path / "whole")


def test_a_slow_disk_is_left_alone(tmp_path):
    layers = layers_of("llama")
    with Kept(tmp_path, layers, {"labels"}) as held:
        for i in range(kept.TRIAL):
            assert held.recorder("labels", layers, print) is not None
            held.keep("labels", np.array([i]), [], 3.0, 1.1)
        assert held.recorder("labels", layers, print) is None
        assert held.holds("labels", np.array([0]))


def test_other_labels_are_not_kept(tmp_path):
    layers = layers_of("llama")
    with Kept(tmp_path, layers, {"labels"}) as held:
        assert held.recorder("others", layers, print) is None
        held.keep("labels", ROWS[0], [], 1.0, 0.0)
        assert not held.holds("others", ROWS[0])
        assert not held.holds("labels", ROWS[1])


@pytest.mark.parametrize("direct", [True, False], ids=["past the page cache", "through it"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_come_back_bit_for_bit(dtype, direct, tmp_path, monkeypatch):
    """Odd sizes, more than a chunk, strides, and calls that move a part only."""
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(kept, "CHUNK", 3 * kept.BLOCK)
    for name in ("pwritev", "preadv"):
        move = getattr(os, name)
        half = lambda file, views, at, move=move: move(file, [views[0][: max(kept.BLOCK, len(views[0]) // 2)]], at)  # noqa: E731
        monkeypatch.setattr(os, name, half)
    layers, draw = layers_of("llama"), torch.Generator().manual_seed(0)
    seen, handed = {}, []
    with Kept(tmp_path, layers, {"labels"}) as held:
        for rows in ROWS:
            both = held.recorder("labels", layers[1:], lambda *given: handed.append(given))
            assert both is not None
            for layer in layers:
                a = torch.randn(len(rows), 7, 333, generator=draw).to(dtype)
                g = torch.randn(len(rows), 1001, 7, generator=draw).to(dtype).transpose(1, 2)
                both(layer, a, g)
                seen[rows.tobytes(), layer.name] = (a, g)
            both.end(rows)
        for rows in ROWS[::-1]:
            assert held.holds("labels", rows)
            found = held.read("labels", rows, layers[1:])
            for layer, (got, a, g) in zip(layers[1:], found, strict=True):
                shared = seen[rows.tobytes(), layer.A_of][0]
                assert got.name == layer.name
                assert a.dtype == g.dtype == dtype
                assert torch.equal(a, shared)
                assert torch.equal(g, seen[rows.tobytes(), layer.name][1])
    assert len({x.A_of for x in layers}) < len(layers), "no layer shares its input"
    assert [x.name for x, *_ in handed] == [x.name for x in layers[1:]] * len(ROWS)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_where_it_does_not_fit_or_is_asked_for_once():
    split = plan_run(Request(1000, 128, memory=8 * 10**9), SMALL, HERE).fit
    assert split is not None
    numbers = 4 * (512 + 256)  # of a token, in the layers of SMALL
    both = keeping(SMALL, split, 1000, "float32", True, False, 10**9)
    assert both == (True, True, True, 4 * 1000 * numbers)
    assert keeping(SMALL, split, 1000, "bfloat16", True, False, 10**9).size == 2 * 1000 * numbers
    assert not keeping(SMALL, split, 1000, "float32", True, False, 2 * both.size - 1).size
    assert keeping(SMALL, split, 1000, "float32", True, False, 2 * both.size).size
    assert not keeping(SMALL, split, 1000, "float32", False, False, 10**9).size
    assert keeping(SMALL, split, 1000, "float32", False, True, 10**9) == (False, True, False, both.size)
    tight = split._replace(covariance=[[0], [1, 2, 3]], correction=[[0, 1], [2, 3]])
    assert keeping(SMALL, tight, 1000, "float32", False, False, 10**9) == (True, True, False, 2 * both.size)


def test_the_plan_counts_what_is_kept():
    asked = Request(1000, 128, memory=8 * 10**9, own_labels=True)
    fast, slow = HERE._replace(disk=1e11), HERE._replace(disk=1e6)
    kept, computed, none = (
        plan_run(r, SMALL, m) for r, m in ((asked, fast), (asked, slow), (asked, fast._replace(space=0)))
    )
    size = 128_000 * 4 * 4 * (512 + 256)
    assert kept.disk["kept between passes"] == size
    assert "kept between passes" not in computed.disk | none.disk
    assert f"kept between passes {size / 1e9:.3g} GB" in " ".join(describe(kept))
    model = 2 * 128_000 * (SMALL.forward(128) + SMALL.backward(128))
    flop = [next(p.flop for p in plan.passes if p.name == "correction") for plan in (kept, computed)]
    assert flop[1] - flop[0] == pytest.approx(model)
    assert kept.seconds("fit") < none.seconds("fit")


def test_the_plan_counts_groups_once():
    asked = Request(1000, 128, memory=int(1.28e9), batch_tokens=128)
    kept, computed = (plan_run(asked, SMALL, HERE._replace(disk=1e11, space=n)) for n in (10**12, 0))
    assert kept.fit is not None
    assert len(kept.fit.correction) > 1
    assert kept.seconds("fit") < computed.seconds("fit")
    assert [p.sweeps for p in kept.passes] == [p.sweeps for p in computed.passes]
