"""Which weights are tracked: shared ones in all their places, computed ones not at all, and nothing by half."""

import pytest
import torch
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.pytorch_utils import Conv1D

import reference
from cases import Small, Windows, _language, case, close
from upriver.curvature.fit import fit
from upriver.errors import ModelError, NumericalError
from upriver.model.capture import capture
from upriver.model.check import checked_layers, tracked_layers
from upriver.model.coverage import coverage
from upriver.model.layers import Layer, find_layers


def checked(module: nn.Module, spec: str, x_NTI: torch.Tensor, T: int | None = None) -> list[Layer]:
    """The layers after the check, on the sum of squares of what the module gives."""

    def loss() -> torch.Tensor:
        return module(x_NTI.clone()).double().square().sum()

    return checked_layers(module, find_layers(module, spec), len(x_NTI), T, loss)


def test_a_shared_weight_is_tracked_in_all_its_places_whichever_is_named():
    module = case("shared").model.module
    for spec in ("blocks.0.up", "blocks.1.up", "*.up"):
        (layer,) = find_layers(module, spec)
        assert (layer.name, len(layer.modules)) == ("blocks.0.up", 2)


def test_a_shared_weight_with_biases_of_its_own_is_refused():
    module = Small(blocks=2, times=1, bias=True)
    first, second = (block.get_submodule("up") for block in module.blocks)
    second.weight = first.weight
    with pytest.raises(ModelError, match=r"2 modules share the weight of layer 'blocks\.0\.up' but not its bias"):
        find_layers(module, "*.up")
    layers = find_layers(module, "mlp")
    assert [x.name for x in layers] == ["blocks.0.down", "blocks.1.down"]
    assert ("blocks.*.up", "a weight with several biases") in reasons(module, layers)
    second.bias = first.bias
    assert len(find_layers(module, "mlp")) == 3


def test_a_head_tied_to_the_embedding_is_refused():
    module = Small(blocks=1, times=1, bias=False)
    module.head.weight = module.embed.weight
    with pytest.raises(ModelError, match="got Embedding, as of a tied embedding"):
        find_layers(module, "head")
    assert [x.name for x in find_layers(module, "mlp")] == ["blocks.0.up", "blocks.0.down"]


def test_a_weight_computed_from_others_is_not_tracked_and_counted_as_such():
    module = Small(blocks=2, times=1, bias=False)
    torch.nn.utils.parametrizations.weight_norm(module.blocks[0].get_submodule("up"))
    layers = find_layers(module, "mlp")
    assert [x.name for x in layers] == ["blocks.0.down", "blocks.1.up", "blocks.1.down"]
    cover = coverage(module, layers)
    assert cover.tracked + sum(u["parameters"] for u in cover.untracked) == cover.total


