"""What a model is told apart by, what is read of it as it is now, and what of its files is refused with which advice."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

import upriver as up
from cases import CASES, Small, Windows
from text_cases import byte_tokenizer
from upriver.errors import InputError, MismatchError, ModelError
from upriver.model.check import check_data, check_loss
from upriver.model.fingerprint import measured_by

# ------------------------------------------------------------------------------------------------- told apart


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def of_task(task: up.Task) -> up.Model:
    return up.Model(net(), task=task)


@pytest.fixture
def written(tmp_path, monkeypatch) -> Callable[[str], up.Task]:
    """Makes an instance of the class ``Mine`` of a script, each in a file of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def write(source: str) -> up.Task:
        made.append(f"script{len(made)}")
        (tmp_path / f"{made[-1]}.py").write_text(source)
        return importlib.import_module(made[-1]).Mine()

    yield write
    for name in made:
        del sys.modules[name]


def with_attribute(value: object) -> up.Model:
    task = up.Regression()
    task.given = value
    return of_task(task)


def holding(make: Callable[[float], object], number: float) -> up.Model:
    return with_attribute(make(number))


def with_private(value: object) -> up.Model:
    task = up.Regression()
    task._given = value
    return of_task(task)


BODY = """
import torch
import upriver as up


class Base(up.Regression):
    scale = 1


class Mine(Base):
    margin = 2

    def loss(self, module, batch, sampler=None, weight=1.0):
        "The error, to some power."
        error = self.outputs(module, batch) - 0.5
        parts = [(lambda x: 3 * x)(e) for e in error.exp().split(1)]
        return weight * torch.cat(parts).pow(2).sum() if weight in {"a", "b", 1.0} else error.sum()

    def measurement(self, module, batch):
        return self.outputs(module, batch).flatten()
"""
EDITS = {
    "a class attribute": ("margin = 2", "margin = 3"),
    "a class attribute of a base": ("scale = 1", "scale = 2"),
    "a number in a body": ("- 0.5", "- 0.25"),
    "a method that is called": (".exp()", ".sin()"),
    "a function inside": ("3 * x", "4 * x"),
    "a default": ("weight=1.0", "weight=2.0"),
    "what is looked for": ('"a", "b"', '"a", "c"'),
}
NOT_THE_LOSS = {
    "a line of its own": ("class Base", "# as usual\n\nclass Base"),
    "a comment": ("margin = 2", "margin = 2  # as usual"),
    "a docstring": ("to some power", "to the power of two"),
    "the measurement": ("flatten()", "sum(1)"),
}


def long_array(middle: float) -> np.ndarray:
    x = np.zeros(5000)
    x[2500] = middle
    return x


def layer_with(bias: float) -> nn.Module:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(bias)
    return layer


class Held(NamedTuple):
    number: float


class Kept:
    def __init__(self, number: float):
        self._number = number


VALUES: dict[str, Callable[[float], object]] = {  # each differs from number to number, and shows too little of it
    "an array": long_array,
    "an array of objects": lambda x: np.array([None, "a", x], object),
    "a list of tensors": lambda x: [torch.ones(3), torch.from_numpy(long_array(x))],
    "a dictionary of tensors": lambda x: {"a": {"b": torch.from_numpy(long_array(x))}},
    "a named tuple": Held,
    "an object": Kept,
    "a class": lambda x: type("Inside", (), {"number": x}),
    "a distribution": lambda x: torch.distributions.Normal(torch.zeros(2000), torch.full((2000,), x)),
    "a set": lambda x: {"a", "b", "c", str(x)},
    "a module": layer_with,
    "a task inside": lambda x: with_attribute(x).task,
}


class Dilated(nn.Module):
    """Shows nothing of how it is set."""

    def __init__(self, **settings):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3))
        for name, value in settings.items():
            setattr(self.layers[0], name, value)

    def forward(self, x):
        return self.layers(x)


