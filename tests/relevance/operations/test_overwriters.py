"""Modules and autograd functions that run as one and overwrite their argument, beside the same ones that do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule, GammaRule, PassRule
from tdhook.selectors import Type

from .checks import TINY, around, assert_balanced, assert_same, every_flow, explained, plainly


class Centred(torch.autograd.Function):
    """``relu(x - 0.5)``, which leaves ``x - 0.5`` in its argument and says nothing of it."""

    @staticmethod
    def forward(ctx, x, overwrites):
        centred = x.sub_(0.5) if overwrites else x - 0.5
        ctx.save_for_backward(centred > 0)
        return centred.relu()

    @staticmethod
    def backward(ctx, grad):
        (above,) = ctx.saved_tensors
        return grad * above, None


class Sneaks(torch.autograd.Function):
    """Writes a value to a place of its argument, as solvers of torchdiffeq do, so that torch does not count it."""

    @staticmethod
    def forward(ctx, x, value):
        x.data[:, 0] = value
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, grad[:, 0]


class Unit(nn.Module):
    """``2 x``, in place or not; or beside the tape."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            return x.mul_(2)
        if self.how == "beside":
            with torch.no_grad():
                x.add_(1)
            return x * 2
        return (x + 1) * 2 if self.how == "added" else x * 2


@every_flow
@pytest.mark.parametrize("baseline", [None, 0.3])
def test_an_autograd_function(flow: str, baseline: float | None) -> None:
    against = {} if baseline is None else {"baseline": baseline}
    found = []
    for overwrites in (False, True):
        model, x = around(lambda h, overwrites=overwrites: Centred.apply(h, overwrites) * 2)
        td, module = explained(model, x, flow, **against)
        assert_balanced(td, module)
        assert torch.equal(td["output"], plainly(model, x))
        found += [td["attr", "input"], explained(model, x, flow, ledger=False, **against)[0]["attr", "input"]]
    assert found[0].abs().max() > 0.01
    for other in found[1:]:
        assert_same(found[0], other)


@every_flow
@pytest.mark.parametrize("rule", [EpsilonRule(1e-12), PassRule()], ids=repr)
@pytest.mark.parametrize("hows", [("plain", "in place"), ("added", "beside")])
def test_a_module_as_one_unit(flow: str, rule, hows: tuple[str, str]) -> None:
    found = []
    for how in hows:
        model, x = around(Unit(how))
        td, module = explained(model, x, flow, [(Type(Unit), rule), *TINY])
        assert_balanced(td, module)
        assert torch.equal(td["output"], plainly(model, x))
        found.append(td["attr", "input"])
    assert_same(*found)


@every_flow
def test_who_reads_the_argument_afterwards_reads_what_was_written(flow: str) -> None:
    found = []
    for how in ("plain", "in place"):
        unit = Unit(how)

        def read_twice(h: Tensor, unit=unit, how=how) -> Tensor:
            made = unit(h)
            return made + (h if how == "in place" else made).sin()

        model, x = around(read_twice)
        td, module = explained(model, x, flow, [(Type(Unit), EpsilonRule(1e-12)), *TINY])
        assert_balanced(td, module)
        assert torch.equal(td["output"], plainly(model, x))
        found.append(td["attr", "input"])
    assert_same(*found)


@every_flow
def test_what_is_overwritten_without_being_counted_is_refused_against_a_baseline(flow: str) -> None:
    model, x = around(lambda h: Sneaks.apply(torch.zeros_like(h), h[:, 1] * 2))
    assert_balanced(*explained(model, x, flow))
    with pytest.raises(NotImplementedError, match=r"`Sneaks` overwrites an argument.*give the module"):
        explained(model, x, flow, baseline=0.3)


class Hides(nn.Module):
    """Overwrites its argument where no derivative sees it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "without gradients":
            with torch.no_grad():
                x.sub_(x.max())
        elif self.how == "detached":
            x.detach()[:, 0] = 0.0
        elif self.how == "assigned":
            x.data = x.data.clamp(min=0.0)
        else:
            x.data.clamp_(min=0.0)
        return x * x


@every_flow
@pytest.mark.parametrize("how", ["without gradients", "detached", "as data", "assigned"])
def test_what_a_model_overwrites_off_the_tape_is_refused(how: str, flow: str) -> None:
    """Derivatives are those of values that are no longer there; torch does not notice."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), Hides(how), nn.Linear(4, 2)).double()
    td = TensorDict({"input": torch.randn(3, 4).double()}, [3])
    with pytest.raises(
        NotImplementedError, match="overwrites off the tape what depends on the inputs, in module `1`"
    ):
        LRP("epsilon", target=Target("output", 0), flow=flow).wrap(net)(td)


@every_flow
@pytest.mark.parametrize("baseline", [None, 0.3])
def test_what_a_unit_leaves_in_its_argument_is_no_value_to_read(flow: str, baseline: float | None) -> None:
    """The tape says of it what it was before."""
    unit = Unit("beside")
    model, x = around(lambda h: unit(h) + h)
    against = {} if baseline is None else {"baseline": baseline}
    with pytest.raises(
        NotImplementedError, match="`Unit` runs as one and overwrites an argument, which is read"
    ):
        explained(model, x, flow, [(Type(Unit), EpsilonRule()), *TINY], **against)


