"""What is timed, and the floor that it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

from benchmarks.models import gpt2, llama, lstm_policy, mlp, nature_cnn, residual_cnn
from tdhook import LRP, Target


@dataclass(frozen=True)
class Case:
    name: str
    preset: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int

    def model(self) -> TensorDictModule:
        torch.manual_seed(0)
        module = self.make().eval().requires_grad_(False)
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action_value"])

    def data(self) -> TensorDict:
        torch.manual_seed(1)
        return TensorDict({"observation": torch.rand(self.batch, *self.shape)}, batch_size=[self.batch])


CASES = [
    *(Case(f"MLP 17-256-256-6, batch {b}", "epsilon_plus", mlp, (17,), b) for b in (1, 256, 4096)),
    *(Case(f"Nature CNN, batch {b}", "epsilon_plus", nature_cnn, (4, 84, 84), b) for b in (1, 32)),
    Case("Nature CNN, batch 32", "epsilon_alpha2_beta1", nature_cnn, (4, 84, 84), 32),
    Case("residual CNN, batch 8", "epsilon_plus", residual_cnn, (3, 32, 32), 8),
    Case("LSTM policy, T=32, batch 16", "lstm_lrp", lstm_policy, (32, 32), 16),
    Case("GPT-2 shaped, 6x768, T=128", "attn_lrp", gpt2, (128, 768), 1),
    Case("Llama shaped, 8x512, T=128", "attn_lrp", llama, (128, 512), 1),
]


def floor(model: TensorDictModuleBase) -> Callable[[TensorDict], TensorDict]:
    """Gradient times input of the same target: one forward and one backward pass, TensorDict in and out."""

    def explain(td: TensorDict) -> TensorDict:
        x = td["observation"].detach().requires_grad_()
        with torch.enable_grad():
            q = model(TensorDict({"observation": x}, td.batch_size))["action_value"]
            (grad,) = torch.autograd.grad(q.amax(-1).sum(), x)
        td.set(("attr", "observation"), (x * grad).detach())
        return td.set("action_value", q.detach())

    return explain


def explained(case: Case, model: TensorDictModuleBase) -> Callable[[TensorDict], TensorDict]:
    return LRP(case.preset, target=Target("action_value", "argmax")).wrap(model)
