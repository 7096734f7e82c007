"""What the tests of bad input share: a model, what is wrong with it, and a look at what it was before."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.models.families import Linear
from tdhook.rules import EpsilonRule, FlatRule
from tdhook.selectors import First

HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)


class Unchanged:
    """Holds what a model and a TensorDict are, and says whether they still are."""

    def __init__(self, model: nn.Module, td: TensorDict | None = None) -> None:
        self.model, self.td = model, td
        self.before = self.look()

    def look(self):
        modules = dict(self.model.named_modules())
        seen = {
            "state_dict": {name: value.clone() for name, value in self.model.state_dict().items()},
            "tensors": {
                name: id(t) for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]
            },
            "requires_grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "grad": {name: p.grad is None for name, p in self.model.named_parameters()},
            "hooks": {name: {hook: dict(getattr(m, hook)) for hook in HOOKS} for name, m in modules.items()},
            "training": {name: m.training for name, m in modules.items()},
            "forward": {name: m.forward for name, m in modules.items()},
            "attributes": {name: list(vars(m)) for name, m in modules.items()},
            "inplace": {name: vars(m).get("inplace") for name, m in modules.items()},
        }
        if self.td is not None:
            entries = dict(self.td.items(True, True))
            seen["keys"] = {key: id(value) for key, value in entries.items()}
            seen["entries"] = {key: value.clone() for key, value in entries.items()}
            seen["batch_size"] = self.td.batch_size
        return seen

    def check(self) -> None:
        after = self.look()
        for what, before in self.before.items():
            if what in ("state_dict", "entries"):
                assert before.keys() == after[what].keys(), f"{what}: other names"
                for name, value in before.items():
                    same = torch.equal(value.nan_to_num(7.5), after[what][name].nan_to_num(7.5))
                    assert same and value.dtype == after[what][name].dtype, f"{what}: {name} changed"
            else:
                assert before == after[what], f"{what} changed"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Boom(Exception):
    pass


def network() -> TensorDictModule:
    net = nn.Sequential(
        nn.Linear(3, 8),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(8),
        nn.Dropout(0.1),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    )
    model = TensorDictModule(net, ["obs"], ["value"])
    net[0].register_forward_hook(lambda module, args, output: None)
    net[4].weight.requires_grad_(False)
    model.eval()
    net[3].train()
    return model


def observation(**entries):
    return TensorDict(obs=torch.randn(5, 3), **entries, batch_size=[5])


TRACED = [(First(Linear), FlatRule()), (Linear, EpsilonRule())]
METHODS = {
    "preset": "epsilon_plus",
    "traced": TRACED,
    "gradient": "guided_backprop",
}
every_method = pytest.mark.parametrize("composite", METHODS.values(), ids=METHODS)
every_way = pytest.mark.parametrize("way", ["prepare", "wrap"])


def attempt(model, td, error, text, composite="epsilon_plus", way="prepare", again=True, **kwargs):
    """It fails with the text, changes nothing, and works again on what is right."""
    unchanged = Unchanged(model, td)
    method = LRP(composite, **kwargs)

    def explain():
        if way == "wrap":
            return method.wrap(model)(td)
        with method.prepare(model) as explained:
            return explained(td)

    with pytest.raises(error, match=text):
        explain()
    unchanged.check()
    if again:
        good = observation(value=torch.zeros(5, 4))
        with LRP(composite, target=Target("value", 0)).prepare(model) as explained:
            explained(good)
        assert good["attr", "obs"].isfinite().all()
        Unchanged(model).check()
