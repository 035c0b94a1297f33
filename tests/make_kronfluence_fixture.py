"""Make the fixture of the parity test: two tiny models, a corpus of uneven sequences, and Kronfluence's scores.

    make fixture        installs what Kronfluence needs into .venv and runs this file

Kronfluence 1.0.1, strategy "ekfac", empirical Fisher, ``damping_factor=None`` (0.1 x the mean eigenvalue), MLP layers, full
rank, sums for losses, padding masked, float64 throughout.  Every second training sequence has a prompt without loss, whose
positions count in both covariances.  Its score of a query and a training sequence is
``grad m^T (G + lambda I)^-1 grad L``; the measurement given to it is ``m = f = log p(completion | prompt)``, so the scores
kept here are ``- I_f``: **its sign is the opposite of ours**.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent / "fixtures"
VOCABULARY, SEQUENCES, QUERIES, LONGEST = 61, 40, 6, 24
COMMON = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, **COMMON},
    "neox": {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 48, **COMMON},
}
MLP = {"llama": ("gate_proj", "up_proj", "down_proj"), "neox": ("dense_h_to_4h", "dense_4h_to_h")}
Item = dict[str, Tensor]
Scores = dict[str, Tensor]


class SumOfLogProbs(Task):
    """Losses and measurements as sums over tokens; position t predicts token t + 1."""

    def __init__(self, names: list[str]):
        self.names = names

    def compute_train_loss(self, batch: Item, model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample, "the empirical Fisher takes the corpus's own labels"
        return -self._log_probs(batch, model, first=batch["prompt"]).sum()

    def compute_measurement(self, batch: Item, model: nn.Module) -> Tensor:
        return self._log_probs(batch, model, first=batch["prompt"]).sum()

    def _log_probs(self, batch: Item, model: nn.Module, first: Tensor) -> Tensor:
        """``log p`` of the tokens from ``first`` on, 0 elsewhere: ``[N, T - 1]``."""
        logits = model(input_ids=batch["tokens"], attention_mask=self.get_attention_mask(batch)).logits
        log_probs = -F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="none")
        at = torch.arange(1, batch["tokens"].shape[1])
        wanted = (at >= first[:, None]) & (at < batch["length"][:, None])
        return log_probs.view_as(wanted) * wanted

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: Item) -> Tensor:
        return (torch.arange(batch["tokens"].shape[1]) < batch["length"][:, None]).long()


class SumOfLosses(Task):
    """Of images or other rows in classes."""

    def __init__(self, names: list[str]):
        self.names = names

    def compute_train_loss(self, batch: list[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample, "the empirical Fisher takes the data's own labels"
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: list[Tensor], model: nn.Module) -> Tensor:
        return -self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names


def make_model(name: str, **more) -> nn.Module:
    """Random weights wide enough that predictions are far from uniform; biases and norms are not at their defaults."""
    torch.manual_seed(0)
    config = {key: value for key, value in (CONFIGS[name] | more).items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIGS[name]["model_type"], **config))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.25 * torch.randn_like(p) if p.ndim > 1 else p + 0.2 * torch.randn_like(p))
    return model.eval()


def make_data() -> tuple[list[Item], list[Item]]:
    rng = np.random.default_rng(1)

    def item(length: int, prompt: int) -> Item:
        tokens = np.zeros(LONGEST, np.int64)
        tokens[:length] = rng.integers(0, VOCABULARY, length)
        return {name: torch.tensor(x) for name, x in (("tokens", tokens), ("length", length), ("prompt", prompt))}

    lengths = rng.integers(3, LONGEST + 1, SEQUENCES).tolist()
    train = [item(n, int(rng.integers(2, n)) if row % 2 else 1) for row, n in enumerate(lengths)]
    queries = [item(int(rng.integers(8, LONGEST + 1)), int(rng.integers(2, 7))) for _ in range(QUERIES)]
    return train, queries


def mlp(model: nn.Module, name: str) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in MLP[name]]


def analysed(model: nn.Module, task: Task, train: Any, queries: Any, strategy: str) -> tuple[Scores, Scores]:
    """Scores ``[Q, N]``, and those of training examples with themselves ``[N]``, by module, as Kronfluence gives them."""
    f64 = torch.float64
    covariances = ("activation_covariance_dtype", "gradient_covariance_dtype", "eigendecomposition_dtype")
    types = (*covariances, "per_sample_gradient_dtype", "lambda_dtype")
    factors = FactorArguments(strategy=strategy, use_empirical_fisher=True, **dict.fromkeys(types, f64))
    scores = ScoreArguments(
        damping_factor=None, compute_per_module_scores=True, per_sample_gradient_dtype=f64, precondition_dtype=f64,
        score_dtype=f64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("fixture", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
        analyzer.fit_all_factors("factors", dataset=train, per_device_batch_size=8, factor_args=factors)
        of_train = {"train_dataset": train, "per_device_train_batch_size": 8, "score_args": scores}
        analyzer.compute_pairwise_scores(
            "scores", "factors", query_dataset=queries, per_device_query_batch_size=3, **of_train
        )
        analyzer.compute_self_scores("own", "factors", **of_train)
        return analyzer.load_pairwise_scores("scores"), analyzer.load_self_scores("own")


def make_fixture(name: str) -> None:
    train, queries = make_data()
    model = make_model(name)
    weights = {f"model.{key}": value.clone().contiguous() for key, value in model.state_dict().items()}
    names = mlp(model, name)
    scores = sum(analysed(model.double(), SumOfLogProbs(names), train, queries, "ekfac")[0].values(), torch.zeros(()))
    tables = {f"{side}.{field}": torch.stack([item[field] for item in items]) for side, items in
              (("train", train), ("query", queries)) for field in ("tokens", "length", "prompt")}  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    save_file({**weights, **tables, "scores": scores.contiguous()}, FOLDER / f"kronfluence-{name}.safetensors")
    about = {"kronfluence": "1.0.1", "config": CONFIGS[name], "layers": names, "scores": "[Q, N], minus I_f"}
    (FOLDER / f"kronfluence-{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {len(names)} layers, scores {tuple(scores.shape)} in [{scores.min():.4g}, {scores.max():.4g}]")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model_name in CONFIGS:
        make_fixture(model_name)
