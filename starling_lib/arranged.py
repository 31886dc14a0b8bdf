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


@contextlib.contextmanager
def arranged(model: nn.Module) -> Iterator[None]:
    """Inside, float32 linear layers on a CPU multiply by arranged copies of their weights.

    Without gradients, and weights must not change inside; rounding differs in the last
    digits. The copies take as much memory as the weights. Layers of other kinds, devices
    and precisions, and those somebody moves when they are called, stay as they are.
    """
    layers = [layer for layer in model.modules() if _arrangeable(layer)]
    copies: dict[int, Tensor] = {}  # a tied weight is arranged once
    try:
        for layer in layers:
            weight = layer.weight.detach()
            if weight.data_ptr() not in copies:
                copies[weight.data_ptr()] = _arrange(weight)
            layer.forward = partial(_product, copies[weight.data_ptr()], layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _arrangeable(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # a hook of accelerate
        and type(layer.weight) is nn.Parameter  # not a shard, not quantised
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() > 0  # gathered only when called (ZeRO-3)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _arrange(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _product(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
