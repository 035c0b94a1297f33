"""The Python interface: the lines of the README as they stand, and tasks other than language modelling."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import normalizers
from torch import nn

import cli_cases
import upriver as up
from upriver.errors import ConfigError, MismatchError, ModelError, NumericalError, QueryError
from upriver.model.generate import _continuation, complete
from upriver.runtime.artifact import read_json, write_json

README = (Path(__file__).parent.parent / "README.md").read_text()
LINES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cli_cases.build(tmp_path)
    os.makedirs("path/or")
    os.rename("model", "path/or/name")
    return tmp_path


def test_the_lines_of_the_readme(folder):
    names: dict = {}
    exec(LINES.replace('"q1"', '"people"').replace("512", "16"), names)
    result = names["result"]
    assert result.report("report.html") == Path("report.html")
    top = result.top("people", 3)
    assert isinstance(top, pd.DataFrame)
    assert top["rank"].tolist() == [1, 2, 3]
    assert (top["score"] > 0).all()
    assert (result.top("people", 3, side="negative")["score"] < 0).all()
    assert (folder / "report.html").exists()
    assert len(result.frame()) == len(names["corpus"])
    assert set(result.documents()["document"]) == {r["id"] for r in cli_cases.RECORDS}
    pd.testing.assert_frame_equal(up.Scores("scores").frame(), result.frame())
    with pytest.raises(QueryError, match="no such query: got 'q9'; the results have people, peace"):
        result.top("q9")
    with pytest.raises(QueryError, match="no such side: got 'both'; positive or negative"):
        result.top("people", side="both")


def test_half_a_surrogate_pair_in_metadata_is_replaced(folder):
    (folder / "odd.jsonl").write_text('{"text": "we the people of the states", "title": "cut \\ud83d é"}\n' * 3)
    model = up.load_model("path/or/name")
    corpus = up.Corpus.read("odd.jsonl", model.tokenizer, seq_len=16)
    result = up.trace(model, corpus, up.Queries.read("queries.jsonl"), up.fit(model, corpus, "factors"), "scores")
    top = pd.concat([result.top("people", side=side) for side in ("positive", "negative")])
    assert set(top["metadata"]) == {'{"title": "cut \ufffd é"}'}


def test_gradient_dot_products_are_in_no_unit(folder):
    model = up.load_model("path/or/name")
    corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=16)
    factors = up.fit(model, corpus, "factors")
    result = up.trace(model, corpus, up.Queries.read("queries.jsonl"), factors, "scores", curvature="identity")
    assert result.top("people")["score_nats"].isna().all()
    report = json.loads(result.report("report.html").with_suffix(".json").read_text())
    assert report["n_train"] is None
    assert "dot products of gradients" in report["unit"]
    assert all(p["score_nats"] is None for q in report["queries"] for p in q["passages"])


class Margin(up.Task):
    """Another measurement of a language model, by somebody who starts from the base class."""

    def __init__(self) -> None:
        self.language = up.LanguageModel()

    def positions(self, batch):
        return self.language.positions(batch)

    def loss(self, module, batch, sampler=None):
        return self.language.loss(module, batch, sampler)

    def measurement(self, module, batch):
        return module(batch.inputs["tokens"]).logits[:, -1].logsumexp(-1)


def test_another_task_takes_text_and_queries(folder):
    model = up.load_model("path/or/name")
    model.task = Margin()
    corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=16)
    result = up.trace(model, corpus, up.Queries.read("queries.jsonl"), up.fit(model, corpus, "factors"), "scores")
    assert result.queries[0]["completion"] == " people"
    assert result.queries[0]["log_prob"] is None
    assert result.report("report.html").exists()


def test_a_model_that_was_trained_on_is_another(folder):
    model = up.load_model("path/or/name")
    found = [model.fingerprint]
    assert model.fingerprint == found[0]
    with torch.no_grad():
        next(model.module.parameters()).mul_(1.01)
    found.append(model.fingerprint)
    next(model.module.parameters()).data.mul_(1.01)  # of which autograd notes nothing, as of a fused optimizer
    found.append(model.fingerprint)
    assert len(set(found)) == 3


def test_what_a_forward_pass_notes_is_not_the_model(folder):
    model = up.load_model("path/or/name")
    first = model.fingerprint
    assert any("inv_freq" in name for name, _ in model.module.named_buffers())
    for name, buffer in model.module.named_buffers():
        if "inv_freq" in name:
            buffer.mul_(2)  # as where rotary frequencies follow the length of the sequence
    assert model.fingerprint == first


def test_another_version_of_transformers_is_the_same_model(folder, monkeypatch):
    first = up.load_model("path/or/name").fingerprint
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    model = up.load_model("path/or/name")
    assert model.module.config.to_diff_dict()["transformers_version"] == "99.0"
    assert model.fingerprint == first


class Stripping:
    """A decoder that drops the space a text begins with, as those of SentencePiece do."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(f" word{t}" for t in tokens).removeprefix(" ")


