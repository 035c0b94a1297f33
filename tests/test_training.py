"""Training as a function of the examples' weights, and its exact derivative, against retraining and the closed form."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import upriver as up
from cases import case, close
from upriver.errors import ConfigError, ModelError, NumericalError
from upriver.evaluate.training import Recipe, Trainer
from upriver.influence.queries import measurements

RECIPES = {
    "sgd": Recipe(12, 0.2, optimizer="sgd", weight_decay=0.01),
    "sgd in batches": Recipe(12, 0.1, 6, optimizer="sgd", momentum=0.5, decay="linear"),
    "adam": Recipe(12, 0.02, epsilon=1e-4, weight_decay=0.01),
    "adam in batches": Recipe(12, 0.01, 6, decay="linear", epsilon=1e-4),
}


def weights(model: up.Model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


@pytest.mark.parametrize("name", ["classifier", "regressor", "gpt2", "llama"])
def test_losses_are_the_parts_of_the_loss(name):
    c = case(name)
    batch = c.data.batch(np.arange(5))
    found = c.model.task.row_losses(c.model.module, batch).detach()
    alone = [c.model.task.loss(c.model.module, c.data.batch(np.array([n]))).detach() for n in range(5)]
    close(found, torch.stack(alone))
    close(
        found, super(type(c.model.task), c.model.task).row_losses(c.model.module, batch).detach()
    )  # what any task has


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_are_those_of_torch(optimizer):
    """Plain SGD with momentum, and AdamW where nothing is near its epsilon."""
    c, rows = case("classifier"), np.arange(3, 17)
    recipe = Recipe(20, 0.03, optimizer=optimizer, weight_decay=0.1, epsilon=1e-12)
    module = copy.deepcopy(c.model.module)
    kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adam": (torch.optim.AdamW, {"eps": 1e-12})}
    kind, options = kinds[optimizer]
    plain = kind(module.parameters(), lr=0.03, weight_decay=0.1, **options)
    for _ in range(20):
        plain.zero_grad()
        (c.model.task.loss(module, c.data.batch(rows)) / len(rows)).backward()
        plain.step()
    found = Trainer(c.model, c.data, recipe)(rows, 0)
    close(weights(found), torch.cat([p.detach().flatten() for p in module.parameters()]), 1e-6)
    assert not torch.equal(weights(found), weights(c.model)), "the model that was given stays as it was"


def test_equal_calls_give_equal_models_and_seeds_others():
    c = case("gpt2")
    train = Trainer(c.model, c.data, RECIPES["adam in batches"])
    first, again, other = (weights(train(np.arange(10), seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_from_scratch_is_drawn_by_the_seed_and_leaves_torch_s_own_numbers_alone():
    c = case("classifier")
    train = Trainer(lambda: up.Model(nn.Linear(4, 3).double(), task=up.Classification()), c.data, Recipe(1, 1e-9))
    before = torch.random.get_rng_state()
    first, again, other = (weights(train(np.arange(20), seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert float((first - other).abs().max()) > 0.1


def test_what_is_left_out_plays_no_part_and_changes_no_batch():
    c = case("classifier")
    broken = up.Examples({"x": c.data.inputs["x"].clone(), "y": c.data.inputs["y"]})
    broken.inputs["x"][7] = 1e6
    rows, recipe = np.delete(np.arange(20), 7), RECIPES["sgd in batches"]
    assert torch.equal(
        weights(Trainer(c.model, c.data, recipe)(rows, 3)), weights(Trainer(c.model, broken, recipe)(rows, 3))
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["classifier", "regressor", "gpt2"])
def test_metagradients_are_the_differences_of_retraining(name, recipe):
    """Central differences of models trained again with one weight changed, in float64: within 1e-4 of the largest."""
    c, step = case(name), 1e-6
    train, rows = Trainer(c.model, c.data, RECIPES[recipe]), [0, 5, 11]
    found = up.metagradients(train, c.queries, seed=4)
    expected = []
    for row in rows:
        f = []
        for sign in (1, -1):
            w_N = np.ones(len(c.data))
            w_N[row] += sign * step
            f.append(measurements(train.weighted(w_N, 4), c.queries))
        expected.append((f[0] - f[1]) / (2 * step))
    assert np.abs(expected).max() > 1e-4, "there is something to compare"
    close(torch.tensor(found.nats_NQ[rows]), torch.tensor(np.array(expected)), 1e-4)
    assert np.array_equal(found.f_Q, measurements(train(np.arange(len(c.data)), 4), c.queries))


def test_where_training_has_converged_metagradients_are_the_exact_influence():
    """A linear classifier with weight decay is convex, and its Gauss-Newton matrix is its Hessian."""
    c, decay = case("classifier"), 0.1
    begin = up.Model(nn.Sequential(nn.Linear(4, 3)).double(), task=up.Classification())
    recipe = Recipe(200, 0.5, optimizer="sgd", momentum=0.8, weight_decay=decay)
    found = up.metagradients(Trainer(begin, c.data, recipe), c.queries)
    names = [n for n, _ in found.model.module.named_parameters()]

    def flat(f) -> torch.Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(f, list(found.model.module.parameters()), create_graph=True)]
        )

    for p in found.model.module.parameters():
        p.requires_grad_()
    assert names == ["0.weight", "0.bias"]
    losses = c.model.task.row_losses(found.model.module, c.data.batch(np.arange(20)))
    slope_P = flat(losses.mean())
    H_PP = torch.stack([flat(s).detach() for s in slope_P])
    L_NP = torch.stack([flat(x).detach() for x in losses])
    f_QP = torch.stack(
        [flat(x).detach() for x in c.model.task.measurement(found.model.module, c.queries.batch([0, 1, 2]))]
    )
    influence_NQ = -L_NP @ torch.linalg.solve(H_PP + decay * torch.eye(len(H_PP), dtype=torch.float64), f_QP.T)
    close(torch.tensor(found.nats_NQ) * 20, influence_NQ, 1e-6)


def test_a_task_whose_losses_are_not_the_parts_of_its_loss_is_refused():
    class Smoothed(up.Classification):
        def loss(self, module, batch, sampler=None):
            return super().loss(module, batch, sampler) + 0.1 * len(batch.rows_N)

    c = case("classifier")
    with pytest.raises(ModelError, match="not the parts of its loss"):
        Trainer(dataclasses.replace(c.model, task=Smoothed()), c.data)(np.arange(20), 0)


def test_bad_trainings_are_refused():
    c = case("classifier")
    with pytest.raises(ConfigError, match="no such training"):
        Recipe(optimizer="lion")  # type: ignore
    with pytest.raises(ConfigError, match="above zero"):
        Recipe(steps=0)
    with pytest.raises(ConfigError, match="some of the 20"):
        Trainer(c.model, c.data)(np.array([20]), 0)
    with pytest.raises(NumericalError, match="diverged"):
        Trainer(case("regressor").model, case("regressor").data, Recipe(200, 1e6, optimizer="sgd"))(np.arange(20), 0)
