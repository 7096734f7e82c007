"""Every rule a second time, slowly: as an explicit matrix, straight from its definition, in float64.

A layer becomes the matrix of its single weights, one sample at a time. Row ``j`` is an output, column ``k`` a
position that the kernel can see, and ``source[k]`` the input that stands there. Padding with zeros is no input, so
its positions have no column. Circular, reflecting and replicating padding show one input at several positions: each
has a column of its own, because two weights of different sign that meet the same input are two contributions.

Nothing in here uses the library under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stabiliser = Callable[[Tensor], Tensor]

STANDARD = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
TRANSPOSED = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def sign(z: Tensor) -> Tensor:
    """The sign, where zero counts as positive."""
    return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)


def stabiliser(epsilon: float | Stabiliser) -> Stabiliser:
    """``stab(z) = z + epsilon * sign(z)``, unless the caller brings a function."""
    return epsilon if callable(epsilon) else lambda z: z + epsilon * sign(z)


# --- A layer as a matrix --------------------------------------------------------------------------


@dataclass(frozen=True)
class Explicit:
    """One sample's layer: ``z = weight @ x[source] + bias``."""

    weight: Tensor  # [outputs, positions]
    ones: Tensor  # [outputs, positions], 1 where a weight is, whatever its value
    bias: Tensor  # [outputs]
    source: Tensor  # [positions], index into the flattened input
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def spread(self, at_positions: Tensor) -> Tensor:
        """What lies at the positions, summed where it belongs: at the inputs."""
        return torch.zeros(math.prod(self.in_shape), dtype=torch.float64).index_add(
            0, self.source, at_positions
        )

    def drop(self, names: tuple[str, ...]) -> Explicit:
        """The same layer, with the parameters of these names treated as zero."""
        weight = torch.zeros_like(self.weight) if "weight" in names else self.weight
        bias = torch.zeros_like(self.bias) if "bias" in names else self.bias
        return replace(self, weight=weight, bias=bias)


