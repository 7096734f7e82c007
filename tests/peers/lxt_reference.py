"""Explains transformers with LXT and writes what it finds: ``python -m peers.lxt_reference FILE RULES NAME ...``.

LXT changes classes of the transformers library and of torch for good, so it is given a process of its own.
"""

from __future__ import annotations

import itertools
import sys
import warnings

import torch
from torch import Tensor
from torchvision_shim import import_torchvision

from .transformer_models import ATTENTION, CASES, Case, answer, in_double, tokens


def explain(case: Case, attention: str, *, exact: bool) -> dict[str, Tensor]:
    """Gradient times input of the patched model: the relevance of each token of each sample.

    ``exact`` leaves out what LXT and the model do for numerical reasons: single precision in normalisation, and a
    number that LXT adds to the arguments of activations.
    """
    from lxt.efficient import patches, rules

    forward = rules.identity_rule_implicit_fn.forward
    model = case.build(attention)
    embedded = model.get_submodule(case.embedding)(tokens()).requires_grad_()

    def run() -> dict[str, Tensor]:
        logits = answer(model(inputs_embeds=embedded).logits)
        (grad,) = torch.autograd.grad(logits.amax(-1).sum(), embedded)
        return {"logits": logits.detach(), "relevance": (grad * embedded).sum(-1).detach()}

    if not exact:
        return run()
    before = forward.__defaults__
    forward.__defaults__ = (0.0,)
    try:
        with in_double(case.source, patches):
            return run()
    finally:
        forward.__defaults__ = before


def main(file: str, rules: str, *names: str) -> None:
    import_torchvision()
    from lxt.efficient import models, monkey_patch

    torch.set_num_threads(1)
    found = {}
    for name in names:
        case = CASES[name]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of torch's classes, which a model before this one has had patched
            monkey_patch(case.source, getattr(getattr(models, case.family), rules))
        for attention, exact in itertools.product(ATTENTION, (False, True)):
            found[name, attention, exact] = explain(case, attention, exact=exact)
    torch.save(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
