"""ExportedPrograms: equal outputs, at any batch size, where tersenet is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersenet
from run_support import files
from tersenet.errors import GraphError, TersenetError
from tersenet.exporting.program import export_program
from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.models.open import Source, example_of


def small() -> nn.Module:
    """A compacted ResNet-8 with adapters, taps and channel padding in it."""
    torch.manual_seed(0)
    model = Source("resnet8", arguments=(("width", 4),)).open((3, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    graph = ModelGraph(model, example_of(model, batch=2), "independent")
    compact(graph, {g.name: torch.arange(g.size // 2).numpy() for g in graph.groups if g.frozen is None})
    return model.eval()


OUTSIDE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tersenet":
            raise ImportError("tersenet is not installed here")
sys.meta_path.insert(0, Block())
import torch
x = torch.linspace(-1, 1, 5 * 3 * 8 * 8).view(5, 3, 8, 8)
net = torch.export.load(sys.argv[1]).module()
print(json.dumps([net(x[:n]).tolist() for n in (1, 2, 5)]), "tersenet" in sys.modules)
"""


def test_it_runs_without_tersenet_for_any_batch_size(tmp_path: Path) -> None:
    """Also from an example of one image, which torch.export would take for a constant."""
    model = small()
    tersenet.export(model, tmp_path / "net.pt2", torch.zeros(1, 3, 8, 8))
    command = [sys.executable, "-I", "-c", OUTSIDE, str(tmp_path / "net.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outputs, _, imported = done.stdout.rpartition(" ")
    assert imported.strip() == "False"
    x = torch.linspace(-1, 1, 5 * 3 * 8 * 8).view(5, 3, 8, 8)
    for n, found in zip((1, 2, 5), json.loads(outputs), strict=True):
        torch.testing.assert_close(torch.tensor(found), model(x[:n]).detach())


def test_the_network_is_as_it_was(tmp_path: Path) -> None:
    model = small().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    export_program(model, tmp_path / "net.pt2", (torch.randn(2, 3, 8, 8),))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Stubborn(nn.Module):
    """Mixes up the samples of a batch, in a way that tracing takes for constant."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "branch" and x.sum() > 0:
            return x
        if self.how == "size":
            return self.layer(x) * (2 if len(x) == 2 else 3)
        if self.how == "random":
            return self.layer(x) + torch.rand(1)
        return self.layer(x)


@pytest.mark.parametrize(
    ("how", "message"),
    [("branch", "can't be exported"), ("size", "batch size 3"), ("random", "differs from it at batch size 2")],
)
def test_what_can_not_be_equal_is_refused(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        export_program(Stubborn(how), tmp_path / "net.pt2", (torch.ones(2, 4),))
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {}


def test_several_inputs_of_any_batch(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"sum": x + y, "both": (x, y)}

    example = (torch.randn(1, 3), torch.randn(1, 3))
    export_program(Two(), tmp_path / "net.pt2", example)
    net = torch.export.load(tmp_path / "net.pt2").module()
    x, y = torch.randn(7, 3), torch.randn(7, 3)
    assert torch.equal(net(x, y)["sum"], x + y)


class AnyNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *images: Tensor) -> Tensor:
        total = self.conv(images[0])
        for image in images[1:]:
            total = total + self.conv(image)
        return total


def test_a_forward_of_any_number_of_inputs(tmp_path: Path) -> None:
    model = AnyNumber().eval()
    images = tuple(torch.randn(1, 3, 8, 8) for _ in range(3))
    path = export_program(model, tmp_path / "net.pt2", images)
    five = tuple(torch.randn(5, 3, 8, 8) for _ in range(3))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(*five), model(*five))


def test_other_endings_and_places(tmp_path: Path) -> None:
    model, example = nn.Linear(2, 2), (torch.zeros(1, 2),)
    with pytest.raises(TersenetError, match=r"'net\.pt': the file must end in \.pt2"):
        tersenet.export(model, tmp_path / "net.pt", example)
    (tmp_path / "file").touch()
    with pytest.raises(TersenetError, match="could not write"):
        export_program(model, tmp_path / "file" / "net.pt2", example)
    assert files(tmp_path) == {"file": b""}


def test_a_full_disk(small_disk: Path) -> None:
    (small_disk / "net.pt2").write_bytes(b"old")
    with pytest.raises(TersenetError, match=r"could not write .*net\.pt2: No space left on device"):
        export_program(nn.Linear(400, 400), small_disk / "net.pt2", (torch.zeros(1, 400),))
    assert files(small_disk) == {"net.pt2": b"old"}
