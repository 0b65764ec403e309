"""Networks that choose by values: detectors with non-maximum suppression, crops and heads behind it, branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.choices import Choices
from tersenet.graph.compact import compact
from tersenet.graph.example import random_like
from tersenet.graph.model import ModelGraph
from tersenet.graph.trace import running, tensors_in, trace


def block(read: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU())


class Detector(nn.Module):
    """Boxes by score, the overlapping ones dropped one by one in Python, and a second look at what is left."""

    def __init__(self, threshold: float = 0.5, classes: int = 3) -> None:
        super().__init__()
        self.threshold = threshold
        self.body = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 12))
        self.tower = block(12, 10)
        self.head = nn.Conv2d(10, 5, 1)
        nn.init.normal_(self.head.weight)
        self.head.bias = nn.Parameter(torch.full((5,), 3.0))
        self.look = nn.Sequential(nn.Linear(12 * 4, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = self.body(torch.stack(images))
        raw = self.head(self.tower(features)).flatten(2).transpose(1, 2)
        return [self.choose(*parts) for parts in zip(features, raw, strict=True)]

    def choose(self, features: Tensor, raw: Tensor) -> dict[str, Tensor]:
        scores, boxes = raw[:, 0].sigmoid(), raw[:, 1:].sigmoid()
        keep = scores > self.threshold
        scores, boxes = scores[keep], boxes[keep]
        places = keep.nonzero()[:, 0]
        scores, order = scores.topk(min(20, len(scores)))
        boxes, places = boxes[order], places[order]
        kept: list[int] = []
        for i in range(len(boxes)):
            if all(bool((boxes[i] - boxes[j]).abs().max() > 0.2) for j in kept):
                kept.append(i)
        boxes, scores, places = boxes[kept], scores[kept], places[kept]
        # Two by two features from each place on.
        side = features.shape[2]
        rows, columns = places // side, places % side
        offsets = torch.arange(2)
        crops = features[
            :,
            (rows[:, None, None] + offsets[:, None]).clamp(max=side - 1),
            (columns[:, None, None] + offsets).clamp(max=side - 1),
        ]
        return {"boxes": boxes, "scores": scores, "labels": self.look(crops.transpose(0, 1).flatten(1))}


class Written(Detector):
    """Regions of two maps are written into one tensor, as from the levels of a pyramid; the order is sorted back."""

    def __init__(self) -> None:
        super().__init__()
        self.second = block(12, 12)

    def choose(self, features: Tensor, raw: Tensor) -> dict[str, Tensor]:
        scores = raw[:, 0]
        chosen = scores.sort(descending=True)[1][:9]
        both = (features, self.second(features[None])[0])
        regions = torch.zeros(len(chosen), features.shape[0], 2, 2, dtype=features.dtype)
        for level, maps in enumerate(both):
            here = torch.where(scores[chosen].abs() * 10 % 2 >= 1, 1, 0) == level
            found = maps.flatten(1)[:, chosen[here]].t()
            regions[here] = found[:, :, None, None].expand(-1, -1, 2, 2)
        return {"scores": torch.masked_select(scores, scores > scores.mean()), "labels": self.look(regions.flatten(1))}


class Branch(nn.Module):
    """Which layer runs depends on the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block(3, 8)
        self.dark, self.bright = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.dark(y) if x[0, 0, 0, 0] < 0 else self.bright(y)


class Nothing(Detector):
    """Fails as soon as something is found."""

    def choose(self, features: Tensor, raw: Tensor) -> dict[str, Tensor]:
        if len((raw[:, 0] > 1e9).nonzero()):
            raise ValueError("found")
        return {"raw": raw}


