"""Patching single operations: effects of what is no module, approximated and patched."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.attribution import Gradient, Patching
from tdhook.evaluation import compare_effects
from tdhook.selectors import First, Last, Name, Op, Type

EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Attending(nn.Module):
    """Attention whose weights are no module, and two activations that are none."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)["answer"]

    def parts(self, x: Tensor, **put: Tensor) -> dict[str, Tensor]:
        """All values by name, with others put in place of some."""
        found: dict[str, Tensor] = {}

        def one(name: str, value: Tensor) -> Tensor:
            found[name] = put.get(name, value)
            return found[name]

        first = one("first", torch.tanh(self.query(x)))
        scores = first @ self.key(x).transpose(-1, -2)
        weights = one("weights", scores.softmax(-1))
        last = one("last", torch.tanh(weights @ self.value(x)))
        found["answer"] = self.head(last)[..., -1, :]
        return found


PLACES = {"first": First(Op("tanh")), "weights": Op("softmax"), "last": Last(Op("tanh"))}
WHICH = 1


def model() -> Attending:
    torch.manual_seed(0)
    return Attending().double().requires_grad_(False)


def two(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    clean, corrupt = torch.randn(2, *batch, 5, 4).double()
    sides = {"clean": TensorDict({"x": clean}, batch), "corrupt": TensorDict({"x": corrupt}, batch)}
    return TensorDict(sides, batch)


def sides(patch: str, td: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, int]:
    """The run that is patched and the other one, the input of the first, and the sign of an effect."""
    here = "corrupt" if patch == "clean" else "clean"
    runs = {side: model().parts(td[side, "x"]) for side in ("clean", "corrupt")}
    return runs[here], runs[patch], td[here, "x"], 1 if patch == "clean" else -1


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_exact_effects_are_those_of_other_outputs(patch: str) -> None:
    td = two(3)
    here, there, x, sign = sides(patch, td)
    found = Patching("exact", Target("output", WHICH), at=list(PLACES.values()), axis=1, patch=patch)
    found = found.wrap(model(), in_keys=["x"])(td.clone())
    for name, place in PLACES.items():
        effects = found["attr", repr(place)]
        assert effects.shape == (3, 5)
        for token in range(5):
            put = here[name].clone()
            put[:, token] = there[name][:, token]
            changed = model().parts(x, **{name: put})["answer"]
            expected = sign * (changed - here["answer"])[:, WHICH]
            torch.testing.assert_close(effects[:, token], expected, **EXACT)


@pytest.mark.parametrize("patch", ["clean", "corrupt"])
def test_approximated_effects_are_differences_times_gradients(patch: str) -> None:
    td = two(3)
    _, _, x, sign = sides(patch, td)
    parts = model().requires_grad_().parts(x)
    here, there, _, _ = sides(patch, td)
    grads = torch.autograd.grad(parts["answer"][:, WHICH].sum(), [parts[name] for name in PLACES])
    found = Patching("atp", Target("output", WHICH), at=list(PLACES.values()), patch=patch)
    found = found.wrap(model(), in_keys=["x"])(td.clone())
    for (name, place), grad in zip(PLACES.items(), grads, strict=True):
        expected = sign * (there[name] - here[name]) * grad
        torch.testing.assert_close(found["attr", repr(place)], expected, **EXACT)


@pytest.mark.parametrize("by", ["atp", "relp", "eap_ig", "by_share", "exact"])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_any_method_and_batch_shape_beside_modules_and_keys(by: str, batch: tuple[int, ...]) -> None:
    td, at = two(*batch), [PLACES["weights"], "value", "x", PLACES["last"]]
    made = Patching(by, Target("output", "argmax"), at=at, axis=1).wrap(model(), in_keys=["x"])
    found = made(td.clone())
    flat = made(td.reshape(-1) if batch else td.unsqueeze(0))
    names = [repr(PLACES["weights"]), "value", "x", repr(PLACES["last"])]
    assert sorted(found["attr"].keys()) == sorted(names)
    assert {("attr", name) for name in names} <= set(made.out_keys)
    for name in names:
        assert found["attr", name].shape == (*batch, 5)
        expected = flat["attr", name].reshape(found["attr", name].shape)
        torch.testing.assert_close(found["attr", name], expected, rtol=1e-8, atol=1e-9)


def test_what_is_behind_all_of_it_has_all_of_the_change() -> None:
    for by in ("by_share", "exact", LRP("deeplift", baseline=0.0)):
        made = Patching(by, Target("output", 0), at=PLACES["last"], axis=()).wrap(model(), in_keys=["x"])
        found = made(two(6))
        effects = found["attr", repr(PLACES["last"])]
        torch.testing.assert_close(effects, found["ledger", "target"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("by", ["atp", "epsilon", "exact"])
def test_several_outputs(by: str) -> None:
    td, place = two(2, 3), PLACES["weights"]
    several = Patching(by, Target("output", "all"), at=place, axis=1).wrap(model(), in_keys=["x"])(td.clone())
    for output in range(3):
        one = Patching(by, Target("output", output), at=place, axis=1)
        one = one.wrap(model(), in_keys=["x"])(td.clone())
        effects = several["attr", repr(place)][:, :, output]
        torch.testing.assert_close(effects, one["attr", repr(place)], **EXACT)


def test_one_of_several_by_where_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Attending(), Attending()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    torch.manual_seed(0)
    both, td, target = Twice().double(), two(3), Target("output", 0)
    place = Op("softmax") & Name("two")
    found = Patching("exact", target, at=place, axis=()).wrap(both, in_keys=["x"])(td.clone())
    alone = Patching("exact", target, at=Op("softmax"), axis=()).wrap(both.two, in_keys=["x"])(td.clone())
    torch.testing.assert_close(found["attr", repr(place)], alone["attr", repr(Op("softmax"))], **EXACT)
    with pytest.raises(ValueError, match=r"means 2 operations \(softmax in 'one', softmax in 'two'\)"):
        Patching("atp", target, at=Op("softmax")).wrap(both, in_keys=["x"])(td.clone())


def test_approximation_beside_truth() -> None:
    at = list(PLACES.values())
    methods = {"AtP": Patching(Gradient(Target("output", 0)), at=at, axis=1)}
    kinds = {"weights": [PLACES["weights"]], "last": [PLACES["last"]]}
    found = compare_effects(methods, model(), two(8), kinds=kinds, in_keys=["x"])
    assert found.of("AtP", "last").pearson == pytest.approx(1.0)  # behind it the model is linear
    assert found.of("AtP", "weights").pearson < 0.999


@pytest.mark.parametrize("by", ["atp", "exact"])
def test_compiled_equals_eager(by: str) -> None:
    options = {"at": PLACES["weights"], "axis": 1}
    eager = Patching(by, Target("output", 0), **options).wrap(model(), in_keys=["x"])(two(3))
    quickly = {"backend": "aot_eager"}
    compiled = Patching(by, Target("output", 0), compile=quickly, **options)
    compiled = compiled.wrap(model(), in_keys=["x"])(two(3))
    key = ("attr", repr(PLACES["weights"]))
    torch.testing.assert_close(compiled[key], eager[key], **EXACT)


def test_places_that_are_none() -> None:
    with pytest.raises(TypeError, match="selects modules: name the path of one, or select an operation"):
        Patching("atp", at=Type(nn.Linear))
    with pytest.raises(TypeError, match="edges begin at modules and keys"):
        Patching("atp", edges=[(Op("softmax"), "head:input")])  # type: ignore[list-item]
    for by in ("atp", "exact"):
        with pytest.raises(ValueError, match="the model performs no operation Op"):
            Patching(by, Target("output", 0), at=Op("relu")).wrap(model(), in_keys=["x"])(two(3))


def test_an_operation_without_the_batch_in_front() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x.movedim(0, 1)).movedim(1, 0).sum(1))

    made = Patching("atp", at=Op("tanh")).wrap(Turned().double(), in_keys=["x"])
    with pytest.raises(ValueError, match=r"in front of which are not the axes of the batch \[3\]"):
        made(two(3))


def test_nothing_is_left_behind() -> None:
    net, td = model(), two(3)
    before = net(td["clean", "x"])
    for by in ("atp", "exact"):
        made = Patching(by, Target("output", 0), at=list(PLACES.values()), axis=()).wrap(net, in_keys=["x"])
        first, again = made(td.clone()), made(td.clone())
        for key in map(repr, PLACES.values()):
            torch.testing.assert_close(first["attr", key], again["attr", key], **EXACT)
    assert torch.equal(net(td["clean", "x"]), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
