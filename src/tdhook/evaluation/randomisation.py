"""Sanity checks: an explanation that stays the same while the model is destroyed does not explain the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.runs import Method, axes_of, bound, quiet, relevance_of, seed_globally, target_of
from tdhook.evaluation.similarity import cosine, spearman
from tdhook.models.holding import modules_of
from tdhook.models.model import Model
from tdhook.passes.questions import asked
from tdhook.passes.rows import rows_of, shaped_like
from tdhook.perturbing.features import Features
from tdhook.tape.undoing import Hook, hooked
from tdhook.targets import TargetLike

__all__ = ["Randomisation", "Similarity", "layers_of", "randomisation"]

Similarity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``([rows, entries], [rows, entries]) -> [rows]``: how alike explanations are."""

MEASURES: Mapping[str, Similarity] = {
    "spearman": spearman,
    "spearman of sizes": lambda a, b: spearman(a.abs(), b.abs()),
    "cosine": cosine,
}


@dataclass(frozen=True, eq=False)
class Randomisation(Figures):
    """How alike explanations are to those of randomised models.

    Attributes:
        layers: paths of the layers, in the order in which they were randomised, from the output on.
        cascading: whether layers stay randomised while further ones are; else each was randomised alone.
        similarity: ``[*batch, layers]`` by measure.
    """

    layers: tuple[str, ...]
    cascading: bool
    similarity: dict[str, Tensor]
    trailing: ClassVar[int] = 1

    def figures(self) -> dict[str, Tensor]:
        """Similarity by measure, of which there are intervals for each layer."""
        return self.similarity

    def mean(self, measure: str = "spearman") -> Tensor:
        """Mean over the batch, ``[layers]``."""
        return self.similarity[measure].reshape(-1, len(self.layers)).mean(0)

    def to_dict(self) -> dict[str, object]:
        """Means over the batch, by measure and layer."""
        return {
            name: dict(zip(self.layers, self.mean(name).tolist(), strict=True)) for name in self.similarity
        }


def layers_of(
    module: nn.Module, td: TensorDictBase | None = None, batch_dims: int | None = None
) -> list[str]:
    """Paths of the modules that hold parameters themselves.

    Args:
        module: the model.
        td: what to run it on, to see in which order it runs them; by default they come as they are registered.
        batch_dims: how many of its batch axes come before time, for a model that needs time.
    """
    modules = modules_of(module)
    # Multi-agent networks keep the shape of their network on the device "meta", and its weights elsewhere.
    names = {
        id(layer): name
        for name, layer in modules.items()
        if any(not parameter.is_meta for parameter in _held(layer))
    }
    if td is None:
        return list(names.values())
    ran: list[str] = []

    def note(layer: nn.Module, *_: object) -> None:
        if names[id(layer)] not in ran:
            ran.append(names[id(layer)])

    hooks: list[Hook] = [
        (layer.register_forward_hook, note, {}) for layer in modules.values() if id(layer) in names
    ]
    with quiet(module), hooked(*hooks):
        Model.of(module).run(rows_of(td, axes_of(td, batch_dims, None))[:1].copy())
    # Layers whose parameters are used without running them come first: where in the model is not known.
    return [*(name for name in names.values() if name not in ran), *ran]


def randomisation(
    module: nn.Module,
    td: TensorDictBase,
    method: Method,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    cascading: bool = True,
    how: Literal["reset", "shuffle"] = "reset",
    layers: Sequence[str] | None = None,
    measures: Mapping[str, Similarity] | None = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> Randomisation:
    """Randomise the layers of a copy of the model, and compare explanations (Adebayo et al. 2018, section 3).

    Layers are randomised from the output on, each further one beside those before (``cascading``) or each alone. What
    is explained is chosen by the model as it was.

    Args:
        module: the model, which stays as it is.
        td: inputs, with any batch shape.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: inputs whose relevance is compared; by default all that have relevance.
        cascading: whether layers stay randomised while further ones are.
        how: ``"reset"`` calls a layer's own ``reset_parameters``, and shuffles the entries of parameters of layers that
            have none; ``"shuffle"`` shuffles all, which keeps their distribution.
        layers: paths, in the order in which they are randomised; by default all that hold parameters, the last one that
            runs first.
        measures: how explanations are compared, by name; by default Spearman's rank correlation of relevance
            (``"spearman"``) and of its size (``"spearman of sizes"``), and the cosine (``"cosine"``).
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers; global ones are left as they are.

    Raises:
        KeyError: a key or its relevance is missing.
        ValueError: the batch is empty, or the model has no such layer, or none at all.
    """
    if how not in ("reset", "shuffle"):
        raise ValueError(f"how={how!r} is neither 'reset' nor 'shuffle'")
    measures = MEASURES if measures is None else measures
    target = target_of(method, target)
    axes = axes_of(td, batch_dims, target)
    order = tuple(reversed(layers_of(module, td, axes)) if layers is None else layers)
    known = modules_of(module)
    for name in order:
        if name not in known:
            raise ValueError(f"the model has no module {name!r}; it has {', '.join(n for n in known if n)}")
    if not order:
        raise ValueError("the model has no parameters to randomise")
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    with quiet(module, seed):
        question, rows = asked(module, td, target, axes, chunk_size)

        def explained_by(model: nn.Module) -> Tensor:
            explain = bound(method, model, question.seeder, rows)
            parts = [relevance_of(explain(part.copy()), attribution_key) for part in rows.split(chunk_size)]
            chosen = list(parts[0]) if keys is None else [unravel_key(key) for key in keys]
            features = Features.of(rows, chosen)
            return torch.cat([features.flat(part) for part in parts])

        before = explained_by(module)
        changed = copy.deepcopy(module)
        for place, name in enumerate(order):
            if not cascading:
                changed = copy.deepcopy(module)
            _randomise(modules_of(changed)[name], how, seed + place)
            after = explained_by(changed)
            for measure, alike in measures.items():
                found[measure].append(alike(before, after).cpu())
    similarity = {name: shaped_like(torch.stack(values, -1), td, axes) for name, values in found.items()}
    return Randomisation(order, cascading, similarity)


def _held(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module holds itself."""
    return list(layer.parameters(recurse=isinstance(layer, TensorDictParams)))


def _randomise(layer: nn.Module, how: str, seed: int) -> None:
    """Give a layer other parameters."""
    reset = getattr(layer, "reset_parameters", None)
    seed_globally(seed)
    if how == "reset" and callable(reset):
        reset()
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in _held(layer):
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
