"""What a ledger costs: how much longer an explanation takes that keeps one."""

from __future__ import annotations

import time

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.models import mlp
from tdhook import LRP, Target

__all__ = ["main"]

SIZES = (1, 32, 1_000, 20_000)


class Centred(nn.Module):
    """A model in which the elements of a batch meet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The model on what the mean of the batch is taken off from."""
        found: Tensor = self.model(x - x.mean(0))
        return found


def main() -> None:
    """Print a row for each model and batch size: milliseconds without a ledger and with one, and their ratio."""
    torch.manual_seed(0)
    print(f"{'model':14} {'batch':>6} {'without':>9} {'with':>9} {'ratio':>6}")
    for name, model in (("MLP", mlp()), ("MLP, meeting", Centred(mlp()))):
        for size in SIZES:
            td = TensorDict(input=torch.randn(size, 17), batch_size=[size])
            without, kept = (milliseconds(model, td, ledger=ledger) for ledger in (False, True))
            print(f"{name:14} {size:6} {without:9.1f} {kept:9.1f} {kept / without:6.1f}")


def milliseconds(model: nn.Module, td: TensorDict, *, ledger: bool) -> float:
    """The least time of a few calls."""
    explained = LRP("epsilon_plus", target=Target("output", 0), ledger=ledger).wrap(model)
    explained(td.copy())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        explained(td.copy())
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
