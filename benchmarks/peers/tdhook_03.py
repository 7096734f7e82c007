"""tdhook 0.3, which has the name of this library, so it is imported beside it under that name and then put away.

It is looked for on the path, then in the folder that the environment variable ``TDHOOK_03`` names (made by
``pip install --no-deps --target FOLDER tdhook==0.3.0``).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.library_models import Unavailable, import_torchvision
from benchmarks.peers import rules_for
from benchmarks.timing import Contender


def folder() -> str:
    """Where it is installed."""
    for place in (*sys.path, os.environ.get("TDHOOK_03", "")):
        if place and any(Path(place).glob("tdhook-0.3.*.dist-info")) and Path(place, "tdhook").is_dir():
            return place
    raise Unavailable("tdhook 0.3 is not installed")


@contextmanager
def imported_from(place: str) -> Iterator[None]:
    """``import tdhook`` means the one in ``place``."""
    ours = _take_modules()
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        _take_modules()
        sys.modules.update(ours)


def _take_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.split(".")[0] == "tdhook"]
    return {name: sys.modules.pop(name) for name in names}


@functools.cache
def library() -> tuple[ModuleType, ModuleType]:
    """Its module of LRP and that of rules."""
    with suppress(Unavailable):
        import_torchvision()  # which it imports where that is installed
    with imported_from(folder()):
        return import_module("tdhook.attribution.lrp"), import_module("tdhook.attribution.lrp_helpers.rules")


def contender(case: Case, device: str) -> Contender:
    lrp, rules = library()
    alpha2_beta1 = rules.AlphaBetaRule(2.0, 1.0)
    mapper = rules_for(
        case,
        {
            "epsilon_plus": rules.EpsilonPlus(),
            "epsilon_alpha2_beta1": rules.EpsilonPlus(
                rule_mapper=lambda name, module: alpha2_beta1 if isinstance(module, nn.Conv2d) else None
            ),
        },
    )
    method = lrp.LRP(
        rule_mapper=mapper,
        skip_modules=lrp.LRP.default_skip,
        warn_on_missing_rule=False,
        init_attr_targets=lambda outputs, _: TensorDict(out=outputs["action_value"].amax(-1)),
        init_attr_grads=lambda targets, _: targets.clone().detach(),
    )
    context = method.prepare(case.model(device, frozen=True).module, ["observation"], ["action_value"])
    explained = context.__enter__()  # stays open as long as the contender

    def explain(td: TensorDict) -> Tensor:
        relevance: Tensor = explained(td)["attr", "observation"]
        return relevance

    return Contender(explain)
