"""The models of torchvision, of each builder, with random weights and on small images."""

from __future__ import annotations

import re
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.supported.making import NotBuilt, random_weights, settle
from benchmarks.supported.measuring import Subject, in_precision
from benchmarks.supported.shim import import_torchvision

import_torchvision()
import torchvision  # noqa: E402
from torchvision.models.video import mvit  # noqa: E402

__all__ = ["names", "subject"]

_mvit = mvit._mvit
BATCH, CLASSES, LARGEST = 2, 10, 700_000_000
DETECTS = re.compile(r"(fasterrcnn|fcos|keypointrcnn|maskrcnn|retinanet|ssd|ssdlite)\w*")
SETTINGS: dict[str, dict[str, Any]] = {
    "alexnet": {"dropout": 0.0},
    "vit_[bl]_16": {"image_size": 32},
    "vit_[bl]_32": {"image_size": 64},
    "vit_h_14": {"image_size": 28},
    "(quantized_)?googlenet": {"init_weights": False, "aux_logits": False, "transform_input": False},
    "(quantized_)?inception_v3": {"init_weights": False, "aux_logits": False, "transform_input": False},
    "(fasterrcnn|keypointrcnn|maskrcnn).*": {
        "box_score_thresh": 0.0,
        "box_detections_per_img": 3,
        "rpn_post_nms_top_n_test": 32,
    },
    "(fcos|retinanet|ssd|ssdlite).*": {"score_thresh": 0.0, "detections_per_img": 3},
    "(fasterrcnn|keypointrcnn|maskrcnn|fcos|retinanet).*": {"min_size": 64, "max_size": 64},
    "vgg.*": {"init_weights": False},
}
"""What builders are given besides the number of classes, by name."""
SIZES = {
    "(quantized_)?inception_v3": (3, 96, 96),
    "maxvit_t": (3, 224, 224),
    "vit_b_32|vit_l_32": (3, 64, 64),
    "vit_[bl]_16": (3, 32, 32),
    "vit_h_14": (3, 28, 28),
    "mvit.*": (3, 4, 64, 64),
    "mc3_18|r3d_18|r2plus1d_18": (3, 4, 32, 32),
    "s3d": (3, 13, 209, 209),
    "swin3d_.": (3, 4, 32, 32),
    "raft.*": (3, 128, 128),
}
"""``[channels, height, width]``, or ``[channels, frames, height, width]``."""


def names() -> list[str]:
    """All builders that the library registers, sorted."""
    return sorted(torchvision.models.list_models())


def _for(name: str, table: dict[str, Any]) -> list[Any]:
    return [value for pattern, value in table.items() if re.fullmatch(pattern, name)]


def build(name: str) -> nn.Module:
    """A model, without weights that were trained."""
    settings: dict[str, Any] = {"weights": None}
    for each in _for(name, SETTINGS):
        settings |= each
    if name.startswith("quantized"):
        settings["quantize"] = False
    if not name.startswith("raft"):
        settings["num_classes"] = CLASSES
    if DETECTS.fullmatch(name) or "deeplab" in name or "fcn" in name or "lraspp" in name:
        settings["weights_backbone"] = None
    with mock.patch.object(mvit, "_mvit", _small_mvit):
        return torchvision.models.get_model(name, **settings)


def _small_mvit(**settings: Any) -> nn.Module:
    """A model for less than the only size that the builders are for."""
    return _mvit(**settings | {"spatial_size": (64, 64), "temporal_size": 4})


def subject(name: str) -> tuple[Subject, dict[str, Any]]:
    """What is explained of a builder's model, and what it is in words."""
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in build(name).parameters())
        except (NotImplementedError, RuntimeError):
            size = 0
    if size > LARGEST:
        raise NotBuilt(f"it has {size / 1e6:.0f} million weights in its smallest form")
    with in_precision(torch.float64):
        model = build(name).to(torch.float64).eval()
        random_weights(model)
        shape = next(iter(_for(name, SIZES)), (3, 64, 64))
        batch = 1 if DETECTS.fullmatch(name) else BATCH
        values = {"x": torch.randn(4 * batch, *shape).float().double()}
        if name.startswith("raft"):
            values = {"image1": values["x"], "image2": torch.randn(4 * batch, *shape).float().double()}
        asked = _asked(name, model)
        values = {asked.get(key, key): value for key, value in values.items()}
        fixed = {"num_flow_updates": 2} if name.startswith("raft") else {}
        with torch.no_grad():
            settle(model, partial(model, **values, **fixed))
    values = {key: value[:batch] for key, value in values.items()}

    def single() -> nn.Module:
        with in_precision(torch.float32):
            made = build(name).eval()
        made.load_state_dict(model.state_dict())
        return made

    told = {"model": type(model).__name__, "relevant": list(values)}
    batch = 0 if DETECTS.fullmatch(name) else batch
    return Subject(model, single, values, 0, batch, (), fixed), told


def _asked(name: str, model: nn.Module) -> dict[str, str]:
    """What the model calls its images."""
    first = model.forward.__code__.co_varnames[1]
    return {} if name.startswith("raft") else {"x": first}


def nms(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Boxes that no better one overlaps, ``[boxes, 4]`` to indices, best first: the compiled one may be missing."""
    left, kept = scores.argsort(descending=True, stable=True), []
    while len(left):
        kept.append(left[0])
        left = left[1:][torchvision.ops.box_iou(boxes[left[:1]], boxes[left[1:]])[0] <= overlap]
    return torch.stack(kept) if kept else left


def _without_compiled_part() -> None:
    if not torchvision.extension._has_ops():
        torchvision.ops.boxes._assert_has_ops = lambda: None
        torch.library.impl("torchvision::nms", "CPU", nms)


_without_compiled_part()
