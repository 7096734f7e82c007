"""Random programs: lines that call modules and functions on a pool of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

N = 4
MASK = torch.tensor([True, False, False, True])
GROUPS = torch.tensor([2, 0, 2, 1])


def _fixed(*shape: int) -> Tensor:
    return torch.linspace(0.4, 1.2, N).double().expand(*shape, N).clone()


# What requires a gradient, and is no input: a leaf, and what was computed of one and kept.
LEAF = _fixed().requires_grad_()
KEPT = _fixed().requires_grad_() * 0.5


@dataclass
class Pair:
    left: Tensor
    right: Tensor


class Crosses(nn.Module):
    """Takes a dictionary and returns a dataclass."""

    def forward(self, values: dict[str, Tensor]) -> Pair:
        return Pair(values["a"] + values["b"], values["a"] * 0.5 - values["b"])


class Splits(nn.Module):
    """Returns a tuple of views."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : N // 2], x[..., N // 2 :]


class OnACopy(nn.Module):
    """Hands a module a tensor that nobody else sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.clone())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(N, 2 * N)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.inner(x), -1)


class Attends(nn.Module):
    """Attention among pairs of features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(N, 3 * N)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, N // 2)).unbind(-3)
        return F.scaled_dot_product_attention(q, k, v).flatten(-2)


class ByKeyword(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(N, N), nn.BatchNorm1d(N)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.inner(input=x.reshape(-1, N))).reshape(x.shape)


class Standardised(nn.Linear):
    """Transforms its weight in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(-1, keepdim=True), self.bias)


class Outside(nn.Module):
    """Holds a layer without registering it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(N, N).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Counts(nn.Module):
    """Counts its calls in a buffer, in place, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.calls.append(len(self.calls))
        return x * (1 + 0.1 * self.count) / (1 + 0.1 * len(self.calls))


class Remembers(nn.Module):
    """Keeps what it was given, for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before, self.last = self.last, 0.5 * x
        return x if before is None or before.shape != x.shape else x + before


class Squared(torch.autograd.Function):
    """Has a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Rounded(torch.autograd.Function):
    """Rounds, and lets gradients through as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N, N),
    "unbiased": lambda: nn.Linear(N, N, bias=False),
    "layer norm": lambda: nn.LayerNorm(N),
    "rms norm": lambda: nn.RMSNorm(N, eps=1e-3),
    "relu": lambda: nn.ReLU(),
    "gelu": lambda: nn.GELU(),
    "relu in place": lambda: OnACopy(nn.ReLU(inplace=True)),
    "dropout": lambda: nn.Dropout(0.3),
    "identity": lambda: nn.Identity(),
    "mlp": lambda: nn.Sequential(nn.Linear(N, 6), nn.SiLU(), nn.Linear(6, N)),
    "gated": Gated,
    "attention": Attends,
    "by keyword": ByKeyword,
    "standardised": lambda: Standardised(N, N),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(N, N)),
    "outside": Outside,
    "counts": Counts,
    "remembers": Remembers,
}


def _overwrite(x: Tensor, y: Tensor) -> Tensor:
    x[..., 1:3] = y[..., :2]
    return x


def _through_view(x: Tensor, y: Tensor) -> Tensor:
    view = x[..., :2]
    view.mul_(0.5)
    view += y[..., 2:]
    return x