def small(times: int) -> up.Model:
    torch.manual_seed(0)
    return up.Model(Small(blocks=1, times=times, bias=True))


def buffered(number: float) -> up.Model:
    module = net()
    module.register_buffer("scale", torch.full((3,), number))
    return up.Model(module, task=up.Regression())


def dilated(**settings) -> up.Model:
    torch.manual_seed(0)
    return up.Model(Dilated(**settings), task=up.Regression())


DIFFERENT: dict[str, tuple[Callable[[], up.Model], Callable[[], up.Model]]] = {
    "a private attribute": (lambda: with_private(2.0), lambda: with_private(3.0)),
    "a public attribute": (lambda: with_attribute(2.0), lambda: with_attribute(3.0)),
    "true and one": (lambda: with_attribute(True), lambda: with_attribute(1)),
    "how often a block runs": (lambda: small(1), lambda: small(2)),
    "a float of a layer": (lambda: dilated(scale=0.5), lambda: dilated(scale=0.25)),
    "a tuple of a layer": (lambda: dilated(steps=(1, 2)), lambda: dilated(steps=(1, 3))),
    "a word of a layer": (lambda: dilated(kind="sum"), lambda: dilated(kind="max")),
    "a weight": (lambda: up.Model(net(0)), lambda: up.Model(net(1))),
    "a buffer": (lambda: buffered(1.0), lambda: buffered(2.0)),
    **{name: (partial(holding, make, 1.0), partial(holding, make, 2.0)) for name, make in VALUES.items()},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_the_loss_or_the_module_depends_on_is_in_the_fingerprint(case):
    first, second = DIFFERENT[case]
    assert first().fingerprint == first().fingerprint
    assert first().fingerprint != second().fingerprint


@pytest.mark.parametrize("case", EDITS)
def test_another_source_of_a_tasks_class_is_another_task(case, written):
    old, new = EDITS[case]
    assert old in BODY
    assert of_task(written(BODY)).fingerprint != of_task(written(BODY.replace(old, new))).fingerprint


@pytest.mark.parametrize("case", NOT_THE_LOSS)
def test_what_changes_no_loss_is_the_same_task(case, written):
    old, new = NOT_THE_LOSS[case]
    assert old in BODY
    assert of_task(written(BODY)).fingerprint == of_task(written(BODY.replace(old, new))).fingerprint


def test_a_class_whose_source_nobody_has_is_told_apart_by_its_instructions():
    def typed_in(source: str) -> str:
        names = {"__name__": "__main__"}
        exec(source, names)
        return of_task(names["Mine"]()).fingerprint

    assert typed_in(BODY) == typed_in(BODY)
    for case in ("a class attribute", "a number in a body", "a method that is called"):
        assert typed_in(BODY) != typed_in(BODY.replace(*EDITS[case])), case


def test_a_class_that_changes_no_loss_is_none_of_its_own():
    c = CASES["llama"]()
    before = c.model.fingerprint
    c.model.task = type("Own", (up.LanguageModel,), {"measurement": lambda self, module, batch: None})()
    assert c.model.fingerprint == before


class Noting(nn.Module):
    """Counts its calls, and keeps what it made for a length."""

    def __init__(self):
        super().__init__()
        self.layers, self.calls = net(), 0

    def forward(self, x):
        self.calls += 1
        self.seq_len_cached = len(x)
        return self.layers(x)


def test_another_forward_is_another_model():
    def own(forward):
        torch.manual_seed(0)
        return up.Model(type("Own", (Noting,), {"forward": forward})(), task=up.Regression()).fingerprint

    squashed = own(lambda self, x: self.layers(x).tanh())
    assert squashed == own(lambda self, x: self.layers(x).tanh())
    assert squashed != own(lambda self, x: self.layers(x).relu())


class Caching(up.Regression):
    def outputs(self, module, batch):
        self._mask = torch.ones(len(batch.inputs["x"]))
        return super().outputs(module, batch)


def examples() -> up.Examples:
    generator = torch.Generator().manual_seed(0)
    return up.Examples({"x": torch.randn(8, 3, generator=generator), "y": torch.randn(8, generator=generator)})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_a_module_and_a_task_note_on_the_way_is_not_theirs_afterwards(dtype, tmp_path):
    """Else the trace would refuse the factors of the fit before it, as those of another model."""
    module, task, data = Noting(), Caching(), examples()
    model = up.Model(module, task=task)
    before = vars(module).copy(), vars(task).copy(), model.fingerprint
    factors = up.fit(model, data, tmp_path / "factors", layers="*", dtype=dtype)
    up.trace(model, data, up.Measurements(data), factors, tmp_path / "scores", top=2)
    assert (vars(module), vars(task), model.fingerprint) == before


def test_a_task_that_holds_itself_has_a_fingerprint():
    task = up.Regression()
    task.itself = [task]
    assert of_task(task).fingerprint == of_task(task).fingerprint


def test_the_measurement_is_told_apart_by_its_source(written):
    plain, again, other = (
        written(BODY.replace("flatten()", end)) for end in ("flatten()", "flatten()  # of all", "sum(1)")
    )
    assert measured_by(plain)[0] == "Mine.measurement"
    assert measured_by(plain) == measured_by(again) != measured_by(other)
    assert measured_by(up.Regression()) != measured_by(up.Classification())


EDITS_IN_PLACE = {
    "rows change places": lambda W: W[[1, 0, *range(2, len(W))]],
    "columns change places": lambda W: W[:, [1, 0, *range(2, W.shape[1])]],
    "two numbers change places": lambda W: W.flatten()[[1, 0, *range(2, W.numel())]].view_as(W),
    "another shape, the same numbers": lambda W: W.reshape(W.shape[1], -1),
}


@pytest.mark.parametrize("weight", ["random", "identity"])
@pytest.mark.parametrize("case", EDITS_IN_PLACE)
def test_an_edit_in_one_process_that_keeps_every_sum_is_seen(case, weight):
    torch.manual_seed(0)
    W = torch.eye(600, 700) if weight == "identity" else torch.randn(600, 700)
    layer = nn.Linear(700, 600, bias=False)
    layer.weight.data = W
    model = up.Model(nn.Sequential(layer), task=up.Regression())
    before = model.fingerprint
    layer.weight.data = EDITS_IN_PLACE[case](W)
    after = model.fingerprint
    assert after != before
    assert up.Model(model.module, task=up.Regression()).fingerprint == after
    layer.weight.data = W
    assert model.fingerprint == before


def everything() -> str:
    """One fingerprint of all the values, and of a class of this file."""
    found = [with_attribute([make(1.0) for make in VALUES.values()]), of_task(Caching())]
    return hashlib.blake2b("".join(x.fingerprint for x in found).encode()).hexdigest()


@pytest.mark.slow
def test_fingerprints_are_the_same_in_every_process():
    command = [sys.executable, "-c", "import test_load; print(test_load.everything())"]
    env = {**os.environ, "PYTHONHASHSEED": "1"}  # that of this process is drawn
    ran = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [everything()]


class Plain:
    """A configuration as people write it."""

    def __init__(self, width: int):
        self.width = width


def test_a_configuration_of_another_kind_counts():
    found = []
    for width in (4, 4, 5):
        module = net()
        module.config = Plain(width)
        found.append(up.Model(module, task=up.Regression()).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_configuration_that_answers_no_question_is_no_hindrance(tmp_path):
    """Of the names that those of transformers have it may use one for another thing."""
    module, data = net(), examples()
    module.config = Plain(4)
    module.config.rope_scaling = 8.0
    model = up.Model(module, task=up.Regression())
    assert (model.positions, model.rotary_limit, model.longest) == (None, None, None)
    factors = up.fit(model, data, tmp_path / "factors", layers="*", say=lambda line: None)
    result = up.trace(model, data, up.Measurements(data), factors, tmp_path / "scores", top=2)
    assert np.isfinite(result.frame()["q0"]).all()


# ------------------------------------------------------------------------------------------------- as it is now


def test_the_attention_kernel_is_that_of_now(tmp_path):
    c = CASES["llama"]()
    module = c.model.module
    assert (c.model.attention, c.model.positions) == ("sdpa", 16)
    factors = up.fit(c.model, c.data, tmp_path / "factors", layers=c.spec, dtype="float64")
    module.set_attn_implementation("eager")
    assert c.model.attention == "eager"
    with pytest.raises(MismatchError, match="another kernel: got 'eager' now, 'sdpa' then"):
        factors.check(c.model)
    module.set_attn_implementation("sdpa")
    result = up.trace(c.model, c.data, c.queries, factors, tmp_path / "scores", top=2)
    assert (result.manifest["kernel"], result.manifest["model"]["attention"]) == ("sdpa", "sdpa")


def test_a_module_that_says_nothing_has_its_own_kernel_and_any_length():
    model = up.Model(net(), task=up.Regression())
    assert (model.attention, model.positions, model.longest) == ("the model's own", None, None)
    model.info |= {"attention": "flash", "positions": 7}
    assert (model.attention, model.positions, model.longest) == ("flash", 7, 7)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, is_decoder=False
    )
    torch.manual_seed(0)
    return BertLMHeadModel(config)


def test_a_model_that_is_given_directly_must_be_causal(tmp_path):
    data = CASES["llama"]().data
    module = bert().train()
    for _ in range(2):
        with pytest.raises(ModelError, match="the model is not causal: a later token changes the prediction before it"):
            up.fit(up.Model(module), data, tmp_path / "factors", layers="all")
    assert module.training


def test_causality_is_looked_at_once(monkeypatch):
    c, calls = CASES["gpt2"](), []
    c.model.module.register_forward_pre_hook(lambda *args: calls.append(1))
    check_loss(c.model, c.data, False)
    first = len(calls)
    check_loss(c.model, c.data, False)
    assert len(calls) - first == first - 2
    with c.model.computing_in("float32") as copied:
        before = len(calls)
        check_loss(copied, c.data, False)
        assert len(calls) - before <= first - 2


def phi3() -> up.Model:
    """As Phi-3-128k: other rotary factors for all that stands in a batch once one sequence is longer than 16 tokens."""
    scaling = {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0]}
    config = Phi3Config(
        vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        num_key_value_heads=1, max_position_embeddings=64, original_max_position_embeddings=16, rope_scaling=scaling,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return up.Model(Phi3ForCausalLM(config).double().eval())


def windows(*lengths: int) -> Windows:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 11, n) for n in lengths]
    return Windows(tokens, [np.ones(n, bool) for n in lengths])