class Puts(nn.Module):
    """Changes a list or dictionary that it is given."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, given: list[Tensor] | dict[str, Tensor], **kwargs: list[Tensor]) -> Tensor:
        values = given if isinstance(given, list) else list(given.values())
        made = values[0] * 2
        if self.how == "appended":
            given.append(made)
        elif self.how == "assigned":
            given["first"] = made
        elif self.how == "popped":
            given.pop()
        else:
            kwargs["others"][0] = made
        return made


PUTS = {
    "appended": lambda unit, h: [given := [h], unit(given)],
    "popped": lambda unit, h: [given := [h, h.sin()], unit(given)],
    "assigned": lambda unit, h: [given := {"first": h}, unit(given)],
    "by name": lambda unit, h: [others := [h], unit([h], others=others)],
}


@pytest.mark.parametrize("how", PUTS)
def test_a_unit_that_changes_what_holds_its_arguments_is_refused(how: str) -> None:
    """Whoever reads that would read what was there before."""
    unit = Puts(how)
    model, x = around(lambda h: PUTS[how](unit, h)[-1])
    message = "Puts changes a list or dictionary that it is given"
    with pytest.raises(NotImplementedError, match=message):
        explained(model, x, "gradient", [(Type(Puts), EpsilonRule()), *TINY])
    explained(model, x, "gradient")
    with EpsilonRule().register(unit), pytest.raises(NotImplementedError, match=message):
        PUTS[how](unit, x.clone().requires_grad_())


@pytest.mark.parametrize("rule", [EpsilonRule(), GammaRule(), PassRule()], ids=repr)
def test_a_rule_on_a_module_alone_that_overwrites_its_argument(rule) -> None:
    leaf = torch.randn(2, 6, requires_grad=True)
    with rule.register(unit := Unit("in place")):
        if isinstance(rule, PassRule):
            torch.autograd.grad(unit(leaf * 1).sum(), leaf)
            return
        with pytest.raises(
            NotImplementedError, match=r"Unit overwrites what it is given, where .* is registered"
        ):
            unit(leaf * 1)


class Doubles(nn.Module):
    """Twice its argument, which it overwrites uncounted; or, off the tape, what it has made of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "as data":
            x.data *= 2
            return x + 0.0
        if self.how == "by numpy":
            x.detach().numpy()[:] *= 2
            return x + 0.0
        if self.how == "given":
            with torch.no_grad():
                x.mul_(2)
            return x + 0.0
        z = x + 0.0
        if self.how == "without gradients":
            with torch.no_grad():
                z.mul_(2)
        elif self.how == "detached":
            z.detach().mul_(2)
        return 2 * z if self.how == "plain" else z


@every_flow
@pytest.mark.parametrize("how", ["as data", "by numpy", "given", "without gradients", "detached"])
def test_a_unit_that_overwrites_off_the_tape(how: str, flow: str) -> None:
    """A rule that asks for no derivative of it has all it needs."""
    found = []
    for each in ("plain", how):
        model, x = around(Doubles(each))
        td, module = explained(model, x, flow, [(Type(Doubles), PassRule()), *TINY])
        assert_balanced(td, module)
        assert torch.equal(td["output"], plainly(model, x))
        found.append(td["attr", "input"])
    assert_same(*found)
    refused = (
        "overwrites off the tape what depends on the inputs|overwrites an argument where no derivative sees"
    )
    with pytest.raises(NotImplementedError, match=refused):
        explained(*around(Doubles(how)), flow, [(Type(Doubles), EpsilonRule()), *TINY])


@every_flow
@pytest.mark.parametrize("how", ["as data", "by numpy"])
def test_a_unit_that_overwrites_uncounted_for_the_first_time_in_a_later_call(how: str, flow: str) -> None:
    unit = Doubles("out of place")
    model, x = around(unit)
    module = LRP([(Type(Doubles), PassRule()), *TINY], target=Target("output", 0), flow=flow).wrap(model)
    td = TensorDict({"input": x}, [len(x)])
    module(td.copy())
    unit.how = how
    found = module(td.copy())["attr", "input"]
    unit.how = "plain"
    assert_same(found, module(td.copy())["attr", "input"])


@every_flow
@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_a_table_that_is_computed_is_not_shortened_unseen(function, flow: str) -> None:
    places = torch.tensor([[0, 1], [1, 1], [0, 0]])
    model, x = around(lambda h: function(places, h, max_norm=0.5).reshape(3, -1)[:, :6])
    with pytest.raises(NotImplementedError, match="with max_norm overwrites its table"):
        explained(model, x, flow)
    model, x = around(lambda h: function(places, h).reshape(3, -1)[:, :6])
    assert_balanced(*explained(model, x, flow))


@every_flow
def test_state_and_copies_may_be_overwritten_off_the_tape(flow: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0))
                x.detach().clone().zero_()
            least = x.detach().amin(1, keepdim=True)
            least -= 1.0
            return x * 2

    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 2)
    td = TensorDict({"input": torch.randn(3, 4).double()}, [3])
    found, plain = (
        LRP("epsilon", target=Target("output", 0), flow=flow).wrap(nn.Sequential(first, unit, last).double())(
            td.clone()
        )
        for unit in (Counts(), Unit("out of place"))
    )
    torch.testing.assert_close(found["attr", "input"], plain["attr", "input"])