def _from_linear_function(
    function: Callable[[Tensor], Tensor], in_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The Jacobian of a function that is linear, one basis vector at a time, and the shape of one output."""
    basis = torch.eye(math.prod(in_shape), dtype=torch.float64).reshape(-1, *in_shape)
    out = function(basis)
    return out.flatten(1).T.contiguous(), out.shape[1:]


def _padding_per_axis(
    layer: nn.Module, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    if layer.padding == "valid":
        return [(0, 0)] * len(kernel)
    if layer.padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def _source_along_axis(mode: str, size: int, before: int, after: int) -> list[int]:
    """Which of ``size`` entries stands at each padded position, -1 for none."""
    sources = []
    for position in range(-before, size + after):
        if 0 <= position < size:
            sources.append(position)
        elif mode == "zeros":
            sources.append(-1)
        elif mode == "circular":
            sources.append(position % size)
        elif mode == "replicate":
            sources.append(min(max(position, 0), size - 1))
        elif mode == "reflect":
            sources.append(-position if position < 0 else 2 * (size - 1) - position)
        else:
            raise NotImplementedError(mode)
    return sources


def explicit(layer: nn.Module, in_shape: tuple[int, ...]) -> Explicit:
    """The matrix of a linear layer or convolution for one sample of shape ``in_shape``."""
    kernel = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    source = torch.arange(math.prod(in_shape))

    if isinstance(layer, nn.Linear):
        apply = F.linear
        shown = in_shape
        keep = source
    elif type(layer) in TRANSPOSED:
        function = TRANSPOSED[type(layer)]

        def apply(x: Tensor, w: Tensor) -> Tensor:
            return function(
                x, w, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
            )

        shown = in_shape
        keep = source
    else:
        function = STANDARD[type(layer)]

        def apply(x: Tensor, w: Tensor) -> Tensor:
            return function(x, w, None, layer.stride, 0, layer.dilation, layer.groups)

        paddings = _padding_per_axis(layer, tuple(kernel.shape[2:]), layer.dilation)
        axes = [
            _source_along_axis(layer.padding_mode, size, before, after)
            for size, (before, after) in zip(in_shape[1:], paddings, strict=True)
        ]
        shown = (in_shape[0], *(len(axis) for axis in axes))
        index = source.reshape(in_shape)
        placed = [-1 if -1 in spot[1:] else int(index[spot]) for spot in product(range(in_shape[0]), *axes)]
        source = torch.tensor(placed)
        keep = (source >= 0).nonzero().flatten()

    weight, out_shape = _from_linear_function(lambda x: apply(x, kernel), shown)
    ones, _ = _from_linear_function(lambda x: apply(x, torch.ones_like(kernel)), shown)
    if bias is None:
        constant = torch.zeros(math.prod(out_shape), dtype=torch.float64)
    else:
        event = bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (len(out_shape) - 1))
        constant = event.expand(out_shape).flatten()
    return Explicit(weight[:, keep], ones[:, keep], constant, source[keep], tuple(in_shape), tuple(out_shape))


# --- The rules of linear layers, relevance convention ---------------------------------------------
#
# Each takes the layer, the input at the positions (x[k]) and the relevance of the outputs (r[j]), and returns
# the relevance at the positions.


def epsilon(layer: Explicit, x: Tensor, r: Tensor, *, stab: float | Stabiliser = 1e-6) -> Tensor:
    c = layer.weight * x
    z = c.sum(1) + layer.bias
    return torch.einsum("jk,j->k", c, r / stabiliser(stab)(z))


def gamma(
    layer: Explicit, x: Tensor, r: Tensor, *, gamma: float = 0.25, stab: float | Stabiliser = 1e-6
) -> Tensor:
    c = torch.cat([layer.weight * x, layer.bias[:, None]], dim=1)
    z = c.sum(1)
    favoured = torch.where(z[:, None] >= 0, c > 0, c < 0)
    weighted = c * torch.where(favoured, 1 + gamma, 1.0)
    denominator = stabiliser(stab)(z + gamma * torch.where(favoured, c, 0.0).sum(1))
    return torch.einsum("jk,j->k", weighted, r / denominator)[:-1]


def alpha_beta(
    layer: Explicit,
    x: Tensor,
    r: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 1.0,
    stab: float | Stabiliser = 1e-6,
) -> Tensor:
    c = torch.cat([layer.weight * x, layer.bias[:, None]], dim=1)
    positive, negative = c.clamp(min=0), c.clamp(max=0)
    shares = alpha * torch.einsum("jk,j->k", positive, r / stabiliser(stab)(positive.sum(1)))
    shares -= beta * torch.einsum("jk,j->k", negative, r / stabiliser(stab)(negative.sum(1)))
    return shares[:-1]


def zplus(layer: Explicit, x: Tensor, r: Tensor, *, stab: float | Stabiliser = 1e-6) -> Tensor:
    c = (layer.weight * x).clamp(min=0)
    z = c.sum(1) + layer.bias.clamp(min=0)
    return torch.einsum("jk,j->k", c, r / stabiliser(stab)(z))


def zbox(
    layer: Explicit,
    x: Tensor,
    r: Tensor,
    *,
    low: Tensor,
    high: Tensor,
    stab: float | Stabiliser = 1e-6,
) -> Tensor:
    """``low`` and ``high`` at the positions. The bias has the box [1, 1] and drops out: b - b+ - b- = 0."""
    w = layer.weight
    c = w * x - w.clamp(min=0) * low - w.clamp(max=0) * high
    return torch.einsum("jk,j->k", c, r / stabiliser(stab)(c.sum(1)))


def wsquare(layer: Explicit, x: Tensor, r: Tensor, *, stab: float | Stabiliser = 1e-6) -> Tensor:
    c = layer.weight**2
    return torch.einsum("jk,j->k", c, r / stabiliser(stab)(c.sum(1) + layer.bias**2))


def flat(layer: Explicit, x: Tensor, r: Tensor, *, stab: float | Stabiliser = 1e-6) -> Tensor:
    c = layer.ones
    return torch.einsum("jk,j->k", c, r / stabiliser(stab)(c.sum(1)))


LINEAR_RULES = {
    function.__name__: function for function in (epsilon, gamma, alpha_beta, zplus, zbox, wsquare, flat)
}


def relevance(
    rule: str,
    layer: Explicit,
    x: Tensor,
    r: Tensor,
    *,
    zero_params: tuple[str, ...] = (),
    **parameters,
) -> Tensor:
    """The relevance of ``x``, of any number of batch dimensions, by the rule of that name."""
    layer = layer.drop(zero_params)
    batch = x.shape[: x.dim() - len(layer.in_shape)]
    samples = x.detach().double().reshape(-1, math.prod(layer.in_shape))
    outputs = r.detach().double().reshape(-1, math.prod(layer.out_shape))
    box = {}
    for name in ("low", "high"):
        if name in parameters:
            bound = torch.as_tensor(parameters.pop(name), dtype=torch.float64).broadcast_to(x.shape)
            box[name] = bound.reshape(samples.shape)
    rows = []
    for n, (sample, output) in enumerate(zip(samples, outputs, strict=True)):
        bounds = {name: bound[n, layer.source] for name, bound in box.items()}
        shares = LINEAR_RULES[rule](layer, sample[layer.source], output, **bounds, **parameters)
        rows.append(layer.spread(shares))
    return torch.stack(rows).reshape(*batch, *layer.in_shape)


def bias_share(rule: str, layer: Explicit, x: Tensor, r: Tensor, **parameters) -> Tensor:
    """What the bias of one sample's layer keeps: the relevance of one more input, which is always one."""
    extended = replace(
        layer,
        weight=torch.cat([layer.weight, layer.bias[:, None]], dim=1),
        ones=torch.cat([layer.ones, torch.zeros_like(layer.bias)[:, None]], dim=1),
        bias=torch.zeros_like(layer.bias),
    )
    inputs = torch.cat([x.detach().double().flatten()[layer.source], torch.ones(1, dtype=torch.float64)])
    return LINEAR_RULES[rule](extended, inputs, r.flatten(), **parameters)[-1]


# --- Any module, relevance convention -------------------------------------------------------------


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``[outputs, inputs]`` at ``x``, whole batch flattened."""
    return torch.autograd.functional.jacobian(
        lambda flat_x: function(flat_x.reshape(x.shape)).flatten(), x.flatten()
    )


def generic_epsilon(
    function: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, *, stab: float | Stabiliser = 1e-6
) -> Tensor:
    """``x * J^T(r / stab(z))`` with the Jacobian written out; the other inputs, if any, are closed over."""
    z = function(x).detach().flatten()
    shares = jacobian(function, x).T @ (r.flatten() / stabiliser(stab)(z))
    return x.detach() * shares.reshape(x.shape)


def norm(
    function: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, *, stab: float | Stabiliser = 1e-6
) -> Tensor:
    """Contributions of a layer without weights, as a matrix, each over the sum of its row."""
    c = jacobian(function, x) * x.detach().flatten()
    return torch.einsum("ji,j->i", c, r.flatten() / stabiliser(stab)(c.sum(1))).reshape(x.shape)


def pass_through(x: Tensor, r: Tensor) -> Tensor:
    return r.reshape(x.shape)


def stop(x: Tensor, r: Tensor) -> Tensor:
    return torch.zeros_like(x)


def uniform(n_inputs: int, r: Tensor) -> Tensor:
    return r / n_inputs


def softmax_epsilon(x: Tensor, r: Tensor) -> Tensor:
    """``x_i (r_i - s_i sum_j r_j)`` along the last axis (AttnLRP, Prop. 3.1)."""
    rows, out = x.reshape(-1, x.shape[-1]), torch.empty_like(x).reshape(-1, x.shape[-1])
    for n, (row, rel) in enumerate(zip(rows, r.reshape(rows.shape), strict=True)):
        s = (row - row.max()).exp() / (row - row.max()).exp().sum()
        for i in range(len(row)):
            out[n, i] = row[i] * (rel[i] - s[i] * rel.sum())
    return out.reshape(x.shape)


# --- Gradient convention --------------------------------------------------------------------------


def layer_norm(x: Tensor, g: Tensor, weight: Tensor | None, eps: float, n_axes: int) -> Tensor:
    """With the variance constant, the layer is diag(w / std) (I - 1/n); transposed for the gradient."""
    size = math.prod(x.shape[-n_axes:])
    w = torch.ones(size, dtype=x.dtype) if weight is None else weight.detach().flatten()
    centre = torch.eye(size, dtype=x.dtype) - 1 / size
    out = []
    for row, grad in zip(x.detach().reshape(-1, size), g.reshape(-1, size), strict=True):
        std = (((row - row.mean()) ** 2).mean() + eps).sqrt()
        out.append((torch.diag(w / std) @ centre).T @ grad)
    return torch.stack(out).reshape(x.shape)


def rms_norm(x: Tensor, g: Tensor, weight: Tensor | None, eps: float, n_axes: int) -> Tensor:
    size = math.prod(x.shape[-n_axes:])
    w = torch.ones(size, dtype=x.dtype) if weight is None else weight.detach().flatten()
    out = []
    for row, grad in zip(x.detach().reshape(-1, size), g.reshape(-1, size), strict=True):
        out.append(w / ((row**2).mean() + eps).sqrt() * grad)
    return torch.stack(out).reshape(x.shape)


def pseudo_identity(x: Tensor, z: Tensor, g: Tensor, *, stab: float | Stabiliser = 1e-6) -> Tensor:
    return g * z / stabiliser(stab)(x)


def ahqkv(weight: Tensor, g: Tensor) -> Tensor:
    """Queries and keys are held constant: only the last third of the rows (the values') carries anything."""
    third = weight.shape[0] // 3
    return torch.einsum("...j,ji->...i", g[..., 2 * third :], weight.detach()[2 * third :])


def relu_deconvnet(x: Tensor, g: Tensor) -> Tensor:
    """Zeiler 2014: the rectifier of the backward pass looks at the gradient alone."""
    return torch.where(g > 0, g, 0.0)


def relu_guided(x: Tensor, g: Tensor) -> Tensor:
    """Springenberg 2015: both the gradient and the input must be positive."""
    return torch.where((g > 0) & (x > 0), g, 0.0)


def relu_beta_smooth(x: Tensor, g: Tensor, *, beta: float = 10.0) -> Tensor:
    """Dombrowski 2019: the derivative of softplus with sharpness beta, d/dx log(1 + exp(beta x)) / beta."""
    return g / (1 + torch.exp(-beta * x))
