"""A device that is none: a CPU tensor that says it lies elsewhere, and refuses to meet one that does not say so.

A machine without a GPU can so be asked whether code that runs on a GPU would: an operation that mixes devices, as torch
refuses it, is refused here. Within :func:`device`, ``model.to(PRETEND)`` and ``tensor.to(PRETEND)`` bring things there.
There is a ``SECOND`` one of its kind, which no backward pass reaches: autograd knows of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What torch asks of a device's module; it says that there is none, but for the time of :func:`device`."""

    there = False

    def is_available(self) -> bool:
        return self.there

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return int(self.there)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device) -> torch.Tensor:
        return torch.get_rng_state()  # the CPU draws for it

    def set_rng_state(self, state: torch.Tensor, device) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_MODULE = _Module()
_setup_privateuseone_for_python_backend("pretend", _MODULE)
PRETEND, SECOND = torch.device("pretend", 0), torch.device("pretend", 1)
CROSSING = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}  # what brings a tensor to another device


class There(torch.Tensor):
    """``inner``, a CPU tensor, as one of ``device``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> There:
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=device
        )
        found.inner = inner
        return found

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = {x.device for x in leaves if isinstance(x, There)}
    here = [x for x in leaves if not isinstance(x, There) and x.dim()]
    index = function in (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put_.default,
    )  # takes a CPU's indices, as CUDA
    if there and here and function not in CROSSING and not index:
        raise RuntimeError(f"{function} has {len(here)} of {len(leaves)} tensors on the CPU")
    if len(there) > 1 and function not in CROSSING:  # be they single numbers, as a CPU's may be
        raise RuntimeError(f"{function} has tensors on {len(there)} devices")
    asked = kwargs.get("device")
    to = min(there, key=str, default=None) if asked is None else torch.device(asked)
    if asked is not None and to.type == PRETEND.type:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, kwargs))
    found = function(*args, **kwargs)
    if function is torch.ops.aten.copy_.default or function._schema.name.endswith("_"):
        return leaves[0] if isinstance(found, torch.Tensor) else found
    if to is None or to.type != PRETEND.type:
        return found
    to = to if to.index else PRETEND  # which is meant where no number is given
    return tree_map(lambda x: There(x, to) if isinstance(x, torch.Tensor) else x, found)


class _Made(TorchDispatchMode):
    """What is made on the device, and what goes there, which no tensor of it tells."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _Written(TorchFunctionMode):
    """Tensors of Python's numbers and numbers of tensors, which no dispatch sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == PRETEND.type:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if function is torch.Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1])]
        if function is torch.Tensor.tolist and isinstance(args[0], There):
            return args[0].inner.tolist()
        return function(*args, **kwargs)


@contextmanager
def device() -> Iterator[torch.device]:
    """The device is there within the block."""
    _MODULE.there = True
    try:
        with _Made(), _Written():
            yield PRETEND
    finally:
        _MODULE.there = False
