"""Which device is taken, how exact its products are, and what happens where its memory runs out; no GPU is needed.

Axes: N sequences, T tokens, I a side of a matrix.
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cli_cases
from in_memory import TokenCorpus, TokenQueries
from upriver.curvature.fit import Factors, fit
from upriver.errors import ConfigError, MismatchError, NumericalError, ResourceError
from upriver.model.load import Model
from upriver.pipeline import trace
from upriver.runtime.artifact import Artifact, read_json, read_tensors
from upriver.runtime.device import float32_products, pick_device
from upriver.runtime.units import each, total
from upriver.tensors import eigh

CPU = torch.device("cpu")
# some versions of torch say so when the older of their settings are read
pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings")


# ------------------------------------------------------------------------------------------ which device


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, and which of them were made current."""
    chosen: list[torch.device] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_process_of_torchrun_takes_the_gpu_of_its_own(name, two_gpus, monkeypatch):
    assert pick_device(name) == torch.device("cuda:0")
    assert two_gpus == []  # the process alone is left as it is
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(name) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]


def test_a_device_that_is_named_is_taken_whatever_torchrun_says(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [pick_device(name) for name in ("cuda:0", "cpu")] == [torch.device("cuda:0"), CPU]
    assert two_gpus == []


def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(two_gpus, monkeypatch):
    with pytest.raises(ConfigError, match=r"got 'cuda:7'.* has 2 GPUs"):
        pick_device("cuda:7")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"got 'cuda:2'.* has 2 GPUs"):
        pick_device("auto")


def test_a_machine_without_a_gpu_gives_its_cpu_and_refuses_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device("auto") == CPU
    with pytest.raises(ConfigError, match="has 0 GPUs"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "xpu:1", "meta"])
def test_other_kinds_of_device_are_refused_by_name(name):
    with pytest.raises(
        ConfigError, match=f"the device {name.partition(':')[0]} is not supported: .*use auto, cpu, cuda"
    ):
        pick_device(name)


def test_what_is_no_device_is_refused():
    with pytest.raises(ConfigError, match="no such device: got 'gpu0'"):
        pick_device("gpu0")


# ------------------------------------------------------------------------------------------ TF32


def settings() -> dict[str, object]:
    """All that torch tells of float32 products; what it refuses to tell is a setting too."""
    found: dict[str, object] = {}
    places = {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn, "all": torch.backends}
    places |= {f"cudnn.{x}": getattr(torch.backends.cudnn, x, None) for x in ("conv", "rnn")}
    places |= {f"mkldnn.{x}": getattr(torch.backends.mkldnn, x, None) for x in ("matmul", "conv", "rnn")}
    for name, place in places.items():
        for attribute in ("fp32_precision", "allow_tf32"):
            try:
                found[f"{name} {attribute}"] = getattr(place, attribute, None)
            except RuntimeError:
                found[f"{name} {attribute}"] = "refused"
    try:
        found["precision"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["precision"] = "refused"
    return found


def _older(matmul: str, cudnn: bool):
    def change() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn

    return change


def _newer(place: str, value: str):
    def change() -> None:
        at = torch
        for name in place.split("."):
            at = getattr(at, name)
        if not hasattr(at, "fp32_precision"):
            pytest.skip("an older torch, without these settings")
        at.fp32_precision = value

    return change


CHANGES = {
    "nothing": lambda: None,
    "high": _older("high", True),
    "medium": _older("medium", False),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "one": _newer("backends.cuda.matmul", "tf32"),
    "convolutions": _newer("backends.cudnn.conv", "ieee"),
    "cudnn": _newer("backends.cudnn", "tf32"),
    "all": _newer("backends", "tf32"),
}


@pytest.fixture(params=CHANGES)
def changed(request):
    """The user's process has set what it likes."""
    with float32_products(False):  # which puts everything back
        pass
    before = settings()
    with float32_products(torch.backends.cuda.matmul.allow_tf32):
        CHANGES[request.param]()
        yield settings()
    assert settings() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_what_was_asked_for_and_the_process_gets_its_settings_back(changed, tf32):
    with float32_products(tf32):
        inside = settings()
        assert inside["matmul allow_tf32"] == inside["cudnn allow_tf32"] == tf32
        assert inside["precision"] == ("high" if tf32 else "highest")
        assert inside["matmul fp32_precision"] in (None, "tf32" if tf32 else "ieee")
        assert inside["cudnn.conv fp32_precision"] in (None, "tf32" if tf32 else "ieee")
        assert inside["mkldnn.matmul fp32_precision"] in (None, "none", "ieee")
        with float32_products(not tf32):
            assert settings()["matmul allow_tf32"] != tf32
        assert settings() == inside
    assert settings() == changed
    with pytest.raises(KeyError), float32_products(tf32):
        raise KeyError
    assert settings() == changed


def small_model() -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config).double().eval())


