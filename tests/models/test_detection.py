"""Segmentation and detection models of torchvision: traced, pruned, trained for a step, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersenet
from tersenet.errors import TersenetError
from tersenet.exporting import artifact
from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.models.detection import image_part
from tersenet.models.open import Source
from zoo_support import needs

pytestmark = needs("torchvision")

SMALL = {"min_size": 128, "max_size": 128}


def few_regions(model: Any) -> None:
    """A step then takes seconds rather than a minute."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        model.rpn._post_nms_top_n = {"training": 20, "testing": 20}


def halved(part: nn.Module, example: Tensor) -> float:
    """The share of the multiply-adds that is left."""
    graph = ModelGraph(part, (example,))
    before = graph.macs()
    compact(graph, {g.name: np.arange(g.size // 2) for g in graph.groups if g.frozen is None and g.size > 1})
    return ModelGraph(part, (example,)).macs() / before


def trained(model: nn.Module, *inputs: Any) -> None:
    """One step: a gradient everywhere, which is zero only where it is before pruning too: in the heads of feature maps
    that no box falls on, and behind ReLUs of small random weights."""
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    found = model(*inputs)
    loss = found["out"].square().mean() if "out" in found else sum(found.values())
    assert torch.isfinite(loss)
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.4 * len(moved)
    model.eval()


def targets(name: str, size: int) -> list[dict[str, Tensor]]:
    box = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    if name.startswith("mask"):
        box["masks"] = torch.ones(1, size, size, dtype=torch.uint8)
    if name.startswith("keypoint"):
        box["keypoints"] = torch.tensor([[[20.0, 20, 1]] * 17])
    return [box, box]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lraspp_mobilenet_v3_large", marks=pytest.mark.slow),
        pytest.param("fcn_resnet50", marks=pytest.mark.slow),
        pytest.param("deeplabv3_mobilenet_v3_large", marks=pytest.mark.slow),
    ],
)
def test_segmentation(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Source(f"torchvision:{name}").open((3, 64, 64), 5)
    assert halved(model, torch.randn(2, 3, 64, 64)) < 0.3
    trained(model, torch.randn(2, 3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    loaded = tersenet.load(artifact.save(model, tmp_path / "m"))
    assert model(x)["out"].shape == (1, 5, 64, 64)
    assert torch.equal(loaded(x)["out"], model(x)["out"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", SMALL, 128),
        ("keypointrcnn_resnet50_fpn", SMALL, 128),
        ("maskrcnn_resnet50_fpn", SMALL, 128),
        ("retinanet_resnet50_fpn", SMALL, 128),
        ("fcos_resnet50_fpn", SMALL, 128),
        ("ssdlite320_mobilenet_v3_large", {}, 320),
    ],
)
def test_detection(name: str, arguments: dict[str, int], size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Source(f"torchvision:{name}", arguments=tuple(arguments.items())).open()
    few_regions(model)
    part = image_part(model)
    example = torch.randn(2, 3, size, size)
    assert halved(part, example) < 0.6
    assert tersenet.measure(part, example[:1]).params == sum(p.numel() for p in model.parameters())
    trained(model, list(torch.rand(2, 3, size, size)), targets(name, size))
    loaded = tersenet.load(artifact.save(model, tmp_path / "m"))
    few_regions(loaded)
    image = [torch.rand(3, size, size)]
    with torch.no_grad():
        (own,), (other,) = model(image), loaded(image)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("fasterrcnn_resnet50_fpn", SMALL, 128),
        ("keypointrcnn_resnet50_fpn", SMALL, 128),
        ("maskrcnn_resnet50_fpn", SMALL, 128),
        ("retinanet_resnet50_fpn", SMALL, 128),
        ("fcos_resnet50_fpn", SMALL, 128),
        ("ssd300_vgg16", {}, 300),
        ("ssdlite320_mobilenet_v3_large", {}, 320),
    ],
)
def test_whole_detectors(name: str, arguments: dict[str, int], size: int) -> None:
    """As they are, from a list of images to boxes: nothing is frozen but what gives scores, boxes and masks."""
    torch.manual_seed(0)
    model = Source(f"torchvision:{name}", arguments=tuple(arguments.items())).open()
    few_regions(model)
    images = list(torch.rand(1, 3, size, size))
    graph = ModelGraph(model, (images,))
    frozen = sum(g.size for g in graph.groups if g.frozen)
    assert frozen < 0.35 * sum(g.size for g in graph.groups)
    kept = {g.name: np.arange(g.size // 2) for g in graph.groups if g.frozen is None and g.size > 1}
    # For the boxes of the example: afterwards there may be more or fewer.
    assert graph.macs(kept) < 0.6 * graph.macs()
    done = compact(graph, kept)
    assert done.equality.relative <= done.equality.tolerance
    with torch.no_grad():
        assert {"boxes", "scores", "labels"} <= model([torch.rand(3, size, size + 20)])[0].keys()
    trained(model, list(torch.rand(2, 3, size, size)), targets(name, size))


def test_a_part_shares_everything_and_changes_nothing() -> None:
    model = Source("torchvision:ssdlite320_mobilenet_v3_large").open()
    kind, names = type(model), list(model.state_dict())
    part = image_part(model)
    assert isinstance(part, kind)
    assert list(part.state_dict()) == names
    assert all(a is b for a, b in zip(part.parameters(), model.parameters(), strict=True))
    outputs = part(torch.zeros(1, 3, 320, 320))
    assert {key: value.shape[-1] for key, value in outputs.items()} == {"bbox_regression": 4, "cls_logits": 91}
    assert type(model) is kind
    assert set(model([torch.zeros(3, 100, 120)])[0]) == {"boxes", "scores", "labels"}


def test_other_networks_have_no_such_part() -> None:
    with pytest.raises(TersenetError, match="Linear is not a detector of torchvision"):
        image_part(nn.Linear(1, 1))
