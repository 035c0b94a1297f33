"""The plan: its counts against torch's own counter, its splits against the limit they promise, its table of machines."""

import json
import re
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cases import case
from in_memory import TokenCorpus, TokenQueries
from upriver.curvature.consumers import FIT_PROBES
from upriver.curvature.fit import fit
from upriver.errors import ConfigError, ModelError
from upriver.influence.forecast import divide, plan_model, scan_probe
from upriver.influence.job import Given
from upriver.influence.queries import weighted_measurement
from upriver.kernels import add_second_moment
from upriver.model.capture import capture
from upriver.model.check import tracked_layers
from upriver.model.layers import find_layers, probe
from upriver.model.load import Model
from upriver.model.planned import Blank, memory_budget, plan_here
from upriver.model.shape import config_only, config_shape, model_shape, module_shape, observe
from upriver.runtime import cost
from upriver.runtime.config import TraceOptions, parse_memory
from upriver.runtime.cost import CORRECTION, COVARIANCE, Asked, Block, LayerSize, Shape, groups
from upriver.runtime.divide import (
    LAYER_SCORES_BYTES,
    SLACK,
    Budget,
    batch_size,
    divide_fit,
    divide_trace,
    scan_held,
    still_fits,
)
from upriver.runtime.hardware import Machine, Rates, hardware
from upriver.runtime.plan import Request, describe, parse_sizes, plan_run, request_for
from upriver.runtime.progress import show_bytes, show_flop, silent
from upriver.runtime.system import available_memory, peak_memory, resident_memory, start_seconds
from upriver.tensors import rotated_gradients

N, T = 3, 16
PASSES = ["covariance", "eigendecomposition", "correction", "agreement", "queries", "scan", "rescore"]
FIT, TRACE = PASSES[:4], PASSES[4:]
CONFIGS = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 6},
    "gpt_neox": {"intermediate_size": 32},
    "gpt2": {"n_inner": 24},
}
SPECS = ["mlp", "attention", "all", "*.1.*"]


@cache
def config(name: str):
    return AutoConfig.for_model(
        name, vocab_size=19, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
        bos_token_id=0, eos_token_id=0, **CONFIGS[name],
    )  # fmt: skip