def corpus(N: int = 40, T: int = 5) -> TokenCorpus:
    rng = np.random.default_rng(0)
    return TokenCorpus([rng.integers(2, 17, T) for _ in range(N)])


QUESTIONS = TokenQueries([np.array([3, 4, 5, 6, 7]), np.array([8, 9, 3, 2, 2])], [2, 3])
GIVEN = {"dtype": "float64", "batch_tokens": 100, "unit_tokens": 100}


def test_a_fit_and_a_trace_round_as_they_were_told_and_not_as_the_process_is_set(tmp_path):
    model, seen = small_model(), set()
    model.module.register_forward_pre_hook(lambda *_: seen.add(torch.backends.cuda.matmul.allow_tf32))

    def noted(work):
        seen.clear()
        return work(), set(seen)

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        plain, found = noted(lambda: fit(model, corpus(), tmp_path / "plain", **GIVEN))
        assert found == {False}
        rounded, found = noted(lambda: fit(model, corpus(), tmp_path / "rounded", tf32=True, **GIVEN))
        assert found == {True}
        how = {"top": 3, "held_out": 0}
        for factors, tf32, wanted in ((plain, None, False), (rounded, None, True), (rounded, False, False)):
            out = tmp_path / f"scores {wanted} {tf32}"
            told = {} if tf32 is None else {"tf32": tf32}
            _, found = noted(lambda: trace(model, corpus(), QUESTIONS, factors, out, **how, **told))  # noqa: B023
            assert found == {wanted}
        assert torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        _, found = noted(lambda: fit(model, corpus(), tmp_path / "other", tf32=True, **GIVEN))
        assert found == {True}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    with pytest.raises(MismatchError, match="tf32"):
        fit(model, corpus(), tmp_path / "plain", tf32=True, **GIVEN)


def test_the_command_line_takes_tf32_for_a_fit_and_as_the_factors_for_a_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UPRIVER_CACHE", str(tmp_path / "cache"))
    tiny = cli_cases.build(tmp_path)

    def told(args: list) -> bool:
        ran = cli_cases.upriver(capsys, monkeypatch, *args)
        assert ran.status == 0, ran.err
        return read_json(args[args.index("--out") + 1] / "key.json")["options"]["tf32"]

    assert told(cli_cases.fit(tiny, tiny.factors, "--tf32"))
    assert told(cli_cases.trace(tiny, tmp_path / "same"))
    assert not told(cli_cases.trace(tiny, tmp_path / "other", "--no-tf32"))
    inputs = "".join(f"{name} = {str(getattr(tiny, name))!r}\n" for name in ("model", "corpus", "queries"))
    file = tmp_path / "run.toml"
    file.write_text(f"{inputs}out = {str(tmp_path / 'run')!r}\nseq_len = 16\ntop = 2\ntf32 = true\n")
    assert cli_cases.upriver(capsys, monkeypatch, "run", file).status == 0
    assert all(read_json(tmp_path / "run" / x / "key.json")["options"]["tf32"] for x in ("factors", "scores"))


# ------------------------------------------------------------------------------------------ eigendecompositions


class Elsewhere(torch.Tensor):
    """Numbers that say that they are on a GPU, whose library decomposes nothing."""

    error: RuntimeError = torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.device.__get__:
            return torch.device("cuda:0")
        if function is torch.linalg.eigh:
            raise cls.error
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else found


