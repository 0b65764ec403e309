"""Fresh weights as all the families here draw them."""

from __future__ import annotations

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Draw every convolution from N(0, sqrt(2 / (kH kW C_out))), with bias 0. Other layers keep torch's own start:
    scale 1 and shift 0 in batch norm.

    Source: He et al. 2015, Delving Deep into Rectifiers, section 2.2, the variance that keeps the backward signal.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