@cache
def module(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(config(name), attn_implementation="eager").eval()


def run(name: str):
    return module(name)(input_ids=torch.zeros(N, T, dtype=torch.int64), use_cache=False).logits


@cache
def shape(name: str, spec: str) -> tuple[Shape, list]:
    layers = probe(find_layers(module(name), spec), lambda: run(name), N * T, {})
    return module_shape(module(name), layers, N * T, lambda: run(name)), layers


def counted(work) -> float:
    """Multiplications that torch counts (it knows ``addmm``, and has to be told that ``addmm_`` is the same)."""
    in_place = {torch.ops.aten.addmm_: lambda total, x, y, out_shape: 2 * x[0] * x[1] * y[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_are_what_torch_counts(name, spec):
    """Also with a gradient that ends at a block in the middle, and within a block."""
    found, layers = shape(name, spec)
    with torch.no_grad():
        forward = counted(lambda: run(name))
    # rotary embeddings are made by a product of a position and a frequency, which is no work of a layer
    small = N * T * 16
    assert found.forward(T) * N * T == pytest.approx(forward, abs=small)
    with capture(module(name), layers, lambda *_: None) as through:
        whole = counted(lambda: through(N, T, lambda: run(name).sum()))
    assert found.backward(T) * N * T == pytest.approx(whole - forward, abs=small)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_is_what_torch_counts(name):
    module(name).requires_grad_(True)
    step = counted(lambda: run(name).sum().backward())
    module(name).zero_grad()
    first = shape(name, "mlp")[0].layers[0]
    assert first.block == 0
    found = shape(name, "mlp")[0].step(T) * N * T
    assert found == pytest.approx(step, rel=0.01)
    assert found >= step - 16 * N * T  # nothing is passed back below the first block, all else is


def test_a_covariance_is_half_of_what_torch_counts_of_a_whole_product():
    """Block rows as on a GPU (the shapes alone, on the meta device) do a little more."""
    total, x = torch.zeros(6144, 6144, device="meta"), torch.zeros(5, 6144, device="meta")
    layer = LayerSize("a", 8, 6144, "a", 0)
    half = 5 * COVARIANCE.multiplications(layer._replace(O=0), 1)
    assert half == 5 * 6144**2 / 2 < counted(lambda: add_second_moment(total, x)) < 1.3 * half
    assert COVARIANCE.multiplications(layer._replace(A_of="b"), 1) == 32


@pytest.mark.parametrize(("t", "O", "I"), [(4, 9, 7), (8, 9, 7), (8, 7, 9), (30, 9, 7)])
def test_correction_is_what_torch_counts(t, O, I):
    a, g, Q_A, Q_S = torch.zeros(2, t, I), torch.zeros(2, t, O), torch.zeros(I, I), torch.zeros(O, O)
    found = counted(lambda: rotated_gradients(a, g, Q_A, Q_S))
    assert CORRECTION.multiplications(LayerSize("a", O, I, "a", 0), t) * 2 * t == pytest.approx(found)


def test_orders_are_what_torch_counts():
    O, I, n, t, Q, R = 5, 7, 3, 4, 6, 2
    a, g, U, V = torch.zeros(n, t, I), torch.zeros(n, t, O), torch.zeros(Q, O, R), torch.zeros(Q, R, I)
    gradients = (lambda: g.mT @ a)().flatten(1)
    form = counted(lambda: g.mT @ a)
    dense = form + counted(lambda: gradients @ torch.zeros(Q, O * I).T)
    tokens = counted(lambda: (g @ U.permute(1, 0, 2).flatten(1)) * (a @ V.flatten(0, 1).T))
    assert cost.orders(O, I, n * t, n, Q, R) == (tokens, dense, dense + counted(lambda: U @ V))


def test_held_memory_is_each_storage_once():
    """The input of the first layer and what tanh gives, which it keeps and the next layer takes: no weight, nothing twice."""
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)
    found = module_shape(net, find_layers(net, "*"), 5, lambda: net(x))
    assert found.activation == 4 + 8
    assert (found.forward(1), found.backward(1)) == (4 * 8 + 8 * 3, 8 * 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_alone_gives_the_shape_of_the_model(name, tmp_path):
    config(name).save_pretrained(tmp_path)
    architecture, found = config_shape(tmp_path, "mlp")
    assert architecture == type(module(name)).__name__
    assert found._replace(activation=0, narrow=None) == shape(name, "mlp")[0]._replace(activation=0)
    assert found == config_shape(tmp_path / "config.json", "mlp")[1]


def test_experts_count_as_far_as_a_token_goes_through_them(tmp_path):
    """Two of four experts, each with three matrices of 16 x 24; the configuration of one that has no fused attention, too."""
    common = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = AutoConfig.for_model(
        "mixtral", **common, intermediate_size=24, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2
    )
    experts.save_pretrained(tmp_path)
    assert config_shape(tmp_path, "attention")[1].blocks[1].linear == 4 * 16 * 16 + 2 * 3 * 16 * 24
    AutoConfig.for_model("gptj", vocab_size=19, n_embd=16, n_layer=2, n_head=4, rotary_dim=4).save_pretrained(tmp_path)
    assert config_shape(tmp_path, "mlp")[1].blocks[1].linear == 12 * 16 * 16


def test_no_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json"):
        config_shape(tmp_path, "mlp")


sides = st.integers(1, 4000)


@st.composite
def shapes(draw) -> Shape:
    sizes = draw(st.lists(st.tuples(sides, sides, st.booleans()), min_size=1, max_size=12))
    layers: list[LayerSize] = []
    for i, (O, I, follows) in enumerate(sizes):
        if follows and layers:
            leader = next(x for x in layers if x.name == layers[-1].A_of)
            layers.append(LayerSize(f"{i}", O, leader.I, leader.name, i))
        else:
            layers.append(LayerSize(f"{i}", O, I, f"{i}", i))
    blocks = tuple(Block(float(x.O * x.I), 64.0) for x in layers)
    parameters, widest = sum(x.O * x.I for x in layers), max(x.O for x in layers)
    return Shape(tuple(layers), blocks, 0.0, 1e5, 0.5, False, parameters, draw(st.floats(1, 1e5)), widest, 1000)


jobs = st.builds(
    Budget,
    limit=st.integers(10**7, 2 * 10**10),
    fixed=st.integers(0, 10**9),
    batch_tokens=st.integers(1, 5000),
    longest=st.integers(1, 2000),
    dtype=st.sampled_from(["float32", "bfloat16", "mixed"]),
    cores=st.integers(1, 8),
    sequences=st.integers(0, 300),
    copy=st.integers(0, 10**8),
    exact=st.sampled_from(["float32", "bfloat16"]),
    widened=st.integers(0, 10**8),
    accelerator=st.booleans(),
)


def kept(work, job: Budget) -> tuple[Any, Budget]:
    """What ``work`` finds within the limit; or, where it refuses, within the least that its error says would do."""
    try:
        return work(job), job
    except ConfigError as error:
        least = parse_memory(re.search(r"least that would do is ([\d.]+ [kMGT]B)", str(error))[1])
    assert least > job.limit
    job = job._replace(limit=least)
    return work(job), job


@settings(max_examples=60, deadline=None)
@given(shapes(), jobs)
def test_a_fit_keeps_its_limit_or_says_what_would_do(shape, job):
    split, job = kept(lambda job: divide_fit(shape, job), job)
    everything = list(range(len(shape.layers)))
    batch = batch_size(shape, split.batch_tokens, job.dtype)
    for spec in (COVARIANCE, CORRECTION):
        found = split.groups[spec.name]
        assert [i for group in found for i in group] == everything
        for group in found:
            assert job.fixed + job.copy + batch + spec.held([shape.layers[i] for i in group]) <= job.limit
    assert max(split.peak.values()) <= job.limit
    assert job.longest <= split.batch_tokens <= max(job.batch_tokens, job.longest)
    assert 1 <= split.eigen_workers <= job.cores


@settings(max_examples=60, deadline=None)
@given(
    shapes(),
    jobs,
    st.builds(Asked, st.integers(1, 300), st.integers(1, 100), st.sampled_from([None, 4, 32]), norms=st.integers(0, 3)),
)
def test_a_trace_keeps_its_limit_or_says_what_would_do(shape, job, asked):
    split, job = kept(lambda job: divide_trace(shape, asked, job), job)
    assert max(split.peak.values()) <= job.limit
    for group in split.groups["scan"]:
        some = [shape.layers[i] for i in group]
        assert scan_held(some, asked, job, split.batch_tokens, split.scan_room).held <= job.free
    for name in ("queries", "scan", "rescore"):
        assert [i for group in split.groups[name] for i in group] == list(range(len(shape.layers)))
    assert job.longest <= split.batch_tokens


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(1, 10**9))
def test_no_two_neighbouring_groups_would_fit_as_one(shape, room):
    found = groups(shape.layers, CORRECTION.held, room)
    for first, second in pairwise(found):
        assert CORRECTION.held([shape.layers[i] for i in [*first, second[0]]]) > room


def test_a_shared_input_is_counted_once():
    up, gate = LayerSize("up", 3, 10, "up", 0), LayerSize("gate", 3, 10, "up", 0)
    assert COVARIANCE.held([up, gate]) == 4 * (100 + 9 + 9)
    assert CORRECTION.held([up, gate]) == 4 * (100 + 9 + 9 + 2 * 30 + 2 * 30)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("2GiB", 2 << 30), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("64", 64)]
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "8XB", "8 GB or so", "0GB", "nan", "1e30TB"])
def test_bad_sizes_of_memory(text):
    with pytest.raises(ConfigError, match="8GB"):
        parse_memory(text)