def _pair(x: Tensor, y: Tensor) -> Tensor:
    pair = Crosses()({"a": x, "b": y})
    return pair.left * 0.5 + pair.right


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": Tensor.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "abs": abs,
    "square": lambda x: x**2,
    "scale": lambda x: 1.5 * x,
    "shift": lambda x: x + 0.25,
    "negative": lambda x: -x,
    "flip": lambda x: x.flip(-1),
    "softmax": lambda x: x.softmax(-1),
    "normalised": lambda x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt(),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "spread": lambda x: x.sum(-1, keepdim=True).expand_as(x),
    "cumsum": lambda x: x.cumsum(-1),
    "sorted": lambda x: x.sort(-1)[0],
    "masked": lambda x: x.masked_fill(MASK, 0.5),
    "shaped": lambda x: x.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2),
    "split": lambda x: torch.cat(Splits()(x)[::-1], -1),
    "view": lambda x: x.view_as(x),
    "same": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "detached sum": lambda x: x + x.detach() * 0.1,
    "foreach": lambda x: torch._foreach_mul([x], 0.5)[0],
    "own backward": Squared.apply,
    "rounded": Rounded.apply,
    "fraction": lambda x: x - x.floor(),
    "at least": lambda x: torch.maximum(x, torch.linspace(-0.5, 0.6, N, dtype=x.dtype)),
    "above the median": lambda x: x - x.median(-1, keepdim=True)[0],
    "largest of groups": lambda x: x.scatter_reduce(-1, GROUPS.expand_as(x), 1.5 * x, "amax"),
    "mask as numbers": lambda x: (x > 0).to(x) * x.flip(-1),
    "spectrum": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1), n=N, dim=-1) * 1.5,
    "single precision": lambda x: (x.float() * 1.5).double(),
    "scaled by a leaf": lambda x: x * LEAF,
    "moved by what is kept": lambda x: x + KEPT,
    "coupled": lambda x: x - 1e-3 * x.mean(0, keepdim=True) if x.dim() > 1 else x,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / (y.square() + 0.5),
    "gate": lambda x, y: x * y.sigmoid(),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(MASK, x, y),
    "outer": lambda x, y: (x.unsqueeze(-1) @ y.unsqueeze(-2)).mean(-1),
    "stack": lambda x, y: torch.stack([x, y], -1).mean(-1),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "pair": _pair,
    "remainder": lambda x, y: torch.remainder(x, y.square() + 0.5),
    "hypotenuse": lambda x, y: torch.hypot(x, y.abs() + 0.1),
    "angle": lambda x, y: torch.atan2(x, y.abs() + 0.2),
    "exchanged": lambda x, y: torch.where(x > y, x, 0.5 * y),
}
IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_": lambda x, y: x.add_(y),
    "mul_": lambda x, y: x.mul_(y),
    "scaled": lambda x, y: x.mul_(0.7),
    "relu_": lambda x, y: F.relu_(x),
    "tanh_": lambda x, y: x.tanh_(),
    "clamp_": lambda x, y: x.clamp_(-0.6, 0.9),
    "copy_": lambda x, y: x.copy_(y),
    "masked_fill_": lambda x, y: x.masked_fill_(MASK, 0.3),
    "setitem": _overwrite,
    "through a view": _through_view,
    "foreach_": lambda x, y: (torch._foreach_mul_([x], 0.5), x)[1],
}


@dataclass(frozen=True)
class Line:
    """``pool.append(name(pool[x], pool[y]))``."""

    kind: str
    name: str
    x: int
    y: int


class Program(nn.Module):
    """Runs its lines one after the other on a pool of tensors, and sums up what the last ones made."""

    def __init__(self, lines: list[Line]) -> None:
        super().__init__()
        self.lines = lines
        names = sorted({line.name for line in lines if line.kind == "module"})
        self.parts = nn.ModuleList([MODULES[name]() for name in names])
        self.index = {name: i for i, name in enumerate(names)}
        self.head = nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        pool: list[Tensor] = [x]
        for line in self.lines:
            a, b = pool[line.x % len(pool)], pool[line.y % len(pool)]
            if line.kind == "module":
                made: Any = self.parts[self.index[line.name]](a)
            elif line.kind == "unary":
                made = UNARY[line.name](a)
            elif line.kind == "binary":
                made = BINARY[line.name](a, b)
            else:
                a = a if a.is_contiguous() and 0 not in a.stride() else a.clone()
                made = IN_PLACE[line.name](a, b.clone() if a is b else b)
            pool.append(made)
        total = pool[-1]
        for tensor in pool[-3:-1]:
            total = total + tensor
        return self.head(total)
