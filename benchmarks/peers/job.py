"""What every side is given: a model as safetensors, the tokens of the corpus and of the queries, and the settings.

python job.py FOLDER SETTINGS            (as JSON; in our interpreter, called by run.py)
"""

import json
import lzma
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Job:
    """Paths and settings; plain enough to be read in any of the environments.

    ``corpus_NT`` and ``queries_QT`` are int64 tokens; every token after the first carries loss in the corpus, the tokens
    from ``query_tokens // 2`` on are a query's completion.
    """

    folder: str
    kind: str  # neox, smollm2, or what is in the folder already
    sequences: int
    tokens: int
    queries: int
    query_tokens: int
    width: int
    layers: int  # 0: all of the pretrained model
    vocabulary: int
    batch: int  # sequences in a batch of the corpus
    query_batch: int  # queries in a batch, where a side wants a number
    dtype: str
    fisher: str  # empirical: the labels of the corpus; sampled: drawn from the model
    threads: int
    memory: str | None  # the limit that ours is given
    as_they_come: bool  # the peers with their own defaults, instead of tuned
    device: str = "cpu"  # or cuda

    @property
    def model(self) -> str:
        return str(Path(self.folder) / "model")

    @property
    def prompt(self) -> int:
        return self.query_tokens // 2

    @cached_property
    def corpus_NT(self) -> np.ndarray:
        return np.load(Path(self.folder) / "corpus.npy")

    @cached_property
    def queries_QT(self) -> np.ndarray:
        return np.load(Path(self.folder) / "queries.npy")

    def write(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def read_job(path: str | Path) -> Job:
    return Job(**json.loads(Path(path).read_text()))


def load_module(job: Job, dtype: Any) -> Any:
    """The model as a side computes with it: SDPA attention, evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa").eval()


def mlp_names(module: Any) -> list[str]:
    """The linear layers of the MLPs."""
    return [name for name, m in module.named_modules() if ".mlp." in name and type(m).__name__ == "Linear"]


def make(job: Job) -> None:
    """Write the model and the tokens of ``job``."""
    module, corpus_NT, queries_QT = _smollm2(job) if job.kind == "smollm2" else _neox(job)
    module.save_pretrained(job.model)
    layers = [module.get_submodule(name) for name in mlp_names(module)]
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    (Path(job.folder) / "weights.txt").write_text(str(weights))
    np.save(Path(job.folder) / "corpus.npy", corpus_NT)
    np.save(Path(job.folder) / "queries.npy", queries_QT)


def _neox(job: Job) -> tuple[Any, np.ndarray, np.ndarray]:
    """A GPT-NeoX-type model with random weights, and random tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=job.vocabulary, hidden_size=job.width, intermediate_size=4 * job.width,
        num_hidden_layers=job.layers, num_attention_heads=max(1, job.width // 64), tie_word_embeddings=False,
        max_position_embeddings=max(job.batch * job.tokens, job.query_batch * job.query_tokens),  # Bergson: >= a batch
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    random = np.random.default_rng(1)
    corpus_NT = random.integers(job.vocabulary, size=(job.sequences, job.tokens))
    return (
        AutoModelForCausalLM.from_config(config),
        corpus_NT,
        random.integers(job.vocabulary, size=(job.queries, job.query_tokens)),
    )


def _smollm2(job: Job) -> tuple[Any, np.ndarray, np.ndarray]:
    """SmolLM2-135M from its GGUF file; passages of the demo's speeches, at the places that benchmarks/smollm2.py takes."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from smollm2 import model_file  # pyright: ignore[reportMissingImports]

    import upriver as up

    model = up.load_model(model_file())
    speeches = resources.files("upriver") / "demo" / "speeches.jsonl.xz"
    with resources.as_file(speeches) as file, lzma.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokens = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def cut(at: int, rows: int, length: int) -> np.ndarray:
        return np.array([tokens[n % len(tokens)][at + 1000 * (n // len(tokens)) :][:length] for n in range(rows)])

    return (
        _plain(model.module, job.layers),
        cut(500, job.sequences, job.tokens),
        cut(900, job.queries, job.query_tokens),
    )


def _plain(module: Any, layers: int) -> Any:
    """A copy that can be saved (one read from a GGUF file cannot), of the first few blocks where ``layers`` is not 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = module.config.to_dict() | ({"num_hidden_layers": layers} if layers else {})
    kept.pop("quantization_config", None)
    config = AutoConfig.for_model(kept.pop("model_type"), **kept)
    copy = AutoModelForCausalLM.from_config(config)
    missing = copy.load_state_dict(module.state_dict(), strict=False).missing_keys
    assert not missing, missing
    return copy


if __name__ == "__main__":
    make(Job(**json.loads(sys.argv[1])))