def test_sizes_of_a_corpus():
    assert parse_sizes("10000000x512") == (10_000_000, 512)
    assert [parse_sizes(x) for x in ("corpus.jsonl", "0x5", "5x", "x5", "5x0")] == [None] * 5


def test_hardware_of_the_table():
    one, eight = hardware("h100"), hardware("H100x8")
    assert (one.devices, eight.devices) == (1, 8)
    assert one.rates == eight.rates
    assert hardware("rtx4090").devices == 1
    assert hardware("rtx4090x2").devices == 2
    for name in ("a100-80gb", "l40s", "epyc-9554"):
        rates = hardware(name).rates
        assert rates["bfloat16"].model > rates["float32"].model >= rates["float64"].model > 0


@pytest.mark.parametrize("name", ["h10", "h100x0", "a100", "", "x8"])
def test_unknown_hardware_names_what_there_is(name):
    with pytest.raises(ConfigError, match=r"one of .*\b(h100|a100-80gb|l40s)\b"):
        hardware(name)


def test_memory_of_this_machine():
    left, resident, peak = available_memory(), resident_memory(), peak_memory()
    if sys.platform == "linux":
        assert left
        assert resident
        assert peak
        assert 10**7 < resident <= 1.01 * peak < 10**12  # the system counts them apart


