"""Families of modules that mappers test with ``isinstance``.

A family is an abstract class whose members are listed, so ``isinstance(nn.ReLU(), Activation)`` is true although
``nn.ReLU`` does not derive from it. ``Linear`` includes the convolutions, as "linear layer" does in the LRP literature.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

__all__ = [
    "Activation",
    "AvgPool",
    "BatchNorm",
    "Convolution",
    "ConvolutionStandard",
    "ConvolutionTranspose",
    "Linear",
    "MaxPool",
]


class FamilyMeta(type):
    """Lets a class that is never instantiated answer for the classes that it lists."""

    members: tuple[type, ...] = ()

    def __instancecheck__(cls, instance: object) -> bool:
        return cls.__subclasscheck__(type(instance))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return type.__subclasscheck__(cls, subclass) or issubclass(subclass, cls.members)


class ConvolutionStandard(metaclass=FamilyMeta):
    """Convolutions in one to three dimensions."""

    members: ClassVar[tuple[type, ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvolutionTranspose(metaclass=FamilyMeta):
    """Transposed convolutions in one to three dimensions."""

    members: ClassVar[tuple[type, ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Convolution(metaclass=FamilyMeta):
    """Convolutions, transposed or not."""

    members: ClassVar[tuple[type, ...]] = (ConvolutionStandard, ConvolutionTranspose)


class Linear(metaclass=FamilyMeta):
    """Layers that are linear in their input: fully connected ones and convolutions."""

    members: ClassVar[tuple[type, ...]] = (Convolution, nn.Linear)


class _AsWritten(FamilyMeta):
    """A family of classes that compute what its members do, and nothing besides."""

    def __subclasscheck__(cls, subclass: type) -> bool:
        if type.__subclasscheck__(cls, subclass):
            return True
        forward = getattr(subclass, "forward", None)
        return any(
            issubclass(subclass, one) and forward is getattr(one, "forward", None) for one in cls.members
        )


class BatchNorm(metaclass=_AsWritten):
    """Batch normalisation, and nothing besides: not a class that derives from it and has an activation in it, too."""

    members: ClassVar[tuple[type, ...]] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    @staticmethod
    def inside(layer: nn.Module) -> nn.Module | None:
        """The batch norm that a layer derives from and adds something to, as a layer of torch's with the same state."""
        kinds = [base for base in type(layer).__mro__ if base in BatchNorm.members]
        if not kinds or isinstance(layer, BatchNorm):
            return None
        norm: nn.Module = object.__new__(kinds[0])
        # Parameters and buffers stay those of the layer, also when it gets others.
        norm.__dict__.update(layer.__dict__, _modules={})
        norm.__dict__.pop("forward", None)
        return norm


class AvgPool(metaclass=FamilyMeta):
    """Average pooling, adaptive or not."""

    members: ClassVar[tuple[type, ...]] = (
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
    )


class MaxPool(metaclass=FamilyMeta):
    """Max pooling, adaptive or not."""

    members: ClassVar[tuple[type, ...]] = (
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
    )


class Activation(metaclass=FamilyMeta):
    """Element-wise activation functions."""

    members: ClassVar[tuple[type, ...]] = (
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardshrink,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.LogSigmoid,
        nn.Mish,
        nn.PReLU,
        nn.ReLU,
        nn.ReLU6,
        nn.RReLU,
        nn.SELU,
        nn.Sigmoid,
        nn.SiLU,
        nn.Softplus,
        nn.Softshrink,
        nn.Softsign,
        nn.Tanh,
        nn.Tanhshrink,
        nn.Threshold,
    )
