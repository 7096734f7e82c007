"""The classifiers of torchvision, as they are: one of each family, with all relevance accounted for.

Weights are random. Batch norms have statistics near those of the values that they see, so that the signal of the
image reaches the output, and what is initialised to ones or zeros (scales, biases) is neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchvision_shim import import_torchvision

from tdhook import Target

from .checks import check, check_difference

import_torchvision()
models = pytest.importorskip(
    "torchvision.models", reason="torchvision is not installed; `nox -s zoo` installs it"
)
pytestmark = pytest.mark.zoo

CLASSES = 10


def builder(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A builder of the library, by name."""
    return partial(models.get_model, name, weights=None, num_classes=CLASSES, **settings)


def narrow(name: str, **settings: Any) -> nn.Module:
    """A model with fewer features where the builders have 4096, and so more than 100 million weights."""
    model = models.get_model(name, num_classes=CLASSES, **settings)
    layers, features = [], None
    for layer in model.classifier:
        if isinstance(layer, nn.Linear):
            inputs, features = features or layer.in_features, min(layer.out_features, 64)
            layer = nn.Linear(inputs, features)
        layers.append(layer)
    model.classifier = nn.Sequential(*layers)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # nothing else keeps the signal up
    return model


def wide_resnet() -> nn.Module:
    """One block a stage; the builders have 16 and more, of 67 million weights."""
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=2 * 64)


def efficientnet_v2() -> nn.Module:
    """Each kind of stage that the builders have: fused, without and with expansion, and depthwise with excitation."""
    fused, mobile = models.efficientnet.FusedMBConvConfig, models.efficientnet.MBConvConfig
    stages = [
        fused(1, 3, 1, 8, 8, 2), fused(4, 3, 2, 8, 16, 2), mobile(4, 3, 2, 16, 24, 2), mobile(6, 3, 1, 24, 32, 2),
    ]  # fmt: skip
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3)
    return models.EfficientNet(stages, 0.2, num_classes=CLASSES, norm_layer=norm_layer, last_channel=64)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=CLASSES)


def maxvit() -> nn.Module:
    """The only builder is for images of 224 pixels."""
    return models.MaxVit(
        (64, 64), stem_channels=16, partition_size=2, block_channels=[16, 32], block_layers=[2, 2], head_dim=8,
        stochastic_depth_prob=0.2, num_classes=CLASSES,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Builders that make one architecture in several sizes.

    Attributes:
        builders: a regular expression for their names.
        build: makes the smallest of them, or one of the same classes that is smaller still.
        size: height and width of its images.
    """

    builders: str
    build: Callable[[], nn.Module]
    size: int = 32


FAMILIES = {
    "alexnet": Family(r"alexnet", partial(narrow, "alexnet"), 63),
    "vgg": Family(r"vgg\d+", partial(narrow, "vgg11", init_weights=False)),
    "vgg_bn": Family(r"vgg\d+_bn", partial(narrow, "vgg11_bn", init_weights=False)),
    "resnet": Family(r"resnet\d+", builder("resnet18")),
    "resnext": Family(r"resnext\d+_\d+x\d+d", builder("resnext50_32x4d")),
    "wide_resnet": Family(r"wide_resnet\d+_2", wide_resnet),
    "densenet": Family(r"densenet\d+", builder("densenet121")),
    "googlenet": Family(r"googlenet", builder("googlenet", init_weights=False)),
    "inception": Family(r"inception_v3", builder("inception_v3", init_weights=False), 75),
    "squeezenet": Family(r"squeezenet\d_\d", builder("squeezenet1_1")),
    "mobilenet_v2": Family(r"mobilenet_v2", builder("mobilenet_v2")),
    "mobilenet_v3": Family(r"mobilenet_v3_\w+", builder("mobilenet_v3_small")),
    "shufflenet_v2": Family(r"shufflenet_v2_x\d_\d", builder("shufflenet_v2_x0_5")),
    "efficientnet": Family(r"efficientnet_b\d", builder("efficientnet_b0")),
    "efficientnet_v2": Family(r"efficientnet_v2_\w", efficientnet_v2),
    "regnet_x": Family(r"regnet_x_\w+gf|regnet_x_\d+mf", builder("regnet_x_400mf")),
    "regnet_y": Family(r"regnet_y_\w+gf|regnet_y_\d+mf", builder("regnet_y_400mf")),
    "mnasnet": Family(r"mnasnet\d_\d+", builder("mnasnet0_5")),
    "convnext": Family(r"convnext_\w+", builder("convnext_tiny")),
    "vit": Family(r"vit_\w_\d+", vit),
    "swin": Family(r"swin_[a-z]", builder("swin_t")),
    "swin_v2": Family(r"swin_v2_[a-z]", builder("swin_v2_t")),
    "maxvit": Family(r"maxvit_\w", maxvit, 64),
}


@contextmanager
def calibrated(model: nn.Module) -> Iterator[None]:
    """While the model runs, each batch norm takes statistics near those of its inputs, at random."""

    def calibrate(norm: Any, args: tuple[Tensor]) -> None:
        values = args[0].transpose(0, 1).flatten(1)
        spread = values.std(1) + 1e-3
        norm.running_mean.copy_(values.mean(1) + 0.2 * spread * torch.randn_like(spread))
        norm.running_var.copy_(spread.square() * torch.empty_like(spread).uniform_(0.5, 1.5))

    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def made(family: Family) -> tuple[nn.Module, Tensor]:
    """The model of a family, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = family.build().eval().requires_grad_(False).double()
        for param in model.parameters():
            if (param == param.flatten()[0]).all():  # ones or zeros
                param.add_(torch.randn_like(param), alpha=0.1)
        images = torch.randn(8, 3, family.size, family.size, dtype=torch.float64)
        with calibrated(model), torch.no_grad():
            model(images)
    return model, images[:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_accounted_for(name: str) -> None:
    model, images = made(FAMILIES[name])
    explained = check(model, TensorDict({"input": images}, [2]), target=Target("output", "argmax"))
    for flow, td in explained.items():
        share = td["attr", "input"].abs().flatten(1).sum(1) / td["ledger", "target"].abs()
        assert (share > 1e-3).all(), f"{flow}: next to nothing reaches the image, so that little is shown"
    relevance, other = (td["attr", "input"] for td in explained.values())
    assert (other - relevance).norm() <= 1e-6 * relevance.norm(), "the two flows find different relevance"


@pytest.mark.parametrize("composite", ["deeplift", "epsilon_plus"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_of_a_difference_arrives(name: str, composite: str) -> None:
    model, images = made(FAMILIES[name])
    td = TensorDict({"input": images}, [2])
    check_difference(model, td, target=Target("output", "argmax"), composite=composite)


def test_every_builder_belongs_to_a_family() -> None:
    families = [family.builders for family in FAMILIES.values()]
    builders = models.list_models(module=models)
    assert builders
    left = [name for name in builders if not any(re.fullmatch(each, name) for each in families)]
    assert not left
    empty = [each for each in families if not any(re.fullmatch(each, name) for name in builders)]
    assert not empty
