"""Outputs of modules whose first axis is not that of the batch."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Key, Target
from tdhook.attribution import Ablation, GradCAM, GradientTimesInput, IntegratedGradients, Patching
from tdhook.concepts.activations import Activations
from tdhook.targets import Computed, Through

METHODS = {
    "lrp": lambda **options: LRP("lstm_lrp", **options),
    "gradient": lambda **options: GradientTimesInput(**options),
    "integrated": lambda **options: IntegratedGradients(steps=2, **options),
}


class Reads(nn.Module):
    """Token by token, with time first inside or with the batch first."""

    def __init__(self, *, time_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_first = time_first
        self.emb = nn.Embedding(9, 5)
        self.rnn, self.fc = nn.GRU(5, 4, batch_first=not time_first), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, time] -> [batch, 2]``."""
        if self.time_first:
            return self.fc(self.rnn(self.emb(ids.mT))[0][-1])
        return self.fc(self.rnn(self.emb(ids))[0][:, -1])


def tokens(*shape: int) -> TensorDict:
    ids = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    return TensorDict({"input": ids}, shape[:-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 6), (6, 6), (4, 4), (5, 4), (1, 3), (1, 1)])
def test_relevance_has_the_batch_first(shape: tuple[int, int], method: str) -> None:
    """Also where time is as long as the batch, or the features are."""
    wanted, found = (
        METHODS[method](
            target=Target("output", 0), use_inputs=False, input_modules=["emb"], values=True
        ).wrap(Reads(time_first=time_first))(tokens(*shape))
        for time_first in (False, True)
    )
    for entry in ("attr", "value"):
        assert found[entry, "emb"].shape == (*shape, 5)
        torch.testing.assert_close(found[entry, "emb"], wanted[entry, "emb"], rtol=1e-4, atol=1e-6)


def test_an_axis_that_is_known_stays_known() -> None:
    explained = LRP("lstm_lrp", target=Target("output", 0), use_inputs=False, input_modules=["emb"]).wrap(
        Reads(time_first=True)
    )
    plain = LRP("lstm_lrp", target=Target("output", 0), use_inputs=False, input_modules=["emb"]).wrap(
        Reads(time_first=False)
    )
    for shape in ((4, 6), (6, 6), (5, 6), (5, 5)):
        found, wanted = explained(tokens(*shape))["attr", "emb"], plain(tokens(*shape))["attr", "emb"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6), (5, 5)])
def test_a_layer_in_the_midst_and_several_outputs(shape: tuple[int, int]) -> None:
    class Midst(Reads):
        def forward(self, ids: Tensor) -> Tensor:
            x = ids.float().unsqueeze(-1).expand(*ids.shape, 5)
            return self.fc(
                (self.mid(x.transpose(0, 1)).mean(0) if self.time_first else self.mid(x).mean(1))[:, :4]
            )

    def model(time_first: bool) -> Midst:
        made = Midst(time_first=time_first)
        made.mid = nn.Linear(5, 5)
        return made

    torch.manual_seed(1)
    first = model(True)
    second = model(False)
    second.load_state_dict(first.state_dict())
    lrp = LRP("epsilon", target=Target("output", [0, 1]), input_modules=["mid"], use_inputs=False)
    found, wanted = (lrp.wrap(made)(tokens(*shape))["attr", "mid"] for made in (first, second))
    assert found.shape == (shape[0], 2, shape[1], 5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_target_inside_the_model() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mid, self.fc = nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mid(x.transpose(0, 1)).sum(0))

    x = torch.randn(4, 6, 5)
    model = Inside()
    lrp = GradientTimesInput(target=Target("mid", (2, 1)), target_modules=["mid"])
    found = lrp.wrap(model)(TensorDict({"input": x}, [4]))["attr", "input"]
    wanted = torch.zeros_like(x)
    wanted[:, 2] = x[:, 2] * model.mid.weight[1].detach()
    torch.testing.assert_close(found, wanted)


