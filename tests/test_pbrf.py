"""The proximal Bregman response: its pieces against their definitions, and its derivative against the dense solve."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cases import case, close, gradients, measured
from upriver.curvature.base import Damping
from upriver.curvature.products import Products
from upriver.curvature.spectral import Spectral
from upriver.errors import ConfigError
from upriver.evaluate.pbrf import Anchor, ProximalBregman, bregman
from upriver.influence.queries import Measurements
from upriver.influence.queries import gradients as query_gradients
from upriver.model.load import Model
from upriver.model.losses import Task
from upriver.text.examples import Examples

LAMBDA = {"classifier": 0.05, "regressor": 0.05, "gpt2": 1.0, "twice": 1.0, "llama": 1.0}
ROW = 3


def pbrf(name, **options):
    c = case(name)
    return ProximalBregman(c.model, c.layers, c.data, LAMBDA[name], **options)


def exact_response(name):
    """``- (G + lambda I)^-1 grad L(z)`` with the oracle's gradient, ``[1, O, I]`` for every layer."""
    c = case(name)
    q = {n: g[None].detach() for n, g in gradients(name)[ROW].items()}
    solution = Spectral.exact(Products(c.model, c.layers, c.data)).solve(q, Damping(LAMBDA[name], relative=False))
    return {n: -v for n, v in solution.value.items()}


def sequence(name, row=ROW):
    return case(name).data.batch(np.array([row]))


@pytest.mark.parametrize("name", ["classifier", "gpt2"])
def test_the_divergence_of_cross_entropy_is_the_kl_from_the_old_to_the_new_predictions(name):
    c = case(name)
    batch = c.data.batch(np.arange(5))
    old_MC = c.model.task.outputs(c.model.module, batch).detach()
    new_MC = old_MC + torch.randn(old_MC.shape, dtype=old_MC.dtype, generator=torch.Generator().manual_seed(0))
    expected = F.kl_div(new_MC.log_softmax(1), old_MC.log_softmax(1), reduction="sum", log_target=True)
    close(bregman(c.model.task, new_MC, Anchor(batch, old_MC)), expected)
    if c.language:
        assert len(old_MC) == int(batch.inputs["loss"][:, 1:].sum()), "one prediction for every token with loss"


def test_the_divergence_of_squared_error_is_half_the_squared_difference_of_outputs():
    c = case("regressor")
    batch = c.data.batch(np.arange(5))
    old_MC, new_MC = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(bregman(c.model.task, new_MC, Anchor(batch, old_MC)), (new_MC - old_MC).square().sum() / 2)


@pytest.mark.parametrize("name", LAMBDA)
def test_invariant_5_the_dense_solution_is_the_derivative_of_the_pbrf(name):
    found = pbrf(name).derivative(sequence(name), epsilon=1e-4)
    assert found.converged
    for n, expected in exact_response(name).items():
        close(found.value[n], expected, 1e-4)


def test_invariant_5_the_gap_falls_with_the_square_of_epsilon():
    expected, errors = exact_response("classifier"), []
    for epsilon in (1e-1, 1e-2, 1e-3):
        value = pbrf("classifier").derivative(sequence("classifier"), epsilon).value
        errors.append(max(float((value[n] - expected[n]).abs().max()) for n in expected))
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50


@pytest.mark.parametrize("name", LAMBDA)
def test_invariant_5_the_pbrf_of_a_measurement_is_its_influence(name):
    """``I_f(z) = - grad f^T (G + lambda I)^-1 grad L(z)``: positive where training on ``z`` raises ``f``."""
    c, response = case(name), exact_response(name)
    expected = torch.stack([sum((g[n] * response[n][0]).sum() for n in g) for g in measured(name)]).detach()
    found = pbrf(name).influence(sequence(name), c.queries)
    assert found.converged
    close(torch.from_numpy(found.value_Q), expected, 1e-4)


class Counts(Task):
    """Poisson regression, which none of the tasks here is."""

    name = "counts"

    def outputs(self, module, batch):
        return module(batch.inputs["x"])

    def loss_of(self, outputs_MC, batch):
        return (outputs_MC.exp() - batch.inputs["y"] * outputs_MC).sum()

    def loss(self, module, batch, sampler=None):
        return self.loss_of(self.outputs(module, batch), batch)

    def measurement(self, module, batch):
        return self.outputs(module, batch)[:, 0]