@pytest.mark.parametrize(
    "error", [Elsewhere.error, RuntimeError("cusolver"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_a_matrix_that_the_gpu_cannot_decompose_is_decomposed_on_the_cpu(error, monkeypatch):
    monkeypatch.setattr(Elsewhere, "error", error)
    x_II = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix_II = x_II @ x_II.T
    values_I, vectors_II, _ = eigh(matrix_II.tril().as_subclass(Elsewhere))
    assert type(values_I) is type(vectors_II) is Elsewhere  # they are where the matrix is
    rebuilt_II = ((vectors_II * values_I) @ vectors_II.T).as_subclass(torch.Tensor)
    torch.testing.assert_close(rebuilt_II, matrix_II)


def test_what_the_cpu_cannot_decompose_either_is_an_error(monkeypatch):
    def fails(matrix):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigh", fails)
    with pytest.raises(NumericalError, match="did not converge"):
        eigh(torch.eye(3).as_subclass(Elsewhere))


# ------------------------------------------------------------------------------------------ memory that runs out


class Card:
    """A device that holds batches of up to ``room`` tokens; of larger ones the first goes through, and every second fails.

    Args:
        backward: fail when the gradients of the upper block have been handed on already; else half-way forward.
    """

    def __init__(self, model: Model, room: int, backward: bool):
        self.room, self.backward, self.failed, self._larger = room, backward, 0, 0
        self._hook = model.module.model.layers[1].mlp.register_forward_pre_hook(self._forward)

    def _forward(self, module, args) -> None:
        x_NTH = args[0]
        if x_NTH[..., 0].numel() > self.room:
            self._larger += 1
            if self._larger % 2 == 0:
                if self.backward:
                    x_NTH.register_hook(self._fail)
                else:
                    self._fail()

    def _fail(self, *_) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")

    def remove(self) -> None:
        self._hook.remove()


LARGE = {"batch_tokens": 100, "unit_tokens": 300}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Factors:
    return fit(small_model(), corpus(), tmp_path_factory.mktemp("whole"), dtype="float64", **LARGE)


def test_a_fit_goes_on_in_smaller_batches_where_the_memory_runs_out(whole, tmp_path):
    """In the second batch of a unit, and half-way backward: the sums of the upper layers have more in them than they should."""
    model = small_model()
    card = Card(model, 60, backward=True)
    factors = fit(model, corpus(), tmp_path / "factors", dtype="float64", **LARGE)
    assert card.failed == 2  # once in each pass: all that comes later in it is smaller
    for x in whole.layers:
        for kind in ("ekfac", "kfac"):
            found, wanted = (f.block(x.name, kind).lam_OI for f in (factors, whole))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("backward", "how"),  # products run forward, and have no gradient to fail at
    [(True, {}), (False, {}), (False, {"rank": "full", "refine": 2}), (False, {"curvature": "cg", "solver_steps": 3})],
    ids=str,
)
def test_a_trace_goes_on_in_smaller_batches_where_the_memory_runs_out(backward, how, whole, tmp_path):
    model = small_model()
    wanted = trace(model, corpus(), QUESTIONS, whole, tmp_path / "wanted", top=30, **how, **LARGE)
    card = Card(model, 60, backward)
    found = trace(model, corpus(), QUESTIONS, whole, tmp_path / "found", top=30, **how, **LARGE)
    assert card.failed >= 2  # in the scan, in the second look, and in products
    card.remove()
    for q in QUESTIONS.ids:
        np.testing.assert_allclose(found.frame()[q], wanted.frame()[q], rtol=1e-6, atol=1e-9)
        assert found.top(q, 3)["sequence"].tolist() == wanted.top(q, 3)["sequence"].tolist()


def test_what_does_not_fit_in_smaller_batches_either_is_one_error_that_says_what_to_do(whole, tmp_path):
    model = small_model()
    card = Card(model, 40, backward=True)
    with pytest.raises(
        ResourceError, match=r"pass 'covariance'.*'Tried to allocate 2.00 GiB'; give --batch-tokens 25 "
    ) as e:
        fit(model, corpus(), tmp_path / "factors", dtype="float64", **LARGE)
    assert e.value.exit_status == 1
    assert card.failed == 2
    with pytest.raises(ResourceError, match=r"pass 'scan'.*--batch-tokens 25 "):
        trace(model, corpus(), QUESTIONS, whole, tmp_path / "scores", **LARGE)
    card.remove()
    fit(model, corpus(), tmp_path / "factors", dtype="float64", **LARGE)  # goes on


def test_memory_that_runs_out_costs_nothing_that_is_committed(tmp_path):
    """Each unit is computed once, and those of a sum since it was written last once more."""
    seen: list[tuple[int, int]] = []

    def batches(unit: int) -> list[int]:
        found = [len(x) for x in corpus(8).plan(20)]
        seen.append((unit, found[0]))
        if (unit, found[0]) == (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    stage = Artifact.open(tmp_path / "kept", "scan", {})
    each(stage, 4, lambda unit: {"sizes": torch.tensor(batches(unit))})
    assert seen == [(0, 4), (1, 4), (2, 4), (2, 2), (3, 2)]
    seen.clear()

    def add(unit: int, sums: dict[str, torch.Tensor]) -> None:
        sums["x"] = sums.get("x", torch.zeros(1)) + 10**unit  # before it fails
        batches(unit)

    path = total(Artifact.open(tmp_path / "summed", "covariance", {}), 4, add, CPU)
    assert float(read_tensors(path)["x"]) == 1111
    assert seen[0] == (0, 4)
    assert seen[-2:] == [(2, 2), (3, 2)]
    assert [len(x) for x in corpus(8).plan(20)] == [4, 4]  # whole again after the pass