HERE = Machine(
    "this machine", 1, 10**10, 2, 1e-12, 1e9, 3.0, {"float32": Rates(1e11, 1e11)}, 10**9, "float32", 0
)  # fmt: skip
LAYERS = tuple(LayerSize(f"{i}", 512, 256, f"{i}", i) for i in range(4))
SMALL = Shape(LAYERS, (Block(3e5, 256.0),) * 4, 0.0, 2e6, 0.5, False, 4_000_000, 5000.0, 512, 8192)


def test_time_is_linear_in_the_sequences_and_memory_is_level_but_for_their_places():
    plans = [plan_run(Request(n, 128, queries=8, memory=8 * 10**9), SMALL, HERE) for n in (10**5, 2 * 10**5, 4 * 10**5)]
    scans = [next(p for p in plan.passes if p.name == "scan").seconds for plan in plans]
    assert scans[1] / scans[0] == pytest.approx(2)
    assert scans[2] / scans[0] == pytest.approx(4)
    assert plans[2].peak("trace") - plans[0].peak("trace") == 128 * 3 * 10**5
    assert len({plan.seconds("fit") for plan in plans}) == 1  # the sample has its own size


def test_each_draw_of_labels_is_a_pass_over_the_sample():
    one, three = (plan_run(Request(1000, 128, memory=8 * 10**9, draws=n), SMALL, HERE).passes for n in (1, 3))
    times = {a.name: (b.flop / a.flop, b.sweeps / max(1, a.sweeps)) for a, b in zip(one, three, strict=True)}
    assert times["covariance"] == times["correction"] == (pytest.approx(3), 3)
    assert times["agreement"] == (pytest.approx(1), 1)
    assert times["eigendecomposition"][0] == pytest.approx(1)


def test_a_smaller_limit_costs_passes_and_the_numbers_stay():
    wide = plan_run(Request(1000, 128, memory=8 * 10**9), SMALL, HERE)
    tight = plan_run(Request(1000, 128, memory=int(1.28e9), batch_tokens=128), SMALL, HERE)
    assert wide.fit is not None
    assert tight.fit is not None
    assert [len(found) for found in wide.fit.groups.values()] == [1, 1, 1]
    assert tight.peak("fit") <= 1.28e9 < wide.peak("fit")
    with pytest.raises(ConfigError, match="least that would do"):
        plan_run(Request(1000, 128, memory=10**9), SMALL, HERE)


def _with_bfloat16(times: float) -> Machine:
    """The machine with a bfloat16 that is so many times as fast."""
    return HERE._replace(rates=HERE.rates | {"bfloat16": Rates(times * 1e11, times * 1e11)})


def test_what_pays_is_the_run_as_a_whole_and_not_its_products():
    """Eigendecompositions gain a quarter, solved queries and the second look nothing: little is won where they are most of it."""
    machine = _with_bfloat16(8.0)
    long = plan_run(Request(100_000, 128, queries=1), SMALL, machine)
    assert float(re.search(r"about ([\d.]+) times", long.advice[0])[1]) > 4
    short = plan_run(Request(100, 128, queries=1), SMALL, machine._replace(eigen=1e-5))
    assert short.advice == ["bfloat16 pays here: about 1.3 times as fast (--dtype bfloat16)"]


