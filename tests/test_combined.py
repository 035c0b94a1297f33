"""What is combined is the best combination of EK-FAC's solutions at several dampings, by the dense matrix."""

from typing import Any

import numpy as np
import pytest
import torch

import upriver as up
from cases import case
from test_trace_solvers import flat, matrix
from upriver.curvature.base import Damping
from upriver.curvature.combined import TIMES, Combined
from upriver.curvature.products import Space
from upriver.errors import ConfigError
from upriver.influence.queries import gradients

NAME = "llama"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    c = case(NAME)
    return up.fit(c.model, c.data, tmp_path_factory.mktemp("combined") / "factors", layers=c.spec, dtype="float64")


def test_it_has_the_largest_energy_that_the_parts_can_have(fitted):
    c, damping = case(NAME), Damping.parse("0.5x")
    q, space = gradients(c.model, c.layers, c.queries), Space.of(c.layers)
    start = fitted.curvature()
    combined = Combined(c.model, c.layers, c.data, np.arange(len(c.data)), start, batch_tokens=20)
    found = combined.solve(q, damping)
    q_QP, v_QP = space.flatten(q), space.flatten(found.value)
    A = matrix(NAME).to(q_QP) + torch.diag(space.spread(combined.lambdas(damping), q_QP[0]))
    energy = lambda v_P, q_P: float(q_P @ v_P - v_P @ A @ v_P / 2)  # noqa: E731
    parts = [space.flatten(start.solve(q, damping._replace(value=0.5 * x)).value) for x in TIMES]
    for i, q_P in enumerate(q_QP):
        left_P = q_P - A @ v_QP[i]  # nothing is left of the gradient along any part
        for b_P in (b_QP[i] for b_QP in parts):
            assert abs(float(b_P @ left_P)) <= 1e-3 * abs(float(b_P @ q_P))
            assert energy(v_QP[i], q_P) > float((q_P @ b_P) ** 2 / (2 * b_P @ A @ b_P))


def test_a_trace_couples_on_sequences_that_do_not_judge(fitted, tmp_path):
    c = case(NAME)
    how: dict[str, Any] = {"layers": c.spec, "rank": "full", "top": 3, "dtype": "float64", "damping": "0.5x"}
    found = up.trace(c.model, c.data, c.queries, fitted, tmp_path / "scores", combine=40, **how)
    assert found.manifest["solver"]["combine"] == 40
    frame, rows = found.frame(), c.data.sample(40, 0)
    combined = Combined(c.model, c.layers, c.data, rows, fitted.curvature())
    v_QP = Space.of(c.layers).flatten(combined.solve(gradients(c.model, c.layers, c.queries), Damping(0.5)).value)
    g_NP, _ = flat(NAME)
    expected = -(g_NP.to(v_QP) @ v_QP.T).numpy()
    np.testing.assert_allclose(frame[list(c.queries.ids)], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_what_cannot_be_combined_is_refused(fitted, tmp_path):
    c = case(NAME)
    refused: list[dict[str, Any]] = [{"curvature": "exact"}, {"refine": 2}]
    for given in refused:
        with pytest.raises(ConfigError, match="--combine takes solutions of ekfac"):
            up.trace(c.model, c.data, c.queries, fitted, tmp_path / "no", combine=40, **given)
    small = Combined(c.model, c.layers, c.data, np.arange(3), fitted.curvature(), memory_bytes=1000)
    with pytest.raises(ConfigError, match="too small to combine"):
        small.solve(gradients(c.model, c.layers, c.queries), Damping(0.5))
