"""Networks of many families, from their name to a file that runs without tersenet, by the command line alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tersenet as tn
from run_support import json_of, start
from zoo_support import needs

SMALL = ("timm:test_resnet", "timm:test_vit")
FAMILIES = (
    "timm:resnet18",
    "timm:mobilenetv3_small_100",
    "timm:convnext_atto",
    "timm:tf_efficientnet_b0",
    "timm:regnetx_002",
    "timm:densenet121",
    "torchvision:vgg11_bn",
    "timm:repvgg_a0",
    "timm:ghostnet_100",
    "timm:hrnet_w18_small",
    "timm:dla34",
    "timm:mobilevit_xs",
    "timm:vit_tiny_patch16_224",
)
NETWORKS = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
SHAPE = (3, 64, 64)

# A process in which importing tersenet fails, as where it is not installed.
OUTSIDE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tersenet":
            raise ImportError("tersenet is not installed here")
sys.meta_path.insert(0, Block())
import torch
x, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    found = torch.export.load(sys.argv[1]).module()(x)
# Relative to the outputs: those of random weights can be small.
assert found.shape == expected.shape and len(x) == 3 and expected.std() > 0
assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), (found - expected).abs().max()
assert "tersenet" not in sys.modules
print("equal")
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    return partial(json_of, capsys)


@needs("timm", "torchvision")
@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_macs_are_met_within_one_percent(
    cli: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """No data is needed: the recipe does not train. What it leaves is saved, loaded, exported and run elsewhere."""
    run, file, outputs = tmp_path / "run", tmp_path / "net.pt2", tmp_path / "outputs.pt"
    where = ("--input", "x".join(map(str, SHAPE)), "--device", "cpu", "--out", str(run))
    report = cli("compress", name, "--recipe", "magnitude", "--target", "macs=50%", *where)
    assert 0.495 < report["after"]["macs"] / report["before"]["macs"] <= 0.5
    equality = report["steps"][0]["equality"]
    assert equality["relative"] <= equality["tolerance"]

    measured = cli("measure", str(run))
    assert (measured["input"], measured["macs"]) == ([1, *SHAPE], report["after"]["macs"])
    loaded = tn.load(run)
    assert sum(p.numel() for p in loaded.parameters()) == report["after"]["params"] < report["before"]["params"]

    cli("export", str(run), str(file))
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save((x, loaded(x)), outputs)
    process = start("-I", "-c", OUTSIDE, str(file), str(outputs), cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "equal"), err
