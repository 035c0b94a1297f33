"""Tasks beside language models: labels of many kinds, models of transformers with their padding, preference pairs.

Axes: N examples, T positions, C outputs, K labels of an example, V vocabulary, O outputs and I inputs of a layer.
"""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import upriver as up
from cases import close
from text_cases import byte_tokenizer
from upriver.errors import CorpusError, ModelError
from upriver.model.sweep import Labels, Source, sweep

V, N = 23, 6
DAMPING = up.Damping(0.01, relative=False)
rng = np.random.default_rng(0)
TOKENS = [rng.integers(3, V, n) for n in (4, 7, 5, 7, 3, 6)]
SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 16}


def bert(kind: type, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, **more)
    return kind(config).double().eval()


def llama(kind: type, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0, **more)).double().eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=V, d_model=8, d_kv=4, d_ff=6, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).double().eval()


def masked() -> dict[str, Any]:
    return {"input_ids": TOKENS, "labels": [np.where(np.arange(len(t)) % 3 == 1, t, -100) for t in TOKENS]}


ANSWERS = [rng.integers(3, V, n) for n in (2, 4, 3, 8, 1, 2)]
MODELS: dict[str, Any] = {
    "sequences": lambda: (
        bert(BertForSequenceClassification, num_labels=3),
        up.Classification(),
        {"input_ids": TOKENS, "labels": [0, 1, 2, 2, 1, 0]},
        lambda m, x: F.cross_entropy(m(input_ids=x["input_ids"]).logits[0], x["labels"]),
    ),
    "several yes or no": lambda: (
        bert(BertForSequenceClassification, num_labels=7),  # as many as the longest has tokens
        up.BinaryClassification(),
        {"input_ids": TOKENS, "labels": rng.integers(0, 2, (N, 7))},
        lambda m, x: F.binary_cross_entropy_with_logits(
            m(input_ids=x["input_ids"]).logits[0], x["labels"], reduction="sum"
        ),
    ),
    "causal classifier": lambda: (
        llama(LlamaForSequenceClassification, num_labels=3),
        up.Classification(),
        {"input_ids": TOKENS, "label": [0, 1, 2, 2, 1, 0]},
        lambda m, x: F.cross_entropy(m(input_ids=x["input_ids"]).logits[0], x["label"]),
    ),
    "tokens": lambda: (
        bert(BertForTokenClassification, num_labels=4),
        up.Classification(),
        {"input_ids": TOKENS, "labels": [t % 4 for t in TOKENS]},
        lambda m, x: F.cross_entropy(m(input_ids=x["input_ids"]).logits[0], x["labels"][0], reduction="sum"),
    ),
    "masked": lambda: (
        bert(BertForMaskedLM),
        up.Classification(),
        masked(),
        lambda m, x: F.cross_entropy(m(input_ids=x["input_ids"]).logits[0], x["labels"][0], reduction="sum"),
    ),
    "encoder and decoder": lambda: (
        t5(),
        up.Classification(),
        {"input_ids": TOKENS, "labels": ANSWERS},
        lambda m, x: m(input_ids=x["input_ids"], labels=x["labels"]).loss * x["labels"].numel(),
    ),
}


def row(columns: dict[str, Any], n: int) -> dict[str, torch.Tensor]:
    """One example as a user would give it to the model: without any padding."""
    found = {name: torch.as_tensor(np.asarray(x[n])) for name, x in columns.items()}
    if (
        "labels" in found
        and found["labels"].ndim
        and len(found["labels"]) == 7
        and not isinstance(columns["labels"], list)
    ):
        return {"input_ids": found["input_ids"][None], "labels": found["labels"].double()}
    return {name: x[None] if x.ndim and name != "label" else x for name, x in found.items()}


