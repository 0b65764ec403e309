"""Channel decomposition: a convolution with fewer filters and a 1 x 1 one behind it, from its responses.

Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks for Classification and Detection, TPAMI 2016,
arXiv 1505.06798.
Differs: reduced-rank regression on second moments in place of a decomposition of all responses in each iteration; the
old bias goes through the map (in He et al.'s code it does not); batch norm is kept; ranks by measured damage beside the
paper's product of energies; calibration images are training images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from tersenet.methods.low_rank import LowRank

if TYPE_CHECKING:
    from tersenet.calibration.low_rank_layers import Candidates
    from tersenet.graph.model import ModelGraph


class ChannelDecomposition(LowRank):
    """Split convolutions in one of fewer filters and a 1 x 1 one, by reduced-rank regression of the responses.

    It needs training images, but no labels and no training.
    """

    method: ClassVar[str] = "channel_decomposition"
    form: ClassVar[Literal["spatial", "channel"]] = "channel"

    pointwise: bool = False
    """Split 1 x 1 convolutions too, in two of them."""

    def find(self, graph: ModelGraph) -> Candidates:
        from tersenet.calibration.low_rank_layers import find_splittable

        return find_splittable(graph, self.form, self.include, self.exclude, self.pointwise)