def test_mixed_precision_has_the_model_of_float32_and_the_products_of_bfloat16():
    machine = _with_bfloat16(2.0)
    whole, low, mixed = (machine.of(dtype) for dtype in ("float32", "bfloat16", "mixed"))
    assert mixed == low._replace(model=whole.model)

    def scan(dtype):
        plan = plan_run(Request(100_000, 128, queries=400, dtype=dtype), SMALL, machine)
        assert plan.advice == [] or dtype == "float32"
        return next(p for p in plan.passes if p.name == "scan")

    assert scan("bfloat16").seconds < scan("mixed").seconds < scan("float32").seconds
    assert scan("mixed").peak < scan("float32").peak, "no copy of the model, and queries and what waits take half"


def test_the_description_names_every_pass_and_what_pays():
    plan = plan_run(Request(100_000, 128, queries=8), SMALL, _with_bfloat16(2.0))
    lines = describe(plan)
    text = "\n".join(lines)
    for name in (
        "covariance",
        "eigendecomposition",
        "correction",
        "queries",
        "scan",
        "rescore",
        "disk",
        "bfloat16 pays",
    ):
        assert name in text
    assert max(map(len, lines)) <= 110
    for machine in (HERE, _with_bfloat16(1.1)):
        assert "bfloat16" not in "\n".join(describe(plan_run(Request(100_000, 128), SMALL, machine)))
    asked = plan_run(Request(100_000, 128, dtype="bfloat16"), SMALL, _with_bfloat16(2.0))
    assert "pays" not in "\n".join(describe(asked))
    assert json.loads(json.dumps(plan.as_dict()))["seconds"]["fit"] == plan.seconds("fit")


def test_a_model_too_large_for_one_device_is_spread():
    layers = tuple(LayerSize(f"{i}", 16384, 4096, f"{i}", i) for i in range(60))
    large = Shape(layers, (Block(2e8, 4096.0),) * 60, 0.0, 3e8, 0.5, False, 30 * 10**9, 1e6, 16384, 65536)
    plan = plan_run(Request(10**6, 512), large, hardware("h100x8"))
    assert plan.spread > 1
    assert plan.spread * 80e9 > 4 * 30e9
    assert 8 % plan.spread == 0
    with pytest.raises(ConfigError, match="least that would do"):
        plan_run(Request(10**6, 512), large, hardware("l40s"))


def test_a_second_piece_of_work_does_not_count_the_first_as_its_start(tmp_path, monkeypatch):
    """`upriver run` fits and traces in one process."""
    monkeypatch.setattr("upriver.runtime.system._ended", 0.0)
    c, before = case("neox"), start_seconds()
    fit(c.model, c.data, tmp_path, layers=c.spec, dtype="float64")
    assert 0 <= start_seconds() < before


def planned(name: str, division=None, left: int = 0, **asked):
    c = case(name)
    request = request_for(c.data.lengths_N, batch_tokens=30, dtype="float64", **asked)
    probes = {"scan": scan_probe(request.asked)} if request.queries else {}
    layers = tracked_layers(c.model, c.data, c.spec)
    return plan_here(c.model, layers, c.data, request, probes | (FIT_PROBES if request.fit else {}), division, left)


@pytest.mark.parametrize("name", ["neox", "classifier"])
def test_this_machine_is_measured_with_the_model(name):
    """Any module and corpus; a second plan takes what the first one measured."""
    plan = planned(name, queries=3)
    assert [p.name for p in plan.passes][: len(PASSES)] == PASSES
    assert all(p.seconds > 0 for p in plan.passes)
    once, again = ([p.seconds for p in x.passes if p.name in FIT_PROBES] for x in (plan, planned(name, queries=3)))
    assert again == once
    with pytest.raises(ConfigError, match="least that would do"):
        planned(name, memory=10**6)


def test_what_will_not_be_in_a_run_is_not_planned():
    """As what reading a corpus for the first time leaves."""
    peaks, lower = ([p.peak for p in planned("neox", queries=3, left=x).passes] for x in (0, 10**8))
    assert lower == pytest.approx([peak - 10**8 for peak in peaks], abs=3e7)


