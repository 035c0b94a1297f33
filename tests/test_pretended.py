"""Fit, trace, proximal response and output-token influence on a pretended GPU: nothing meets what is on the CPU, the numbers are
the CPU's, and the host waits for the device a few times a batch, whatever the layers and queries.

What a real GPU alone can show is not here: its own kernels and their rounding, TF32, memory, streams that really run beside each
other.  A device is always named with its number: without one C++ asks CUDA for the current one.
"""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

import pretended
import upriver as up
from cases import case, close
from golden import difference
from upriver.curvature.base import Damping
from upriver.curvature.choose import SOLVERS
from upriver.curvature.consumers import Agreement, Correction, Covariance, SelfInfluence
from upriver.curvature.factors import read_moments
from upriver.errors import NumericalError
from upriver.evaluate.pbrf import ProximalBregman
from upriver.influence.normed import Lengths
from upriver.influence.queries import gradients, token_gradients
from upriver.influence.rescore import TokenScores, output_token_influence
from upriver.influence.score import Score, route
from upriver.model.check import tracked_layers
from upriver.model.load import Model
from upriver.model.sweep import Labels, Source, sweep
from upriver.tensors import LowRank

DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16}
# Of the range of the CPU's numbers.  Where operations are the same, so are all bits; eigenvectors, products and attention of
# other libraries, which some processors are given, round elsewhere.
APART = {"float32": 1e-5, "mixed": 2e-3, "bfloat16": 2e-2}
STEPS = {"cg": 3, "lissa": 3, "astra": 2}
KINDS = {kind: {"curvature": kind, "solver_steps": STEPS.get(kind), "solver_rank": 8} for kind in SOLVERS}
REFINED, FULL, LAYERS = {"refine": 2}, {"rank": "full"}, {"rank": 2, "layer_scores": True, "damping": "0.1x,1.0"}
TRACES = {  # all solvers on small models, and those that go over all layers on one with attention
    "classifier": KINDS | {"refined": REFINED, "full": FULL, "layers": LAYERS},
    "regressor": {"ekfac": {}, "kfac": KINDS["kfac"], "refined": REFINED, "cg": KINDS["cg"]},
    "llama": {"refined": REFINED, "layers": LAYERS, "diagonal": KINDS["diagonal"]},
    "twice": {"ekfac": {}, "full": FULL},
}
HALF = ("ekfac", "refined", "layers")  # of them, in half precision


def placed(name: str, device: str, dtype: torch.dtype = torch.float32) -> Model:
    c = case(name)
    return Model(copy.deepcopy(c.model.module).to(dtype).to(device), task=c.model.task)


def numbers(name: str, device: str, dtype: str) -> dict[str, np.ndarray]:
    """Eigenvalues, and for each trace the scores ``[N, Q]`` and those of the tops, which are sums over tokens."""
    c, model, found = case(name), placed(name, device, DTYPES[dtype]), {}
    narrow = dtype != "float32"
    if narrow and name == "llama":
        model.module.set_attn_implementation("eager")
    with TemporaryDirectory() as place:
        folder, asked = Path(place), {"batch_tokens": 30, "dtype": dtype}
        factors = up.fit(model, c.data, folder / "factors", layers=c.spec, **asked)
        for x in factors.layers:
            found[f"lam {x.name}"] = factors.block(x.name).lam_OI.numpy()
        for trace, options in TRACES[name].items():
            if narrow and trace not in HALF:
                continue
            scores = up.trace(model, c.data, c.queries, factors, folder / trace, top=3, held_out=60, **asked, **options)
            found[trace] = scores.frame().sort_values("sequence")[c.queries.ids].to_numpy()
            found[f"{trace} top"] = np.concatenate([np.sort(scores.top(q, 3)["score"]) for q in c.queries.ids])
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in TRACES), ("llama", "mixed"), ("llama", "bfloat16"), ("classifier", "bfloat16")],
)
def test_a_fit_and_its_traces_give_the_numbers_of_the_cpu(name, dtype):
    wanted = numbers(name, "cpu", dtype)
    with pretended.gpu() as seen:
        found = numbers(name, "cuda:0", dtype)
    assert seen.count("to device") + seen.count("to device beside") > 0, "it was there"
    apart = {key: difference(x, wanted[key]) for key, x in found.items()}
    assert max(apart.values()) <= APART[dtype], apart


def test_the_proximal_response_is_that_of_the_cpu():
    c, z = case("classifier"), case("classifier").data.batch(np.array([3]))
    wanted = ProximalBregman(c.model, c.layers, c.data, 0.05).influence(z, c.queries)
    with pretended.gpu():
        model = placed("classifier", "cuda:0", torch.float64)
        pbrf = ProximalBregman(model, tracked_layers(model, c.data, c.spec), c.data, 0.05)
        found = pbrf.influence(z, c.queries)
    assert found.converged
    close(torch.from_numpy(found.value_Q), torch.from_numpy(wanted.value_Q), 1e-5)


def test_the_influence_of_output_tokens_is_that_of_the_cpu():
    def influence(device: str) -> torch.Tensor:
        c, model = case("llama"), placed("llama", device, torch.float64)
        layers = tracked_layers(model, c.data, c.spec)
        v = {name: q_QOI[0] for name, q_QOI in gradients(model, layers, c.queries).items()}
        return output_token_influence(model, layers, c.data.batch(np.arange(4)), v).cpu()

    wanted = influence("cpu")
    with pretended.gpu():
        close(influence("cuda:0"), wanted, 1e-9)


# ---- how often the host waits for the device

Q, BATCH_TOKENS = 3, 20
# A batch: transformers looks whether the sequences are packed, and whether a loss lost its digits is asked once all are there.
WAITS = 2
ONCE = 3  # a pass: whether the losses are numbers; a result that is fetched