def test_an_answer_keeps_its_space(folder):
    assert _continuation(Stripping(), [1, 2, 3], 2) == " word3"


def test_an_answer_is_the_likeliest_token_each_time(folder):
    model = up.load_model("path/or/name")
    queries = up.Queries.of([{"prompt": "the state of the"}], model.tokenizer, complete=3)
    tokens = queries.prompt_tokens(0).tolist()
    for _ in range(3):
        logits_TV = model.module(input_ids=torch.tensor([tokens])).logits[0]
        tokens.append(int(logits_TV[-1].argmax()))
    [answered] = complete(model, queries, 3).records
    assert answered.generated
    assert answered.prompt + answered.completion == model.tokenizer.decode(tokens)


def test_an_answer_needs_room(folder):
    model = up.load_model("path/or/name")
    queries = up.Queries.of([{"id": "long", "prompt": "x" * 29}], model.tokenizer, complete=8)
    with pytest.raises(
        QueryError, match=r"'long' leaves no room for an answer: got .* and 8 of the answer, the model takes 32"
    ):
        complete(model, queries, 8)


@pytest.mark.parametrize("prompt", ["Z", "ZZ"])
def test_a_prompt_without_a_token_is_named(folder, prompt):
    model = up.load_model("path/or/name")
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Z", "")
    queries = up.Queries.of(
        [{"id": "good", "prompt": "we"}, {"id": "none", "prompt": prompt}], model.tokenizer, complete=2
    )
    with pytest.raises(
        QueryError, match=f"query 2: the prompt of query 'none' has no token .*: got '{prompt}'; write more"
    ):
        complete(model, queries, 2)


def test_the_type_of_the_scan_may_be_written_out(folder):
    model = up.load_model("path/or/name")
    corpus, queries = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=16), up.Queries.read("queries.jsonl")
    factors, said = up.fit(model, corpus, "factors"), []
    up.trace(model, corpus, queries, factors, "scores")
    up.trace(model, corpus, queries, factors, "scores", dtype="float32", say=said.append)
    assert "was made from the same inputs" in said[0]
    with pytest.raises(MismatchError, match=r"another options\.dtype: got 'bfloat16' now, 'float32' then"):
        up.trace(model, corpus, queries, factors, "scores", dtype="bfloat16")


def test_scores_of_factors_that_ended_earlier_are_others(folder):
    """With ``until`` two fits of one key may have come to different sizes."""
    model = up.load_model("path/or/name")
    corpus, queries = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=16), up.Queries.read("queries.jsonl")
    factors = up.fit(model, corpus, "factors")
    up.trace(model, corpus, queries, factors, "scores")
    manifest = read_json(folder / "factors" / "manifest.json")
    manifest["fit"]["tokens"] //= 2
    write_json(folder / "factors" / "manifest.json", manifest)
    with pytest.raises(MismatchError, match="scores was made with another factors"):
        up.trace(model, corpus, queries, up.Factors("factors"), "scores")