class Moments:
    """Consumer: second moments of inputs, and gradients of the batch, over the real positions."""

    def __init__(self) -> None:
        self.A: dict[str, Any] = {}
        self.G: dict[str, Any] = {}
        self.batch: Any = None

    def begin(self, batch: Any) -> None:
        self.batch = batch

    def __call__(self, layer: Any, a_NTI: torch.Tensor, g_NTO: torch.Tensor) -> None:
        at_M, counts_N = self.batch.real(a_NTI, layer.name)
        a_MI, g_MO = a_NTI.flatten(0, 1), g_NTO.flatten(0, 1)
        a_MI, g_MO = (a_MI, g_MO) if at_M is None else (a_MI[at_M], g_MO[at_M])
        assert sum(counts_N) == len(a_MI)
        self.A[layer.name] = self.A.get(layer.name, 0) + a_MI.T @ a_MI
        self.G[layer.name] = self.G.get(layer.name, 0) + g_MO.T @ a_MI


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_neither_moments_nor_gradients_of_a_model_of_transformers(name):
    module, task, columns, plain = MODELS[name]()
    model, data = up.Model(module, task=task), up.Examples(columns)
    layers = up.tracked_layers(model, data, "all")
    assert len(layers) > 5
    padded, alone = Moments(), Moments()
    source = Source.of(data, np.arange(N), 10_000)
    sweep(model, layers, source, source.rows, padded)
    assert len(source.batches(source.rows)) == 1  # all together
    for n in range(N):
        one = {k: [x[n]] if isinstance(x, list) else x[n : n + 1] for k, x in columns.items()}
        alone_n = Source.of(up.Examples(one), np.arange(1), 10_000)
        sweep(model, layers, alone_n, alone_n.rows, alone)
    for layer in layers:
        close(padded.A[layer.name], alone.A[layer.name], 1e-9)
        close(padded.G[layer.name], alone.G[layer.name], 1e-9)
    losses = [float(plain(module, row(columns, n)).detach()) for n in range(N)]
    batch = data.batch(np.arange(N))
    np.testing.assert_allclose(model.task.losses(module, batch).detach(), losses, rtol=1e-9)
    module.zero_grad()
    sum(plain(module, row(columns, n)) for n in range(N)).backward()
    for layer in layers:
        theirs = module.get_submodule(layer.name).weight.grad
        close(padded.G[layer.name][:, : theirs.shape[1]], theirs, 1e-9)


def test_labels_that_the_fisher_draws_follow_the_predictions():
    """The mean over draws of the squared slope tends to the variance of the label, position by position and label by label."""
    module, task, columns, _ = MODELS["several yes or no"]()
    batch, K = up.Examples(columns).batch(np.arange(N)), 400
    model = up.Model(module, task=task)
    h_NK = task.outputs(module, batch).detach().requires_grad_()
    squares = 0.0
    for k in range(K):
        sampler = Labels(seed=k, stream=1).sampler(batch)
        found = type(task).loss(_Fixed(h_NK), module, batch, sampler)
        squares = squares + torch.autograd.grad(found, h_NK)[0].square() / K
    p_NK = h_NK.detach().sigmoid()
    assert (squares - p_NK * (1 - p_NK)).abs().max() < 0.05
    roots = torch.stack([task.root(h_NK.detach(), k) for k in range(7)])
    close(torch.einsum("kni,knj->nij", roots, roots), torch.diag_embed(p_NK * (1 - p_NK)))
    assert model.task.check(module, up.Examples(columns)) is None


class _Fixed(up.BinaryClassification):
    def __init__(self, h_NK: torch.Tensor):
        self.h_NK = h_NK

    def _outputs(self, module: nn.Module, batch: Any) -> torch.Tensor:
        return self.h_NK


