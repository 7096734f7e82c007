"""Several targets at once: one batched backward pass gives what a loop over the targets gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Contrast, Key, Target, preset
from tdhook.composites import PRESETS
from tdhook.passes import backward
from tdhook.passes.backward import PullBack
from tdhook.rules import EpsilonRule
from tdhook.targets import Seeds

COUNT = 4


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, COUNT)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        h = F.gelu(self.first(x))
        return self.last(h + self.inner(self.norm(h)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, COUNT)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.into(x)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.out(F.silu(h).mean(-2))


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, COUNT))


def cnn():
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.AvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, COUNT)).eval()


MODELS = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 8, 8)),
    "residual": (Residual, (6,)),
    "attention": (Attention, (5, 4)),
}


def case(name, *batch):
    make, shape = MODELS[name]
    model = TensorDictModule(make().double(), ["x"], ["q"])
    return model, TensorDict(x=torch.randn(*batch, *shape).double(), batch_size=batch)


def composite(name):
    return preset(name, **({"low": -4.0, "high": 4.0} if name == "epsilon_gamma_box" else {}))


def explained(model, td, pairs, target, **arguments):
    with LRP(pairs, target=target, on_unmatched="ignore", **arguments).prepare(model) as module:
        return module(td.clone())["attr", "x"], module


def one_by_one(model, td, pairs, targets, **arguments):
    relevance = [explained(model, td, pairs, target, **arguments)[0] for target in targets]
    return torch.stack(relevance, td.batch_dims)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PRESETS)
def test_each_output_under_every_preset(name, model):
    model, td = case(model, 3)
    against = {"baseline": 0.0} if name.startswith("deeplift_") else {}
    found, module = explained(model, td, composite(name), Target("q", "all"), **against)
    assert module._setup.pull_back._batches, "the backward pass was not batched"
    loop = one_by_one(model, td, composite(name), [Target("q", i) for i in range(COUNT)], **against)
    assert found.shape == (3, COUNT, *td["x"].shape[1:])
    torch.testing.assert_close(found, loop, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_lists_and_contrasts_in_both_flows(model, batch, flow):
    model, td = case(model, *batch)
    td["chosen"] = torch.randint(COUNT, batch)

    def both(target, *targets):
        found = explained(model, td, "epsilon_plus", target, flow=flow)[0]
        loop = [explained(model, td, "epsilon_plus", one, flow=flow)[0] for one in targets]
        torch.testing.assert_close(found, torch.stack(loop, len(batch)), rtol=1e-9, atol=1e-9)

    best, chosen = Target("q", "argmax"), Target("q", Key("chosen"))
    each = [Target("q", i) for i in range(COUNT)]
    both(Target("q", [2, "argmax", Key("chosen")]), each[2], best, chosen)
    both(Target("q", [1]), each[1])
    both(Contrast(best, Target("q", "all")), *(Contrast(best, one) for one in each))
    both(Contrast(Target("q", [0, 3]), chosen), Contrast(each[0], chosen), Contrast(each[3], chosen))


def test_a_contrast_of_one_output_with_each_of_another():
    model = TensorDictModule(nn.Linear(6, 2).double(), ["x"], ["v"])
    heads = TensorDictModule(nn.Linear(6, COUNT).double(), ["x"], ["q"])
    both = TensorDictSequential(model, heads)
    td = TensorDict(x=torch.randn(3, 6).double(), batch_size=[3])
    found = explained(both, td, "epsilon_plus", Contrast(Target("v", 1), Target("q", "all")))[0]
    loop = one_by_one(
        both, td, "epsilon_plus", [Contrast(Target("v", 1), Target("q", i)) for i in range(COUNT)]
    )
    torch.testing.assert_close(found, loop, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_masked_outputs_have_no_relevance(flow):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, COUNT)

        def forward(self, x):
            return self.fc(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    model = TensorDictModule(Masked().double(), ["x"], ["q"])
    td = TensorDict(x=torch.randn(3, 6).double(), batch_size=[3])
    found = explained(model, td, "epsilon_plus", Target("q", "all"), flow=flow)[0]
    assert found.isfinite().all() and not found[:, 1].any()
    for i in (0, 2, 3):
        alone = explained(model, td, "epsilon_plus", Target("q", i), flow=flow)[0]
        torch.testing.assert_close(found[:, i], alone, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="the value of the target 'q' is NaN or infinite"):
        explained(model, td, "epsilon_plus", Target("q", [0, 1]), flow=flow)


@pytest.mark.parametrize("budget, passes", [(0, COUNT), (1, COUNT), (2**30, 1)])
def test_the_budget_says_how_many_share_a_pass(budget, passes, monkeypatch):
    model, td = case("mlp", 3)
    calls = []
    pull = backward._pull
    monkeypatch.setattr(backward, "_pull", lambda *a, **k: calls.append(1) or pull(*a, **k))
    found = explained(model, td, "epsilon_plus", Target("q", "all"), memory_budget=budget)[0]
    assert len(calls) == passes
    monkeypatch.undo()
    torch.testing.assert_close(found, explained(model, td, "epsilon_plus", Target("q", "all"))[0])


def test_the_last_pass_may_have_fewer():
    model, td = case("mlp", 3)
    largest = 3 * 9 * 8  # the hidden layer of three batch elements, in bytes
    target = Target("q", [0, 1, 2, 3, 0])
    found = explained(model, td, "epsilon_plus", target, memory_budget=4 * largest * 3)[0]
    torch.testing.assert_close(found, explained(model, td, "epsilon_plus", target)[0])


class Once(torch.autograd.Function):
    """Cannot be batched: its backward pass looks at a value."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(-1) * 2

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(-1) * 2 if float(grad.sum()) < 1e9 else grad


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, COUNT)

    def forward(self, x):
        return self.fc(Once.apply(x))