class Folds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid, self.fc = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("method", METHODS)
def test_where_no_axis_is_the_batchs_it_is_said(method: str) -> None:
    explained = METHODS[method](target=Target("output", 0), input_modules=["mid"]).wrap(Folds())
    with pytest.raises(
        ValueError, match=r"module 'mid' \(Linear\) returned a tensor of shape \[24, 3\], none of whose"
    ):
        explained(TensorDict({"input": torch.randn(4, 6, 5)}, [4]))


class Folded(nn.Module):
    """Heads are made elements of the batch: ``[batch, tokens, 2 * width] -> [batch * 2, tokens, width]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        folded = self.inner(x.reshape(batch, tokens, 2, 3).transpose(1, 2).reshape(-1, tokens, 3))
        return self.head(folded.relu().reshape(batch, 2, tokens, 4).sum((1, 2)))


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_tokens_as_many_as_the_batch_are_not_taken_for_it(method: str) -> None:
    td = TensorDict({"input": torch.randn(12, 12, 6)}, [12])
    explained = METHODS[method](target=Target("output", 0), input_modules=["inner"]).wrap(Folded())
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"shape \[24, 12, 4\], where axis 1 is as long as the batch, 12"
        ):
            explained(td.clone())
    with pytest.raises(ValueError, match="none of whose axes is that of the batch"):
        explained(td[:5].clone())


class Encodes(nn.Module):
    """Pictures ``[*batch, 1, 3, 3]`` by a convolution that sees them in one line, and then one after the other."""

    def __init__(self, *, time_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_first = time_first
        self.look, self.gru, self.head = nn.Conv2d(1, 2, 2), nn.GRU(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[:-3]
        if self.time_first:
            seen = (
                self.look(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (batch[1], batch[0])).transpose(0, 1)
            )
        else:
            seen = self.look(x.reshape(-1, 1, 3, 3)).reshape(*batch, 2, 2, 2)
        return self.head(self.gru(seen.flatten(-3))[0] if len(batch) == 2 else seen.flatten(-3)[..., :4])


def pictures(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, 1, 3, 3)}, batch)


@pytest.mark.parametrize("batch", [(2, 1, 3), (1, 1, 1), (2, 3), (3, 3), (1, 4)])
def test_a_model_that_makes_the_batch_one_axis_itself(batch: tuple[int, ...]) -> None:
    model, td = Encodes(), pictures(*batch)
    seen = model.look(td["input"].reshape(-1, 1, 3, 3)).reshape(*batch, 2, 2, 2).detach()
    for target, lead in ((Target("output", 1), ()), (Target("output", "all"), (3,))):
        for method in (
            LRP("lstm_lrp", target=target, ledger=True, input_modules=["look"], values=True),
            IntegratedGradients(target, steps=2, input_modules=["look"], values=True),
            Ablation(target, input_modules=["look"], values=True, use_inputs=False),
        ):
            out = method.wrap(model)(td.clone())
            assert out["attr", "look"].shape == (*batch, *lead, 2, 2, 2)
            torch.testing.assert_close(out["value", "look"], seen)
    out = GradCAM("look", Target("output", 1)).wrap(model)(td.clone())
    assert out["attr", "input"].shape == td["input"].shape
    both = TensorDict({"clean": td.to_tensordict(), "corrupt": pictures(*batch).to_tensordict()}, batch)
    out = Patching("exact", Target("output", 1), at="look", axis=1).wrap(model)(both)
    assert out["attr", "look"].shape == (*batch, 2)


def test_what_belongs_to_each_element_is_its_own() -> None:
    model, td = Encodes(), pictures(2, 1, 3)
    one = GradientTimesInput(Target("output", "argmax"), input_modules=["look"]).wrap(model)
    found, flat = one(td.clone())["attr", "look"], one(td.reshape(-1).clone())["attr", "look"]
    torch.testing.assert_close(found, flat.reshape(2, 1, 3, 2, 2, 2))


@pytest.mark.parametrize("use_inputs", [True, False])
def test_elements_in_another_order_are_not_taken_for_others(use_inputs: bool) -> None:
    method = GradientTimesInput(Target("output", 1), input_modules=["look"], use_inputs=use_inputs)
    explained = method.wrap(Encodes(time_first=True))
    for batch in ((2, 3), (3, 3)):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"axes of the batch \[\d, 3\] are one, in another order"):
                explained(pictures(*batch))
    explained(pictures(1, 3))  # there is but one order


def test_units_of_each_element_are_not_those_of_another() -> None:
    """Of a layer that a target passes, elements may lie in any order, unless each has units of its own."""
    model, td = Encodes(time_first=True), pictures(2, 3)
    td["unit"] = torch.randint(2, (2, 3))
    for units in ("top:1", Key("unit"), torch.zeros(2, 3, dtype=torch.int64)):
        explained = GradientTimesInput(Through(Target("output", 1), "look", units, axis=1)).wrap(model)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"module 'look' .* are one, in another order"):
                explained(td.clone())
    each = GradientTimesInput(Through(Target("output", 1), "look", "all", axis=1)).wrap(model)(td.clone())
    whole = GradientTimesInput(Target("output", 1)).wrap(model)(td.clone())
    torch.testing.assert_close(each["attr", "input"].sum(2), whole["attr", "input"])


def test_as_many_variants_as_features_tell_nothing_of_the_axes() -> None:
    """Of a batch without axes: variants side by side have one, of whatever size."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh()).sum(-2)

    model = Tokens()
    explained = Patching("exact", Target("output", 0), edges=[("first", "last:input")], axis=1).wrap(model)
    clean, corrupt = torch.randn(5, 4), torch.randn(5, 4)
    td = TensorDict({"clean": {"input": clean}, "corrupt": {"input": corrupt}}, [])
    for _ in range(2):
        found = explained(td.clone())["edge", "first", "last:input"]
        wanted = (model.first(clean) - model.first(corrupt)) @ model.last.weight[0]
        torch.testing.assert_close(found, wanted.detach())