def net(width: int, out: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(width, out)


@pytest.mark.parametrize(
    ("task", "y", "said"),
    [
        (up.Classification(), torch.rand(5), r"classes are whole numbers from 0: got 'y' of torch.float32"),
        (up.Classification(), torch.tensor([0, 1, 2, 3, 0]), r"classes are from 0 to 2, .* got 3 in 'y'"),
        (up.Classification(), torch.tensor([0, 1, -1, 2, 0]), r"got -1 in 'y'; -100 is for no loss"),
        (up.Classification(), torch.full((5,), -100), r"no label carries loss: got -100 alone in 'y'"),
        (up.Classification(), torch.zeros(5, 3, dtype=torch.int64), r"logits of shape \[1, 3\], 'y' of \[1, 3\]"),
        (up.BinaryClassification(), torch.tensor([0, 1, 2, 0, 1]), r"labels are 0 or 1: got 2 in 'y'"),
        (up.BinaryClassification(), torch.zeros(5, 2), r"got 3 numbers for each example from the model, 2 in 'y'"),
        (up.Regression(), torch.tensor([0.0, float("nan"), 1.0, 1.0, 1.0]), r"NaN or infinity in 'y'"),
        (up.Regression(), torch.zeros(5, 2), r"got 3 numbers for each example from the model, 2 in 'y'"),
    ],
)
def test_wrong_labels_are_told_by_their_column(task, y, said, tmp_path):
    data = up.Examples({"x": torch.randn(5, 4), "y": y})
    with pytest.raises(ModelError, match=said):
        up.fit(up.Model(net(4, 3), task=task), data, tmp_path / "f", layers="*")


def test_a_padded_batch_of_a_model_that_names_no_padding_is_refused(tmp_path):
    module, _, columns, _ = MODELS["causal classifier"]()
    module.config.pad_token_id = None
    with pytest.raises(ModelError, match=r"got no pad_token_id in its configuration; set model\.module\.config"):
        up.fit(up.Model(module, task=up.Classification()), columns, tmp_path / "f", layers="mlp")


# ---- what examples are made of


X, Y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {"x": X[n], "y": Y[n]}


@pytest.mark.parametrize(
    "data",
    [
        {"x": X.T.contiguous().T, "y": Y[:, None].expand(5, 3)[:, 0]},
        {"x": X.numpy()[::-1][::-1], "y": Y.numpy().astype(">i8")},
        (X, Y),
        TensorDataset(X, Y),
        datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist(), "text": list("abcde")}).with_format("torch"),
        [{"y": int(y), "x": x.tolist(), "note": "kept aside"} for x, y in zip(X, Y, strict=True)],
        DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, drop_last=True),
        DataLoader(Rows(), batch_size=3),
    ],
    ids=["strides", "arrays", "tuple", "tensors", "dataset", "dictionaries", "loader", "loader of dictionaries"],
)
def test_examples_are_the_same_whatever_they_are_held_in(data):
    assert up.Examples(data).fingerprint == up.Examples({"x": X, "y": Y}).fingerprint


def test_a_column_of_one_number_each_has_a_stride_that_does_not_matter():
    one = torch.arange(5.0).reshape(1, 5).T
    assert up.Examples({"x": one}).fingerprint == up.Examples({"x": torch.arange(5.0)[:, None]}).fingerprint


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "not examples: got dict without a column"),
        ("train.csv", "not examples: got str"),
        ({"x": ["a", "b"]}, r"the column 'x' holds no numbers: got an array of <U1"),
        ({"x": [np.zeros(2), np.zeros(3)]}, r"rows of 'x' differ in shape: got \[\(2,\), \(3,\)\]"),
        ({"x": torch.zeros(3).to_sparse()}, "the column 'x' is not a plain tensor"),
        ([{"x": 1}, {"y": 1}], "examples differ in their fields: got y in number 1, x in the first"),
        ([{"x": "a"}], "no column of numbers: got x"),
        ((X, Y, Y), "a tuple holds an 'x' and a 'y': got 3 tensors"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"x": [1]})), r"several splits: got train"),
        ({"input_ids": [np.array([1.5]), np.array([1, 2])]}, "'input_ids' is not whole numbers: got float64 in row 0"),
    ],
)
def test_what_is_no_examples_is_refused_in_a_sentence(data, said):
    with pytest.raises(CorpusError, match=said):
        up.Examples(data)


