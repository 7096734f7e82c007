"""Batch normalisation, merged into the linear layer before it for the rules; the model is not touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import LayerCall
from tdhook.relevance.propagation.forms import DenseForm
from tdhook.relevance.propagation.stabilisers import rounding
from tdhook.relevance.rules.epsilon import EpsilonRule
from tdhook.relevance.rules.simple import PassRule
from tdhook.tape.functions import Identity

__all__ = ["merging"]


class _MergedBatchNormRule(PassRule):
    """Pass, and tell the linear layer before that its weights are those times the scale of the batch norm.

    The layer is found on the tape: the one whose output came in. In training, where the statistics are those of the
    batch and no fixed map exists, this is the pass rule alone.

    Args:
        linears: the layers to merge into, if something else lies between them and the batch norm.
    """

    def __init__(self, linears: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.linears = tuple(linears)

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the batch norm."""
        if args and isinstance(args[0], Tensor) and not module.training and module.running_mean is not None:
            node, stabilizers = _maker(args[0])
            if type(node).__name__.startswith(_PLAIN):
                # Behind a layer that runs as it is, merging amounts to the epsilon rule, stabilised once.
                epsilon = rounding if not stabilizers else stabilizers[0].stabilizer
                for other in stabilizers:
                    other.stabilizer = rounding
                return EpsilonRule(epsilon).run_in(flow, module, original, args, kwargs)
            for call in self._producers(node):
                # On [N, C, L] a batch norm scales the rows of what a fully connected layer made, not its features.
                if not isinstance(call.form, DenseForm) or args[0].dim() == 2 or self.linears:
                    call.merged = module
        return super().run_in(flow, module, original, args, kwargs)

    def _producers(self, node: Any) -> list[LayerCall]:
        if not self.linears:
            call = getattr(node, "call", None)
            return [call] if isinstance(call, LayerCall) else []
        found, seen, front = [], set(), [node]
        while front:
            node = front.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            call = getattr(node, "call", None)
            if isinstance(call, LayerCall) and call.module in self.linears:
                found.append(call)
            elif call is None and not getattr(node, "made_by", ""):  # other layers end the search
                front.extend(parent for parent, _ in node.next_functions)
        return found


_PLAIN = ("Addmm", "Mm", "Convolution", "Addbmm", "Baddbmm", "Bmm")


def _maker(x: Tensor) -> tuple[Any, list[Any]]:
    """The node of the tape that made ``x``, and those between at which relevance is stabilised."""
    node, passed = Identity.before(x.grad_fn)
    return node, [identity for identity in passed if hasattr(identity, "stabilizer")]


def merging(linears: Sequence[nn.Module] = ()) -> PassRule:
    """The rule for a batch norm that is merged into ``linears``, or else into the linear layer right before it."""
    return _MergedBatchNormRule(linears)
