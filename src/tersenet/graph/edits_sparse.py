"""Edits of sparse Winograd convolution: a weight that moves into the Winograd domain, and a weight that gets a mask."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from tersenet.errors import GraphError
from tersenet.graph.edit_fields import EditModel, Name
from tersenet.graph.edits_layers import find_module, plain_convolution, replace_module
from tersenet.nn.masked import MaskedConv2d, MaskedLinear, MaskedWeight
from tersenet.nn.skip_relu import skip_relu
from tersenet.nn.winograd_relu import WinogradReLUConv2d, hindrance
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings


class MovedReLU(EditModel):
    """The ReLU that a layer takes over: the module `owner` itself, or `call` of those in the forward of `owner`."""

    owner: Name
    call: int | None = Field(default=None, ge=0, le=100_000)

    def replay(self, model: nn.Module) -> None:
        """Take it away; nothing if that was done for another layer that reads it."""
        owner = find_module(model, self.owner)
        if self.call is not None:
            skip_relu(owner, self.call)
        elif type(owner) is nn.ReLU:
            replace_module(model, owner, nn.Identity())
        elif type(owner) is not nn.Identity:
            raise GraphError(f"edit moves the ReLU {self.owner!r}, which is a {type(owner).__name__}")


class WinogradDomain(EditModel):
    """Put a convolution's weight into the Winograd domain, and with `relu` the ReLU before it too."""

    kind: Literal["winograd_domain"] = "winograd_domain"
    module: Name
    settings: WinogradReLUSettings
    relu: MovedReLU | None = None

    def replay(self, model: nn.Module) -> None:
        conv = plain_convolution(model, self.module)
        reason = hindrance(conv)
        if reason is not None:
            raise GraphError(f"edit puts the weight of {self.module!r} into the Winograd domain, but {reason}")
        if self.relu is not None:
            self.relu.replay(model)
        replace_module(model, conv, WinogradReLUConv2d.from_conv(conv, self.settings))


class Sparsify(EditModel):
    """Give the weight of a layer a mask. Which weights it keeps is saved with the weights."""

    kind: Literal["sparsify"] = "sparsify"
    module: Name

    def replay(self, model: nn.Module) -> None:
        layer = find_module(model, self.module)
        if isinstance(layer, MaskedWeight):
            layer.make_sparse()
        elif type(layer) is nn.Linear and layer is not model:
            replace_module(model, layer, MaskedLinear.from_linear(layer))
        else:
            conv = plain_convolution(model, self.module)
            replace_module(model, conv, MaskedConv2d.from_conv(conv))
