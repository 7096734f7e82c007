"""The floor, this library and its peers, each as a function from inputs to relevance."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.timing import Contender
from tdhook import LRP, Target

__all__ = [
    "FLOOR",
    "FLOOR_COMPILED",
    "ONE_EXPLANATION",
    "OURS",
    "OURS_COMPILED",
    "floor",
    "fresh_compiler",
    "gradient_times_input",
    "is_gpu",
    "lrp",
    "own",
    "start_compiler",
]

FLOOR, FLOOR_COMPILED = "floor", "floor compiled"
OURS, OURS_COMPILED, ONE_EXPLANATION = "tdhook", "tdhook compiled", "tdhook, one output"

Make = Callable[[], Contender]


def own(case: Case, device: str, compiled: bool) -> dict[str, Make]:
    """What makes the floor and this library's contenders for a case."""
    makes = {
        FLOOR: lambda: Contender(floor(case.model(device))),
        OURS: lambda: lrp(case, case.model(device)),
    }
    if case.index == "all":
        makes[ONE_EXPLANATION] = lambda: lrp(case, case.model(device), index="argmax")
    if compiled:
        mode = "reduce-overhead" if is_gpu(device) else True
        makes[FLOOR_COMPILED] = lambda: Contender(compiled_floor(case.model(device), device))
        makes[OURS_COMPILED] = lambda: lrp(case, case.model(device), compile=mode)
    return makes


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def gradient_times_input(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and input times the gradient of its largest entry; the backward pass is to the input only."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        q = module(x)
        (gradient,) = torch.autograd.grad(q.amax(-1).sum(), x)
    return q.detach(), (x * gradient).detach()


def floor(model: TensorDictModuleBase) -> Callable[[TensorDict], Tensor]:
    """Gradient times input: one forward and one backward pass, TensorDict in and out."""

    def explain(td: TensorDict) -> Tensor:
        x = td["observation"].detach().requires_grad_()
        with torch.enable_grad():
            q = model(TensorDict({"observation": x}, td.batch_size))["action_value"]
            (gradient,) = torch.autograd.grad(q.amax(-1).sum(), x)
        relevance = (x * gradient).detach()
        td.set("action_value", q.detach())
        td.set(("attr", "observation"), relevance)
        return relevance

    return explain


def compiled_floor(model: TensorDictModuleBase, device: str) -> Callable[[TensorDict], Tensor]:
    """The same as one compiled graph of tensors, with the TensorDict outside: the fastest way that was found."""
    mode = "reduce-overhead" if is_gpu(device) else None
    graph = torch.compile(gradient_times_input, fullgraph=True, mode=mode)
    module = model.module

    def explain(td: TensorDict) -> Tensor:
        q, relevance = graph(module, td["observation"])
        td.set("action_value", q)
        td.set(("attr", "observation"), relevance)
        return relevance

    def first_traced(td: TensorDict) -> Tensor:
        # Read while a graph is traced, and only then.
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return explain(td)

    return traced_once(first_traced, explain)


def traced_once(
    first: Callable[[TensorDict], Tensor], later: Callable[[TensorDict], Tensor]
) -> Callable[[TensorDict], Tensor]:
    """``first`` for the first call and ``later`` from then on."""
    calls = iter([first])
    return lambda td: next(calls, later)(td)


def lrp(case: Case, model: TensorDictModuleBase, index: str | None = None, **settings: object) -> Contender:
    """This library, as a user calls it."""
    target = Target("action_value", index or case.index)
    explained = LRP(case.preset, target=target, baseline=case.baseline, **settings).wrap(model)
    return Contender(lambda td: explained(td)["attr", "observation"])


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Compile from nothing, whatever was compiled before, here or by an earlier process."""
    from torch._inductor.utils import fresh_inductor_cache

    torch._dynamo.reset()
    with fresh_inductor_cache():
        yield
    torch._dynamo.reset()


@functools.cache
def start_compiler() -> None:
    """Compile anything, so that what a process loads and finds out once is part of no measurement."""
    torch.compile(torch.sin)(torch.ones(8))
