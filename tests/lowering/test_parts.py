"""Networks that torch.export does not take: their parts are lowered, and the rest is the network's own code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tersenet as tn
from graph_support import randomise
from zoo_support import needs


class Picky(nn.Module):
    """Branches by values behind a backbone; one head runs at two sizes, and an attribute of it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.heads = nn.ModuleDict({"score": nn.Conv2d(8, 4, 1), "unused": nn.Conv2d(8, 4, 3)})
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.backbone(x)
        y = y if y.sum() > 0 else -y
        score = self.heads["score"]
        assert score.out_channels == 4
        found = [score(y), score(y[..., ::2, ::2])]
        return [*found, self.last(found[0].mean((2, 3)))]


@pytest.fixture(scope="module")
def picky() -> nn.Module:
    return randomise(Picky()).eval()


@pytest.mark.parametrize("choice", ["F4", None])
def test_parts(picky: nn.Module, choice: str | None) -> None:
    before = copy.deepcopy(picky.state_dict())
    fast = tn.lower(picky, torch.rand(1, 3, 12, 12), choice=choice)
    assert [layer.name for layer in fast.report.layers] == ["backbone.0", "backbone.3", "heads.score.conv2d"]
    assert fast.report.folded == 1
    note = fast.report.notes[0]
    assert "Picky can't be lowered" in note
    assert note.endswith("checked one by one: backbone, heads.score")
    for size in ((1, 3, 12, 12), (3, 3, 12, 12), (2, 3, 16, 10)):  # the last one takes the modules' own way
        x = torch.randn(size)
        with torch.no_grad():
            for a, b in zip(fast(x), picky(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert "forward" not in vars(picky.backbone)
    for name, tensor in picky.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_lowered_part_is_what_runs(picky: nn.Module) -> None:
    fast = tn.lower(picky, torch.rand(1, 3, 12, 12), choice="F4")
    again = copy.deepcopy(fast)
    x = torch.randn(1, 3, 12, 12)
    expected = fast(x)
    for network in (fast, again):
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 4:
                tensor.data.zero_()  # the modules' own weights, which lowered parts don't read
        for a, b in zip(network(x)[::2], expected[::2], strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(network(x)[1], expected[1])  # a size that no part was lowered for
        assert network.train(False) is network


def test_parts_of_parts(picky: nn.Module) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.stem, self.odd = picky, nn.Conv2d(3, 3, 1), Odd()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [*self.inner(self.stem(x)), self.odd(x)]

    class Odd(nn.Module):
        """Its layer is called through `functional`, so nothing of it can be lowered."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x if x.sum() > 0 else -x, self.conv.weight)

    model = Outer().eval()
    fast = tn.lower(model, torch.rand(1, 3, 12, 12), choice="direct")
    assert {layer.name for layer in fast.report.layers} == {
        "inner.backbone.0", "inner.backbone.3", "inner.heads.score.conv2d", "stem.conv2d",
    }  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        for a, b in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_nothing_to_lower() -> None:
    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(tn.GraphError, match=r"Linears can't be lowered, because torch\.export"):
        tn.lower(Linears(), torch.rand(1, 3))


@pytest.mark.slow
@needs("torchvision")
def test_a_detector() -> None:
    from tersenet.models.torchvision_cpu import ready

    torch.manual_seed(0)
    model = ready().models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    x = torch.rand(1, 3, 320, 320)
    fast = tn.lower(model, x, choice="direct")
    assert any(layer.name.startswith("backbone") for layer in fast.report.layers)
    with torch.no_grad():
        expected, found = model(list(x)), fast(list(x))
    assert len(expected) == len(found) == 1
    best = expected[0]["scores"][:20]
    torch.testing.assert_close(found[0]["scores"][:20], best, atol=1e-4, rtol=1e-3)
