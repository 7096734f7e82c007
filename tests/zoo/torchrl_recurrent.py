"""Recurrent networks and world models of torchrl.modules."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModule
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.modules import (
    GRU,
    LSTM,
    MLP,
    GRUCell,
    GRUModule,
    LSTMCell,
    LSTMModule,
    set_recurrent_mode,
)

from .cases import Collection, first, inputs, keyed, ready

CASES = Collection()


# --- Recurrent networks ---------------------------------------------------------------------------


class Last(nn.Module):
    """An action from what a recurrent network returns at the last step."""

    def __init__(self, network):
        super().__init__()
        self.network, self.head = network, nn.Linear(3, 2)

    def forward(self, x, **kwargs):
        return self.head(self.network(x, **kwargs)[0][:, -1])


NETWORKS = {
    "LSTM": lambda **kwargs: LSTM(4, 3, **kwargs),
    "GRU": lambda **kwargs: GRU(4, 3, **kwargs),
    "nn.LSTM": lambda **kwargs: nn.LSTM(4, 3, batch_first=True, **kwargs),
    "nn.GRU": lambda **kwargs: nn.GRU(4, 3, batch_first=True, **kwargs),
}

for name, make in NETWORKS.items():
    for layers in (1, 2):

        @CASES.add(f"{name}, {layers} layers", *[name] * (name in ("LSTM", "GRU")))
        def _(make=make, layers=layers):
            model = keyed(Last(make(num_layers=layers)), ["observation"], ["action"])
            return ready(model), inputs(2, observation=(3, 4)), first("action")


for cell, extra in ((LSTMCell, ["cell"]), (GRUCell, []), (nn.LSTMCell, ["cell"]), (nn.GRUCell, [])):
    name = cell.__name__ if cell.__module__.startswith("torchrl") else f"nn.{cell.__name__}"

    @CASES.add(name, *[name] * (name in ("LSTMCell", "GRUCell")))
    def _(cell=cell, extra=extra):
        class Cell(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell, self.head = cell(4, 3), nn.Linear(3, 2)

            def forward(self, x, h, *c):
                made = self.cell(x, (h, *c) if c else h)
                return self.head(made[0] if c else made)

        model = keyed(Cell(), ["observation", "hidden", *extra], ["action"])
        td = inputs(2, observation=(4,), hidden=(3,), **dict.fromkeys(extra, (3,)))
        return ready(model), td, first("action")


MODULES = ((LSTMModule, ["hidden", "cell"]), (GRUModule, ["hidden"]))
RESET = torch.tensor([[True, False, False], [False, False, True]]).unsqueeze(-1)

for module, states in MODULES:
    for python in (False, True):

        def actor(python=python, module=module, states=states, **kwargs):
            rnn = module(
                4,
                3,
                in_keys=["observation", *states],
                out_keys=["features", *(("next", s) for s in states)],
                python_based=python,
                **kwargs,
            )
            return ready(Seq(rnn, keyed(MLP(3, 2, num_cells=[5]), ["features"], ["action"])))

        how = f"{module.__name__}, {'in Python' if python else 'by the kernel'}"
        attributed = ["observation", *states]

        @CASES.add(f"{how}, one step", module.__name__, in_keys=attributed)
        def _(actor=actor, states=states):
            td = inputs(
                2, observation=(4,), is_init=torch.tensor([[True], [False]]), **dict.fromkeys(states, (1, 3))
            )
            return actor(), td, first("action")

        @CASES.add(
            f"{how}, sequence",
            module.__name__,
            "set_recurrent_mode",
            in_keys=attributed,
            within=set_recurrent_mode,
        )
        def _(actor=actor, states=states):
            td = inputs(
                2, 3, observation=(4,), is_init=torch.zeros(2, 3, 1).bool(), **dict.fromkeys(states, (1, 3))
            )
            return actor(), td, first("action")

        # With a ledger, a slice that the model overwrites elsewhere is kept as a copy, of another layout in memory.
        @CASES.add(f"{how}, several episodes", module.__name__, in_keys=attributed, exact=not python)
        def _(actor=actor, states=states):
            td = inputs(2, 3, observation=(4,), is_init=RESET, **dict.fromkeys(states, (2, 3)))
            return actor(default_recurrent_mode=True, num_layers=2), td, first("action")


# What torch compiles in order to scan computes in another order than the loop that is explained.
for module, states in MODULES:

    @CASES.add(
        f"{module.__name__} by scan",
        module.__name__,
        in_keys=["observation", *states],
        exact=False,
        slow=True,
    )
    def _(module=module, states=states):
        rnn = module(
            4,
            3,
            in_keys=["observation", *states],
            out_keys=["features", *(("next", s) for s in states)],
            recurrent_backend="scan",
            default_recurrent_mode=True,
        )
        td = inputs(2, 3, observation=(4,), is_init=RESET, **dict.fromkeys(states, (1, 3)))
        return ready(Seq(rnn, keyed(nn.Linear(3, 2), ["features"], ["action"]))), td, first("action")


for network in (LSTM, GRU):

    @CASES.add(f"{network.__name__}, masked", network.__name__, in_keys=["observation"])
    def _(network=network):
        mask = torch.tensor([[True, True, True], [True, True, False]])
        model = TensorDictModule(Last(network(4, 3)), {"x": "observation", "mask": "mask"}, ["action"])
        return ready(model), inputs(2, observation=(3, 4), mask=mask), first("action")
