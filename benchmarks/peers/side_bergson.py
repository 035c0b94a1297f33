"""Bergson 2.5.1: the four steps of its Hessian pipeline (query gradients, fit, inverse, scores) with EK-FAC.

Its own steps run in this process.  Two things are changed: the model and the data are loaded once instead of before each
step, as loading is timed on no side; and the covariances take in the last position of a sequence, as those of the other
sides do (by itself Bergson leaves it out, and its scores then differ a little from both).
"""
# pyright: reportMissingImports=false

import importlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.config import (
    DistributedConfig,
    HessianConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.utils.worker_utils import setup_model_and_peft
from datasets import Dataset
from job import Job
from meter import Meter
from torch import Tensor

APPLY_BATCH = 8  # queries that are solved at a time

collector = importlib.import_module("bergson.collector.collector")
hessians = importlib.import_module("bergson.hessians.hessian_approximations")
build = importlib.import_module("bergson.build")
score = importlib.import_module("bergson.score.score")


class Side:
    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self.precision = "bf16" if job.dtype == "bfloat16" else "fp32"
        self.sets = {"corpus": rows(job.corpus_NT, 1), "queries": rows(job.queries_QT, job.prompt)}
        loaded = setup_model_and_peft(self._config("loading", "corpus"))
        for step in (hessians, build, score):
            vars(step)["setup_model_and_peft"] = lambda cfg, **_: loaded
            vars(step)["setup_data_pipeline"] = lambda cfg, *_: (self.sets[cfg.data.dataset], 0)
        vars(hessians)["collect_hessians"] = self._phases(hessians.collect_hessians)
        vars(collector)["pad_and_tensor"] = every_position(collector.pad_and_tensor)
        self.settings = (
            f"bergson {version('bergson')}, {job.batch} sequences a batch, loss summed, kfac with ev_correction, dataset "
            f"labels, biases, damped_inverse 0.1, {job.query_batch} queries a batch, {APPLY_BATCH} solved at a time, "
            f"{self.precision}, full rank (it has no low rank for EK-FAC), the last position counted in the covariances"
        )

    def _config(self, name: str, data: str) -> Any:
        """A config of one step; every linear layer but those of the attention and the head is an MLP's."""
        job, asked = self.job, data == "queries"
        config = IndexConfig(
            str(self.folder / name), model=job.model, precision=self.precision, include_bias=True, overwrite=True,
            token_batch_size=job.query_batch * job.query_tokens if asked else job.batch * job.tokens, loss_reduction="sum",
            filter_modules="*attention*,*attn*", distributed=DistributedConfig(nnode=1, nproc_per_node=1),
        )  # fmt: skip
        config.data.dataset = data
        self._clear(name)
        return config

    def _clear(self, *names: str) -> None:
        for name in names:
            for suffix in ("", ".part"):
                shutil.rmtree(self.folder / (name + suffix), ignore_errors=True)

    def _phases(self, collect: Callable) -> Callable:
        """Time the two passes of a fit as phases; what is left of it is the eigendecomposition."""

        def timed(**kwargs: Any) -> Any:
            with self.meter("correction" if kwargs.get("ev_correction") else "covariance"):
                return collect(**kwargs)

        return timed

    def fit(self, meter: Meter) -> None:
        self.meter = meter
        config = self._config("factors", "corpus")
        how = HessianConfig("kfac", ev_correction=True, use_dataset_labels=True)
        with meter("eigendecomposition"):
            hessians.approximate_hessians(config, how)

    def score(self, meter: Meter, queries: int, rank: int | None) -> tuple[np.ndarray, int]:
        self.sets["queries"] = rows(self.job.queries_QT[:queries], self.job.prompt)
        asked, scored = self._config("queries", "queries"), self._config("scores", "corpus")
        self._clear("solved")
        solved = self.folder / "solved"
        with meter("solve"):
            build.build_query(asked, QuerySetConfig(dataset="queries"), PreprocessConfig())
            apply = EkfacConfig(
                str(self.folder / "factors"),
                asked.run_path,
                str(solved),
                ev_correction=True,
                apply_batch_size=APPLY_BATCH,
            )
            apply_worker(0, 0, 1, apply, InversionConfig("damped_inverse", 0.1))
        how = ScoreConfig(query_path=str(solved), precision=self.precision)
        with meter("scan"):
            score.score_dataset(scored, how, PreprocessConfig())
        scores_NQ = np.asarray(load_scores(Path(scored.run_path))[:], np.float32)
        stored = sum(file.stat().st_size for file in solved.iterdir())
        self._clear("queries", "solved", "scores")
        return scores_NQ, stored


def every_position(pad_and_tensor: Callable) -> Callable:
    """The same batch, whose mask of collected positions leaves none out: all sequences have one length."""

    def padded(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        tokens, labels, loss, collected = pad_and_tensor(*args, **kwargs)
        return tokens, labels, loss, torch.ones_like(collected)

    return padded


def rows(tokens_NT: np.ndarray, prompt: int) -> Dataset:
    """A dataset as Bergson's tokenisation makes it; the tokens after the first ``prompt`` are labels."""
    labels_NT = np.where(np.arange(tokens_NT.shape[1]) >= prompt, tokens_NT, -100)
    lengths = [tokens_NT.shape[1]] * len(tokens_NT)
    return Dataset.from_dict({"input_ids": tokens_NT.tolist(), "labels": labels_NT.tolist(), "length": lengths})
