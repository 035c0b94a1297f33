"""Agreement with Kronfluence 1.0.1 run here, on a network with a convolution; skipped where it is not installed.

Its K-FAC is left out: its eigenvalues are per position, so that one damping means something else (``Eigenblock.kfac``).

pip install --no-deps --target FOLDER kronfluence==1.0.1 einconv einops opt_einsum accelerate      and PYTHONPATH=FOLDER
"""

import numpy as np
import pytest
import torch
from torch import nn

import upriver as up

pytest.importorskip("kronfluence")

from kronfluence.analyzer import Analyzer, prepare_model  # type: ignore
from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore
from kronfluence.task import Task  # type: ignore
from kronfluence.utils.dataset import DataLoaderKwargs  # type: ignore

N, Q, AGREED = 24, 3, 1e-4
F64 = torch.float64


class SumOfLosses(Task):
    def compute_train_loss(self, batch, model, sample=False):
        assert not sample
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return -self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return ["0", "2", "5"]


def made() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, dilation=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(20, 3),
    ).double()  # fmt: skip
    return net, torch.randn(N + Q, 2, 8, 8, dtype=F64), torch.randint(3, (N + Q,))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    net, x, y = made()
    model = up.Model(net, task=up.Classification())
    data, rest = (up.Examples({"x": x[at], "y": y[at]}) for at in (slice(N), slice(N, None)))
    told: dict = {"layers": "*", "fisher": "empirical", "dtype": "float64"}
    factors = up.fit(model, data, tmp_path_factory.mktemp("factors") / "f", **told)
    return model, data, up.Measurements(rest), factors


@pytest.mark.parametrize("kind", ["ekfac", "diagonal", "identity"])
def test_scores_and_self_scores_are_theirs(kind, ours, tmp_path):
    model, data, asked, factors = ours
    net, x, y = made()
    task = SumOfLosses()
    theirs = Analyzer("a", prepare_model(net, task), task, cpu=True, output_dir=str(tmp_path / "a"), disable_tqdm=True)
    theirs.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    train, query = (torch.utils.data.TensorDataset(x[at], y[at]) for at in (slice(N), slice(N, None)))
    types = (
        "activation_covariance_dtype",
        "gradient_covariance_dtype",
        "eigendecomposition_dtype",
        "per_sample_gradient_dtype",
    )
    how = FactorArguments(strategy=kind, use_empirical_fisher=True, lambda_dtype=F64, **dict.fromkeys(types, F64))
    theirs.fit_all_factors("f", dataset=train, per_device_batch_size=8, factor_args=how)
    told = ScoreArguments(damping_factor=None, per_sample_gradient_dtype=F64, precondition_dtype=F64, score_dtype=F64)
    theirs.compute_pairwise_scores(
        "s", "f", query_dataset=query, train_dataset=train, per_device_query_batch_size=Q, per_device_train_batch_size=8,
        score_args=told,
    )  # fmt: skip
    theirs.compute_self_scores("own", "f", train_dataset=train, per_device_train_batch_size=8, score_args=told)
    given = {"curvature": kind, "dtype": "float64"}
    result = up.trace(model, data, asked, factors, tmp_path / "s", rank="full", held_out=0, top=1, **given)
    scores_NQ = result.frame().sort_values("sequence")[asked.ids].to_numpy()
    own_N = up.self_influence(model, data, factors, **given)["self_influence"].to_numpy()
    agree(scores_NQ, -theirs.load_pairwise_scores("s")["all_modules"].numpy().T)
    agree(own_N, theirs.load_self_scores("own")["all_modules"].numpy())


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    apart = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"largest difference, of the largest score: {apart:.1e}")
    assert apart <= AGREED
