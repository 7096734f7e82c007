"""What every registered rule is held to, whatever it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TOLERANCE = 1e-9


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to ``tolerance`` of the largest entry."""
    assert actual is not None, "no relevance arrived"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"not finite: {actual}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.double().abs().max().item(), (
        f"off by {error:.3g}, the largest entry is {expected.abs().max().item():.3g}\n{actual}\n{expected}"
    )


def as_tuple(output: Tensor | Sequence) -> tuple[Tensor, ...]:
    """The tensors of a possibly nested output, in order."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(tensor for part in output for tensor in as_tuple(part))


def registered_relevance(
    rule, module: nn.Module, inputs: Sequence[Tensor], relevance: Tensor | Sequence[Tensor], **kwargs
) -> tuple[Tensor, ...]:
    """The inputs' relevance by ``backward`` on a registered module; everything else is checked on the way.

    The forward value is the module's own, bit for bit; ``torch.autograd.grad`` agrees with ``backward``; afterwards
    the module is what it was.
    """
    before, state = module.forward, dict(vars(module))
    with torch.no_grad():
        plain = as_tuple(module(*inputs, **kwargs))

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    others = [x.detach().clone().requires_grad_() for x in inputs]
    with rule.register(module):
        outputs = as_tuple(module(*leaves, **kwargs))
        torch.autograd.backward(outputs, as_tuple(relevance))
        again = torch.autograd.grad(as_tuple(module(*others, **kwargs)), others, as_tuple(relevance))

    for output, own in zip(outputs, plain, strict=True):
        assert torch.equal(output, own), "the forward value is not the module's own"
        assert output.dtype == own.dtype
    for leaf, grad in zip(leaves, again, strict=True):
        assert leaf.grad is not None, "backward left no relevance"
        assert leaf.grad.dtype == leaf.dtype
        assert torch.equal(leaf.grad, grad), "autograd.grad and backward differ"
    assert module.forward == before, "the module's forward was not put back"
    assert vars(module).keys() == state.keys(), f"left behind: {vars(module).keys() ^ state.keys()}"
    for parameter in module.parameters():
        parameter.grad = None
    return tuple(leaf.grad for leaf in leaves)
