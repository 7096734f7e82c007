"""What has to hold of the explanation of any model."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook import LRP
from tdhook.models.holding import modules_of
from tdhook.models.model import Model

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check(
    model: nn.Module,
    td: TensorDict,
    *,
    in_keys=None,
    out_keys=None,
    target,
    input_modules=(),
    flows=("relevance", "gradient"),
    composite="epsilon_plus",
    tolerance=1e-6,
    exact=True,
):
    """Explain ``model`` in each flow and assert what has to hold of the explanation.

    Every operation is known; per batch element, all relevance is accounted for; relevance is finite and not all zero;
    the outputs are those of the model run plainly; the model is what it was.

    Args:
        model: in evaluation mode and double precision.
        td: what it is run on; it is not changed.
        in_keys: keys that a plain module reads; of a TensorDictModule, those that get relevance.
        out_keys: keys that a plain module writes.
        target: what is explained.
        input_modules: paths of the embeddings that get relevance in place of the inputs.
        flows: the conventions to run in.
        composite: what happens where.
        tolerance: how much of the target may be unaccounted for.
        exact: whether outputs equal the plain ones bit for bit, or up to rounding.

    Returns:
        The explained TensorDict of each flow.
    """
    given = Model.of(model, in_keys, out_keys), input_modules
    expected = _plain(*given, td.copy(), frozen=True)
    before = _state(model)
    explained = {}
    for flow in flows:
        method = LRP(
            composite,
            target=target,
            flow=flow,
            ledger=True,
            on_unmatched="raise",
            use_inputs=not input_modules,
            input_modules=list(input_modules),
        )
        torch.manual_seed(0)
        with method.prepare(model, in_keys=in_keys, out_keys=out_keys) as run:
            done = run(td.copy())
            _balanced(done, run.ledger, flow, tolerance)
        _relevant(done, flow, attributes_inputs=not input_modules)
        # torch computes with other kernels where parameters need no gradient.
        if _difference(done, expected, flow, exact) is not None:
            told = _difference(done, _plain(*given, td.copy(), frozen=False), flow, exact)
            assert told is None, told
        _unchanged(before, _state(model), flow)
        explained[flow] = done
    return explained


def check_difference(
    model: nn.Module,
    td: TensorDict,
    *,
    in_keys=None,
    out_keys=None,
    target,
    input_modules=(),
    flows=("relevance", "gradient"),
    composite="deeplift",
    tolerance=1e-9,
    exact=True,
):
    """Explain the difference of ``model`` from what it is on values half as large, and nearly so, in each flow.

    Every operation is known, and all of the difference arrives. Arguments are those of :func:`check`.
    """
    explained = {}
    for flow in flows:
        method = LRP(
            composite,
            target=target,
            baseline=_nearby,
            flow=flow,
            ledger=True,
            on_unmatched="raise",
            use_inputs=not input_modules,
            input_modules=list(input_modules),
        )
        torch.manual_seed(0)
        with method.prepare(model, in_keys=in_keys, out_keys=out_keys) as run:
            done = run(td.copy())
            gap, size = done["ledger", "gap"].abs(), done["ledger", "target"].abs()
            # A difference may well be none: that of all samples of a distribution that are one in sum.
            size = size.clamp(min=max(1e-3 * float(size.max()), 1e-4))
            assert (gap <= tolerance * size).all(), (
                f"{flow}: {float((gap / size).max()):.3g} of the difference is lost or made\n"
                f"{_culprits(run.ledger, tolerance)}"
            )
        explained[flow] = done
    return explained


def _nearby(rows: Tensor) -> Tensor:
    """Other values of either sign, the same of equal ones."""
    chance = torch.Generator().manual_seed(7)
    return 0.5 * rows + 0.3 * torch.randn(rows.shape, generator=chance, dtype=torch.float64).to(rows)


def _plain(model: Model, input_modules, td: TensorDict, *, frozen: bool) -> dict:
    """The outputs of the model run by itself, with its inputs on the tape and its parameters on or off it.

    Without the fused kernel of attention for inference, which torch would take where only constants attend.
    """
    for key in () if input_modules else model.attributed:
        value = td.get(key)
        if isinstance(value, Tensor) and value.is_floating_point():
            td.set(key, value.detach().requires_grad_())
    torch.manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model) if frozen else nullcontext())
        stack.enter_context(torch.enable_grad())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for path in input_modules:
            stack.enter_context(_on_tape(model.submodule(path)))
        outputs, _ = model.run(td)
    return {key: value for key, value in outputs.items(True, True) if isinstance(value, Tensor)}


@contextmanager
def _frozen(model: Model):
    thawed = [p for m in modules_of(model.root).values() for p in m.parameters() if p.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


@contextmanager
def _on_tape(module: nn.Module):
    def hook(module, args, output):
        return output.detach().requires_grad_()

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _balanced(td, ledger, flow, tolerance):
    target, gap = td["ledger", "target"], td["ledger", "gap"]
    assert target.isfinite().all() and (target != 0).all(), f"{flow}: nothing to explain in {target}"
    share = (gap / target).abs()
    assert (share <= tolerance).all(), (
        f"{flow}: {float(share.max()):.3g} of the target is lost or made\n{_culprits(ledger, tolerance)}"
    )


def _culprits(ledger, tolerance):
    lines = []
    for entry in ledger.summary():
        if entry.opens(tolerance):
            amounts = [float(x.sum()) for x in (entry.of("arrived"), entry.of("left"), entry.gap)]
            where = f"{entry.path or '(model)'}: {entry.name} under {entry.rule!r}"
            lines.append("{}: {:.6g} arrived, {:.6g} left, {:.3g} is missing".format(where, *amounts))
    return "\n".join(lines) or "no call that was seen is to blame"


def _relevant(td, flow, *, attributes_inputs):
    relevance = dict(td["attr"].items(True, True))
    assert relevance, f"{flow}: nothing got relevance"
    for key, value in relevance.items():
        assert value.isfinite().all(), f"{flow}: relevance of {key} is not finite"
    assert any((value != 0).any() for value in relevance.values()), f"{flow}: all relevance is zero"
    if attributes_inputs:
        arrived = td["ledger", "inputs"].sum()
        total = sum(value.sum() for value in relevance.values())
        size = sum(value.abs().sum() for value in relevance.values())
        assert (total - arrived).abs() <= 1e-6 * size + 1e-15, (
            f"{flow}: the ledger saw {arrived}, there is {total}"
        )


def _difference(td, expected, flow, exact) -> str | None:
    assert expected, "the model wrote nothing"
    for key, value in expected.items():
        got = td.get(key)
        assert got.shape == value.shape and got.dtype == value.dtype, f"{flow}: {key} is another tensor"
        if exact or not value.is_floating_point():
            same = torch.equal(got.nan_to_num(7.5), value.detach().nan_to_num(7.5))
        else:
            same = torch.allclose(got, value, rtol=1e-9, atol=1e-12, equal_nan=True)
        if not same:
            return f"{flow}: {key} differs by up to {(got.double() - value.double()).abs().max():.3g}"
    return None


def _state(model: nn.Module) -> dict:
    modules = modules_of(model)
    tensors = {
        (path, name): tensor
        for path, module in modules.items()
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if not tensor.is_meta  # a module that is lent its parameters, which torchrl puts back as new ones
    }
    return {
        "values": {key: tensor.detach().clone() for key, tensor in tensors.items()},
        # TensorDictParams may make the tensors that it hands out.
        "tensors": {
            (path, name): id(tensor)
            for (path, name), tensor in tensors.items()
            if not isinstance(modules[path], TensorDictParams)
        },
        "requires_grad": {key: tensor.requires_grad for key, tensor in tensors.items()},
        "grad": {key: tensor.grad is None for key, tensor in tensors.items()},
        "training": {path: module.training for path, module in modules.items()},
        "classes": {path: type(module) for path, module in modules.items()},
        "forward": {path: "forward" in vars(module) for path, module in modules.items()},
        "hooks": {path: [dict(getattr(m, hook)) for hook in HOOKS] for path, m in modules.items()},
        "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
    }


def _unchanged(before: dict, after: dict, flow: str) -> None:
    assert before["values"].keys() == after["values"].keys(), f"{flow}: the model has other tensors"
    for key, value in before["values"].items():
        same = value.is_meta or torch.equal(value.nan_to_num(7.5), after["values"][key].nan_to_num(7.5))
        assert same, f"{flow}: {key} changed"
    for what in before.keys() - {"values"}:
        assert before[what] == after[what], f"{flow}: {what} of the model changed"