class Odd(nn.Module):
    """Blocks of which each has one layer that can be tracked, and others that cannot, each for another reason."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("plain", "unused", "twice", "folded", "around"):
                setattr(self, name, nn.Linear(4, 4))

        def forward(self, x_NTI):
            x_NTI = x_NTI + self.plain(x_NTI) @ self.around.weight
            x_NTI = self.twice(x_NTI) @ self.twice.weight
            return x_NTI + self.folded(x_NTI.flatten(0, 1)[:5]).sum() + self.around(x_NTI)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Odd.Block(), Odd.Block()])

    def forward(self, x_NTI):
        for block in self.blocks:
            x_NTI = block(x_NTI)
        return x_NTI.square().sum()


def reasons(module, layers):
    return {(u["name"], u["why"]) for u in coverage(module, layers).untracked}


def test_what_cannot_be_tracked_is_left_out_with_its_reason_unless_it_is_named():
    torch.manual_seed(0)
    module, x_NTI = Odd(), torch.randn(2, 3, 4)
    for spec in ("mlp", "all", "*.plain,mlp"):
        layers = checked_layers(module, find_layers(module, spec), 2, 3, lambda: module(x_NTI))
        assert [x.name for x in layers] == ["blocks.0.plain", "blocks.1.plain"]
        assert all(x.A_of == x.name and x.named for x in layers)
        told = reasons(module, layers)
    assert told == {
        ("blocks.*.unused", "never called"),
        ("blocks.*.twice", "its calls do not show the gradient of its weight"),
        ("blocks.*.around", "its calls do not show the gradient of its weight"),
        ("blocks.*.folded", "not laid out by sequence and token"),
    }
    for name, sentence in {
        "unused": "were never called",
        "twice": "do not show the gradient",
        "folded": "cannot be laid out",
    }.items():
        with pytest.raises(ModelError, match=sentence):
            checked_layers(module, find_layers(module, f"*.{name},mlp"), 2, 3, lambda: module(x_NTI))


def test_layers_of_which_none_can_be_tracked_are_refused():
    module = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match="1 tracked layers were never called"):
        checked_layers(module, find_layers(module, "mlp"), 1, None, lambda: module[0].weight.sum())


def test_the_others_of_a_group_that_sees_one_input_go_by_what_is_left_of_it():
    module, x_NTI = nn.ModuleList([nn.ModuleDict({n: nn.Linear(3, 3) for n in "abc"})]), torch.ones(1, 2, 3)

    def loss():
        return sum(m(x_NTI).square().sum() for m in module[0].values()) + module[0]["a"].weight.sum()

    layers = checked_layers(module, find_layers(module, "mlp"), 1, 2, loss)
    assert [(x.name, x.A_of) for x in layers] == [("0.b", "0.b"), ("0.c", "0.b")]


def test_a_layer_that_is_never_called_is_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ModelError, match="1 tracked layers were never called, the first is '1'"):
        checked_layers(module, find_layers(module, "*"), 1, None, lambda: module[0](torch.ones(1, 2)).sum())


class Tied(nn.Module):
    """Its way back is its way there, turned."""

    def __init__(self, back: bool):
        super().__init__()
        self.there, self.back = nn.Linear(3, 2), back

    def forward(self, x):
        h = torch.tanh(self.there(x))
        return nn.functional.linear(h, self.there.weight.T) if self.back else h.to(self.there.weight.dtype)


OUTSIDE = "cannot be tracked: its calls do not show the gradient of its {}: .* is used outside of it too"


def test_a_weight_that_is_used_outside_of_its_layer_too_is_refused():
    x_NI = torch.randn(4, 3)
    with pytest.raises(ModelError, match="layer 'there' " + OUTSIDE.format("weight")):
        checked(Tied(back=True), "there", x_NI)
    assert len(checked(Tied(back=False), "there", x_NI)) == 1  # its type may be asked for


def test_a_bias_that_layers_share_is_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].bias = module[0].bias
    with pytest.raises(ModelError, match=OUTSIDE.format("bias")):
        checked(module, "*", torch.ones(1, 2))
    with pytest.raises(ModelError, match=OUTSIDE.format("bias")):
        checked(module, "0", torch.ones(1, 2))


def test_the_check_leaves_gradients_and_flags_as_they_were():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kept = module[0].weight.grad = torch.ones(2, 2)
    module[1].bias.requires_grad_(False)
    assert len(checked(module, "*", torch.ones(1, 2))) == 2
    assert module[0].weight.grad is kept
    assert torch.equal(kept, torch.ones(2, 2))
    assert [(p.requires_grad, p.grad is None) for p in module.parameters()] == [
        (True, False),
        (True, True),
        (True, True),
        (False, True),
    ]


def test_a_loss_without_tracked_layers_is_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with (
        capture(module, find_layers(module, "1"), lambda *a: None) as run,
        pytest.raises(ModelError, match="does not depend on any tracked layer"),
    ):
        run(1, None, lambda: module[0](torch.ones(1, 2)).sum())


def test_a_loss_that_is_nan_is_an_error_without_warning():
    module = nn.Linear(2, 2)
    with (
        capture(nn.Sequential(module), find_layers(nn.Sequential(module), "*"), lambda *a: None) as run,
        pytest.raises(NumericalError, match="the loss of a batch is nan"),
    ):
        run(1, None, lambda: module(torch.full((1, 2), torch.nan)).sum())


class Sometimes(Small):
    """The second block sees short sequences only."""

    def forward(self, input_ids, use_cache=False):
        self.blocks[1].skipped = input_ids.shape[1] > 3
        return super().forward(input_ids)


def test_a_layer_called_in_some_units_only(tmp_path):
    c = _language(Sometimes(blocks=2, times=1, bias=True), [f"blocks.{i}.{k}" for i in (0, 1) for k in ("up", "down")])
    block = c.model.module.blocks[1]
    block.register_forward_hook(lambda m, args, out: args[0] if m.skipped else out)
    assert isinstance(c.data, Windows)
    assert c.data.lengths_N.min() <= 3 < c.data.lengths_N.max()
    options = {"layers": "mlp", "dtype": "float64", "fisher": "empirical", "batch_tokens": 1, "unit_tokens": 1}
    factors = fit(c.model, c.data, tmp_path, **options)
    for name in c.names:
        m, block = factors.moments(name), factors.block(name)
        grads = [reference.gradient(c.model.module, c.names, c.loss(row))[name] for row in range(len(c.data))]
        close(block.lam_OI, reference.eigenvalues(grads, m.Q_S_OO, m.Q_A_II))


class Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Tupled(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Doubled1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class WrittenOut(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Adapted(nn.Module):
    """As LoRA has it: a plain layer, and beside it something small that another layer gives."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base_layer, self.lora = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 0.1 * self.lora(x)


