"""Weights arranged once for the many small products of decoding, on a CPU.

A step of decoding multiplies every matrix with as few rows as there are responses. For
that torch asks a library that arranges the matrix anew in each product; oneDNN multiplies
by one that has been arranged before (torch's Inductor does so where it "freezes" weights).

Knows: linear layers. Does not know: text, policies.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from starling_lib.vocabulary import is_plain


@contextlib.contextmanager
def arranged(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers on a CPU multiply by arranged copies of their weights.

    Those of float32, and of bfloat16 where the CPU has it. Without gradients, and weights
    must not change inside; rounding differs in the last digits. The copies take as much
    memory as the weights. Layers of other kinds, devices and precisions stay as they are,
    and so does a model that somebody moves or has compiled when it is called.
    """
    modules = list(model.modules())
    formats = () if any(map(_watched, modules)) else _offered()
    layers = [layer for layer in modules if _arrangeable(layer, formats)]
    copies: dict[nn.Parameter, Tensor] = {}  # a tied weight is arranged once
    try:
        for layer in layers:
            if layer.weight not in copies:
                copies[layer.weight] = _arrange(layer.weight.detach())
            layer.forward = partial(_product, copies[layer.weight], layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _offered() -> tuple[torch.dtype, ...]:
    """Formats in which this torch, on this CPU, has oneDNN's products switched on."""
    backend, ops = torch.backends.mkldnn, torch.ops.mkldnn
    if not (backend.is_available() and backend.enabled):
        return ()
    if not hasattr(ops, "_linear_pointwise"):
        return ()
    half = ops._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def _watched(module: nn.Module) -> bool:
    """Does accelerate move what the module computes with, or has torch compiled it?"""
    return hasattr(module, "_hf_hook") or module._compiled_call_impl is not None


def _arrangeable(layer: nn.Module, formats: tuple[torch.dtype, ...]) -> bool:
    return (
        is_plain(layer)
        and "forward" not in vars(layer)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in formats
    )


def _arrange(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _product(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
