"""The models that two libraries explain, and when their explanations count as equal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    """A continuous-control policy of the usual size."""
    return nn.Sequential(
        nn.Linear(17, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 6)
    )  # fmt: skip


def nature_cnn() -> nn.Module:
    """The network of Mnih et al. 2015 for four Atari frames."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        nn.Linear(512, 6),
    )  # fmt: skip


def vgg11() -> nn.Module:
    """torchvision's, as it is: in-place ReLUs, max and adaptive average pooling, dropout."""
    # zennit cannot be imported without torchvision, so where one is, so is the other.
    from torchvision.models import vgg11

    return vgg11(weights=None, num_classes=10)


def batch_normed_cnn() -> nn.Module:
    """Batch norm behind every kind of layer it is merged into: with and without bias, grouped, strided, transposed."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the shape of one of its inputs."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.build.__name__

    def inputs(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of either sign within [-3, 3]."""
        return torch.randn(batch, *self.shape, dtype=dtype).clamp(-3, 3)


CASES = {
    case.name: case
    for case in (
        Case(mlp, (17,)),
        Case(nature_cnn, (4, 84, 84)),
        Case(vgg11, (3, 32, 32)),
        Case(batch_normed_cnn, (3, 16, 16)),
    )
}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a case as if it had been trained: biases and running statistics are no longer at their start."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = CASES[name].build()
        for module in built.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.weight, mean=1.0, std=0.2)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, std=0.1)
    return built.eval().requires_grad_(False).to(dtype)


def relative_errors(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The worst sample's error, as a norm and as its largest entry, relative to the same of what is expected."""
    difference, expected = (ours - theirs).flatten(1), theirs.flatten(1)
    errors = [
        torch.linalg.vector_norm(difference, order, dim=1) / torch.linalg.vector_norm(expected, order, dim=1)
        for order in (2, torch.inf)
    ]
    return errors[0].max().item(), errors[1].max().item()


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Each sample's relevance is the same, relative to its own size: small ones do not hide behind large ones."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (theirs != 0).flatten(1).any(dim=1).all(), "nothing to compare: a sample has no relevance at all"
    norm, largest = relative_errors(ours, theirs)
    assert norm <= tolerance and largest <= tolerance, (
        f"relative error {norm:.1e} (norm), {largest:.1e} (largest)"
    )