class Sized(nn.Module):
    """A number that is made of a size, in a tensor: it is not chosen by values, and shrinks with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        count = torch.zeros(y.shape[1]).add(1).nonzero().numel()
        width = int(torch.tensor(y.shape[1]).item())
        assert count == width == y.shape[1]
        best = int(y.mean((0, 1, 3)).argmax())
        return self.b(y.view(y.shape[0], width, *y.shape[2:]))[:, :, best]


class Keeping(nn.Module):
    """Makes a table in its first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.a, self.b = block(3, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.table is None:
            self.table = torch.arange(y.shape[3]).to(y.dtype).add(1).sqrt()
        return self.b(y * self.table)


def images(count: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    return (list(torch.randn(count, 3, 12, 12, dtype=torch.float64, generator=generator)),)


def built(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(*arguments).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.weight).detach()
            module.running_var = torch.rand_like(module.weight).detach() + 0.5
            nn.init.normal_(module.bias)
    return model.eval()


def half(graph: ModelGraph) -> dict[str, np.ndarray]:
    return {g.name: np.arange(0, g.size, 2) for g in graph.groups if g.frozen is None and g.size > 1}


@pytest.mark.parametrize("kind", [Detector, Written])
def test_all_layers_before_and_behind_choices_are_pruned(kind: type[nn.Module]) -> None:
    model = built(kind)
    graph = ModelGraph(model, images())
    free = {name for g in graph.groups if g.frozen is None for name in g.producers}
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert free == layers - {"head", "look.2"}
    assert graph.group("head").frozen is not None
    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        equality = compact(graph, half(graph)).equality
    assert equality.relative < 1e-12
    assert sum(p.numel() for p in model.parameters()) < 0.5 * before
    assert all(len(tensors_in(model(*random_like(images(n), n)))) for n in (1, 2, 3))


def test_a_pruned_detector_finds_the_boxes_of_the_masked_one() -> None:
    model, masked = built(Detector), built(Detector)
    graph = ModelGraph(model, images())
    kept = half(graph)
    for name, places in kept.items():
        gone = np.setdiff1d(np.arange(graph.group(name).size), places)
        for member in graph.group(name).members:
            end = graph.ends[member.end]
            for tensor in end.tensors if end.role != "consume" else ():
                if "running" not in tensor:
                    masked.get_parameter(tensor).data.index_fill_(
                        end.axis, torch.from_numpy(member.places[gone][:, 0]), 0
                    )
    compact(graph, kept, constants="zero")
    for seed in range(5):
        inputs = random_like(images(), seed)
        with torch.no_grad():
            pairs = list(zip(tensors_in(masked(*inputs)), tensors_in(model(*inputs)), strict=True))
        assert any(a.numel() for a, _ in pairs)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_layers_behind_a_choice_of_nothing_are_seen() -> None:
    model = built(Detector, 1.0)
    assert all(len(one["boxes"]) == 0 for one in model(*images()))
    graph = ModelGraph(model, images())
    assert graph.group("look.0").frozen is None
    compact(graph, half(graph))
    assert model.get_parameter("look.0.weight").shape == (8, 24)
    assert all(len(one["boxes"]) == 0 for one in model(*images()))


def test_a_network_that_fails_where_something_is_found_is_traced_as_it_is() -> None:
    graph = ModelGraph(built(Nothing), images())
    assert graph.group("tower.0").frozen is None
    compact(graph, half(graph))


def test_a_branch_that_was_not_traced_is_not_broken() -> None:
    """The noise that the compact network is tried on takes the other branch, whose layer was never seen."""
    model = built(Branch)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    noise = random_like((x,), 2)[0]
    x[0, 0, 0, 0] = -noise[0, 0, 0, 0].sign()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = ModelGraph(model, (x,))
    with pytest.raises(GraphError, match="does not run with fewer channels"):
        compact(graph, half(graph))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x[0, 0, 0, 0] = noise[0, 0, 0, 0].sign()
    graph = ModelGraph(model, (x,))
    compact(graph, half(graph))  # on one branch only, as it was traced


@pytest.mark.parametrize("kind", [Sized, Keeping])
def test_what_is_made_of_sizes_or_kept_from_the_first_pass_freezes_nothing(kind: type[nn.Module]) -> None:
    graph = ModelGraph(built(kind), (torch.randn(2, 3, 6, 6, dtype=torch.float64),))
    assert graph.group("a.0").frozen is None
    compact(graph, half(graph))


def test_choices_are_repeated_on_other_inputs() -> None:
    """Everywhere the same operators and shapes; alone, other images lead to others."""
    model, shapes = built(Detector), []
    found = trace(model, images())
    assert found.chosen_from is not None
    assert found.ops[found.chosen_from].name in ("index", "nonzero")
    for known in (found.choices, None):
        inputs = ([3 * image for image in random_like(images(), 5)[0]],)
        with running(model), Choices(tensors_in(inputs), known) as choices:
            outputs = tensors_in(model(*inputs))
        shapes.append([x.shape for x in outputs])
        assert choices.read
    assert shapes[0] == [found.slots[ref.slot].shape for one in found.outputs for ref in one.values()]
    assert shapes[0] != shapes[1]


def test_other_choices_than_the_known_ones_are_refused() -> None:
    x = torch.randn(4, 4)
    with Choices([x]) as choices:
        x.nonzero()
    with pytest.raises(GraphError, match="a branch depends on values"), Choices([x], choices.made):
        x[x > 0]


def counts(x: Tensor) -> Tensor:
    return torch.unique((x * 3).long(), return_counts=True)[1]


CHOOSING: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.topk(3, 1)[0],
    lambda x: x.topk(3, dim=0)[1],
    lambda x: x[x > 0],
    lambda x: x[:, x[0] > 0],
    lambda x: x.masked_select(x > 0),
    lambda x: x.flatten().sort()[0],
    lambda x: x.flatten().argsort(descending=True, stable=True),
    counts,
    lambda x: x * (1 if x.sum() > 0 else -1),
    lambda x: torch.zeros_like(x).index_put_((x > 0,), torch.ones(())),
]


@pytest.mark.parametrize("choose", CHOOSING)
def test_a_choice_repeated_on_its_own_input_gives_the_same(choose: Any) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with Choices([x]) as first:
        noted = choose(x)
    with Choices([x], first.made):
        repeated = choose(x)
    assert torch.equal(noted, choose(x))
    assert torch.equal(repeated, noted)
    with Choices([-x], first.made):
        assert choose(-x).shape == noted.shape
