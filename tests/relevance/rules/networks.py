"""Random networks without bias, and what must hold of one for its relevance to be conserved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
BATCH_NORM = nn.modules.batchnorm._BatchNorm
SMOOTH = (nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Sigmoid)
# A unit that is off passes nothing on, and is given nothing by a rule that looks at the inputs. Flat and WSquare do
# not look: above a unit that is off, they would lose what they give it.
RECTIFYING = (nn.ReLU, nn.ReLU6)
IN_PLACE_RELU = partial(nn.ReLU, inplace=True)

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {
    "average": {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d},
    "adaptive": {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d},
    "max": {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d},
}


@dataclass(frozen=True)
class Drawn:
    network: nn.Sequential
    x: Tensor
    batch: tuple[int, ...]

    def steps(self):
        """Each module, what goes in, what comes out, and which of the outputs the next one looks at."""
        with torch.no_grad():
            value, steps = self.x, []
            for module in self.network:
                result = module(value.clone())
                steps.append((module, value, result))
                value = result
        for n, (module, value, result) in enumerate(steps):
            off = n + 1 < len(steps) and isinstance(steps[n + 1][0], RECTIFYING)
            yield (
                module,
                value,
                result,
                (steps[n + 1][2] != 0) if off else torch.ones_like(result, dtype=bool),
            )


@dataclass(frozen=True)
class Family:
    """What the networks of a family have in common."""

    rectifying: bool = True
    # Every layer sees positive inputs through weights of both signs, so that each output has a positive and a
    # negative part. Of random signs one is too often missing.
    balanced: bool = False
    norms: tuple[type[nn.Module], ...] = ()
    batch_norm: bool = True

    @property
    def activations(self) -> tuple[Callable[[], nn.Module], ...]:
        if self.balanced:
            return (nn.ReLU, IN_PLACE_RELU, nn.Softplus, nn.Sigmoid)
        return (*RECTIFYING, IN_PLACE_RELU, *SMOOTH) if self.rectifying else SMOOTH

    @property
    def widths(self) -> tuple[int, int]:
        return (4, 10) if self.balanced else (1, 8)


def _activation(draw, family: Family) -> nn.Module:
    return draw(st.sampled_from(family.activations))()


def _out_size(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """One sample's shape after the layer, or None where the layer does not fit."""
    try:
        with torch.no_grad():
            out = tuple(layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    except RuntimeError:
        return None
    return out if math.prod(out) <= 300 and 0 not in out else None


def _convolution(draw, n_dims: int, shape: tuple[int, ...], family: Family) -> nn.Module:
    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(n_dims))

    groups = 1 if family.balanced else draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0]))
    channels = draw(st.integers(2, 5)) if family.balanced else groups * draw(st.integers(1, 4 // groups + 1))
    kernel, stride, dilation = per_axis(1, 3), per_axis(1, 2), per_axis(1, 2)
    options = {"groups": groups, "dilation": dilation, "bias": False, "dtype": torch.float64}
    if draw(st.integers(0, 3)) == 0:
        return TRANSPOSED[n_dims](shape[0], channels, kernel, stride=stride, **options)
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    if draw(st.booleans()):
        return CONVOLUTIONS[n_dims](shape[0], channels, kernel, padding="same", padding_mode=mode, **options)
    return CONVOLUTIONS[n_dims](
        shape[0], channels, kernel, stride=stride, padding=per_axis(0, 1), padding_mode=mode, **options
    )


def _pool(draw, n_dims: int) -> nn.Module:
    kind = draw(st.sampled_from(sorted(POOLS)))
    if kind == "adaptive":
        return POOLS[kind][n_dims](draw(st.integers(1, 2)))
    kernel = draw(st.integers(1, 3))
    return POOLS[kind][n_dims](
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, kernel // 2)),
        ceil_mode=draw(st.booleans()),
    )


def _dense(
    draw, modules: list[nn.Module], width: int, depth: int, batch: tuple[int, ...], family: Family
) -> None:
    for level in range(depth):
        after = draw(st.integers(*family.widths))
        modules.append(nn.Linear(width, after, bias=False, dtype=torch.float64))
        width = after
        if level + 1 < depth:
            if family.batch_norm and len(batch) == 1 and draw(st.integers(0, 3)) == 0:
                modules.append(nn.BatchNorm1d(width, dtype=torch.float64))
            if family.norms and width > 1 and draw(st.booleans()):
                kind = draw(st.sampled_from(family.norms))
                modules.append(
                    kind(width, **({"bias": False} if kind is nn.LayerNorm else {}), dtype=torch.float64)
                )
            modules.append(_activation(draw, family))
            if draw(st.integers(0, 3)) == 0:
                modules.append(nn.Dropout(0.5))


def _alternate_signs(layer: nn.Module, weight: Tensor) -> None:
    """Even inputs through positive weights, odd ones through negative."""
    inputs = 0 if isinstance(layer, tuple(TRANSPOSED.values())) else 1
    signs = torch.ones(weight.shape[inputs], dtype=weight.dtype)
    signs[1::2] = -1
    weight.abs_().mul_(signs.reshape([-1 if axis == inputs else 1 for axis in range(weight.dim())]))


def _finish(
    draw, modules: list[nn.Module], shape: tuple[int, ...], batch: tuple[int, ...], family: Family
) -> Drawn:
    network = nn.Sequential(*modules).eval()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for module in network:
            if isinstance(module, BATCH_NORM):  # without a shift, it has no bias
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            for name, parameter in module.named_parameters():
                if isinstance(module, WEIGHTED):
                    parameter.normal_(generator=generator)
                    parameter /= math.sqrt(parameter[0].numel())
                    if family.balanced:
                        _alternate_signs(module, parameter)
                elif name == "weight":
                    parameter.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(*batch, *shape, dtype=torch.float64, generator=generator)
    return Drawn(network, x.abs() if family.balanced or draw(st.booleans()) else x, batch)


@st.composite
def dense_networks(draw, family: Family) -> Drawn:
    """Linear layers with activations between them, on any batch shape."""
    modules: list[nn.Module] = []
    width = draw(st.integers(*family.widths))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 3)]))
    _dense(draw, modules, width, draw(st.integers(1, 4)), batch, family)
    return _finish(draw, modules, (width,), batch, family)