def test_another_body_of_a_measurement_is_another_measurement(tmp_path):
    train = up.Examples({"x": torch.randn(8, 3), "y": torch.randn(8)})
    asked, net = up.Measurements(train), mlp(0, 3, 1)
    factors = up.fit(up.Model(net, task=MeanPrediction()), train, out=tmp_path / "factors", layers="*")
    up.trace(up.Model(net, task=MeanPrediction()), train, asked, factors, out=tmp_path / "scores", rank="full", top=2)
    twice = type("MeanPrediction", (up.Regression,), {"measurement": lambda self, m, b: 2 * m(b.inputs["x"]).flatten()})
    twice.measurement.__qualname__ = "MeanPrediction.measurement"
    with pytest.raises(MismatchError, match="made with another measurement"):
        up.trace(up.Model(net, task=twice()), train, asked, factors, out=tmp_path / "scores", rank="full", top=2)


def test_a_forward_that_was_put_on_the_head_counts(folder):
    model, plain = (up.load_model("path/or/name") for _ in range(2))
    head = model.module.get_output_embeddings()
    head.forward = own = lambda hidden: nn.functional.linear(hidden, head.weight) / 2
    corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=16)
    batch = corpus.batch(np.arange(2))
    with torch.no_grad():
        losses = [[float(m.task.loss(m.module, batch)) for _ in range(2)] for m in (model, plain)]
    assert losses[0][0] == losses[0][1] != losses[1][0]
    assert head.forward is own


def test_a_forward_that_is_put_on_a_body_later_counts(folder):
    """Where the logits are scaled, later passes run the model's own end with its body standing still."""
    model = up.load_model("path/or/name")
    module, plain = model.module, model.module.forward
    module.forward = lambda *args, **kwargs: _halved(plain(*args, **kwargs))
    batch = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=16).batch(np.arange(2))
    with torch.no_grad():
        first = [float(model.task.loss(module, batch)) for _ in range(2)]
        body, before = module.get_decoder(), module.get_decoder().forward
        body.forward = own = lambda *args, **kwargs: _doubled(before(*args, **kwargs))
        then = [float(model.task.loss(module, batch)) for _ in range(2)]
    assert first[0] == pytest.approx(first[1])
    assert then[0] == pytest.approx(then[1])
    assert then[0] != pytest.approx(first[0])
    assert body.forward is own


def _halved(output):
    output.logits = output.logits / 2
    return output


def _doubled(output):
    output.last_hidden_state = output.last_hidden_state * 2
    return output


def test_labels_of_another_form_are_refused(tmp_path):
    model = up.Model(mlp(0, 3, 2), task=up.Regression())
    with pytest.raises(ModelError, match="got 2 numbers for each example from the model, 1 in 'y'"):
        up.fit(model, up.Examples({"x": torch.randn(5, 3), "y": torch.randn(5)}), out=tmp_path / "never", layers="*")


class Columns(up.Regression):
    def measurement(self, module, batch):
        return module(batch.inputs["x"])


def test_a_measurement_that_is_not_a_number_a_row_is_refused(tmp_path):
    """Three columns of one number times three weights would be nine numbers, and every score three times as large."""
    model, data = up.Model(mlp(0, 3, 1), task=Columns()), up.Examples({"x": torch.randn(9, 3), "y": torch.randn(9)})
    factors = up.fit(model, data, out=tmp_path / "factors", layers="*")
    with pytest.raises(ModelError, match=r"the measurement of Columns is not one number a row: got the shape \(9, 1\)"):
        up.trace(model, data, up.Measurements(data), factors, out=tmp_path / "scores", rank="full", top=2)


