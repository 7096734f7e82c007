"""Patching: what cannot be patched says so, and what cannot be told apart is patched one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from runs import (
    EXACT,
    Twice,
    network,
    reader,
    states,
    tokens,
    two,
)
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import (
    Ablation,
    Averaged,
    Gradient,
    IntegratedGradients,
    Noise,
    Patching,
)
from tdhook.targets import AtStep, Through


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Patching("atp"), "nothing is patched: name places"),
        (
            lambda: Patching("nothing", at="1"),
            "no coefficients are named 'nothing': there are atp, by_share, eap_ig, exact",
        ),
        (lambda: Patching("atp", at="1", patch="both"), "patch is 'clean' or 'corrupt'"),
        (lambda: Patching("atp", edges=[("1", "2")]), "ends at '2', .* write '2:input'"),
        (lambda: Patching("atp", at="1", axis=(), heads=2), "along the last of some axes; got heads=2"),
        (lambda: Patching("atp", at="1", heads=0), "heads are at least one"),
        (lambda: Patching(LRP("epsilon", ledger=True), at="1"), "leave out ledger"),
    ],
)
def test_what_cannot_be_made(make, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_methods_without_coefficients() -> None:
    for by in (Ablation(), Averaged(Gradient(), Noise(0.1, 2))):
        with pytest.raises(
            TypeError, match="gives no coefficients of activations; Gradient, IntegratedGradients"
        ):
            Patching(by, at="1")


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"at": "9"}, ValueError, "the model has no module '9'"),
        ({"at": "1", "axis": 0}, IndexError, r"axis=0 is no axis of parts of .*'batch', 6"),
        ({"at": "1", "axis": 2}, IndexError, "one of 1 to 1, or of -1 to -1"),
        ({"at": "1", "axis": (1, -1)}, IndexError, "names an axis of .* twice"),
        ({"at": "1", "heads": 4}, ValueError, "the axis of 6 of .* does not consist of 4 equal heads"),
        ({"edges": [("1", "4:input")]}, ValueError, r"joins shapes \[3, 6\] and \[3, 5\]"),
        ({"edges": [("3", "3:input")]}, ValueError, "there is no edge from '3' to '3:input'"),
    ],
)
def test_what_cannot_be_patched(options, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Patching("atp", Target("output", 0), **options).wrap(network())(states(3))


def test_a_target_that_is_no_value() -> None:
    through = Through(Target("output", 0), "1", units=0)
    with pytest.raises(ValueError, match="relevance through units is none: name the way by edges"):
        Patching("atp", through, at="0").wrap(network())(states(3))


def test_a_place_that_is_never_run() -> None:
    with pytest.raises(ValueError, match="there is nothing to patch at 'other': the model does not run it"):
        Patching("atp", Target("output", 0), at=["layer", "other"]).wrap(Twice().double())(states(3))


def test_a_place_that_is_run_in_one_run_alone() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else self.a(x)

    td = two(torch.ones(2, 4).double(), -torch.ones(2, 4).double(), [2])
    for by in ("atp", "exact"):
        with pytest.raises(
            ValueError, match="'b' was not run as often in the clean run as in the corrupt one"
        ):
            Patching(by, Target("output", 0), at=["a", "b"]).wrap(Some().double())(td.clone())


def test_sides_that_lack_something() -> None:
    made = Patching("atp", Target("output", 0), at="1").wrap(network())
    with pytest.raises(KeyError, match=r"key 'clean' is missing .* at \('clean', key\) and at"):
        made(TensorDict({"input": torch.zeros(2, 4).double()}, [2]))
    td = states(2)
    del td["corrupt", "input"]
    with pytest.raises(
        KeyError, match=r"key \('corrupt', 'input'\) is missing from the TensorDict, which has"
    ):
        made(td)
    td = two(torch.zeros(2, 4), torch.zeros(2, 4), [2], key="state")
    with pytest.raises(KeyError, match="key 'input' is missing from the TensorDict"):
        made(td)
    td = two(torch.zeros(2, 5), torch.zeros(2, 4), [2])
    with pytest.raises(
        ValueError, match=r"entry 'input' has the shape \[2, 5\] in the clean batch and \[2, 4\]"
    ):
        made(td)


def test_tokens_without_a_place_to_go_from() -> None:
    model, td = reader(), tokens(2)
    with pytest.raises(
        ValueError, match=r"IntegratedGradients looks at two inputs, .*input_modules=\[\.\.\.\]"
    ):
        Patching("eap_ig", Target("output", 0), at="blocks.0", use_inputs=False).wrap(model)(td.clone())
    by = LRP("relp", target=Target("output", 0), baseline=0.0, input_modules=["blocks.0"], use_inputs=False)
    with pytest.raises(ValueError, match=r"what is compared differs at .'words',. by itself"):
        Patching(by, at=["words"]).wrap(model)(td.clone())


def test_a_tolerance_is_not_one_of_coefficients() -> None:
    by = IntegratedGradients(Target("output", 0), tolerance=0.1)
    with pytest.raises(
        ValueError, match=r"a tolerance is of the sum over the inputs, .*: give steps instead"
    ):
        Patching(by, at="1").wrap(network())(states(2))


class Summing(nn.Module):
    """Linear, and each step sees all before it: ``[*batch, time, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).cumsum(-2))