def test_a_batch_of_one_element_says_nothing_of_a_larger_one() -> None:
    explained, plain = (
        GradientTimesInput(Target("output", 0), use_inputs=False, input_modules=["emb"]).wrap(
            Reads(time_first=first)
        )
        for first in (True, False)
    )
    for shape in ((1, 1), (5, 5)):
        torch.testing.assert_close(
            explained(tokens(*shape))["attr", "emb"], plain(tokens(*shape))["attr", "emb"]
        )


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (1, 1), (3, 3)])
def test_methods_without_a_backward_pass_look_too(shape: tuple[int, int]) -> None:
    found, plain = (
        Activations(use_inputs=False, input_modules=["emb"]).wrap(Reads(time_first=first))
        for first in (True, False)
    )
    for _ in range(2):
        torch.testing.assert_close(found(tokens(*shape))["attr", "emb"], plain(tokens(*shape))["attr", "emb"])
    with pytest.raises(ValueError, match=r"module 'look' .* are one, in another order"):
        Activations(input_modules=["look"]).wrap(Encodes(time_first=True))(pictures(2, 3))


class Centred(nn.Module):
    """Each element less the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        found = self.units(x)
        return found - found.mean(0)


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_as_many_elements_as_units_that_depend_on_each_other(unit: int) -> None:
    """What one element reads of all the others lies along a unit, and is more than what it reads of its own."""
    net, td = Centred(), TensorDict(input=torch.randn(3, 4, dtype=torch.float64), batch_size=[3])
    target = Computed(lambda outputs, inputs: outputs["output"][..., unit].square())
    found = GradientTimesInput(target, input_modules=["units"]).wrap(net)(td.clone())["attr", "units"]
    units = net.units(td["input"]).detach().requires_grad_()
    explained = (units - units.mean(0))[:, unit].square().sum()
    torch.testing.assert_close(found, units.detach() * torch.autograd.grad(explained, units)[0])
