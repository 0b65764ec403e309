"""Spatial decomposition: a k x k convolution as a k x 1 and a 1 x k one, the second fitted to the responses.

Source: Jaderberg et al., Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014, arXiv
1405.3866; the refit from He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, arXiv
1707.06168.
Differs: the ReLU-aware refit is to the whole outputs (the published code takes the bias away first, which moves the
ReLU's threshold); batch norm is kept; the error of every rank comes from one factorisation, and a target is shared out
by these errors; calibration images are training images.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from tersenet.methods.low_rank import LowRank


class SpatialDecomposition(LowRank):
    """Split k x k convolutions in a vertical and a horizontal one, by a singular value decomposition and a refit.

    It needs training images, but no labels and no training.
    """

    method: ClassVar[str] = "spatial_decomposition"
    form: ClassVar[Literal["spatial", "channel"]] = "spatial"
