"""Targets of stochastic policies: entropy, and probability or log-probability of an action."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.keys import parts_of
from tdhook.models.entries import leaves_of
from tdhook.tape.as_one import as_one, of_single_values
from tdhook.targets.computed import Derived, entries_of, entry_of, plain_keys
from tdhook.targets.outputs import Index, Key, Target

__all__ = ["Entropy", "LogProb", "Probability"]

Parameters: TypeAlias = "NestedKey | Sequence[NestedKey] | Mapping[str, NestedKey]"
Distribution: TypeAlias = Callable[..., Any]
T = TypeVar("T", bound="_OfAPolicy")
_CATEGORICAL = (torch.distributions.Categorical, torch.distributions.OneHotCategorical)


@as_one
def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy of categorical distributions, ``[*batch, actions] -> [*batch]``; logits may be minus infinity."""
    log_probs = logits.log_softmax(-1)
    # What is impossible has no part, where zero times infinity would have one.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isinf(), 0.0)).sum(-1)


@of_single_values
@as_one
def normal_entropy(scale: Tensor) -> Tensor:
    """Entropy of independent normal distributions, ``[*batch, n] -> [*batch]``."""
    return (0.5 + 0.5 * math.log(2 * math.pi) + scale.log()).sum(-1)


@as_one
def normal_log_prob(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """Log-density of independent normal distributions, ``[*batch, n] -> [*batch]``."""
    deviation = (value - loc) / scale
    return (-0.5 * deviation.square() - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


class _OfAPolicy(Derived):
    """A value computed from the parameters of a distribution, which a policy writes."""

    parameters: Parameters
    distribution: Distribution | None

    def _prepare(self, *keys: str) -> None:
        given = self.parameters
        if isinstance(given, Mapping):
            plain: object = {name: unravel_key(key) for name, key in given.items()}
        elif isinstance(given, list):
            plain = {key if isinstance(key, str) else key[-1]: unravel_key(key) for key in given}
        else:
            plain = unravel_key(given) if self.distribution is None else {_last(given): unravel_key(given)}
        object.__setattr__(self, "parameters", plain)
        if isinstance(plain, dict) and self.distribution is None and set(plain) != {"loc", "scale"}:
            raise ValueError(
                f"{type(self).__name__} of parameters {', '.join(map(repr, plain))}, of no known distribution: give "
                "one key, of logits; two that end in 'loc' and 'scale', for a normal one; or distribution=, a class "
                "that takes them"
            )
        plain_keys(self, "key", *keys)

    @classmethod
    def of(cls: type[T], actor: nn.Module, **options: object) -> T:
        """The target for a policy that draws from a distribution, such as a ``ProbabilisticActor``.

        Args:
            actor: the policy, whose distribution is taken, its parameters and their keys.
            **options: the other arguments.

        Raises:
            TypeError: there is no distribution in it, or more than one.
        """
        heads = [module for module in actor.modules() if isinstance(module, ProbabilisticTensorDictModule)]
        if len(heads) != 1:
            raise TypeError(
                f"{type(actor).__name__} draws from {len(heads)} distributions, where there should be one; say which "
                f"is meant by the keys of its parameters: {cls.__name__}(['loc', 'scale'], distribution=...)"
            )
        (head,) = heads
        parameters = {_last(name): key for name, key in zip(head.dist_keys, head.in_keys, strict=True)}
        kind = head.distribution_class
        if isinstance(kind, type) and issubclass(kind, _CATEGORICAL) and list(parameters) == ["logits"]:
            return cls._of(parameters["logits"], None, head.dist_sample_keys, **options)
        how = partial(kind, **dict(head.distribution_kwargs)) if head.distribution_kwargs else kind
        return cls._of(parameters, how, head.dist_sample_keys, **options)

    @classmethod
    def _of(
        cls: type[T],
        parameters: Parameters,
        distribution: Distribution | None,
        samples: Sequence[NestedKey],
        **options: object,
    ) -> T:
        """The target for a distribution that a policy draws from, and writes the samples of under some keys."""
        return cls(parameters, distribution=distribution, **options)  # type: ignore[call-arg]

    @property
    def is_categorical(self) -> bool:
        """Whether the parameters are logits."""
        return not isinstance(self.parameters, dict)

    @property
    def reads(self) -> list[NestedKey]:
        """The parameters, if the module did not write them."""
        return list(self.parameters.values()) if isinstance(self.parameters, dict) else [self._logits]

    @property
    def explains(self) -> list[NestedKey]:
        """The parameters."""
        return list(self.parameters.values()) if isinstance(self.parameters, dict) else [self._logits]

    @property
    def _logits(self) -> NestedKey:
        return cast(NestedKey, self.parameters)

    def _found(self, outputs: TensorDictBase, inputs: TensorDictBase) -> dict[str, Tensor | TensorDictBase]:
        """The parameters of a distribution by name; those of a composite one are a TensorDict."""
        parameters = cast("dict[str, NestedKey]", self.parameters)
        return {name: entries_of(key, outputs, inputs, self) for name, key in parameters.items()}


def _tensors(found: Mapping[str, Tensor | TensorDictBase]) -> dict[NestedKey, Tensor]:
    """Parameters one by one, those of a composite distribution by nested keys."""
    return {key: x for name, value in found.items() for key, x in leaves_of(name, value)}


def _arguments(
    found: Mapping[str, Tensor | TensorDictBase], keys: Iterable[NestedKey], tensors: Iterable[Tensor]
) -> dict[str, Tensor | TensorDictBase]:
    """Parameters as a distribution takes them, of tensors one by one."""
    arguments = {name: x if isinstance(x, Tensor) else x.empty() for name, x in found.items()}
    for key, x in zip(keys, tensors, strict=True):
        name, *rest = parts_of(key)
        whole = arguments[name]
        if isinstance(whole, Tensor):
            arguments[name] = x
        else:
            whole.set(tuple(rest), x)
    return arguments


def _joint(made: Any, value: Callable[[Any, NestedKey | None], Tensor], axes: int) -> Tensor:
    """A value of a distribution; of a composite one the sum of those of its parts, ``[*batch]``.

    Args:
        made: the distribution.
        value: given it, or a part of it and the key of its samples.
        axes: how many axes the batch has.
    """
    if not isinstance(made, CompositeDistribution):
        return value(made, None)
    parts = [value(part, key) for key, part in made.dists.items()]
    return torch.stack([x.flatten(axes).sum(-1) if x.dim() > axes else x for x in parts]).sum(0)


def _last(key: NestedKey) -> str:
    return key if isinstance(key, str) else str(key[-1])


@dataclass(frozen=True, eq=False)
class Entropy(_OfAPolicy):
    """The entropy of a policy: what makes it undecided, where relevance is positive, and what makes it sure.

    It is linearised as one function of the parameters: relevance of a parameter is its value times the derivative of
    the entropy (the generic epsilon rule), and the rest is absorbed as a constant.

    Args:
        parameters: the key of logits of a categorical distribution, ``[*batch, actions]``; or the keys of ``loc`` and
            ``scale`` of a normal one, ``[*batch, n]``, in a list; or those of the parameters of ``distribution``,
            whose names are the last parts of the keys, or are given as ``{name: key}``. Those of a
            ``CompositeDistribution`` are one TensorDict; its entropy is the sum of those of its parts.
        distribution: what makes a distribution of these parameters: a class of ``torch.distributions``, of torchrl, or
            a function.
        key: where the entropy is written, ``[*batch]``.
        index: which of the last axis is explained where there are further axes, of agents say.

    Raises:
        ValueError: the parameters are those of no known distribution.
        NotImplementedError: the entropy of this distribution has no closed form.
    """

    parameters: Parameters = "logits"
    distribution: Distribution | None = None
    key: NestedKey = "entropy"
    index: Index = None

    def __post_init__(self) -> None:
        self._prepare()

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The entropy."""
        if self.is_categorical:
            return categorical_entropy(entry_of(self._logits, outputs, inputs, self))
        found = self._found(outputs, inputs)
        if self.distribution is None:
            return normal_entropy(cast(Tensor, found["scale"]))
        make, tensors = self.distribution, _tensors(found)

        @as_one
        def entropy(*parameters: Tensor) -> Tensor:
            made = make(**_arguments(found, tensors, parameters))
            return _joint(made, lambda part, _: cast(Tensor, part.entropy()), outputs.batch_dims)

        try:
            return entropy(*tensors.values())
        except (NotImplementedError, RuntimeError) as error:
            raise NotImplementedError(
                f"the entropy of {_name(make)} has no closed form ({error}); explain that of the distribution before "
                "it is transformed, Entropy(['loc', 'scale']), or LogProb"
            ) from error


@dataclass(frozen=True, eq=False)
class LogProb(_OfAPolicy):
    """The log-probability (or log-density) of an action: what made the policy do, or not do, what it did.

    It is linearised as one function of the parameters, as :class:`Entropy` is.

    Args:
        parameters: as of :class:`Entropy`.
        action: of a categorical distribution the index of the action, as in :class:`~tdhook.targets.Target` (the
            entry ``"action"``, an ``int``, ``"argmax"``, ``Key("taken")``, ``"all"``, a list); of others the key of
            the action that is meant, ``[*batch, n]``; of a composite one a list of the keys of its parts, whose
            log-probabilities are summed.
        distribution: as of :class:`Entropy`.
        key: where the log-probability is written: of each action, ``[*batch, actions]``, if it is categorical, else of
            the action, ``[*batch]``.

    Raises:
        ValueError: the parameters are those of no known distribution.
        TypeError: the distribution is continuous, and ``action`` is no key.
    """

    parameters: Parameters = "logits"
    action: Index | NestedKey = "action"
    distribution: Distribution | None = None
    key: NestedKey = "log_prob"

    def __post_init__(self) -> None:
        self._prepare()

    @property
    def chosen(self) -> Target:
        """The log-probability of the action."""
        if self.is_categorical:
            return Target(self.key, cast(Index, self.action))
        self._taken()
        return Target(self.key)

    @property
    def source(self) -> tuple[Any, ...]:
        """The logits, or all there is."""
        return (
            (self.parameters,) if self.is_categorical else (self.parameters, self.action, self.distribution)
        )

    @classmethod
    def _of(
        cls,
        parameters: Parameters,
        distribution: Distribution | None,
        samples: Sequence[NestedKey],
        **options: object,
    ) -> LogProb:
        keys = [key if key == "action" else Key(key) for key in samples]
        taken: object = keys if len(keys) > 1 else keys[0]
        return cls(parameters, distribution=distribution, **{"action": taken, **options})

    @property
    def reads(self) -> list[NestedKey]:
        """The parameters, if the module did not write them, and the action."""
        return super().reads if self.is_categorical else [*super().reads, *self._taken()]

    @property
    def choices(self) -> list[NestedKey]:
        """The action."""
        return [] if self.is_categorical else self._taken()

    def _taken(self) -> list[NestedKey]:
        """The keys of the action: several for the parts of a composite distribution."""
        given = self.action if isinstance(self.action, list) else [self.action]
        keys = [one.key if isinstance(one, Key) else one for one in given]
        for key in keys:
            if not isinstance(key, str | tuple) or not all(isinstance(part, str) for part in key):
                raise TypeError(f"of a continuous distribution, action= is the key of an entry, got {key!r}")
        return [cast(NestedKey, unravel_key(key)) for key in keys]

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The log-probability of each action, or of the one that is meant."""
        if self.is_categorical:
            return entry_of(self._logits, outputs, inputs, self).log_softmax(-1)
        found = self._found(outputs, inputs)
        taken = {key: entry_of(key, outputs, inputs, self).detach() for key in self._taken()}
        first = next(iter(taken.values()))
        if self.distribution is None:
            return normal_log_prob(cast(Tensor, found["loc"]), cast(Tensor, found["scale"]), first)
        make, tensors = self.distribution, _tensors(found)

        @as_one
        def log_prob(*parameters: Tensor) -> Tensor:
            made = make(**_arguments(found, tensors, parameters))
            return _joint(
                made,
                lambda part, key: cast(Tensor, part.log_prob(first if key is None else _part(taken, key))),
                outputs.batch_dims,
            )

        return log_prob(*tensors.values())


@dataclass(frozen=True, eq=False)
class Probability(Derived):
    """The probability of an action of a categorical policy.

    Args:
        logits: their key, ``[*batch, actions]``.
        index: which action, as in :class:`~tdhook.targets.Target`.
        key: where the probability of each action is written, ``[*batch, actions]``.
    """

    logits: NestedKey = "logits"
    index: Index = "action"
    key: NestedKey = "probability"

    def __post_init__(self) -> None:
        plain_keys(self, "logits", "key")

    @property
    def explains(self) -> list[NestedKey]:
        """The logits."""
        return [self.logits]

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The probability of each action."""
        return entry_of(self.logits, outputs, inputs, self).softmax(-1)


def _part(taken: Mapping[NestedKey, Tensor], key: NestedKey) -> Tensor:
    """The part of an action that belongs to a part of a composite distribution."""
    key = unravel_key(key)
    if key not in taken:
        raise KeyError(
            f"the distribution draws {key!r}, of which action= gives no entry; it gives {', '.join(map(repr, taken))}"
        )
    return taken[key]


def _name(make: object) -> str:
    made = make.func if isinstance(make, partial) else make
    return getattr(made, "__name__", repr(made))