def test_rotary_factors_that_follow_the_longest_of_a_batch_limit_the_length(tmp_path):
    model, data = phi3(), windows(9, 12, 16, 17)
    batches = [data.batch(np.array(rows)).inputs["tokens"] for rows in ([0], [0, 2], [0, 3])]
    alone, with_16, with_17 = (model.module(input_ids=tokens_NT).logits[0, :9] for tokens_NT in batches)
    torch.testing.assert_close(alone, with_16)
    assert not torch.allclose(alone, with_17), "or nothing had to be refused"
    assert (model.positions, model.longest) == (64, 16)
    with pytest.raises(ModelError, match=r"got sequences of 17 tokens, and beyond 16 .* give --seq-len 16 or less"):
        check_data(model, data)
    with pytest.raises(ModelError, match="give --seq-len 16 or less"):
        up.fit(model, data, tmp_path / "factors")
    assert not (tmp_path / "factors").exists()
    check_data(model, windows(9, 16))


def test_a_sequence_longer_than_the_model_takes_is_refused_before_a_fit(tmp_path):
    c = CASES["gpt2"]()
    with pytest.raises(ModelError, match="sequences of 9 tokens and the model takes 8; read it with --seq-len 8"):
        up.fit(c.model, windows(5, 9), tmp_path / "factors")
    assert not (tmp_path / "factors").exists()


