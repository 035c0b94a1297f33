"""What is tried before a fit: a task's loss is a sum over sequences, and draws its labels where it should."""

import numpy as np
import pytest
import torch

import reference
from captured import kept
from cases import CASES, Windows
from test_losses import CLOSE, ENDINGS, ending_so
from upriver.curvature.fit import fit
from upriver.errors import ModelError
from upriver.model.capture import frozen
from upriver.model.check import check_loss, tracked_layers
from upriver.model.head import LinearHead, Tail, ending
from upriver.model.load import Model
from upriver.model.losses import LanguageModel
from upriver.model.sweep import Labels
from upriver.model.tasks import Regression


class Deaf(Regression):
    """Takes the given labels whatever it is told: the empirical Fisher."""

    def loss(self, module, batch, sampler=None):
        return super().loss(module, batch)


class Mean(Regression):
    def loss(self, module, batch, sampler=None):
        return super().loss(module, batch, sampler) / len(batch.rows_N)


class MeanOfDrawn(Regression):
    def loss(self, module, batch, sampler=None):
        return super().loss(module, batch, sampler) / (1 if sampler is None else len(batch.rows_N))


class EachRow(Regression):
    def loss(self, module, batch, sampler=None):
        sampler and sampler.uniform(1)
        return -self.measurement(module, batch)


class MeanOfTokens(LanguageModel):
    def loss(self, module, batch, sampler=None):
        return super().loss(module, batch, sampler) / batch.inputs["loss"].sum()


BROKEN = {  # task, whether it is wrong with own labels already, what is said
    "deaf": (Deaf(), False, r"draws no labels: got Deaf\.loss, which asks its sampler for no number; .*empirical"),
    "mean": (Mean(), True, r"together is not that of one plus that of the other: .* Mean\.loss, .* never a mean$"),
    "mean of drawn labels": (MeanOfDrawn(), False, r"MeanOfDrawn\.loss, .* never a mean, with labels drawn"),
    "a number for each": (EachRow(), True, r"is not one number: got the shape \(\d,\); .* never a mean"),
    "mean of tokens": (MeanOfTokens(), True, r"MeanOfTokens\.loss, .* never a mean"),
}


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("case", BROKEN)
def test_a_loss_that_breaks_the_rules_is_refused(case, drawn):
    task, always, said = BROKEN[case]
    c = CASES["llama" if isinstance(task, LanguageModel) else "regressor"]()
    model = Model(c.model.module, task=task)
    if drawn or always:
        with pytest.raises(ModelError, match=said):
            check_loss(model, c.data, drawn)
    else:
        check_loss(model, c.data, drawn)


@pytest.mark.parametrize("case", ["deaf", "mean"])
def test_a_fit_refuses_a_loss_that_breaks_the_rules(case, tmp_path):
    c, (task, _, said) = CASES["regressor"](), BROKEN[case]
    with pytest.raises(ModelError, match=said):
        fit(Model(c.model.module, task=task), c.data, tmp_path, layers="*")


@pytest.mark.parametrize("name", CASES)
def test_the_rules_cost_a_few_short_passes_and_change_nothing(name):
    c, seen = CASES[name](), []
    module = c.model.module
    hook = module.register_forward_pre_hook(
        lambda m, args, kw: seen.append(len([*args, *kw.values()][0])), with_kwargs=True
    )
    module.train()
    check_loss(c.model, c.data, True)
    hook.remove()
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert len(seen) <= 8, "three with either labels, two for causality"
    assert max(seen) <= 2
    found = kept(c, 10_000, Labels(3, 1))
    for n in c.names:
        torch.testing.assert_close(
            found.grads[n, 5], reference.gradient(module.eval(), c.names, c.loss(5, 3, 1))[n], **CLOSE
        )


@pytest.mark.parametrize("name", ["llama", *ENDINGS])
def test_passes_end_as_the_model_does(name):
    c = ending_so(name, **ENDINGS[name]) if name in ENDINGS else CASES[name]()
    tracked_layers(c.model, c.data, "*.down_proj")
    with frozen(c.model.module):
        assert isinstance(ending(c.model.module), Tail if name in ENDINGS else LinearHead)
    found = kept(c, 10_000, Labels(3, 1), "*.down_proj")
    for n in (n for n in c.names if n.endswith("down_proj")):
        torch.testing.assert_close(
            found.grads[n, 3], reference.gradient(c.model.module, [n], c.loss(3, 3, 1))[n], **CLOSE
        )


def test_where_nothing_can_be_compared_the_rules_hold():
    c = CASES["gpt2"]()
    tokens = np.array([1, 4, 2, 9])
    none, one = np.zeros(4, bool), np.ones(4, bool)
    mean = Model(c.model.module, task=MeanOfTokens())
    check_loss(mean, Windows([tokens], [one]), True)
    check_loss(mean, Windows([tokens[:1], tokens[:1]], [one[:1], one[:1]]), True)
    check_loss(c.model, Windows([tokens, tokens[:3]], [none, none[:3]]), True)
    with pytest.raises(ModelError, match="never a mean"):
        check_loss(mean, Windows([tokens[:1], tokens, tokens[:2], tokens], [one[:1], one, none[:2], one]), True)
