"""Batch normalisation, merged into the linear layer before it for the rules; the model is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import damped_at, noted
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.executed_layers import ExecutedLayer
from tdhook.relevance.propagation.lent import are_lent
from tdhook.relevance.propagation.merges import Merges
from tdhook.relevance.propagation.places import Place as Beside
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.propagation.stabilisers import Stabilizer, rounding
from tdhook.relevance.propagation.steps import Affine
from tdhook.relevance.rules.epsilon import EpsilonRule
from tdhook.relevance.rules.simple import PassRule
from tdhook.relevance.secants.averages import product
from tdhook.relevance.secants.norms import normalised
from tdhook.tape.axes import before_moves
from tdhook.tape.functions import Identity
from tdhook.tape.internals import gradients_of

__all__ = ["merging", "merging_function"]


class _MergedBatchNormRule(PassRule):
    """Pass, and tell the linear layer before that its weights are those times the scale of the batch norm.

    The layer is found on the tape: the one whose output came in, reshaped or transposed at most. In training, where the
    statistics are those of the batch and no fixed map exists, this is the pass rule alone.

    Where something else reads what the layer returns, too (a sum around the batch norm, another batch norm), there is
    no one layer that both amount to: the batch norm is explained as the weighted sum that it is.

    Args:
        linears: the layers to merge into, if something else lies between them and the batch norm.
        alone: whether it passes where it is behind no layer; or else it is the weighted sum there, too.
    """

    def __init__(self, linears: Sequence[nn.Module] = (), *, alone: bool = True) -> None:
        super().__init__()
        self.linears, self.alone = tuple(linears), alone

    def __repr__(self) -> str:
        return repr(PassRule())

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """As the pass rule does, once the layer is told; behind one that runs as it is, as the epsilon rule does."""
        passed, weighted = super().running(module, flow), EpsilonRule(rounding).bound(module, flow)

        def run(call: Call) -> Any:
            merges = call.setting.merges
            x = call.args[0] if call.args else call.kwargs.get("input")
            if merges is None or not isinstance(x, Tensor) or module.training or module.running_mean is None:
                return passed(call)
            if are_lent(module):
                raise NotImplementedError(_LENT.format(type(module).__name__))
            maker = _Maker(x)
            if maker.is_plain:
                # Merging amounts to the epsilon rule, stabilised once.
                epsilon = _taken_over(merges, module, maker)
                return weighted(call) if epsilon is None else EpsilonRule(epsilon).bound(module, flow)(call)
            layers, native = self._producers(maker.node)
            if self.linears and not layers:
                if not native:
                    raise ValueError(_NOT_BEFORE.format(type(module).__name__))
                return weighted(call)
            told = self._tell(merges, module, maker, layers)
            return passed(call) if told else weighted(call)

        return run

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Likewise: a batch norm scales differences, and its mean and bias are none."""
        passed, scaled = super().running(module, flow), secant(module, flow, product)
        scales = passed if flow == "relevance" else self._stabilised(module, scaled)

        def run(call: Call) -> Any:
            x = call.args[0] if call.args else call.kwargs.get("input")
            if not isinstance(x, Tensor) or module.training or module.running_mean is None:
                return secant(module, flow, normalised)(call)
            merges, reference = call.setting.merges, call.setting.reference
            if merges is None:
                return scaled(call)
            if are_lent(module):
                raise NotImplementedError(_LENT.format(type(module).__name__))
            if reference is None or reference.running:
                return scales(call)
            maker = _Maker(x)
            self._tell(merges, module, maker, self._producers(maker.node)[0])
            handle, z = reference.handles.of(x), scales(call)
            if handle is not None:
                scaling = _Scaling(module, x)
                reference.handles.put(z, handle.behind_of(scaling, scaling.scale))
            return z

        return run

    def _stabilised(self, module: nn.Module, scaled: Run) -> Run:
        """Scaling, stabilised where the layer before it would be, as one that runs as it is."""

        def first(call: Call, place: Beside) -> Any:
            merges, x = call.setting.merges, call.args[0] if call.args else call.kwargs["input"]
            z, maker = scaled(call), _Maker(x)
            epsilon = _taken_over(merges, module, maker) if maker.is_plain and merges is not None else None
            return z if epsilon is None else damped_at(z, place, epsilon, call.setting)

        return noted(first, scaled)

    def _tell(
        self, merges: Merges, module: nn.Module, maker: _Maker, layers: Sequence[ExecutedLayer]
    ) -> bool:
        """Tell the layers before it of a batch norm, unless something else reads what these return.

        Returns:
            Whether the batch norm passes.
        """
        passes = self.alone
        for layer in layers:
            if not self.linears:
                # On [N, C, L] a batch norm scales the rows of what a fully connected layer made, not its features.
                if maker.axis != layer.form.output_axis(maker.n_axes):
                    continue
                if merges.is_apart(module):
                    return False
                merges.look_at(module, maker.way)
            merges.merge(module, layer)
            passes = True
        return passes

    def _producers(self, node: Any) -> tuple[list[ExecutedLayer], bool]:
        """The layers before it, and whether there is one that runs as it is."""
        if not self.linears:
            layer = getattr(node, "executed", None)
            return [layer] if isinstance(layer, ExecutedLayer) else [], False
        found, native, seen, front = [], False, set(), [node]
        while front:
            node = front.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            layer = getattr(node, "executed", None)
            if isinstance(layer, ExecutedLayer) and layer.module in self.linears:
                found.append(layer)
            elif layer is None and not getattr(node, "made_by", ""):  # other layers end the search
                native = native or type(node).__name__.startswith(_PLAIN)
                front.extend(parent for parent, _ in node.next_functions)
        return found, native


