"""Lets torchvision be imported next to a torch build that it was not compiled against; does nothing otherwise.

torchvision's wheel for CUDA cannot load its compiled operators beside a CPU build of torch, and then fails on import
where it registers Python implementations for them. The picture transforms that the processors use need none of these
operators: it is enough to declare their signatures first. Only the tests do this; the library never needs torchvision,
and ``scripts/setup dev`` puts it into a folder that nobody else looks into.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(sys.prefix) / "only-tests"))

_POOLED = "SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_RATIO = "int sampling_ratio"
_ROIS = "Tensor rois, float spatial_scale"
_DEFORM = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)
SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"deform_conv2d({_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"roi_align(Tensor input, {_ROIS}, {_POOLED}, {_RATIO}, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, {_ROIS}, {_POOLED}, {_SIZE}, {_RATIO}, bool aligned) -> Tensor",
    f"roi_pool(Tensor input, {_ROIS}, {_POOLED}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, {_POOLED}, {_SIZE}) -> Tensor",
    f"ps_roi_align(Tensor input, {_ROIS}, {_POOLED}, {_RATIO}) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    f"{_POOLED}, {_RATIO}, {_SIZE}) -> Tensor",
    f"ps_roi_pool(Tensor input, {_ROIS}, {_POOLED}) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    f"{_POOLED}, {_SIZE}) -> Tensor",
)


def _loads_by_itself(folder: Path) -> bool:
    """Whether torchvision's compiled operators load here (they register themselves when they do)."""
    library = next(folder.glob("_C*.so"), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def declare() -> torch.library.Library | None:
    """Declares torchvision's operators if it is installed and cannot load its own."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _loads_by_itself(Path(found.origin).parent):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for signature in SIGNATURES:
        library.define(signature)
    return library


LIBRARY = declare()  # kept: the declarations live as long as this object