class Pooled(nn.Module):
    """Sees the mean of a sequence's real positions."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.after = model, model.config, nn.Linear(32, 2)

    def forward(self, batch):
        hidden_NTI, real_NT1 = self.model.model(batch.inputs["tokens"]).last_hidden_state, batch.real_NT[..., None]
        return self.after((hidden_NTI * real_NT1).sum(1) / real_NT1.sum(1))


class Squares(up.Task):
    def loss(self, module, batch, sampler=None):
        return module(batch).square().sum() / 2

    def measurement(self, module, batch):
        return module(batch).sum(1)


def test_a_layer_that_sees_no_positions_is_refused_where_some_are_padding(folder):
    model = up.load_model("path/or/name")
    corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=32)
    pooled = up.Model(Pooled(model.module), model.tokenizer, task=Squares())
    with pytest.raises(ModelError, match=r"layer 'after' cannot be tracked where sequences are padded: it sees 1 rows"):
        up.fit(pooled, corpus, "never", layers="after", fisher="empirical")


def test_a_corpus_longer_than_the_model_is_refused(folder):
    model = up.load_model("path/or/name")
    corpus = up.Corpus.read("corpus.jsonl", model.tokenizer, seq_len=512)
    with pytest.raises(up.UpriverError, match="the model takes 32; read it with --seq-len 32"):
        up.trace(model, corpus, up.Queries.read("queries.jsonl"), up.fit(model, corpus, "factors"), "scores")


def mlp(seed: int, inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def data(task: up.Task, n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator)
    y = torch.randint(3, (n,), generator=generator) if isinstance(task, up.Classification) else x[:, :2].sum(1)
    return {"x": x, "y": y}


def dot_products(module: nn.Module, loss, train: dict, test: dict) -> np.ndarray:
    """The influence under the identity: ``- grad f . grad L`` with ``f = - L``, by torch.func."""
    weights = dict(module.named_parameters())

    def one(w, x, y):
        return loss(torch.func.functional_call(module, w, (x[None],)), y[None])

    def rows(examples):
        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(weights, examples["x"], examples["y"])
        return torch.cat([g.flatten(1) for g in grads.values()], 1)

    return (rows(train) @ rows(test).T).detach().numpy()


def cross_entropy(logits, y):
    return nn.functional.cross_entropy(logits, y, reduction="sum")


def half_square(prediction, y):
    return (prediction[:, 0] - y).square().sum() / 2


TASKS = {
    "classification": (up.Classification(), 3, cross_entropy),
    "regression": (up.Regression(), 1, half_square),
}


@pytest.mark.parametrize("name", TASKS)
def test_other_tasks_from_end_to_end(tmp_path, name):
    task, outputs, loss = TASKS[name]
    module = mlp(0, 5, outputs)
    train, test = data(task, 60), data(task, 4)
    model = up.Model(module, task=task)
    corpus = up.Examples(train)
    asked = up.Measurements(up.Examples(test), ids=["a", "b", "c", "d"])
    factors = up.fit(model, corpus, tmp_path / "factors", layers="*")
    plain = up.trace(model, corpus, asked, factors, tmp_path / "plain", curvature="identity", rank="full", top=5)
    expected = dot_products(module, loss, train, test)
    np.testing.assert_allclose(plain.frame()[asked.ids], expected, atol=1e-4 * np.abs(expected).max())
    result = up.trace(model, corpus, asked, factors, tmp_path / "scores", top=5)
    assert np.isfinite(result.frame()[asked.ids].to_numpy()).all()
    best = result.top("c", 5)
    assert best["rank"].tolist() == [1, 2, 3, 4, 5]
    assert (np.diff(best["score"]) <= 0).all()
    assert result.report(tmp_path / "page").exists()


@pytest.mark.parametrize("name", TASKS)
def test_an_example_supports_itself(tmp_path, name):
    """``(G + lambda)^-1`` is positive definite: training on an example raises its own measurement."""
    task, outputs, _ = TASKS[name]
    model = up.Model(mlp(1, 5, outputs), task=task)
    examples = up.Examples(data(task, 12))
    factors = up.fit(model, examples, tmp_path / "factors", layers="*")
    result = up.trace(model, examples, up.Measurements(examples), factors, tmp_path / "scores", rank="full")
    assert (np.diag(result.frame()[[f"q{i}" for i in range(12)]]) > 0).all()


def test_candidates_need_words(tmp_path):
    model = up.Model(mlp(0, 5, 3), task=up.Classification())
    examples = up.Examples(data(up.Classification(), 12))
    factors = up.fit(model, examples, tmp_path / "factors", layers="*")
    with pytest.raises(QueryError, match="leave out --candidates"):
        up.trace(model, examples, up.Measurements(examples), factors, tmp_path / "scores", candidates=3)


def test_a_misspelt_option_is_named(tmp_path):
    model = up.Model(mlp(0, 5, 3), task=up.Classification())
    with pytest.raises(ConfigError, match="unknown option 'layer'; did you mean 'layers'"):
        up.fit(model, up.Examples(data(up.Classification(), 12)), tmp_path / "factors", layer="*")
    assert not (tmp_path / "factors").exists()


class MeanPrediction(up.Regression):
    def measurement(self, module, batch):
        return module(batch.inputs["x"]).flatten()


class Absolute(up.Regression):
    def outputs(self, module, batch):
        return super().outputs(module, batch).abs()


class Scaled(up.Regression):
    def __init__(self, factor: float):
        self.factor = factor


def test_another_loss_or_activation_is_another_model(tmp_path):
    """Their scores differ, so a finished folder of one must not be handed out for the other."""
    net, train = mlp(0, 3, 1), up.Examples({"x": torch.randn(8, 3), "y": torch.randn(8)})
    model, asked = up.Model(net, task=up.Regression()), up.Measurements(train)
    factors = up.fit(model, train, out=tmp_path / "factors", layers="*")
    up.trace(model, train, asked, factors, out=tmp_path / "scores", rank="full", top=2)
    other = up.Model(net, task=MeanPrediction())
    with pytest.raises(MismatchError, match=r"made with another measurement: got \['MeanPrediction.measurement', "):
        up.trace(other, train, asked, factors, out=tmp_path / "scores", rank="full", top=2)
    up.trace(other, train, asked, factors, out=tmp_path / "mean", rank="full", top=2)
    for task in (Absolute(), Scaled(2.0)):
        with pytest.raises(MismatchError, match="another model"):
            up.trace(up.Model(net, task=task), train, asked, factors, out=tmp_path / "other", rank="full", top=2)
    assert up.Model(net, task=Scaled(2.0)).fingerprint != up.Model(net, task=Scaled(3.0)).fingerprint
    ways = [nn.Sequential(net[0], between, net[2]) for between in (nn.ReLU(), nn.Tanh())]
    assert len({up.Model(way, task=up.Regression()).fingerprint for way in ways}) == 2


@pytest.mark.parametrize(
    ("ids", "said"),
    [(["a"], "got 1 different ids for 2 examples"), (["a", "a"], "got 1 different"), (["a", "start"], "'start'")],
)
def test_ids_of_measurements_name_columns(ids, said):
    with pytest.raises(QueryError, match=said):
        up.Measurements(up.Examples({"x": torch.zeros(2, 3)}), ids=ids)


def test_a_module_in_training_mode_is_left_as_it_was(tmp_path):
    """The norm over a batch would refuse the one row that is looked at first, and note its mean."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train = up.Examples({"x": torch.randn(40, 3), "y": torch.randn(40)})
    up.fit(up.Model(net, task=up.Regression()), train, out=tmp_path / "factors", layers="*")
    assert all(m.training for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_query_with_no_gradient_scores_nothing(tmp_path):
    """A prediction that is exactly right, with layers large enough for the random factors of the compression."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(120, 110), nn.Tanh(), nn.Linear(110, 100), nn.Tanh(), nn.Linear(100, 1))
    x = torch.randn(30, 120)
    with torch.no_grad():
        right = net(x[:2])[:, 0]
    model, train = up.Model(net, task=up.Regression()), up.Examples({"x": x, "y": torch.randn(30)})
    factors = up.fit(model, train, out=tmp_path / "factors", layers="*")
    asked = up.Measurements(up.Examples({"x": x[:2], "y": right + torch.tensor([0.0, 1.0])}))
    up.trace(model, train, asked, factors, out=tmp_path / "scores", rank=8, top=3)
    scores = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    assert np.abs(scores["q0"]).max() <= 1e-5 * np.abs(scores["q1"]).max()
    assert np.isfinite(scores[["q0", "q1"]].to_numpy()).all()


def test_a_layer_without_gradient_is_named(tmp_path):
    """Behind it stands a layer of zeros, as after pruning."""
    net = mlp(0, 3, 1)
    with torch.no_grad():
        net[2].weight.zero_()
    train = up.Examples({"x": torch.randn(20, 3), "y": torch.randn(20)})
    with pytest.raises(NumericalError, match="layer '0' got no gradient on any sequence; leave it out with --layers"):
        up.fit(up.Model(net, task=up.Regression()), train, out=tmp_path / "factors", layers="*")
