"""What is patched: models, and their clean and corrupt runs."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn

EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Block(nn.Module):
    """What a transformer adds to its residual stream: attention of two heads, and a gated network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(-3, -2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(z.transpose(-3, -2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """Reads tokens, and answers after the last."""

    def __init__(self, size: int = 6, words: int = 9) -> None:
        super().__init__()
        self.words = nn.Embedding(words, size)
        self.blocks = nn.ModuleList([Block(size), Block(size)])
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[..., -1, :]


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().double().requires_grad_(False)


def two(clean: Tensor, corrupt: Tensor, batch: list[int], key: str = "input") -> TensorDict:
    sides = {"clean": TensorDict({key: clean}, batch), "corrupt": TensorDict({key: corrupt}, batch)}
    return TensorDict(sides, batch)


def tokens(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    clean = torch.randint(9, (*batch, 5))
    return two(clean, clean.roll(1, -1), list(batch))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)).double()


def states(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    clean, corrupt = torch.randn(2, *batch, 4).double()
    return two(clean, corrupt, list(batch))


def values(model: nn.Module, x: Tensor, places: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model answers, and its values at places, on the tape."""
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, args, output=None):
            value = (args[0] if output is None else output).clone()
            if not value.requires_grad:
                value.requires_grad_()
            found[name] = value
            return (value,) if output is None else value

        return hook

    hooks = []
    for name in places:
        module = model.get_submodule(name.removesuffix(":input"))
        on = module.register_forward_pre_hook if name.endswith(":input") else module.register_forward_hook
        hooks.append(on(keep(name)))
    try:
        return model(x), found
    finally:
        for hook in hooks:
            hook.remove()


def patched(model: nn.Module, x: Tensor, place: str, value: Tensor) -> Tensor:
    """What a model answers with another value at a place."""
    module = model.get_submodule(place.removesuffix(":input"))
    if place.endswith(":input"):
        hook = module.register_forward_pre_hook(lambda module, args: (value,))
    else:
        hook = module.register_forward_hook(lambda module, args, output: value)
    try:
        with torch.no_grad():
            return model(x)
    finally:
        hook.remove()


WHICH = 2


def both_sides(model: nn.Module, td: TensorDict, patch: str, places: list[str]):
    """The run that is patched, and what is put into it: answers and values at places; and the sign of an effect."""
    runs = {side: values(model, td[side, "input"], places) for side in ("clean", "corrupt")}
    here = "corrupt" if patch == "clean" else "clean"
    return runs[here], runs[patch], td[here, "input"], 1 if patch == "clean" else -1


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh()).tanh()
