"""An explained module lasts and works in every mode."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from explained_models import EXACT, chain, explain, mlp
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.models.families import Linear
from tdhook.rules import (
    FlatRule,
    IgnoreRule,
)
from tdhook.selectors import First


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("composite", [EXACT, [(First(Linear), FlatRule()), *EXACT]], ids=["plain", "traced"])
def test_inside_modes_without_gradients(mode, composite):
    model, td = (
        mlp(),
        TensorDict(input=torch.randn(5, 3).double(), action=torch.arange(5) % 4, batch_size=[5]),
    )
    method = LRP(composite, target=Target("output", "action"))
    outside = method.wrap(model)(td.clone())
    with mode():
        made_here = td.clone()
        inside = method.wrap(model)(made_here)
        assert not torch.is_grad_enabled()
    for key in ("output", ("attr", "input")):
        assert torch.equal(inside[key], outside[key])
        assert not inside[key].requires_grad


def test_what_comes_back_is_detached_and_the_graph_is_freed():
    model, seen = mlp(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    x = torch.randn(5, 3).double().requires_grad_()
    td = explain(model, TensorDict(input=x, batch_size=[5]), attribute="all", input_modules=["0"])
    assert td["input"] is x and x.grad is None
    assert not any(value.requires_grad for key, value in td.items(True, True) if key != "input")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    gc.collect()
    assert seen and seen[0]() is None, "an activation is still alive"


@pytest.mark.parametrize("composite, baseline", [("epsilon", None), ("attn_lrp", None), ("deeplift", 0.0)])
@pytest.mark.parametrize("ledger", [False, True])
def test_no_cycles_of_references_are_left(composite, baseline, ledger):
    """What a call has made is given back at once, and not when Python next looks through all objects."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(18, 2)).eval()
    method = LRP(composite, target=Target("output", 0), baseline=baseline, ledger=ledger)
    explained = method.wrap(model)
    td = TensorDict({"input": torch.randn(2, 3, 6)}, [2])
    for _ in range(3):
        explained(td)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        explained(td)
        gc.collect()
        left = [x for x in gc.garbage if str(getattr(x, "__module__", "")).startswith(("torch", "tdhook"))]
        assert not left
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_inputs_without_gradient_get_no_entry_and_say_so_once(dtype):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, mask):
            return self.fc(x) * mask

    model = TensorDictModule(Masked(), ["x", "mask"], ["out"])
    td = TensorDict(x=torch.randn(5, 3), mask=torch.ones(5, 2).to(dtype), batch_size=[5])
    explained = LRP(EXACT).wrap(model)
    with pytest.warns(
        UserWarning, match=f"input 'mask' is {dtype}, which has no gradient: it gets no relevance entry"
    ):
        out = explained(td.clone())
    assert set(out["attr"].keys()) == {"x"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(td.clone())
        explained(x=td["x"], mask=td["mask"])


@pytest.mark.parametrize("frozen", [False, True])
def test_tokens_are_explained_at_their_embedding(frozen):
    model = TensorDictSequential(
        TensorDictModule(nn.Embedding(7, 3), ["token"], ["embedded"]),
        TensorDictModule(mlp().float(), ["embedded"], ["q"]),
    ).requires_grad_(not frozen)
    td = TensorDict(token=torch.arange(5), batch_size=[5])
    path = next(name for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    method = {"composite": [*EXACT, (nn.Embedding, IgnoreRule())], "target": "q"}
    with pytest.warns(UserWarning, match="input 'token' is torch.int64"):
        by_path = explain(model, td.clone(), **method, input_modules=[path])["attr", path]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_key = explain(model, td.clone(), **method, attribute=["embedded"])["attr", "embedded"]
        every = explain(model, td.clone(), **method, attribute="all")["attr", "embedded"]
    assert by_path.shape == (5, 3) and torch.equal(by_key, by_path) and torch.equal(every, by_path)


@pytest.mark.parametrize(
    "make", [mlp, chain, lambda: nn.Linear(3, 2).double()], ids=["plain", "tensordict", "layer"]
)
def test_a_wrapped_module_is_the_model(make):
    model = make()
    key = "obs" if isinstance(model, TensorDictSequential) else "input"
    explained = LRP(EXACT, target="q" if key == "obs" else "output").wrap(model)
    td = TensorDict({key: torch.randn(5, 3).double()}, batch_size=[5])
    before = explained(td.clone())

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    assert same(explained.state_dict(), model.state_dict())
    assert {id(p) for p in explained.parameters()} == {id(p) for p in model.parameters()}
    for clone in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        again = clone(td.clone())
        assert all(torch.equal(before[k], again[k]) for k in before.keys(True, True))
        assert same(clone.state_dict(), model.state_dict())
        with torch.no_grad():
            next(clone.parameters()).mul_(2)
        assert not same(clone.state_dict(), model.state_dict()), "a copy has parameters of its own"
        clone.load_state_dict(model.state_dict())
        torch.testing.assert_close(clone(td.clone())["attr"], before["attr"])
    other = make()
    explained.load_state_dict(other.state_dict())
    assert same(model.state_dict(), other.state_dict())
    explained.eval()
    assert not model.training and not any(m.training for m in model.modules())
    explained.train()
    assert all(m.training for m in model.modules())
    explained.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert explained(td.float())["attr", key].dtype == torch.float32


def test_a_wrapped_module_goes_into_a_sequence():
    explained = LRP(EXACT, target=Target("q", 0)).wrap(chain())
    model = TensorDictSequential(
        TensorDictModule(lambda x: 2 * x, ["raw"], ["obs"]),
        explained,
        TensorDictModule(lambda a: a.abs().argmax(-1), [("attr", "obs")], ["top"]),
    )
    assert model.in_keys == ["raw"]
    assert model(TensorDict(raw=torch.randn(5, 3).double(), batch_size=[5]))["top"].shape == (5,)


def test_a_prepared_module_ends_with_its_block():
    td = TensorDict(input=torch.randn(5, 3).double(), batch_size=[5])
    with LRP(EXACT).prepare(mlp()) as explained:
        explained(td)
    with pytest.raises(
        RuntimeError, match=r"ended with its `with` block; use `\.wrap\(module\)` for one that lasts"
    ):
        explained(td)