def test_a_run_is_planned_as_it_has_divided_its_work():
    """Nothing is counted once more that is in the division already, as the places of the sequences."""
    c = case("neox")
    layers = tracked_layers(c.model, c.data, c.spec)
    division = divide_fit(model_shape(c.model, layers, c.data), memory_budget(c.model, c.data, 30, "3GB"))
    plan = planned("neox", division)
    assert (plan.fit, plan.limit, plan.trace) == (division, 3 * 10**9, None)
    assert {p.name: p.peak for p in plan.passes} == division.peak
    opts = TraceOptions(batch_tokens=30, memory="3GB", dtype="float64")
    traced = divide(Given(c.model, c.data, c.queries, None, opts, (), silent, print), layers, None)
    plan = planned("neox", traced, fit=False, queries=3, scan_dtype="float64")
    assert (plan.fit, plan.trace) == (None, traced)
    peaks = {p.name: p.peak for p in plan.passes if p.name in TRACE}
    assert peaks == {name: peak for name, peak in traced.peak.items() if name in peaks}
    assert traced.peak.keys() - peaks.keys() == {"judge"}  # no sequence is left to judge by


def test_a_model_and_a_corpus_that_are_not_there(tmp_path):
    config("llama").save_pretrained(tmp_path)
    place = config_only(tmp_path)
    assert place == tmp_path
    plan = plan_model(place, Blank(10**6, 32), "mlp", Request(10**6, 32, queries=5), "h100x8")
    assert (plan.machine.name, plan.spread, [p.name for p in plan.passes][:7]) == ("h100x8", 1, PASSES)
    here = plan_model(place, Blank(10, 32), "mlp", Request(10, 32), None)
    assert here.peak("fit") > (resident_memory() or 0) / 2
    (tmp_path / "model.safetensors").touch()
    assert config_only(tmp_path) is None


def test_a_blank_corpus_is_a_corpus():
    data = Blank(5, 7)
    assert [len(rows) for rows in data.plan(14)] == [2, 2, 1]
    batch = data.batch(data.sample(21, 0))
    assert batch.inputs["tokens"].shape == (3, 7)
    assert batch.real_NT is not None
    assert int(batch.real_NT.sum()) == 21


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 kB"), (999.4e6, "999 MB"), (999.6e6, "1 GB"), (1e9, "1 GB"), (12_345e6, "12.3 GB"), (2e12, "2 TB")],
)
def test_sizes_are_shown_in_three_digits_of_the_unit_that_they_round_to(n, text):
    assert show_bytes(n) == text
    assert show_flop(999.6e9) == "1 TFLOP"


def test_a_shape_is_looked_at_once_and_again_when_more_or_less_is_kept():
    c = case("llama")
    model = Model(deepcopy(c.model.module))
    layers = tracked_layers(model, c.data, c.spec)
    first = model_shape(model, layers, c.data)
    assert model_shape(model, layers, c.data) is first
    model.module.set_attn_implementation("eager")
    assert model_shape(model, layers, c.data) is not first