@pytest.mark.parametrize("index", [1, "all"])
@pytest.mark.parametrize("step", [None, "last", 1])
@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_steps_that_see_each_other_are_patched_one_by_one(index, step, patch: str) -> None:
    td = two(torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double(), [2, 5])
    target = Target("output", index) if step is None else AtStep(Target("output", index), step)
    model = Summing().double()
    td.names = [None, "time"]
    exact, approximate = (
        Patching(by, target, at=["first", "input"], patch=patch).wrap(model)(td.clone())
        for by in ("exact", "atp")
    )
    for key in ("first", "input"):
        torch.testing.assert_close(exact["attr", key], approximate["attr", key], **EXACT)
    for axis in ((), 1):
        exact, approximate = (
            Patching(by, target, at=["first"], axis=axis, patch=patch).wrap(model)(td.clone())
            for by in ("exact", "atp")
        )
        torch.testing.assert_close(exact["attr", "first"], approximate["attr", "first"], **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_patches_do_not_look_at_each_other(seed) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.of(self.first(x))

        def of(self, hidden: Tensor) -> Tensor:
            return hidden.tanh() + 0.5 * hidden.tanh().roll(1, 0)

    torch.manual_seed(seed)
    model, clean, corrupt = Shifted().double(), torch.randn(3, 3).double(), torch.randn(3, 3).double()
    with torch.no_grad():
        into, put = model.first(corrupt), model.first(clean)
        expected = torch.zeros_like(into)
        for place in itertools.product(range(3), range(4)):
            changed = into.clone()
            changed[place] = put[place]
            expected[place] = (model.of(changed) - model.of(into))[:, 0].sum()
    found = Patching("exact", Target("output", 0), at="first").wrap(model)(two(clean, corrupt, [3]))
    torch.testing.assert_close(found["attr", "first"], expected, **EXACT)


def test_what_is_seen_at_one_place_is_not_taken_for_another() -> None:
    model, td = Summing().double(), two(torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double(), [2, 5])
    at, quickly = ["last", "first", "last:input"], {"backend": "aot_eager"}
    compiled = Patching("exact", Target("output", 1), at=at, compile=quickly)
    explained, approximate = compiled.wrap(model), Patching("atp", Target("output", 1), at=["last", "first"])
    for _ in range(3):
        found = explained(td.clone())
    expected = approximate.wrap(model)(td.clone())
    for key in ("last", "first"):
        torch.testing.assert_close(found["attr", key], expected["attr", key], **EXACT)


def test_elements_of_a_flat_batch_that_see_each_other() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last((h - h.mean(0)).tanh())

    model = Centred().double()
    td = two(torch.randn(4, 3).double(), torch.randn(4, 3).double(), [4])
    found = Patching("exact", Target("output", 1), at=["first"]).wrap(model)(td.clone())["attr", "first"]
    with torch.no_grad():
        clean, h = model.first(td["clean", "input"]), model.first(td["corrupt", "input"])

        def value(h: Tensor) -> Tensor:
            return model.last((h - h.mean(0)).tanh())[:, 1].sum()

        for element in range(4):
            for unit in range(4):
                changed = h.clone()
                changed[element, unit] = clean[element, unit]
                torch.testing.assert_close(found[element, unit], value(changed) - value(h), **EXACT)


def test_what_is_infinite_in_both_runs_has_no_effect() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.mask = nn.Linear(4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            scores = self.scores(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)
            return self.mask(scores).softmax(-1)

    torch.manual_seed(0)
    model, td = Masked().double(), states(3)
    for by in ("atp", "by_share", "exact"):
        found = Patching(by, Target("output", 0), at="mask").wrap(model)(td.clone())["attr", "mask"]
        assert found.isfinite().all() and (found[:, 2] == 0).all() and found[:, :2].all()


def test_what_is_infinite_in_one_run_alone_is_patched_and_not_approximated() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.mask = nn.Linear(4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            masked = (x[:, :1] > 0) & torch.tensor([False, False, True])
            return self.mask(self.scores(x).masked_fill(masked, -torch.inf)).softmax(-1)

    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(2, 4).double()
    td = two(x.abs(), -x.abs(), [2])
    for by in ("atp", "by_share"):
        with pytest.raises(ValueError, match="effects of 'mask' are not finite: its difference is infinite"):
            Patching(by, Target("output", 0), at="mask").wrap(model)(td.clone())
    exact = Patching("exact", Target("output", 0), at="mask").wrap(model)(td.clone())["attr", "mask"]
    whole = model.scores(-x.abs()).detach()
    without = whole[:, :2].softmax(-1)[:, 0] - whole.softmax(-1)[:, 0]
    torch.testing.assert_close(exact[:, 2], without, **EXACT)


@pytest.mark.parametrize("seed", [1, 15])
def test_steps_that_decide_by_all_are_patched_beside_none(seed: int) -> None:
    """Which row an element takes is told by the mean of all, which variants of a batch would share with it."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.decided(self.first(x)))

        def decided(self, h: Tensor) -> Tensor:
            return torch.where(h[:, :1] > h[:, :1].mean(), h, h.roll(1, 0))

    torch.manual_seed(seed)
    model = Deciding().double()
    td = two(torch.randn(2, 4).double(), torch.randn(2, 4).double(), [2])
    found = Patching("exact", Target("output", 1), at=["first"]).wrap(model)(td.clone())["attr", "first"]
    with torch.no_grad():
        clean, h = model.first(td["clean", "input"]), model.first(td["corrupt", "input"])
        for element, unit in itertools.product(range(2), range(3)):
            changed = h.clone()
            changed[element, unit] = clean[element, unit]
            gained = model.last(model.decided(changed)) - model.last(model.decided(h))
            torch.testing.assert_close(found[element, unit], gained[:, 1].sum(), **EXACT)


def test_nothing_is_left_behind() -> None:
    model, td = network(), states(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for by in ("atp", "epsilon", "eap_ig", "by_share", "exact"):
        Patching(by, Target("output", 0), at=["1", "2:input"]).wrap(model)(td.clone())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