def test_what_cannot_be_batched_is_looped_over():
    model = TensorDictModule(Stubborn().double(), ["x"], ["q"])
    td = TensorDict(x=torch.randn(3, 6).double(), batch_size=[3])
    found, module = explained(model, td, "epsilon_plus", Target("q", "all"))
    assert not module._setup.pull_back._batches
    loop = one_by_one(model, td, "epsilon_plus", [Target("q", i) for i in range(COUNT)])
    torch.testing.assert_close(found, loop)


def test_no_targets_at_all():
    from tdhook.targets import Seeds

    x = torch.randn(3, 2, requires_grad=True)
    z = x * 2
    (found,) = PullBack(2**30)(Seeds(["z"], [z], [torch.zeros(0, 3, 2)], 0), [x])
    assert found.shape == (0, 3, 2)


@pytest.mark.parametrize("target", [Target("q", "all"), Contrast(Target("q", "argmax"), Target("q", "all"))])
def test_a_ledger_of_several_targets(target):
    model, td = case("residual", 3)
    with LRP("epsilon_plus", target=target, ledger=True).prepare(model) as module:
        td = module(td)
    assert td["ledger", "gap"].shape == (3, COUNT)
    assert td["ledger", "gap"].abs().max() < 1e-9


class OutOfMemory(EpsilonRule):
    """Runs out of memory where more than so many targets are explained at once."""

    fits = COUNT
    passes = 0

    def propagate(self, step, relevance):
        OutOfMemory.passes += 1
        batched = torch._C._functorch.is_batchedtensor(relevance[0])
        together = torch._C._functorch.get_unwrapped(relevance[0]).shape[0] if batched else 1
        if together > OutOfMemory.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().propagate(step, relevance)


def test_an_error_of_memory_makes_fewer_targets_at_once_in_that_call_alone():
    model = TensorDictModule(nn.Linear(6, COUNT).double(), ["x"], ["q"])
    td = TensorDict(x=torch.randn(3, 6).double(), batch_size=[3])
    module = LRP([(nn.Linear, OutOfMemory())], target=Target("q", "all")).wrap(model)
    whole = module(td.clone())["attr", "x"]
    OutOfMemory.fits, OutOfMemory.passes = 2, 0
    torch.testing.assert_close(module(td.clone())["attr", "x"], whole)
    assert OutOfMemory.passes > 2
    OutOfMemory.fits, OutOfMemory.passes = COUNT, 0
    torch.testing.assert_close(module(td.clone())["attr", "x"], whole)
    assert OutOfMemory.passes == 1
    OutOfMemory.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        module(td.clone())
    OutOfMemory.fits = COUNT
    torch.testing.assert_close(module(td.clone())["attr", "x"], whole)


def test_a_seed_of_another_shape_raises_and_is_not_summed():
    x = torch.ones(2, 3, requires_grad=True)
    z = 2 * x
    for grad in (torch.ones(5, 2, 3), torch.ones(3)):
        with pytest.raises(RuntimeError, match="Mismatch in shape"):
            PullBack()(Seeds(["z"], [z], [grad]), [x])


def test_what_is_not_on_the_tape_raises():
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        PullBack()(Seeds(["z"], [2 * x], [torch.ones(2, 3)]), [torch.ones(2, 3)])
