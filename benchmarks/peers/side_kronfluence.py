"""Kronfluence 1.0.1: EK-FAC, all queries in one pass over the corpus (by itself: a pass a batch)."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from job import Job, load_module, mlp_names
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.module import TrackedModule
from kronfluence.score import pairwise
from kronfluence.task import Task
from kronfluence.utils.common.factor_arguments import all_low_precision_factor_arguments
from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
from kronfluence.utils.constants import ACCUMULATED_PRECONDITIONED_GRADIENT_NAME
from meter import Meter
from torch import Tensor, nn


class SumOfLogProbs(Task):
    """The same loss and measurement: sums over tokens."""

    def __init__(self, names: list[str]):
        self.names = names

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
        logits_MV, labels_M = logits.flatten(0, 1), batch["labels"][:, 1:].flatten()
        if sample:
            drawn_M = torch.multinomial(logits_MV.detach().softmax(-1), 1)[:, 0]
            labels_M = torch.where(labels_M < 0, labels_M, drawn_M)
        return F.cross_entropy(logits_MV, labels_M, reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return -self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names


class Side:
    def __init__(self, job: Job, folder: Path):
        self.job, self.low = job, job.dtype == "bfloat16"
        module = load_module(job, torch.bfloat16 if self.low else torch.float32)
        self.names = mlp_names(module)
        task = SumOfLogProbs(self.names)
        self.corpus = items(job.corpus_NT, 1)
        self.analyzer = Analyzer(
            "job", prepare_model(module, task), task, cpu=job.device == "cpu", output_dir=str(folder), disable_tqdm=True,
            disable_model_save=True,
        )  # fmt: skip
        preset = "all_low_precision presets and model in bfloat16" if self.low else "float32"
        passes = "a pass over the corpus for each batch of queries" if job.as_they_come else "one pass over the corpus"
        self.settings = (
            f"kronfluence {version('kronfluence')}, {job.batch} sequences and {job.query_batch} queries a batch, "
            f"{passes}, {preset}, low rank by torch.svd_lowrank"
        )

    def fit(self, meter: Meter) -> None:
        factor_args = (all_low_precision_factor_arguments if self.low else FactorArguments)(strategy="ekfac")
        factor_args.use_empirical_fisher = self.job.fisher == "empirical"
        common: dict[str, Any] = {"factors_name": "factors", "factor_args": factor_args, "overwrite_output_dir": True}
        data: dict[str, Any] = {"dataset": self.corpus, "per_device_batch_size": self.job.batch}
        with meter("covariance"):
            self.analyzer.fit_covariance_matrices(**common, **data)
        with meter("eigendecomposition"):
            self.analyzer.perform_eigendecomposition(**common)
        with meter("correction"):
            self.analyzer.fit_lambda_matrices(**common, **data)

    def score(self, meter: Meter, queries: int, rank: int | None) -> tuple[np.ndarray, int]:
        size = min(self.job.query_batch, queries)
        make = all_low_precision_score_arguments if self.low else ScoreArguments
        score_args = make(damping_factor=None, query_gradient_low_rank=rank)
        if not self.job.as_they_come:
            score_args.query_gradient_accumulation_steps = -(-queries // size)
        timed = TimedPass(meter)
        with meter("solve"), timed:
            self.analyzer.compute_pairwise_scores(
                "scores", "factors", query_dataset=items(self.job.queries_QT[:queries], self.job.prompt),
                train_dataset=self.corpus, per_device_query_batch_size=size, per_device_train_batch_size=self.job.batch,
                score_args=score_args, overwrite_output_dir=True,
            )  # fmt: skip
        scores: Any = self.analyzer.load_pairwise_scores("scores")
        return -scores["all_modules"].T.float().numpy(), timed.stored


class TimedPass:
    """Within the block, the pass over the corpus is a phase of its own, and the solved queries are counted before it."""

    def __init__(self, meter: Meter):
        self.meter, self.stored = meter, 0
        self.original = pairwise.compute_dot_products_with_loader

    def __enter__(self) -> None:
        pairwise.compute_dot_products_with_loader = self._run

    def __exit__(self, *_: object) -> None:
        pairwise.compute_dot_products_with_loader = self.original

    def _run(self, model: nn.Module, **kwargs: Any) -> Any:
        self.stored = sum(solved_bytes(m) for m in model.modules() if isinstance(m, TrackedModule))
        with self.meter("scan"):
            return self.original(model=model, **kwargs)


def solved_bytes(module: TrackedModule) -> int:
    held = module.storage[ACCUMULATED_PRECONDITIONED_GRADIENT_NAME]
    return sum(t.nbytes for t in (held if isinstance(held, list) else [held]) if t is not None)


def items(tokens_NT: np.ndarray, prompt: int) -> Any:
    """A dataset of rows; the tokens after the first ``prompt`` are labels."""
    labels_NT = np.where(np.arange(tokens_NT.shape[1]) >= prompt, tokens_NT, -100)
    pairs = zip(torch.from_numpy(tokens_NT), torch.from_numpy(labels_NT), strict=True)
    return [{"tokens": tokens, "labels": labels} for tokens, labels in pairs]
