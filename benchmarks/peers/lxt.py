"""LXT's efficient AttnLRP (Achtibat et al. 2024): its patches make gradient times input of a transformer relevance.

The patches reach torch's own classes, which others here use: they are in place only while LXT has its turn.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from tensordict import TensorDict
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import gradient_times_input
from benchmarks.library_models import LanguageModel, Unavailable, import_torchvision
from benchmarks.peers import rules_for
from benchmarks.timing import Contender

PATCHED = ("forward", "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS")


def contender(case: Case, device: str) -> Contender:
    rules_for(case, {"attn_lrp": None})
    import_torchvision()
    from lxt.efficient import models

    module = case.model(device, frozen=True).module
    if not isinstance(module, LanguageModel):
        raise Unavailable("patches classes of transformers, of which this model is not")
    source = sys.modules[type(module.causal).__module__]
    changes = _patches(source, getattr(models, source.__name__.split(".")[-2]).attnLRP)

    @contextmanager
    def patched() -> Iterator[None]:
        with ExitStack() as stack:
            for target, name, patch in changes:
                stack.enter_context(mock.patch.object(target, name, patch))
            yield

    def explain(td: TensorDict) -> Tensor:
        return gradient_times_input(module, td["observation"])[1]

    return Contender(explain, around=patched)


def _patches(source: Any, rules: dict[Any, Any]) -> list[tuple[Any, str, Any]]:
    """What LXT sets, as ``(class or module, attribute, value)``; all is as it was before."""
    from lxt.efficient import monkey_patch

    places = [(t, n) for t, n in itertools.product(rules, PATCHED) if n in vars(t)]
    before = [vars(target)[name] for target, name in places]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkey_patch(source, rules)
    after = [vars(target)[name] for target, name in places]
    for (target, name), value in zip(places, before, strict=True):
        setattr(target, name, value)
    return [(*place, value) for place, value in zip(places, after, strict=True)]
