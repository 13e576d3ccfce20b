"""Derivatives that the ops do not have are refused: torch would compute others in their place."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ultraep_compile.errors import DerivativeError

_library = torch.library.Library("ultraep", "FRAGMENT")
_REMEDY = "Run the model in eager for it, or with ULTRAEP_COMPILE_DISABLE=1."


def only_first_derivatives(op: CustomOpDef, backward: CustomOpDef) -> None:
    """Forward mode through an op, and a gradient of its gradient, raise `DerivativeError`. Call it after `register_autograd`."""
    name = op._qualname
    plain = make_autograd_impl(op._opoverload, op)

    def checked(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        # torch takes the tangent of what a custom op computes for zero, and says nothing
        level = forward_ad._current_level
        if level >= 0 and any(_has_tangent(t, level) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
            raise DerivativeError(f"{name} has no derivative in forward mode (torch.func.jvp, dual tensors). {_REMEDY}")
        return plain(keyset, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this replaces a kernel
        _library.impl(name.split("::")[1], checked, "Autograd", with_keyset=True, allow_override=True)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise DerivativeError(f"{name} has no second derivative (create_graph=True). {_REMEDY}")

    backward.register_autograd(refuse)


def _has_tangent(tensor: Tensor, level: int) -> bool:
    return forward_ad.unpack_dual(tensor, level=level).tangent is not None
