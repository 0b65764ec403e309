"""Folded Winograd and quantized layers in ONNX files: QuantizeLinear, DequantizeLinear, and what runtimes must know."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tersenet.nn.folded import FoldedWinogradConv2d
from tersenet.nn.levels import Levels

METADATA = "tersenet.winograd"
"""The key of the file's metadata under which the Winograd layers are described."""


def is_quantized(model: nn.Module) -> bool:
    """Whether anything in `model` is rounded."""
    return any(isinstance(module, Levels) for module in model.modules())


def opset(model: nn.Module) -> int | None:
    """The ONNX version that `model` needs: 21 is the first with 16-bit levels. None: any."""
    wide = any(module.zero.dtype == torch.int16 for module in model.modules() if isinstance(module, Levels))
    return 21 if wide else None


def translations(model: nn.Module) -> dict[Any, Callable[..., Any]]:
    """What the two operators of `as_operators` become."""
    op: Any = getattr(importlib.import_module("onnxscript"), "opset21" if opset(model) else "opset18")

    def quantize(values: Any, scale: Any, zero: Any, axis: int) -> Any:
        return op.QuantizeLinear(values, scale, zero, axis=axis)

    def dequantize(levels: Any, scale: Any, zero: Any, axis: int) -> Any:
        return op.DequantizeLinear(levels, scale, zero, axis=axis)

    operators = torch.ops.tersenet
    return {operators.quantize_linear.default: quantize, operators.dequantize_linear.default: dequantize}


def finish(model: nn.Module, proto: Any) -> None:
    """Write down in the file's metadata what each Winograd layer is; docs/methods/winograd_aware.md has the format."""
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            # The zero point says the type; where it is written twice, ONNX Runtime's optimizer stumbles.
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)
    layers = {name: _layer(name, m) for name, m in model.named_modules() if isinstance(m, FoldedWinogradConv2d)}
    if layers:
        entry = proto.metadata_props.add()
        entry.key, entry.value = METADATA, json.dumps({"version": 1, "layers": layers})


def _layer(name: str, layer: FoldedWinogradConv2d) -> dict[str, Any]:
    at = layer.geometry
    found: dict[str, Any] = {
        "m": at.tile,
        "r": at.taps,
        "kernel": at.kernel,
        "stride": at.stride,
        "padding": at.padding,
        "dilation": at.dilation,
        "groups": at.groups,
        "at": layer.at,
        "bt": layer.bt,
        "weight": f"{name}.weight",
    }
    for stage in ("input", "input_winograd", "weight_winograd", "product", "output"):
        levels = getattr(layer, stage)
        found[stage] = (
            None if levels is None else {"bits": levels.rounding.bits, "scale": levels.whole.squeeze().tolist()}
        )
    return found