# ------------------------------------------------------------------------------------------------- files

WIDTHS = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox", "llama"])
def test_a_folder_without_a_tokenizer_is_refused_though_an_empty_one_can_be_made(name, tmp_path):
    torch.manual_seed(0)
    widths = {"n_embd": 8, "n_layer": 1, "n_head": 2} if name == "gpt2" else WIDTHS
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=300, **widths)).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"no tokenizer could be loaded from .*; put the tokenizer\.json that the model"
    ):
        up.load_model(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert up.load_model(tmp_path).tokenizer("we")["input_ids"]


@pytest.mark.parametrize(
    ("name", "start", "packages"),
    [("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"), ("qwen.tiktoken", b"IQ== 0\n", "tiktoken")],
)
def test_files_that_other_packages_read_name_them(name, start, packages, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **WIDTHS)).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(start)
    for package in ("sentencepiece", "google", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)  # as where they are not installed
    with pytest.raises(ModelError, match=f"{name} is read by packages that are not installed; pip install {packages}$"):
        up.load_model(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "words")
    assert up.load_model(tmp_path, tokenizer=tmp_path / "words").info["tokenizer"] == str(tmp_path / "words")


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    return tmp_path / "m.gguf"


def raises(error: Exception) -> Callable:
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize("lacking", ["gguf", "accelerate"])
@pytest.mark.parametrize("loader", [AutoTokenizer, AutoModelForCausalLM])
def test_a_gguf_file_without_its_readers_says_what_to_install(gguf, monkeypatch, loader, lacking):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: byte_tokenizer())
    monkeypatch.setattr("upriver.model.load.find_spec", lambda name: None if name == lacking else name)
    monkeypatch.setattr(
        loader, "from_pretrained", raises(ValueError(f"{lacking} is required when loading a GGUF file"))
    )
    with pytest.raises(ModelError, match=r"m\.gguf.*: .* is required .*; .*pip install 'upriver\[gguf\]'"):
        up.load_model(gguf)


