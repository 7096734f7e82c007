"""Cases of joining, taking, shaping and writing parts of tensors, in the many ways that these can be written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .cases import (
    EVEN,
    ORDER,
    WIDTH,
    Case,
    calling,
    columns,
    even,
    forms_of,
    pictures,
    sequences,
)


def _set(key):
    def form(h: Tensor) -> Tensor:
        h[key] = h[:, :1] * 2
        return h

    return form


def _packed(h: Tensor) -> Tensor:
    packed = pack_padded_sequence(sequences(h), torch.tensor([4, 3, 1]), batch_first=True)
    packed = PackedSequence(packed.data * 2, packed.batch_sizes)
    return pad_packed_sequence(packed, batch_first=True)[0]


def selection_cases() -> list[Case]:
    halves = lambda h: (h[:, :8], h[:, 8:])  # noqa: E731
    cases = [
        Case(
            "cat",
            "",
            {
                "cat": lambda h: torch.cat(halves(h), 1),
                "concat": lambda h: torch.concat(halves(h), dim=1),
                "concatenate": lambda h: torch.concatenate(list(halves(h)), 1),
                "hstack": lambda h: torch.hstack(halves(h)),
                "column_stack": lambda h: torch.column_stack(halves(h)),
                "out": lambda h: torch.cat(halves(h), 1, out=torch.empty(0, dtype=h.dtype)),
            },
            shows=None,
        ),
        *(
            Case(name, "", {name: calling(torch, name, first=lambda h: [h, h.flip(1)])})
            for name in ("hstack", "vstack", "dstack", "column_stack", "stack")
        ),
        Case(
            "chunk",
            "",
            {
                "method": lambda h: h.chunk(3, 1)[1],
                "torch": lambda h: torch.chunk(h, 3, dim=1)[1],
                "unsafe": lambda h: h.unsafe_chunk(3, 1)[1],
                "split": lambda h: h.split(8, 1)[1],
                "split list": lambda h: torch.split(h, [8, 8, 8], dim=1)[1],
                "narrow": lambda h: h.narrow(1, 8, 8),
                "unsafe_split": lambda h: torch.unsafe_split(h, 8, 1)[1],
                "with_sizes": lambda h: h.split_with_sizes([8, 8, 8], 1)[1],
                "tensor_split": lambda h: h.tensor_split(3, 1)[1],
                "hsplit": lambda h: torch.hsplit(h, 3)[1],
                "slice": lambda h: h[:, 8:16],
                "index_select": lambda h: h.index_select(1, torch.arange(8, 16)),
                "getitem list": lambda h: h[:, list(range(8, 16))],
            },
            shows=None,
        ),
        *(
            Case(name, "", {name: f})
            for name, f in {
                "split": lambda h: h.split(8, 1)[1],
                "split_with_sizes": lambda h: h.split_with_sizes([8, 16], 1)[1],
                "unsafe_chunk": lambda h: h.unsafe_chunk(3, 1)[1],
                "unsafe_split": lambda h: torch.unsafe_split(h, 8, 1)[1],
                "tensor_split": lambda h: h.tensor_split(3, 1)[1],
                "hsplit": lambda h: torch.hsplit(h, 3)[1],
                "vsplit": lambda h: torch.cat(torch.vsplit(h, h.shape[0])),
                "dsplit": lambda h: torch.dsplit(sequences(h), 2)[1],
                "narrow": lambda h: h.narrow(1, 8, 8),
                "select": lambda h: h.select(1, 3)[:, None],
                "getitem": lambda h: h[:, 3:9],
                "index_select": lambda h: h.index_select(1, ORDER),
                "gather": lambda h: h.gather(1, columns(h)),
                "masked_select": lambda h: h.masked_select(EVEN).view(h.shape[0], -1),
            }.items()
        ),
        Case(
            "getitem",
            "fancy",
            {
                "ellipsis": lambda h: h[..., ORDER],
                "slice": lambda h: h[:, ORDER],
                "gather": lambda h: h.gather(1, columns(h)),
                "take_along_dim": lambda h: torch.take_along_dim(h, columns(h), dim=1),
            },
            shows=None,
        ),
        Case(
            "getitem",
            "mask",
            {
                "getitem": lambda h: h[:, EVEN],
                "masked_select": lambda h: h.masked_select(EVEN).view(h.shape[0], -1),
            },
            shows=None,
        ),
        Case("clone", "", {"method": lambda h: h.clone(), "torch": lambda h: torch.clone(h)}),
        Case(
            "flatten",
            "",
            {
                "method": lambda h: sequences(h).flatten(1),
                "torch": lambda h: torch.flatten(sequences(h), 1),
                "reshape": lambda h: sequences(h).reshape(-1, WIDTH),
                "view": lambda h: sequences(h).view(-1, WIDTH),
            },
            shows=None,
        ),
        *(
            Case(name, "", {name: f})
            for name, f in {
                "reshape": lambda h: h.reshape(-1, 4, 6),
                "view": lambda h: h.view(-1, 4, 6),
                "unflatten": lambda h: h.unflatten(1, (4, 6)),
            }.items()
        ),
        *(Case(f"atleast_{n}d", "", {f"atleast_{n}d": calling(torch, f"atleast_{n}d")}) for n in (1, 2, 3)),
        Case("flatten", "module", {"": lambda h: sequences(h).flatten(1)}),
        Case(
            "transpose",
            "",
            {
                "method": lambda h: sequences(h).transpose(1, 2),
                "torch": lambda h: torch.transpose(sequences(h), 1, 2),
                "swapaxes": lambda h: sequences(h).swapaxes(1, 2),
                "swapdims": lambda h: torch.swapdims(sequences(h), 1, 2),
                "permute": lambda h: sequences(h).permute(0, 2, 1),
                "movedim": lambda h: sequences(h).movedim(1, 2),
                "moveaxis": lambda h: torch.moveaxis(sequences(h), 1, 2),
                "mT": lambda h: sequences(h).mT,
                "in place": lambda h: sequences(h).transpose_(1, 2),
            },
            shows=None,
        ),
        *(
            Case(name, "", {name: f})
            for name, f in {
                "permute": lambda h: sequences(h).permute(0, 2, 1),
                "movedim": lambda h: sequences(h).movedim(1, 2),
                "t": lambda h: torch.t(h).t(),
            }.items()
        ),
        Case("tril", "", {**{k: lambda h, f=f: f(sequences(h)) for k, f in forms_of("tril").items()}}),
        Case("triu", "", {**{k: lambda h, f=f: f(sequences(h)) for k, f in forms_of("triu").items()}}),
        Case(
            "where",
            "",
            {
                "torch": lambda h: torch.where(EVEN, h, h.flip(-1)),
                "method": lambda h: h.where(EVEN, h.flip(-1)),
                "masked_scatter": lambda h: h.masked_scatter(~EVEN, h.flip(-1)[:, ~EVEN]),
            },
            shows=None,
        ),
        Case(
            "where",
            "number",
            {
                "torch": lambda h: torch.where(EVEN, h, 0.5),
                "masked_fill": lambda h: h.masked_fill(~EVEN, 0.5),
                "masked_fill_": lambda h: h.masked_fill_(~EVEN, 0.5),
                "index_fill": lambda h: h.index_fill(1, (~EVEN).nonzero()[:, 0], 0.5),
                "index_fill_": lambda h: h.index_fill_(1, (~EVEN).nonzero()[:, 0], 0.5),
            },
            shows=None,
        ),
        *(
            Case(name, "", {name: f})
            for name, f in {
                "masked_fill": lambda h: h.masked_fill(EVEN, 0.5),
                "index_fill": lambda h: h.index_fill(1, ORDER, 0.5),
                "masked_scatter": lambda h: h.masked_scatter(EVEN, h.flip(-1)),
            }.items()
        ),
        Case(
            "setitem",
            "",
            {
                "slice": _set((slice(None), slice(2, 5))),
                "ellipsis": _set((..., slice(2, 5))),
                "tensor": _set((slice(None), torch.arange(2, 5))),
                "copy_": _copied,
                "index_copy": lambda h: h.index_copy(1, torch.arange(2, 5), twice(h)),
                "index_copy_": lambda h: h.index_copy_(1, torch.arange(2, 5), twice(h)),
                "index_put": lambda h: h.index_put(
                    (torch.arange(h.shape[0])[:, None], torch.arange(2, 5)), twice(h)
                ),
                "index_put_": lambda h: h.index_put_(
                    (torch.arange(h.shape[0])[:, None], torch.arange(2, 5)), twice(h)
                ),
                "scatter": lambda h: h.scatter(1, torch.arange(2, 5).expand(h.shape[0], -1), twice(h)),
                "scatter_": lambda h: h.scatter_(1, torch.arange(2, 5).expand(h.shape[0], -1), twice(h)),
                "slice_scatter": lambda h: torch.slice_scatter(h, twice(h), 1, 2, 5),
            },
            shows=None,
        ),
        *(
            Case(name, "", {name: f})
            for name, f in {
                "index_copy": lambda h: h.index_copy(1, ORDER[1:], h[:, :4] * 2),
                "index_put": lambda h: h.index_put(
                    (torch.arange(h.shape[0])[:, None], torch.arange(2, 5)), twice(h)
                ),
                "scatter": lambda h: h.scatter(1, torch.arange(2, 5).expand(h.shape[0], -1), twice(h)),
            }.items()
        ),
        Case(
            "index_put",
            "accumulate",
            {
                "index_put": lambda h: h.index_put(
                    (torch.arange(h.shape[0])[:, None], torch.arange(2, 5)), twice(h), accumulate=True
                ),
                "in place": lambda h: h.index_put_(
                    (torch.arange(h.shape[0])[:, None], torch.arange(2, 5)), twice(h), True
                ),
                "add": _added,
            },
            shows=None,
        ),
        Case(
            "scatter",
            "number",
            {
                "scatter": lambda h: h.scatter(1, columns(h), 0.5),
                "in place": lambda h: h.scatter_(1, columns(h), 0.5),
            },
        ),
        Case(
            "scatter",
            "add",
            {
                "scatter_add": lambda h: h.scatter_add(1, columns(h), even(h)),
                "scatter_add_": lambda h: h.scatter_add_(1, columns(h), even(h)),
                "index_add": lambda h: h.index_add(1, ORDER, even(h)),
            },
            shows=None,
        ),
        Case(
            "embedding", "", {"": lambda h: F.embedding(torch.tensor([[1, 0, 1]]), h[0].view(4, 6))}, batch=1
        ),
        Case("upsample_nearest", "", {"": lambda h: F.interpolate(pictures(h), size=(5, 5))}, shows=None),
        Case("pack_padded_sequence", "", {"": _packed}, shows=None),
        Case("pad_packed_sequence", "", {"": _packed}, shows=None),
        Case(
            "to",
            "",
            {
                "to": lambda h: h.to(torch.float32),
                "float": lambda h: h.float(),
                "type": lambda h: h.type(torch.float32),
            },
            "grid",
            tolerance=1e-5,
            shows=None,
        ),
        *(
            Case(name, "", {name: f}, "grid", tolerance=2e-2)
            for name, f in {
                "half": lambda h: h.half(),
                "bfloat16": lambda h: h.bfloat16(),
                "cfloat": lambda h: h.cfloat().real,
            }.items()
        ),
        *(
            Case(name, "", {name: f}, "grid", tolerance=1e-5)
            for name, f in {
                "float": lambda h: h.float(),
                "type": lambda h: h.type(torch.float32),
            }.items()
        ),
        Case("unfold", "F", {"": lambda h: F.unfold(pictures(h), 2)}, shows=None),
    ]
    return cases


def twice(h: Tensor) -> Tensor:
    return (h[:, :1] * 2).expand(-1, 3)


def _copied(h: Tensor) -> Tensor:
    h[:, 2:5].copy_(h[:, :1] * 2)
    return h


def _added(h: Tensor) -> Tensor:
    h[:, 2:5] += h[:, :1] * 2
    return h
