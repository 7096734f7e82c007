"""Every preset equals zennit's composite of that name on residual networks, which zennit rewrites and tdhook does not.

zennit's canonizer for ResNet gives each block a forward pass of its own, in which ``x + shortcut`` is a module. Its
composites have a rule for that module: epsilon with a stabiliser of 1e-6, :data:`SUM` here. The three that modify
gradients have none, nor has a sum any need of one there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdhook import Target
from tdhook.composites import Composite
from tdhook.relevance.composites.composite import preset
from tdhook.rules import IgnoreRule, NormRule
from tdhook.selectors import Op

from .models import assert_equal, relative_errors
from .test_zennit import BOX, FLOAT64, GRADIENT, ZENNIT, identity_batch_norms, out_of_place, with_tdhook

resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
canonizers = pytest.importorskip("zennit.torchvision", reason="zennit is not installed")

pytestmark = pytest.mark.peers

CLASSES = 6
SUM = Composite([(Op("add"), NormRule(1e-6))])
"""zennit's rule for sums."""
RELEVANCE = [name for name in ZENNIT if name not in GRADIENT]
COMPARED = [name for name in ZENNIT if name != "beta_smooth"]  # see TestKnownDifferences


def of_blocks(block: Callable[..., nn.Module], width: int) -> nn.Module:
    """A stem and three blocks: one that adds its input, one that adds a strided projection of it, and another."""
    wide = width * block.expansion
    projection = nn.Sequential(nn.Conv2d(wide, 2 * wide, 1, 2, bias=False), nn.BatchNorm2d(2 * wide))
    return nn.Sequential(
        nn.Conv2d(3, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        block(wide, width),
        block(wide, 2 * width, 2, projection),
        block(2 * wide, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * wide, CLASSES),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "basic_blocks": lambda: of_blocks(resnet.BasicBlock, 8),
    "bottlenecks": lambda: of_blocks(resnet.Bottleneck, 4),
    "resnet18": lambda: resnet.resnet18(weights=None, num_classes=CLASSES),
    "narrow_resnet": lambda: resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=16
    ),
}
BLOCKS = ["basic_blocks", "bottlenecks"]


@functools.cache
def model(name: str) -> nn.Module:
    """As if it had been trained: biases and batch norms are no longer at their start."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = MODELS[name]()
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.weight, mean=1.0, std=0.2)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.1)
    return built.eval().requires_grad_(False).double()


def images(name: str) -> Tensor:
    size = 16 if name in BLOCKS else 32
    return torch.randn(3, 3, size, size, dtype=torch.float64).clamp(-3, 3)


def ours(name: str, module: nn.Module, x: Tensor, *, sums: Composite | None = SUM, **settings: Any) -> Tensor:
    """What tdhook finds; ``sums`` is its rule for sums, ``None`` for its own."""
    composite = preset(name, **BOX.get(name, {}))
    composite = composite if sums is None or name in GRADIENT else sums + composite
    return with_tdhook(composite, module, x, target=Target("output", torch.arange(len(x))), **settings)


def theirs(
    name: str,
    module: nn.Module,
    x: Tensor,
    *,
    inplace: bool = True,
    canonizer: Any = canonizers.ResNetCanonizer,
) -> Tensor:
    """What zennit finds."""
    x = x.clone().requires_grad_()
    with ExitStack() as stack:
        composite = ZENNIT[name](**BOX.get(name, {}), canonizers=[canonizer()])
        stack.enter_context(composite.context(module))
        stack.enter_context(identity_batch_norms(module))
        if not inplace:
            stack.enter_context(out_of_place(module))
        z = module(x)
        seed = torch.eye(CLASSES, dtype=z.dtype)[: len(x)]
        return torch.autograd.grad(z, x, seed if name in GRADIENT else seed * z.detach())[0]


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("case", MODELS)
def test_preset(case: str, name: str) -> None:
    module, x = model(case), images(case)
    assert_equal(ours(name, module, x), theirs(name, module, x), FLOAT64)


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("case", BLOCKS)
def test_preset_in_the_gradient_flow(case: str, name: str) -> None:
    # Relevance is converted there, by stabilisers of the size of rounding that add up.
    module, x = model(case), images(case)
    assert_equal(ours(name, module, x, flow="gradient"), theirs(name, module, x), 1e-7)


class InTurn(nn.Module):
    """Several ReLUs that are called in turn, where a block calls a single one several times."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.ReLU() for _ in range(count))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.each[(self.calls - 1) % len(self.each)](x)


def one_relu_a_call(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for block in module.modules():
        if isinstance(block, resnet.BasicBlock | resnet.Bottleneck):
            block.relu = InTurn(2 if isinstance(block, resnet.BasicBlock) else 3)
    return module


class TestKnownDifferences:
    """Where zennit does something else, on purpose or not, and what that comes to."""

    @pytest.mark.parametrize("name", RELEVANCE)
    @pytest.mark.parametrize("case", BLOCKS)
    def test_sums_are_stabilised_by_rounding_alone(self, case: str, name: str) -> None:
        # A sum has nothing to absorb. The 1e-6 of zennit shows where a block and its shortcut nearly cancel.
        module, x = model(case), images(case)
        error, _ = relative_errors(ours(name, module, x, sums=None), theirs(name, module, x))
        assert FLOAT64 < error < 2e-3

    # Excitation backprop leaves ReLUs to the gradient in zennit, which then differs: here zeros do get relevance.
    @pytest.mark.parametrize("name", [name for name in RELEVANCE if name != "excitation_backprop"])
    @pytest.mark.parametrize("case", BLOCKS)
    def test_without_its_canonizer_zennit_leaves_sums_to_the_gradient(self, case: str, name: str) -> None:
        # Each side then gets all the relevance of the sum. So does ours where the composite says so.
        module, x = model(case), images(case)
        doubled = theirs(name, module, x, canonizer=canonizers.SequentialMergeBatchNorm)
        ignored = Composite([(Op("add"), IgnoreRule())])
        assert_equal(ours(name, module, x, sums=ignored), doubled, FLOAT64)
        assert relative_errors(doubled, ours(name, module, x, sums=None))[0] > 1

    @pytest.mark.parametrize("case", BLOCKS)
    def test_beta_smooth_of_a_relu_that_is_called_again(self, case: str) -> None:
        # sigmoid(beta * x) of the input x of each call. zennit keeps that of the module's last call, for all of them.
        module, x = model(case), images(case)
        own = one_relu_a_call(module)
        assert torch.equal(own(x), module(x))
        found = ours("beta_smooth", module, x)
        assert_equal(found, theirs("beta_smooth", own, x, inplace=False), FLOAT64)
        assert_equal(ours("beta_smooth", own, x), found, FLOAT64)
        if case == "basic_blocks":
            assert relative_errors(theirs("beta_smooth", module, x, inplace=False), found)[0] > 0.1
        else:  # the inputs of two calls have different shapes
            with pytest.raises(RuntimeError, match="must match the size"):
                theirs("beta_smooth", module, x, inplace=False)