def test_queries_longer_than_every_passage_are_counted_by_what_they_keep_themselves():
    """Eager attention keeps as many numbers for a token as the sequence has tokens."""
    config = AutoConfig.for_model("gpt2", vocab_size=23, n_positions=400, n_embd=8, n_layer=2, n_head=4)
    model = Model(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    rng = np.random.default_rng(0)
    corpus = TokenCorpus([rng.integers(0, 23, 8) for _ in range(4)])
    queries = TokenQueries([rng.integers(0, 23, n) for n in (8, 400)], [4, 200])
    layers = tracked_layers(model, corpus, "mlp")
    kept = observe(
        model.module, layers, 400, lambda: weighted_measurement(model, queries.batch([1])).requires_grad_()
    ).held
    opts = TraceOptions(batch_tokens=16, memory="3GB", dtype="float32")
    split = divide(Given(model, corpus, queries, None, opts, (), silent, print), layers, None)
    assert split.peak["queries"] - memory_budget(model, corpus, 16, "3GB").fixed - SLACK > 0.9 * kept
    assert kept > 10 * 400 * model_shape(model, layers, corpus).activation


def test_a_bfloat16_pass_is_counted_by_what_a_bfloat16_model_keeps(tmp_path):
    """More than half of the bytes: norms keep float32 beside."""
    config = AutoConfig.for_model("llama", vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                  intermediate_size=24)  # fmt: skip
    model, corpus = Model(AutoModelForCausalLM.from_config(config).eval()), Blank(4, T)
    layers = tracked_layers(model, corpus, "mlp")
    shape = model_shape(model, layers, corpus, ["float32", "bfloat16"])
    with model.computing_in("bfloat16") as copy:
        own, batch = tracked_layers(copy, corpus, "mlp"), corpus.batch(np.array([0]))
        kept = observe(copy.module, own, T, lambda: copy.task.loss(copy.module, batch)).held
    assert kept == 2 * T * shape.narrow
    assert shape.narrow > 1.1 * shape.activation
    sizes = [batch_size(shape._replace(widest=0, vocabulary=0), 100, dtype) for dtype in ("bfloat16", "float32")]
    assert sizes == [int(200 * shape.narrow), int(400 * shape.activation)]
    assert model_shape(model, layers, corpus, ["mixed", "float32"]).narrow is None
    config.save_pretrained(tmp_path)
    assert config_shape(tmp_path, "mlp", ["bfloat16"])[1].narrow > 1.1 * shape.activation


def test_rounds_are_planned_to_the_end_of_the_sample():
    """Four units: samples of one, two and four of them, each corrected whole and decomposed; covariances are added up once."""
    request = Request(4096, 64, fit_tokens=4 * 65_536, memory=8 * 10**9)
    once, rounds = (plan_run(replace(request, rounds=r), SMALL, HERE) for r in (False, True))
    times = {p.name: q.flop / p.flop for p, q in zip(once.passes, rounds.passes, strict=True)}
    assert times == pytest.approx({"covariance": 1, "eigendecomposition": 3, "correction": 7 / 4, "agreement": 3})
    assert any(line.startswith("fit, at most ") for line in describe(rounds))


def test_scores_by_layer_are_in_the_plan():
    request = Request(4096, 64, queries=8, fit=False, memory=8 * 10**9)
    plain, by_layer = (plan_run(replace(request, layer_scores=x), SMALL, HERE) for x in (False, True))
    table = 4 * 8 * 4096
    assert by_layer.disk["scores"] - plain.disk["scores"] == 4 * table
    assert by_layer.disk["while tracing"] - plain.disk["while tracing"] == 2 * 4 * table
    peak = [next(p.peak for p in plan.passes if p.name == "scan") for plan in (plain, by_layer)]
    assert peak[1] - peak[0] == 2 * LAYER_SCORES_BYTES


def test_a_rank_that_no_layer_can_have_is_the_highest_of_them():
    highest, beyond = (
        plan_run(Request(4096, 64, queries=8, rank=r, memory=8 * 10**9), SMALL, HERE) for r in (256, 10**6)
    )
    assert beyond.passes == highest.passes


@pytest.mark.parametrize(("dtype", "times"), [("float32", 1), ("bfloat16", 1), ("float64", 2)])
@pytest.mark.parametrize("copy", [0, 2 * 10**8])  # of the weights, which is as large as it is
def test_a_division_still_fits_what_it_was_made_for_and_no_limit_below_what_it_takes(dtype, times, copy):
    """Sizes are counted as of float32, and those of float64 are twice as large."""
    layers = tuple(LayerSize(f"l{i}", 1024, 1024, f"l{i}", i) for i in range(4))
    blocks = tuple(Block(2.0**20, 64.0) for _ in layers)
    shape = Shape(layers, blocks, 0.0, 1e4, 0.5, False, 4 << 20, 50_000.0, 1024, 1000)
    for limit in range(800 + copy // 10**6, 2600, 20):  # from about the least that would do
        budget = Budget(limit * 10**6, 10**8, 4000, 100, dtype, copy=copy)
        made = divide_fit(shape, budget)
        assert max(made.peak.values()) <= budget.limit
        assert still_fits(made, made)
        assert not still_fits(made, made._replace(limit=max(made.peak.values())))