def test_a_loader_and_a_data_set_go_through_fit_and_trace(tmp_path):
    module, task, columns, _ = MODELS["sequences"]()
    model = up.Model(module, task=task)
    data = datasets.Dataset.from_dict(
        {name: [np.asarray(x).tolist() for x in value] for name, value in columns.items()}
    )
    factors = up.fit(model, data, tmp_path / "factors", layers="*")
    asked = up.Measurements(data.select(range(2)))
    scores = up.trace(model, data, asked, factors, tmp_path / "scores", rank="full", held_out=0, damping=0.01)
    loader = DataLoader(data.with_format("torch"), batch_size=1)
    assert up.fit(model, loader, tmp_path / "factors", layers="*").fingerprint == factors.fingerprint
    layers = up.tracked_layers(model, up.Examples(data), "*")
    q, z = (up.gradients(model, layers, up.Measurements(up.Examples(data))) for _ in range(2))
    wanted = sum(
        torch.einsum("qoi,noi->nq", factors.block(x.name).solve(q[x.name][:2].float(), DAMPING), z[x.name].float())
        for x in layers
    )
    np.testing.assert_allclose(
        scores.frame()[["q0", "q1"]].to_numpy(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
    )


# ---- preference pairs

RECORDS = [
    {"prompt": "the river", "chosen": " runs", "rejected": " stands still"},
    {"prompt": "who", "chosen": " taught it that", "rejected": " no"},
    {"prompt": "a passage", "chosen": " of text", "rejected": " of arms"},
]


def pairs_of(module: nn.Module, tokenizer: Any, reference: Any = None) -> up.Examples:
    return up.preference_examples(RECORDS, tokenizer, reference)


def log_p(module: nn.Module, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    ids, start = tokenizer(prompt + answer).input_ids, len(tokenizer(prompt).input_ids)
    found = module(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(found[t - 1, ids[t]] for t in range(start, len(ids)))


@pytest.fixture(scope="module")
def spoken():
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    small = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    modules = [LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=1)).double().eval() for _ in range(2)]
    return *modules, tokenizer


def test_direct_preference_optimisation_is_the_logistic_loss_of_the_margin(spoken):
    module, before, tokenizer = spoken
    data = pairs_of(module, tokenizer, before)
    model = up.Model(module, tokenizer, up.Preference(beta=0.3))
    layers = up.tracked_layers(model, data, "mlp")
    found = Moments()
    source = Source.of(data, np.arange(3), 10_000)
    sweep(model, layers, source, source.rows, found)
    module.zero_grad()
    margins = [
        [
            log_p(m, tokenizer, r["prompt"], r["chosen"]) - log_p(m, tokenizer, r["prompt"], r["rejected"])
            for r in RECORDS
        ]
        for m in (module, before)
    ]
    losses = [-F.logsigmoid(0.3 * (a - b.detach())) for a, b in zip(*margins, strict=True)]
    sum(losses).backward()
    for layer in layers:
        close(found.G[layer.name], module.get_submodule(layer.name).weight.grad, 1e-9)
    np.testing.assert_allclose(
        model.task.losses(module, data.batch(np.arange(3))).detach(), [x.item() for x in losses], rtol=1e-9
    )


def test_pairs_are_traced_to_an_answer_of_the_model(spoken, tmp_path):
    module, before, tokenizer = spoken
    data = pairs_of(module, tokenizer, before)
    model = up.Model(module, tokenizer, up.Preference(beta=0.3))
    factors = up.fit(model, data, tmp_path / "factors", layers="mlp")
    asked = up.Queries.of([{"id": "a", "prompt": "who", "completion": " taught it that"}], tokenizer)
    kept: Any = {"rank": "full", "damping": 0.01, "held_out": 0}
    scores = up.trace(model, data, asked, factors, tmp_path / "scores", **kept)
    plain = up.gradients(up.Model(module, tokenizer), layers := up.tracked_layers(model, data, "mlp"), asked)
    z = up.gradients(model, layers, up.Measurements(data))  # log sigmoid(h), minus the loss
    wanted = sum(
        (factors.block(x.name).solve(plain[x.name].float(), DAMPING) * z[x.name].float()).sum((1, 2)) for x in layers
    )
    np.testing.assert_allclose(scores.frame()["a"], wanted, rtol=1e-3)


def test_a_reward_model_compares_two_answers(tmp_path):
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    small = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": len(tokenizer) - 1}
    config = LlamaConfig(**small, num_key_value_heads=1, num_labels=1)
    module = LlamaForSequenceClassification(config).double().eval()
    data = up.preference_examples(RECORDS, tokenizer)
    model = up.Model(module, tokenizer, up.Reward())
    rewards = [
        [module(torch.tensor([tokenizer(r["prompt"] + r[side]).input_ids])).logits[0, 0].item() for r in RECORDS]
        for side in ("chosen", "rejected")
    ]
    found_N = model.task.losses(module, data.batch(np.arange(3))).detach()
    np.testing.assert_allclose(found_N, np.log1p(np.exp(np.subtract(rewards[1], rewards[0]))), rtol=1e-9)
    assert up.fit(model, data, tmp_path / "f", layers="mlp").path.exists()
    with pytest.raises(ModelError, match=r"got no reference_chosen_logps, reference_rejected_logps"):
        up.fit(up.Model(module, tokenizer, up.Preference()), data, tmp_path / "g", layers="mlp")
    with pytest.raises(ModelError, match=r"the columns lack chosen_input_ids, rejected_input_ids"):
        up.fit(model, (X, Y), tmp_path / "g", layers="mlp")
    with pytest.raises(
        CorpusError, match=r"record 0 is no preference pair: got str as its prompt and NoneType as 'chosen'"
    ):
        up.preference_examples([{"prompt": "a"}], tokenizer)
    with pytest.raises(CorpusError, match=r"record 0: a pair is not cut: got \d+ tokens of the rejected answer"):
        up.preference_examples(RECORDS, tokenizer, seq_len=len(tokenizer("who taught it that").input_ids) - 1)
