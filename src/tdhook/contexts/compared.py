"""Methods that compare with a reference: where it comes from, and the accounts of the difference from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.contexts.attribution import Attribution, Shared
from tdhook.keys import under
from tdhook.passes.diagnosis import NOT_FINITE
from tdhook.passes.forward import Run
from tdhook.passes.meeting import joint_axes
from tdhook.passes.runner import Runner
from tdhook.passes.variants import Variants
from tdhook.perturbing.references import Baseline, Fill, References, as_references
from tdhook.tape.conditions import is_traced
from tdhook.targets import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ERROR", "SPREAD", "Compared", "Complete", "compared", "compared_with", "write_under"]

Self = TypeVar("Self", bound="Compared")
SelfComplete = TypeVar("SelfComplete", bound="Complete")

_ACCOUNTS = ("target", "inputs", "absorbed", "gap")
SPREAD, ERROR = "spread", "standard_error"
"""Where the spread of relevance over several explanations is written, and the standard error of their mean."""


class Compared(Attribution):
    """A method that explains the difference from a reference; or, without one, the value.

    Attributes:
        references: what is compared with.
    """

    references: References | None = None

    def against(self: Self, references: References) -> Self:
        """The same with other references."""
        other = copy.copy(self)
        other.references = references
        return other

    @property
    def is_one_pass(self) -> bool:
        """Whether a reference takes one pass, forwards and back, so that many of them may go side by side."""
        return False

    @property
    def samples(self) -> int:
        """How many references there are."""
        return 0 if self.references is None else self.references.samples

    @property
    def compares(self) -> bool:
        """Whether there is a reference."""
        return self.references is not None

    @property
    def spreads(self) -> bool:
        """Whether the spread of relevance over references is wanted."""
        return self.references is not None and self.references.spread

    @property
    def writes_under(self) -> tuple[str, ...]:
        """``"spread"``, if it was asked for."""
        return (SPREAD,) if self.spreads else ()

    def reads(self, td: TensorDictBase) -> list[NestedKey]:
        """What the references are taken of."""
        return [] if self.references is None else self.references.reads(td)

    def among(self: Self, td: TensorDictBase) -> Self:
        """With means and samples of ``td``, unless the references have data of their own."""
        return self if self.references is None else self.against(self.references.among(td))

    def drawn_from(self: Self, rows: Callable[[], TensorDictBase]) -> Self:
        """With means and samples of these rows, unless the references have data of their own."""
        return self if self.references is None else self.against(self.references.drawn_from(rows))

    @property
    def steps_before(self) -> int:
        """One where the baseline is the step before."""
        return 0 if self.references is None else self.references.steps_before

    def settled(
        self: Self,
        keys: Sequence[NestedKey],
        td: TensorDictBase,
        valid: Tensor | None = None,
        *,
        each: bool = False,
        first: int = 0,
    ) -> tuple[Self, TensorDictBase, Fill]:
        """With references that are entries, where they are means, draws, or the step before."""
        if self.references is None:
            return super().settled(keys, td, valid, each=each, first=first)
        references, td, fill = self.references.settled(keys, td, valid, each=each, first=first)
        return self.against(references), td, fill

    def starts(self, run: Run, ends: Mapping[NestedKey, Tensor], numbers: range) -> dict[NestedKey, Tensor]:
        """Some of the references of values, ``[references, *source]``; a key that has none stays as it is."""
        drawn = [self.reference(run, ends, number) for number in numbers]
        return {key: torch.stack([one.get(key, x) for one in drawn]) for key, x in ends.items()}

    def reference(self, run: Run, ends: Mapping[NestedKey, Tensor], number: int) -> dict[NestedKey, Tensor]:
        """One of the references of values, of the same shapes, for those that have one.

        Raises:
            ValueError: there is one of an entry that is not attributed, whose part of the difference nobody would get.
        """
        assert self.references is not None
        attributed = {unravel_key(key) for key in (*run.sources(), *ends)}
        ours = self.references.among_keys(attributed, ends)
        drawn = ours.one(number, ends, run.batch_dims(ends), run.td)
        for key in drawn.entries:
            if key not in attributed:
                raise ValueError(
                    f"the baseline names {key!r}, which is not attributed, so that its part of the difference would be "
                    "nobody's: name it in attribute, or leave it out"
                )
        return drawn.laid_out_as(ends)

    def on_starts(self, variants: Variants, run: Run, ends: Mapping[NestedKey, Tensor]) -> Tensor:
        """The target on each reference, ``[references, *batch]`` or ``[references, outputs, *batch]``.

        Raises:
            ValueError: it is no number there; the message names what makes it so.
        """
        answers = variants.answers(self.samples, lambda numbers: self.starts(run, ends, numbers))
        try:
            return torch.cat([answer.values for answer in answers])
        except ValueError as error:
            if NOT_FINITE not in str(error):
                raise
            raise ValueError(f"on the baseline, with which the input is compared, {error}") from error

    def require_finite_starts(
        self, runner: Runner, variants: Variants, run: Run, groups: Iterable[Mapping[NestedKey, Tensor]]
    ) -> None:
        """See in the first call that the target is a number where ways begin that are not asked about there.

        Raises:
            ValueError: it is none; the message names what makes it so.
        """
        # What passes some units has no value; and a graph takes what was seen before.
        if not (runner.setup.begins_finite or variants.target.places or is_traced()):
            with suppress(RuntimeError):  # a model that runs with gradients alone is not asked
                for ends in groups:
                    self.on_starts(variants, run, ends)
            runner.setup.begins_finite = True

    def begun(self, run: Run) -> list[NestedKey]:
        """The sources that differ from run to run by themselves, where others are sources too: what is asked of it.

        Raises:
            ValueError: nothing is.
        """
        named = (*self.input_modules, *(self.attribute if isinstance(self.attribute, tuple) else ()))
        found = [key for name in named for key in run.calls(name)] if named else list(run.inputs)
        if not found:
            raise ValueError(
                f"{type(self).__name__} looks at two inputs, and none of those that the model reads is floating-point: "
                f"name the module that embeds them, {type(self).__name__}(..., input_modules=[...])"
            )
        return found


def compared(method: Attribution, references: References | None) -> Attribution:
    """A method with other references; as it is, where there are none.

    Raises:
        ValueError: it compares with none.
    """
    if references is None:
        return method
    if not isinstance(method, Compared):
        raise ValueError(f"{type(method).__name__} compares with no baseline: leave out the baseline")
    return method.against(references)


def compared_with(baseline: Baseline | References | None, samples: int) -> References | None:
    """What a method compares with that asks the model by other values alone.

    Raises:
        ValueError: what is explained is to be written as it is on the reference, which LRP does.
    """
    found = as_references(baseline, samples)
    if found is not None and found.values:
        raise ValueError(
            "References(values=True): what is explained is written as it is on the reference by LRP alone; how far it "
            "is from there is ('ledger', 'target'), by ledger=True"
        )
    return found


class Complete(Compared):
    """A method whose relevance adds up to the difference of the target from a reference.

    Args:
        target: what is explained (:mod:`tdhook.targets`); by default the only output there is.
        baseline: what is compared with (:data:`~tdhook.perturbing.references.Baseline`), or
            :class:`~tdhook.perturbing.references.References`; a TensorDict is data to draw from. A key that none is
            given for stays as it is.
        samples: how many references are drawn where the baseline is drawn; relevance is the mean over them.
        ledger: whether to account for it, per batch element: ``("ledger", "target")`` is the difference of the target,
            ``("ledger", "inputs")`` the sum of the relevance of the inputs, ``("ledger", "gap")`` what they differ in,
            and ``("ledger", "absorbed")`` what inputs have that are not attributed and come from their baselines all
            the same, as with conductance, but for what of it goes through layers that are. Of elements that depend on
            each other each has its share.
        **options: those of :class:`~tdhook.contexts.attribution.Attribution`: ``attribute``, ``input_modules``, ...
    """

    def __init__(
        self,
        target: TargetLike = None,
        *,
        baseline: Baseline | References = 0.0,
        samples: int = 1,
        ledger: bool = False,
        **options: Unpack[Shared],
    ) -> None:
        super().__init__(target, **options)
        self.references = compared_with(baseline, samples)
        self.ledger = ledger

    def accounted(self: SelfComplete) -> SelfComplete:
        """The same, with accounts."""
        other = copy.copy(self)
        other.ledger = True
        return other

    @property
    def writes(self) -> tuple[NestedKey, ...]:
        """The accounts, if they are kept."""
        return tuple(("ledger", name) for name in _ACCOUNTS) if self.ledger else ()

    def told(
        self,
        runner: Runner,
        run: Run,
        found: Mapping[NestedKey, Tensor],
        rises: Tensor | None,
        spread: Mapping[NestedKey, Tensor],
        meeting: Sequence[int],
        others: Mapping[NestedKey, Tensor] | None = None,
    ) -> None:
        """Write the accounts of the inputs, and how relevance spreads.

        Args:
            runner: writes it.
            run: the run on the batch as it is.
            found: relevance of sources that depend on none of each other, ``[*source]`` or ``[outputs, *source]``.
            rises: the differences that it is to add up to, as :meth:`rises` gives them.
            spread: its standard deviation over references.
            meeting: the batch axes along which elements depend on each other: along these relevance adds up in sum,
                which each element has its share of.
            others: relevance of inputs that are not attributed, and come from their baselines too.
        """
        write_under(SPREAD, runner, run, spread)
        sources = run.sources(found)
        if self.ledger and rises is not None and found.keys() == run.independent_sources()[0].keys():
            runner.beside.update(_accounts(run, sources, found, rises.mean(0), others or {}, tuple(meeting)))

    def meeting(self, runner: Runner, run: Run) -> tuple[int, ...]:
        """The batch axes along which gradients say that elements depend on each other, if it is accounted for.

        Asked before other runs, which write over what the graph of this one holds where a model counts its calls.
        """
        return (
            joint_axes(run, run.seeds(runner.setup.question.target), run.independent_sources()[0])
            if self.ledger
            else ()
        )

    def rises(self, variants: Variants, run: Run, ends: Mapping[NestedKey, Tensor]) -> Tensor:
        """How far the target is from what it is on each reference, ``[references, *batch]``.

        With several outputs ``[references, outputs, *batch]``.

        Raises:
            TypeError: the target is what passes some units, which has no value of its own.
        """
        if variants.target.places:
            raise TypeError(
                "what passes some units has no value, from whose difference a sum could be off: explain it without "
                "tolerance and ledger, by a number of steps"
            )
        return variants.values - self.on_starts(variants, run, ends)


def write_under(name: str, runner: Runner, run: Run, values: Mapping[NestedKey, Tensor]) -> None:
    """Write values of the shape of sources, or ``[outputs, *source]``, each under a name and its own."""
    sources = run.sources(values)
    for key, value in values.items():
        runner.beside[under(name, key)] = run.in_batch_shape(key, value, sources[key])


def _accounts(
    run: Run,
    sources: Mapping[NestedKey, Tensor],
    found: Mapping[NestedKey, Tensor],
    rise: Tensor,
    others: Mapping[NestedKey, Tensor],
    meeting: tuple[int, ...],
) -> dict[NestedKey, Tensor]:
    """Whether relevance adds up, ``[*batch]`` or ``[*batch, outputs]``."""
    several = rise.dim() > run.outputs.batch_dims
    target = rise.movedim(0, -1) if several else rise

    def summed(values: Mapping[NestedKey, Tensor], of: Mapping[NestedKey, Tensor]) -> Tensor:
        shaped = [run.in_batch_shape(key, values[key], x).reshape(*target.shape, -1) for key, x in of.items()]
        return sum((x.sum(-1) for x in shaped), torch.zeros_like(target))

    arrived = summed(found, sources)
    absorbed = summed(others, {key: run.inputs[key] for key in others})
    if others:  # but for what of it goes through layers
        absorbed = absorbed - summed(found, {key: x for key, x in sources.items() if key not in run.inputs})
    gap = target - arrived - absorbed
    if meeting:
        gap = gap.mean(meeting, keepdim=True).expand_as(target)
        arrived = target - absorbed - gap
    told = (target, arrived, absorbed, gap)
    return {cast(NestedKey, ("ledger", name)): value for name, value in zip(_ACCOUNTS, told, strict=True)}
