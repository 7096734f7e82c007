"""What is measured: a model, what it reads, how it is explained, and the ratios to the floor that are aimed at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from benchmarks.library_models import hf_gpt2, hf_llama, resnet50, vgg11
from benchmarks.models import gpt2, llama, lstm_policy, mlp, nature_cnn, residual_cnn

__all__ = ["CASES", "Aim", "Case"]


@dataclass(frozen=True)
class Aim:
    """The ratios to the floor that an explanation is to stay below; ``None`` where there is none.

    Attributes:
        eager: against gradient times input.
        compiled: compiled, against compiled gradient times input.
        one: of explaining each output, against explaining one.
    """

    eager: float | None = None
    compiled: float | None = None
    one: float | None = None


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        model_name: the model, as the table calls it.
        preset: the rules.
        make: makes the model.
        shape: of one input.
        batch: how many inputs are explained at once.
        gpu_batch: the same on a GPU, enough to keep it busy.
        aim: what is aimed at.
        index: whether the largest output is explained or each of them.
        baseline: what its difference is explained from, if it is one.
    """

    model_name: str
    preset: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    gpu_batch: int | None = None
    aim: Aim = Aim()
    index: Literal["argmax", "all"] = "argmax"
    baseline: float | None = None

    @property
    def name(self) -> str:
        """The model, the batch, and the baseline, if there is one."""
        against = "" if self.baseline is None else f", against {self.baseline:g}"
        return f"{self.model_name}, batch {self.batch}{against}"

    def on_gpu(self) -> Case:
        """The same case at its batch size for a GPU."""
        return dataclasses.replace(self, batch=self.gpu_batch or self.batch)

    def model(self, device: str = "cpu", frozen: bool = False) -> TensorDictModule:
        """The model in evaluation mode, its parameters trainable unless ``frozen``. Its weights are always the same."""
        torch.manual_seed(0)
        module = self.make().eval().requires_grad_(not frozen).to(device)
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action_value"])

    def data(self, device: str = "cpu") -> TensorDict:
        """Inputs, always the same."""
        torch.manual_seed(1)
        observation = torch.rand(self.batch, *self.shape).to(device)
        return TensorDict({"observation": observation}, batch_size=[self.batch])


MLP = "MLP 17-256-256-6"
# The rule that `epsilon_plus` has for linear layers is epsilon, and an MLP has no others.
mlp_case = partial(Case, MLP, "epsilon_plus", mlp, (17,))
atari_case = partial(Case, "Nature CNN", make=nature_cnn, shape=(4, 84, 84))
mlp_difference = partial(Case, MLP, "deeplift", mlp, (17,), baseline=0.0)
atari_difference = partial(Case, "Nature CNN", "deeplift", nature_cnn, (4, 84, 84), baseline=0.0)
z_plus = Aim(eager=1.6, compiled=1.5)
transformer = Aim(eager=1.15, compiled=1.1)

CASES = (
    mlp_case(1, aim=Aim(eager=1.7, compiled=1.2)),
    mlp_case(256, aim=Aim(eager=1.4, compiled=1.2)),
    mlp_case(4096, 262_144, aim=Aim(eager=1.3, compiled=1.2)),
    atari_case("epsilon_plus", batch=1, aim=Aim(eager=1.5, compiled=1.5)),
    atari_case("epsilon_plus", batch=32, gpu_batch=4096, aim=Aim(eager=1.5, compiled=1.5)),
    atari_case("epsilon_alpha2_beta1", batch=32, gpu_batch=4096, aim=Aim(eager=2.5, compiled=2.3)),
    mlp_difference(256, aim=Aim(eager=2.2)),
    atari_difference(1, aim=Aim(eager=2.2)),
    atari_difference(32, 4096, aim=Aim(eager=2.2)),
    # Beside the same without a baseline, of which they are to cost at most half as much again.
    mlp_case(256, baseline=0.0),
    atari_case("epsilon_plus", batch=32, gpu_batch=4096, baseline=0.0),
    Case("VGG-11", "epsilon_plus", vgg11, (3, 224, 224), 2, 64, z_plus),
    Case("ResNet-50", "epsilon_plus", resnet50, (3, 224, 224), 2, 64, z_plus),
    Case("residual CNN", "epsilon_plus", residual_cnn, (3, 32, 32), 8, 1024),
    Case("LSTM policy, T=32", "lstm_lrp", lstm_policy, (32, 32), 16, 4096),
    Case("LSTM policy, T=32", "deeplift", lstm_policy, (32, 32), 16, 4096, baseline=0.0),
    Case("GPT-2 shaped, 6x768, T=128", "attn_lrp", gpt2, (128, 768), 1, 64, transformer),
    Case("Llama shaped, 8x512, T=128", "attn_lrp", llama, (128, 512), 1, 64, transformer),
    Case("GPT-2 shaped, 6x768, T=128", "deeplift", gpt2, (128, 768), 1, 64, Aim(eager=2.2), baseline=0.0),
    Case("GPT-2 of transformers, 6x768, T=128", "attn_lrp", hf_gpt2, (128, 768), 1, 64, transformer),
    Case("Llama of transformers, 8x512, T=128", "attn_lrp", hf_llama, (128, 512), 1, 64, transformer),
    Case(
        "Nature CNN, each of 18 actions",
        "epsilon_plus",
        partial(nature_cnn, actions=18),
        (4, 84, 84),
        32,
        512,
        Aim(one=10.0),
        index="all",
    ),
)