class _Scaling:
    """A batch norm in evaluation, as a function."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        affine, along = Affine.of(module), (-1, *(1,) * (x.dim() - 2))
        self.scale, self._shift = affine.scale.view(along), affine.shift.view(along)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) + self._shift.to(x.dtype)


_LENT = (
    "{} is merged into the layer before it, for which its statistics are needed, and these are offloaded: keep this "
    "module in memory, or pass merge_batch_norm=False"
)
_NOT_BEFORE = (
    "merge_batch_norm names the layers that {} is to be merged into, and none of them is seen before it: they do not "
    "lead to it, or compute in their own way; leave it out, and it is merged into what is right before it"
)
_PLAIN = ("Addmm", "Mm", "Convolution", "Addbmm", "Baddbmm", "Bmm")


class _Maker:
    """What made the values that a batch norm is given, which may have been moved since.

    Attributes:
        node: the node of the tape.
        axis: which axis of what it made the batch norm scales, and ``n_axes``: of how many.
        moved: whether they were moved since.
        way: the nodes from what the batch norm is given to ``node``.
        stabilizing: the identities since, the last one first, at which relevance is stabilised.
    """

    def __init__(self, x: Tensor) -> None:
        self.axis, self.moved = 1, False
        self.node, passed = Identity.before(x.grad_fn)
        self.way, self._shape = [*passed, self.node], tuple(x.shape)
        self._go_back()
        if not self.is_plain:
            self._go_past_bias()

    @property
    def n_axes(self) -> int:
        return len(self._shape)

    @property
    def stabilizing(self) -> list[Any]:
        return [each for each in self.way if getattr(each, "place", None) is not None]

    def _go_back(self) -> None:
        """To what made the values, from where they were moved to."""
        while len(self._shape) > 1 and (moved := before_moves(self.node, self.axis, self._shape)) is not None:
            self.moved = True
            before, self.axis, shape = moved
            self._shape = tuple(shape)
            self._enter(before)

    def _enter(self, node: Any) -> None:
        self.node, passed = Identity.before(node)
        self.way += [*passed, self.node]

    def _go_past_bias(self) -> None:
        """To a product of matrices, where a constant is added to one: torch writes layers on what was transposed so."""
        before = self.node, self.axis, self._shape, self.moved, list(self.way)
        parents = getattr(self.node, "next_functions", ())
        live = [
            parent for parent in parents if type(parent[0]).__name__ not in ("NoneType", "AccumulateGrad")
        ]
        if type(self.node).__name__ == "AddBackward0" and len(live) == 1:
            node, at = live[0]
            if tuple(gradients_of(node)[at][0]) == self._shape:
                self._enter(node)
                self._go_back()
        if not type(self.node).__name__.startswith(("Mm", "Bmm")) or not self.is_plain:
            self.node, self.axis, self._shape, self.moved, self.way = before

    @property
    def is_plain(self) -> bool:
        """Whether it is a linear layer or convolution that runs as it is."""
        name = type(self.node).__name__
        if not name.startswith(_PLAIN):
            return False
        return not self.moved or self.axis == (1 if name.startswith("Conv") else self.n_axes - 1)


def _taken_over(merges: Merges, norm: nn.Module, maker: _Maker) -> Stabilizer | None:
    """The stabiliser of a layer that runs as it is, which from now on is behind the batch norm, if it can be merged."""
    if not maker.stabilizing or merges.is_apart(norm):
        return None
    merges.look_at(norm, maker.way)
    for identity in maker.stabilizing:
        merges.postpone(identity.place)
    stabilizer: Stabilizer = maker.stabilizing[0].stabilizer
    return stabilizer


def merging(linears: Sequence[nn.Module] = ()) -> PassRule:
    """The rule for a batch norm that is merged into ``linears``, or else into the linear layer right before it."""
    return _MergedBatchNormRule(linears)


def merging_function() -> PassRule:
    """That for one which is called as a function: the weighted sum that it is, unless it is behind a linear layer."""
    return _MergedBatchNormRule(alone=False)