@cache
def fitted_folder() -> TemporaryDirectory:
    folder, c = TemporaryDirectory(), case("llama")
    up.fit(placed("llama", "cpu"), c.data, folder.name, layers=c.spec, batch_tokens=BATCH_TOKENS)
    return folder


def consumer(kind: str, model: Model, layers: list):
    """A consumer with all that it holds on the device, as a run has it."""
    like = model.like
    low = {x.name: LowRank(torch.ones(Q, x.O, 2).to(like), torch.ones(Q, 2, x.I).to(like)) for x in layers}
    if kind.startswith("scan"):
        order = kind.split()[1]
        routes = {x.name: route(order, lambda name=x.name: low[name], Q, like) for x in layers}
        return Score(routes, Q, keep_layers=True)
    moments = read_moments(Path(fitted_folder().name), layers, layers, like)
    denominators = {x.name: torch.ones(2, x.O, x.I).to(like) for x in layers}
    return {
        "covariance": lambda: Covariance({}, torch.float32),
        "correction": lambda: Correction({}, torch.float32, moments),
        "agreement": lambda: Agreement(moments, denominators),
        "self-influence": lambda: SelfInfluence(moments, {n: x[0] for n, x in denominators.items()}),
        "lengths": lambda: Lengths(
            up.Factors(fitted_folder().name).curvature(), layers, [Damping(), Damping(1.0)], like
        ),
        "rescore": lambda: TokenScores(layers, {n: x.dense() for n, x in low.items()}, {r: [0, 2] for r in range(14)}),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "covariance",
        "correction",
        "agreement",
        "self-influence",
        "scan tokens",
        "scan dense",
        "scan rebuilt",
        "lengths",
        "rescore",
    ],
)
def test_a_pass_waits_for_the_device_twice_a_batch(kind):
    c, drawn = case("llama"), kind in ("covariance", "correction")
    fitted_folder()
    with pretended.gpu() as seen:
        model = placed("llama", "cuda:0")
        layers = tracked_layers(model, c.data, c.spec)
        consume, rows = consumer(kind, model, layers), np.arange(len(c.data))
        source = Source.of(c.data, rows, BATCH_TOKENS, Labels(0, 1) if drawn else Labels())
        source = source._replace(loss=getattr(consume, "loss", source.loss))
        batches = len(source.batches(rows))
        seen.by_line.clear()
        sweep(model, layers, source, rows, consume)
        if hasattr(consume, "result"):
            consume.result()
    each = {
        what: f"{seen.count(what) / batches:.2f} {what}"
        for what in ("wait", "to host", "to device", "to device beside")
    }
    print(f"\n{kind}, {batches} batches, for each: {', '.join(each.values())}")
    assert batches >= 3
    assert seen.count("wait") <= WAITS * batches + ONCE, seen
    assert seen.count("to host") <= ONCE, seen
    assert seen.count("to device") <= batches, seen  # the random numbers of labels, or which pairs are wanted
    assert seen.count("wait beside") == 0, "batches are read and copied while others are computed"
    assert seen.count("to device beside") <= 6 * batches, seen  # tokens, two masks, where these are true, weights


def test_query_gradients_wait_twice_a_batch():
    c = case("twice")  # padded, and each layer sees its calls side by side
    with pretended.gpu() as seen:
        model = placed("twice", "cuda:0")
        layers = tracked_layers(model, c.data, c.spec)
        seen.by_line.clear()
        token_gradients(model, layers, c.queries, [0, 1, 2], 12)
    assert seen.count("wait") <= WAITS * 3 + 1, seen


def test_a_loss_that_is_no_number_is_refused_before_anything_is_made_of_the_pass():
    c = case("classifier")
    with pretended.gpu() as seen:
        model = placed("classifier", "cuda:0")
        layers = tracked_layers(model, c.data, c.spec)
        with torch.no_grad():
            model.module[2].bias[0] = float("nan")
        source = Source.of(c.data, np.arange(20), 4)
        seen.by_line.clear()
        with pytest.raises(NumericalError, match="the loss of a batch is nan"):
            sweep(model, layers, source, source.rows, Covariance({}, torch.float32))
    assert seen.count("wait") == 1, "for all batches together"


# ---- the device itself: what a GPU refuses


def test_tensors_of_two_devices_do_not_meet():
    with pretended.gpu() as seen:
        there, here = torch.ones(3, device="cuda:0"), torch.ones(3)
        assert there.device == torch.device("cuda:0")
        for work in (
            lambda: there + here,
            lambda: here[there.long()],
            lambda: torch.cat([there, here]),
            lambda: there.index_put((torch.tensor([0, 1]),), torch.ones(2)),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                work()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2], "a number is taken along"
        seen.by_line.clear()
        assert float(there[there > 0].sum()) == 3
        assert (seen.count("wait"), seen.count("to host")) == (2, 0)
        here.pin_memory().to("cuda:0", non_blocking=True)
        assert (seen.count("wait"), seen.count("to device")) == (2, 1), "pinned memory is copied while the host goes on"
        here.to("cuda:0", non_blocking=True)
        assert seen.count("wait") == 3


def test_another_stream_is_waited_for():
    with pretended.gpu():
        copies, passes = torch.cuda.Stream(), torch.cuda.current_stream()
        with torch.cuda.stream(copies):
            x = torch.ones(3).pin_memory().to("cuda:0", non_blocking=True)
        with pytest.raises(RuntimeError, match="was not waited for"):
            x + 1
        passes.wait_event(copies.record_event())
        with pytest.raises(RuntimeError, match="without record_stream"):
            x + 1
        x.record_stream(passes)
        assert (x + 1).tolist() == [2, 2, 2]