def test_a_gguf_file_whose_reader_is_too_old_says_what_to_install(gguf, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raises(ImportError("Please install torch and gguf>=0.10.0")))
    with pytest.raises(ModelError, match=r"pip install 'upriver\[gguf\]'"):
        up.load_model(gguf)


def test_a_name_that_is_no_model_is_told_so_and_one_without_tokenizer_what_it_lacks(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="no such folder, and no such model on the hub here: got 'no-such-model'"):
        up.load_model("no-such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    there = AutoConfig.from_pretrained(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **kwargs: there)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raises(OSError("no file of a tokenizer")))
    with pytest.raises(ModelError, match=r"from 'such-a-model': no file of a tokenizer; put the tokenizer\.json"):
        up.load_model("such-a-model")


@pytest.mark.parametrize("name", ["x" * 300, "/" + "x" * 300])
def test_what_can_be_no_path_is_no_model_and_no_factors(name):
    with pytest.raises(ModelError, match=r"no model can be looked up: got '/?x+ .*name too long.*; give a folder"):
        up.load_model(name)
    with pytest.raises(
        InputError, match=r"the folder of factors cannot be read: got .*name too long.*; make them with"
    ):
        up.Factors(name)


def test_a_folder_that_may_not_be_entered_is_no_model_and_no_factors(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", raises(PermissionError(13, "Permission denied")))
    with pytest.raises(
        ModelError, match=r"no model can be looked up: .*Permission denied.*; give a folder .* may read"
    ):
        up.load_model(tmp_path)
    with pytest.raises(InputError, match=r"cannot be read: got .*Permission denied"):
        up.Factors(tmp_path)