def hooked(hook) -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(hook)
    return layer


def add_one(module, args, output):
    output[1:] += 1  # in place, which returns nothing


NOT_LINEAR = {
    "a subclass": (lambda: Doubled(6, 5), "got Doubled"),
    "a subclass without bias": (lambda: Doubled(6, 5, bias=False), "got Doubled"),
    "two outputs": (lambda: Tupled(6, 5), "got Tupled"),
    "a subclass of Conv1D": (lambda: Doubled1D(5, 6), "got Doubled1D"),
    "quantised as it runs": (lambda: AutoBitLinear(6, 5, online_quant=True), "got AutoBitLinear"),
}
LINEAR = {
    "plain": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
    "another way to write it": lambda: WrittenOut(6, 5),
    "without bias": lambda: WrittenOut(6, 5, bias=False),
    "adapted": lambda: Adapted(6, 5),
    "a hook that looks on": lambda: hooked(lambda m, args, out: None),
    "a hook after it": lambda: hooked(lambda m, args, out: out.relu()),
    "a hook after it, in place": lambda: hooked(add_one),
}


def tracked(layer: nn.Module, dtype: torch.dtype = torch.float32) -> list[Layer]:
    torch.manual_seed(0)
    module = nn.Sequential(layer).to(dtype)
    return checked(module, "*", torch.randn(2, 9, 6, dtype=dtype), 9)


@pytest.mark.parametrize("case", NOT_LINEAR)
def test_a_layer_that_gives_another_thing_than_its_weight_and_bias_do_is_refused(case):
    make, said = NOT_LINEAR[case]
    layer = make()
    with pytest.raises(ModelError, match=rf"layer '0' cannot be tracked: .*{said}.*; .* by giving globs to --layers"):
        tracked(layer)
    assert not layer._forward_hooks
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LINEAR)
def test_a_layer_that_gives_the_same_is_tracked_whatever_its_class(case, dtype):
    assert tracked(LINEAR[case](), dtype)


def test_a_wide_layer_of_16_bits_is_tracked_under_autocast_too():
    torch.manual_seed(0)
    module, x_NI = nn.Sequential(nn.Linear(4096, 64)), torch.randn(40, 4096)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(checked(module, "*", x_NI)) == 1
    assert len(checked(module.bfloat16(), "*", x_NI.bfloat16())) == 1


def test_layers_that_are_given_the_same_input_share_it():
    c = case("llama")
    leaders = {x.name: x.A_of for x in tracked_layers(c.model, c.data, "all")}
    for i in (0, 1):
        mlp, attention = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
        assert leaders[f"{mlp}.up_proj"] == f"{mlp}.gate_proj"
        assert leaders[f"{mlp}.down_proj"] == f"{mlp}.down_proj"
        assert leaders[f"{attention}.v_proj"] == leaders[f"{attention}.k_proj"] == f"{attention}.q_proj"
