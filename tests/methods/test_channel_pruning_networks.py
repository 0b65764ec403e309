"""`channel_pruning` beside magnitude on networks with concatenations, depthwise layers and squeeze-excitation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from sfp_support import CPU, Batches, tiny_data

from graph_support import randomise
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context, Method
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.magnitude import Magnitude
from tersenet.models.build import build
from tersenet.recipe_target import Target
from zoo_support import needs

SIZE, LEFT = 64, "macs=70%"
IMAGES, OTHERS = 64, 16  # calibrated on, and for trials of what layers cost the outputs
CLASSES = 100  # so that 64 images tell the 1280 features apart


class Photos(Batches):
    """Noise with what images have: neighbours that are alike."""

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, 32, 1)
        drawn = torch.Generator().manual_seed(seed)
        coarse = torch.randn(n, 3, SIZE // 8, SIZE // 8, generator=drawn)
        smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
        self.x = smooth + 0.2 * torch.randn(n, 3, SIZE, SIZE, generator=drawn)
        self.y = torch.zeros(n, dtype=torch.long)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs("timm", "torchvision")
@pytest.mark.parametrize("name", ["densenet121", "mobilenetv2_100", "efficientnet_b0"])
def test_the_target_is_met_with_less_error_than_magnitude_leaves(name: str) -> None:
    torch.manual_seed(0)
    whole = randomise(build(f"timm:{name}", num_classes=CLASSES))
    data = dataclasses.replace(tiny_data(), train=Photos(IMAGES + OTHERS, 1))
    fresh = Photos(32, 2).x
    with torch.no_grad():
        wanted = whole(fresh)
    methods: dict[str, Method] = {
        "ours": ChannelPruning(images=IMAGES, positions=16),
        "l1": Magnitude(),
        "l2": Magnitude(score="l2", scope="global"),
    }
    errors: dict[str, float] = {}
    for key, method in methods.items():
        model = copy.deepcopy(whole)
        graph = ModelGraph(model, (torch.zeros(2, 3, SIZE, SIZE),))
        macs = graph.macs()
        method.apply(graph, Context(CPU, 0, Target.parse(LEFT), macs, graph.params(), data))
        assert 0.99 * 0.7 <= ModelGraph(model, graph.example).macs() / macs <= 0.7
        with torch.no_grad():
            errors[key] = float((model(fresh) - wanted).norm() / (wanted - wanted.mean(0)).norm())
    print(name, errors)
    assert errors["ours"] < 0.8 * min(errors["l1"], errors["l2"])
