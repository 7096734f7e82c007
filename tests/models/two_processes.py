"""What the tests of parallel models run in each of two processes, and how they start these."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tdhook import LRP, Target
from tdhook.attribution import Attribution, IntegratedGradients
from tdhook.relevance.propagation.weights import WeightCache
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)
from tdhook.targets import Through

RULES = [
    EpsilonRule(1e-2),
    EpsilonRule(1e-2, zero_params="bias"),
    GammaRule(0.25, 1e-2),
    ZPlusRule(1e-2),
    AlphaBetaRule(2.0, 1.0, 1e-2, "bias"),
    FlatRule(1e-2),
    WSquareRule(1e-2),
    ZBoxRule(-3.0, 3.0, 1e-2),
    IgnoreRule(),
]


def in_two_processes(function: Callable[..., None], folder: Path) -> None:
    """Run a function in each of two processes that know each other; what one of them raises is raised here."""
    torch.multiprocessing.spawn(_started, (function, str(folder / "store")), nprocs=2)


def _started(rank: int, function: Callable[..., None], store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch's own: it looks at modules that it deprecates, and says how gloo is to be closed.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "barrier|.*found no DeviceMesh|FSDP2-wrapped module .* returned a view")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        function()
    finally:
        dist.destroy_process_group()


class Attention(nn.Module):
    """Each process has as many heads as its parts of the projections give."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One block of a transformer; constants in it absorb relevance of which each process sees a part."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.attention, self.n2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))) * 0.9 + 0.05)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.LayerNorm(8), nn.Linear(8, 2)).double()


COLUMNS, ROWS = ColwiseParallel, RowwiseParallel
PLANS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "columns, rows": (perceptron, {"0": COLUMNS(), "2": ROWS()}),
    "rows, columns": (
        perceptron,
        {"0": ROWS(input_layouts=Replicate()), "2": COLUMNS(output_layouts=Replicate())},
    ),
    "sharded in between": (perceptron, {"0": COLUMNS(use_local_output=False), "2": ROWS()}),
    "heads": (
        transformer,
        {f"0.attention.{name}": COLUMNS() for name in "qkv"}
        | {"0.attention.o": ROWS(), "0.up": COLUMNS(), "0.down": ROWS()},
    ),
    "sequence": (
        transformer,
        {
            "0": PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
            ),
            "0.n1": SequenceParallel(),
            "0.n2": SequenceParallel(),
            "0.attention": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
            **{f"0.attention.{name}": COLUMNS() for name in "qkv"},
            "0.attention.o": ROWS(output_layouts=Shard(1)),
            "0.up": COLUMNS(input_layouts=Shard(1)),
            "0.down": ROWS(output_layouts=Shard(1)),
            "1": SequenceParallel(),
            "2": COLUMNS(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    ),
}


def batch(model: nn.Module, seed: int = 1) -> TensorDict:
    shape = (3, 8) if isinstance(model[0], nn.Linear) else (3, 4, 8)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return TensorDict({"input": x}, [3])


def assert_same(method: Attribution, one: nn.Module, parallel: nn.Module, seed: int = 1) -> None:
    expected = method.wrap(one)(batch(one, seed))
    explained = method.wrap(parallel)
    for _ in range(2):
        found = explained(batch(one, seed))
        for key, value in expected.items(True, True):
            torch.testing.assert_close(found[key] + 0, value, rtol=0, atol=1e-9, msg=f"{method}: {key}")


def methods() -> list[LRP]:
    """All rules, and a ledger with one and with several outputs explained."""
    both = Target("output", [0, 1])
    rules = [LRP([(nn.Linear, rule)], target="output", ledger=True) for rule in RULES]
    return [
        *rules,
        LRP([(nn.Linear, ZPlusRule())], target=both, ledger=True),
        LRP("epsilon_plus", target=both),
    ]


def tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for make, plan in PLANS.values():
        for method in methods():
            assert_same(method, make(), parallelize_module(make(), mesh, plan))
    parallel = parallelize_module(perceptron(), mesh, PLANS["columns, rows"][1])
    one_unit = LRP("epsilon_plus", target=Through("output", "0", 1)).wrap(parallel)
    with pytest.raises(NotImplementedError, match=r"of '0' each process holds its own part.*Replicate\(\)"):
        one_unit(batch(perceptron()))


def sharded(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    mesh, model = init_device_mesh("cpu", (2,)), make()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fully_sharded() -> None:
    """Each process explains a batch of its own."""
    seed = 1 + dist.get_rank()
    for options in ({}, {"reshard_after_forward": False}, {"offload_policy": CPUOffloadPolicy(False)}):
        for method in methods():
            assert_same(method, perceptron(), sharded(perceptron, **options), seed)


def sharded_as_one() -> None:
    """Layers that share the weights of one module around them, which stay gathered from the forward pass on."""
    mesh, seed = init_device_mesh("cpu", (2,)), 1 + dist.get_rank()
    for method in (
        LRP("epsilon_plus_flat", target=Target("output", "all"), ledger=True),
        LRP("deeplift", target=Target("output", 0), baseline="mean"),
        IntegratedGradients(Target("output", 0), steps=2),
    ):
        assert_same(method, transformer(), fully_shard(transformer(), mesh=mesh), seed)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(300, 300), nn.ReLU())])


def nothing_is_kept_of_sharded_weights() -> None:
    explained = LRP([(nn.Linear, ZPlusRule())], target="output").wrap(sharded(wide))
    for _ in range(3):
        explained(TensorDict({"input": torch.randn(2, 300)}, [2]))
    caches = [obj for obj in gc.get_objects() if type(obj) is WeightCache]
    assert caches and not any(cache._kept for cache in caches)


def trained(wrap: Callable[[nn.Module], nn.Module], explain: bool) -> Tensor:
    """What a model computes after three steps of training, explained before each of them or not."""
    model = wrap(perceptron())
    explained = LRP("epsilon_plus", target="output", ledger=True).wrap(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        if explain:
            explained(batch(perceptron(), 5))
        optimiser.zero_grad()
        model(batch(perceptron(), 10 * step + dist.get_rank())["input"]).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        return model(batch(perceptron())["input"]).clone()


def training_goes_on_as_without() -> None:
    def static(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, static_graph=True)

    for wrap in (DistributedDataParallel, static, lambda model: sharded(lambda: model)):
        expected, found = trained(wrap, False), trained(wrap, True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def one_process_explains_by_itself() -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    if dist.get_rank() == 0:
        td = LRP("epsilon_plus", target="output").wrap(model)(TensorDict({"input": torch.randn(3, 8)}, [3]))
        assert td["attr", "input"].isfinite().all()


def data_parallel() -> None:
    fully_sharded()
    sharded_as_one()
    nothing_is_kept_of_sharded_weights()
    training_goes_on_as_without()
    one_process_explains_by_itself()