@st.composite
def convolutional_networks(draw, family: Family) -> Drawn:
    """Convolutions with batch norm, activations and pooling between them, and a linear head or none."""
    n_dims = draw(st.integers(1, 3))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    channels = draw(st.integers(2 if family.balanced else 1, 3))
    shape = first = (channels, *(draw(st.integers(2, 5 if n_dims < 3 else 3)) for _ in range(n_dims)))
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        layer = _convolution(draw, n_dims, shape, family)
        if (after := _out_size(layer, shape)) is None:
            continue
        modules.append(layer)
        shape = after
        if family.batch_norm and batch and draw(st.integers(0, 2)) == 0:
            modules.append(BATCH_NORMS[n_dims](shape[0], dtype=torch.float64))
        modules.append(_activation(draw, family))
        if draw(st.booleans()) and (after := _out_size(pool := _pool(draw, n_dims), shape)) is not None:
            modules.append(pool)
            shape = after
    if not modules or draw(st.booleans()):
        modules.append(nn.Flatten(start_dim=-1 - n_dims))
        _dense(draw, modules, math.prod(shape), draw(st.integers(1, 2)), batch, family)
    return _finish(draw, modules, first, batch, family)


# --- Is there someone to give the relevance to? ---------------------------------------------------


def parts(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of positive and of negative contributions to each output, leaving out a bias."""
    more, less = copy.deepcopy(layer), copy.deepcopy(layer)
    more.bias = less.bias = None
    with torch.no_grad():
        more.weight.clamp_(min=0)
        less.weight.clamp_(max=0)
        above, below = x.clamp(min=0), x.clamp(max=0)
        return more(above) + less(below), more(below) + less(above)


def well_posed(drawn: Drawn, needs: str, least: float = 1e-3) -> bool:
    """Whether every output that can hold relevance has, clearly, inputs to hand it to.

    ``needs`` says what a rule asks of each output: a sum (``"sum"``), a positive part (``"positive"``), both a
    positive and a negative part (``"both"``), or a sum also where nothing is switched on (``"always"``).
    """
    for module, x, z, seen in drawn.steps():
        if isinstance(module, WEIGHTED):
            if (z == 0).any() or (z[seen].abs() < least).any():
                return False
            positive, negative = parts(module, x)
            if needs in ("positive", "both") and (positive[seen] < least).any():
                return False
            if needs == "both" and (negative[seen] > -least).any():
                return False
        elif "AvgPool" in type(module).__name__:
            small = z.abs() < least
            if (small if needs == "always" else small & (z != 0)).any():
                return False
        elif (
            not isinstance(module, (*RECTIFYING, nn.Dropout, nn.Identity, nn.Flatten))
            and (z.abs() < 1e-6).any()
        ):
            return False
    return True
