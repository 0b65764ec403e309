"""The table of a Winograd-aware network: what computes each weight, with which bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tersenet.measuring.macs import params_of
from tersenet.measuring.meta import meta_copy, meta_example, run_on_meta
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_quantizer import directly
from tersenet.nn.winograd_settings import Quantization


@dataclass(frozen=True)
class WinogradRow:
    """The weight of one convolution or linear layer that runs. `winograd` is `F(4x4, 3x3)`; `bits` are the input's, or
    None in floating point; `size` counts the weight's numbers."""

    name: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    winograd: str | None
    flex: str | None
    bits: int | None
    size: int


@dataclass(frozen=True)
class WinogradTable:
    """The rows in the order in which the layers run, and numbers: of these weights, all parameters, trained ones."""

    rows: list[WinogradRow]
    in_table: int
    parameters: int
    trainable: int


def winograd_table(model: nn.Module, example: Any) -> WinogradTable | None:
    """None for a network without Winograd or quantized layers.

    Source: the columns and totals of the Winograd-aware reference's report.
    Raises: TersenetError, as `count_macs`.
    """
    if not any(isinstance(module, (WinogradConv2d, QuantizedConv2d)) for module in model.modules()):
        return None
    copied = meta_copy(model)
    found: dict[str, WinogradRow] = {}

    def see(name: str, layer: nn.Conv2d | nn.Linear) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            shape = tuple(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else ()
            found.setdefault(name, _row(f"{name}.weight", layer, shape))

        layer.register_forward_pre_hook(hook)

    for name, module in copied.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            see(name, module)
    with directly():
        run_on_meta(copied, meta_example(example))
    rows = list(found.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return WinogradTable(rows, sum(row.size for row in rows), params_of(model), trainable)


def _row(name: str, layer: nn.Conv2d | nn.Linear, input_shape: tuple[int, ...]) -> WinogradRow:
    quantization: Quantization | None = None
    winograd = flex = None
    if isinstance(layer, WinogradConv2d):
        exact, quantization = layer.transforms.exact, layer.settings.quantization
        winograd, flex = f"F({exact.m}x{exact.m}, {exact.r}x{exact.r})", layer.settings.flex
    elif isinstance(layer, QuantizedConv2d):
        quantization = layer.quantization
    bits = quantization.input.bits if quantization and quantization.input else None
    return WinogradRow(name, tuple(layer.weight.shape), input_shape, winograd, flex, bits, layer.weight.numel())
