"""`fold_batch_norm`: the same outputs, with scales of zero too; what can't be folded stays; the edit, its refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sfp_support import CLASSES, CPU, SHAPE, tiny_data
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import compare_on, randomise
from tersenet.errors import GraphError
from tersenet.graph.edits import Edit, Fold
from tersenet.graph.folding import foldable
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.channel_pruning import ChannelPruning
from tersenet.methods.fold_batch_norm import FoldBatchNorm
from tersenet.models.resnet_cifar import resnet_cifar

EXAMPLE = (torch.zeros(2, *SHAPE),)
EDITS: TypeAdapter[Any] = TypeAdapter(Edit)


def apply(model: nn.Module) -> Context:
    graph = ModelGraph(model, EXAMPLE)
    context = Context(CPU, 0, None, graph.macs(), graph.params())
    FoldBatchNorm().apply(graph, context)
    return context


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise(resnet_cifar(8, width=10, classes=CLASSES))


@pytest.mark.parametrize("zeros", [False, True])
def test_fact_18_folding_changes_no_output_also_with_scales_of_zero(zeros: bool) -> None:
    whole = resnet()
    if zeros:
        with torch.no_grad():
            for module in whole.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight[::3] = 0.0
    model = copy.deepcopy(whole)
    context = apply(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert compare_on(whole, model, (torch.randn(4, *SHAPE),)) < 1e-4
    assert ModelGraph(model, EXAMPLE).macs() == ModelGraph(whole, EXAMPLE).macs()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in whole.modules())
    assert context.notes == [f"{norms} batch norms are part of their convolutions now"]
    assert "nothing to fold" in apply(model).notes[0]


def test_a_folded_network_is_pruned_as_the_other_is() -> None:
    """Fitting behind the batch norm, or with it in the weights, is the same, but for the ridge that few rows need."""
    plain, folded = resnet(), resnet()
    apply(folded)
    for model in (plain, folded):
        graph = ModelGraph(model, EXAMPLE)
        context = Context(CPU, 0, None, graph.macs(), graph.params(), tiny_data())
        ChannelPruning(rate=0.3, images=32).apply(graph, context)
    assert compare_on(plain, folded, (torch.randn(4, *SHAPE),)) < 0.05


class Mixed(nn.Module):
    """Of its batch norms only the first can go: the others read a sum, what is read twice, what runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.a(x)))
        y = self.b(x)
        x = self.norms[1](x + y) + self.norms[2](y)
        x = self.twice(F.relu(self.norms[3](self.twice(x))))
        return self.head(x.mean((2, 3)))


def test_only_what_reads_a_layer_alone_goes() -> None:
    torch.manual_seed(0)
    whole = randomise(Mixed())
    model = copy.deepcopy(whole)
    assert foldable(ModelGraph(model, EXAMPLE)) == [("a", "norms.0")]
    apply(model)
    assert compare_on(whole, model, (torch.randn(4, *SHAPE),)) < 1e-5
    assert model.get_parameter("a.bias").shape == (4,)


def test_the_edit_is_replayed_without_values_too() -> None:
    edit = Fold(module="a", norm="norms.0")
    assert EDITS.validate_json(edit.model_dump_json()) == edit
    with torch.device("meta"):
        model = Mixed()
    edit.replay(model)
    assert model.get_parameter("a.bias").is_meta
    assert isinstance(model.norms[0], nn.Identity)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "head"), "folds 'head', a Linear; it must be an nn.BatchNorm2d"),
        (("head", "norms.0"), "swaps 'head', a Linear"),
        (("a", "norms.7"), "names the module 'norms.7'"),
        (("a", "wide"), "has 8 channels, the convolution makes 4"),
        (("a", "bare"), "has no statistics of its own"),
    ],
)
def test_forged_edits_are_refused(names: tuple[str, str], message: str) -> None:
    model = Mixed()
    model.wide, model.bare = nn.BatchNorm2d(8), nn.BatchNorm2d(4, track_running_stats=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match=message):
        Fold(module=names[0], norm=names[1]).replay(model)
    assert before.keys() == model.state_dict().keys()


def test_a_network_that_would_differ_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import tersenet.graph.proven as proven

    model = resnet()
    before = copy.deepcopy(model)
    real = proven.compare
    monkeypatch.setattr(proven, "compare", lambda *a: real(*a).model_copy(update={"relative": 1.0}))
    with pytest.raises(GraphError, match="with folded layers differs"):
        apply(model)
    assert ModelGraph(model, EXAMPLE).record.edits == ()
    assert compare_on(before, model, (torch.randn(2, *SHAPE),)) == 0
