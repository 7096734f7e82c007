"""A transformer that two processes hold together, explained.

To run it: ``torchrun --nproc-per-node 2 examples/large/two_processes.py``.

First each process has half of every layer (tensor parallelism) and both explain one batch; then each has half of the
weights (``fully_shard``) and explains a batch of its own. Both are compared with the model held whole.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tdhook import LRP, Target

WIDTH, HEADS, TOKENS = 64, 4, 12


class Block(nn.Module):
    """Attention and a gated perceptron, as in a Llama, with the heads that this process has."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(-2, -3)
            for layer in (self.queries, self.keys, self.values)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        h = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def make_model() -> nn.Sequential:
    """The same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 8)).double().eval()


def make_batch(seed: int) -> TensorDict:
    """Embedded tokens, ``[batch, tokens, width]``."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(3, TOKENS, WIDTH, generator=chance, dtype=torch.float64)
    return TensorDict({"input": x}, [3])


def explain(model: nn.Module, td: TensorDict) -> Tensor:
    """Relevance of each token for the largest logit after the last one, ``[batch, tokens]``."""
    td = LRP("attn_lrp", target=Target("output", "argmax")).wrap(model)(td)
    return td["attr", "input"].sum(-1)


def split_by_heads(model: nn.Sequential) -> nn.Module:
    """Tensor parallelism: heads and hidden units are divided among the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        **{name: ColwiseParallel() for name in ("queries", "keys", "values", "gate", "up")},
        **{name: RowwiseParallel() for name in ("out", "down")},
    }
    for block in model[:2]:
        parallelize_module(block, mesh, plan)
    return model


def split_by_weights(model: nn.Sequential) -> nn.Module:
    """FSDP2: weights are divided among the processes, gathered layer by layer, and kept on the CPU meanwhile."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[:2]:
        fully_shard(block, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return fully_shard(model, mesh=mesh)


def main() -> None:
    """Explain, and say how far from the model held whole the relevance is."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, split, seed in (
        ("tensor parallel", split_by_heads, 0),
        ("fully sharded", split_by_weights, rank),
    ):
        found = explain(split(make_model()), make_batch(seed))
        expected = explain(make_model(), make_batch(seed))
        apart = (found - expected).abs().max() / expected.abs().max()
        if rank == 0 or split is split_by_weights:
            print(f"{name}, process {rank}: {apart:.0e} from the model held whole", flush=True)
        assert apart < 1e-9
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