def test_invariant_5_any_task_with_outputs_has_a_pbrf():
    c, y_NK = case("regressor"), torch.arange(40.0, dtype=torch.float64).reshape(20, 2) % 3
    model, data = Model(c.model.module, task=Counts()), Examples({"x": c.data.inputs["x"], "y": y_NK})
    queries = Measurements(Examples({"x": c.queries.examples.inputs["x"], "y": torch.zeros(3, 2)}))
    p = ProximalBregman(model, c.layers, data, 0.05)
    z = data.batch(np.array([ROW]))
    slope_1P = p.function.gradient(p.theta_P, z).detach()[None]
    exact = Spectral.exact(Products(model, c.layers, data))
    v_P = p.function.space.flatten(
        exact.solve(p.function.space.unflatten(slope_1P), Damping(0.05, relative=False)).value
    )[0]
    f_QP = p.function.space.flatten(query_gradients(model, c.layers, queries))
    found = p.influence(z, queries)
    assert found.converged
    close(torch.from_numpy(found.value_Q), -f_QP @ v_P, 1e-4)


@pytest.mark.parametrize("epsilon", [-0.02, 0.02])
def test_the_minimiser_is_no_higher_than_any_point_near_it(epsilon):
    p, z = pbrf("classifier"), sequence("classifier")
    solution = p.minimise(z, epsilon)
    assert solution.converged
    at_P = p.function.space.flatten(solution.value)[0]
    lowest = p.objective(at_P, z, epsilon)
    nearby = torch.randn(20, len(at_P), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert all(p.objective(at_P + size * d, z, epsilon) > lowest for d in nearby for size in (1e-3, 0.1))


def test_a_start_near_the_answer_saves_steps_and_changes_nothing_else():
    z, near = sequence("classifier"), exact_response("classifier")
    plain = pbrf("classifier", tolerance=1e-6).minimise(z, 1e-4)
    begun = pbrf("classifier", tolerance=1e-6).minimise(z, 1e-4, near)
    far = pbrf("classifier", tolerance=1e-6).minimise(z, 1e-4, {n: -9 * v for n, v in near.items()})
    assert begun.stats["steps"] < plain.stats["steps"]
    assert begun.converged
    assert far.converged
    for n, value in plain.value.items():
        close(begun.value[n], value, 1e-4)
        close(far.value[n], value, 1e-4)


def test_neither_batch_size_nor_padding_changes_the_objective():
    z = sequence("gpt2")
    whole, single = pbrf("gpt2"), pbrf("gpt2", batch_tokens=1)
    moved = 0.1 * torch.randn(whole.function.space.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(single.objective(moved, z, 0.1), whole.objective(moved, z, 0.1))


def test_the_model_is_left_as_it_was():
    c = case("gpt2")
    before = copy.deepcopy(c.model.module.state_dict())
    flags = [p.requires_grad for p in c.model.module.parameters()]
    pbrf("gpt2").minimise(sequence("gpt2"), 1e-3)
    assert all(torch.equal(before[name], t) for name, t in c.model.module.state_dict().items())
    assert [p.requires_grad for p in c.model.module.parameters()] == flags


def test_a_precision_out_of_reach_is_reported_as_data():
    c = case("classifier")
    model = Model(copy.deepcopy(c.model.module).float(), task=c.model.task)
    data = Examples({"x": c.data.inputs["x"].float(), "y": c.data.inputs["y"]})
    layers = [x._replace(modules=(model.module.get_submodule(x.name),)) for x in c.layers]
    p = ProximalBregman(model, layers, data, 0.05)
    solution = p.derivative(data.batch(np.array([ROW])))
    assert not solution.converged
    assert "use float64" in solution.stats["why"]


def test_damping_must_be_positive():
    c = case("classifier")
    with pytest.raises(ConfigError, match="positive damping"):
        ProximalBregman(c.model, c.layers, c.data, 0.0)
