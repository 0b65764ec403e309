"""DenseNet-201, which the published code can't build: trained for a moment, grouped, saved, loaded and exported."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sfp_support import CPU, context
from structured_support import settings
from torch import Tensor

from tersenet.data.bundle import Data
from tersenet.exporting import artifact
from tersenet.exporting.onnx import export_onnx
from tersenet.graph.model import ModelGraph
from tersenet.measuring.macs import params_of
from tersenet.models.open import Source
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.train.loop import fit
from zoo_support import needs

SHAPE = (3, 64, 64)
GROUPABLE = 17_854_464
"""Weights of its convolutions but the first, as the specification counts them."""


class Noise:
    """Two batches of four images."""

    n = 8

    def __len__(self) -> int:
        return 2

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(len(self)):
            yield torch.randn(4, *SHAPE, generator=generator), torch.randint(0, 1000, (4,), generator=generator)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs("torchvision", "onnx", "onnxscript", "onnxruntime")
def test_densenet201_from_the_sparse_phase_to_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Source("torchvision:densenet201").open(SHAPE, 1000)
    before = params_of(model)
    data = Data("noise", Noise(), None, None, classes=1000, shape=SHAPE, normalise=None)
    method = settings(sparsity=0.6, warmup=0, first_rounds=2, rounds=2, fit={"epochs": 1, "lr": 1e-3})
    graph = ModelGraph(model, (torch.zeros(2, *SHAPE),))
    hooks = method.hooks(graph, context())
    assert sum(layer.params for layer in hooks.layers.values()) == GROUPABLE
    fit(model, data, method.fit, seed=0, device=CPU, hooks=hooks, checkpoint=None, log=lambda row: None)
    done = context(evaluate=lambda: None)
    method.finish(graph, done, hooks)
    assert done.equality is not None
    assert done.equality.relative <= 1e-5
    assert done.equality.samples == 2
    assert params_of(model) <= before - 0.6 * GROUPABLE

    grouped = [m for m in model.modules() if isinstance(m, GroupShuffleConv2d)]
    assert len(grouped) > 150
    # What a dense layer adds lies in the order that its second convolution makes it in.
    assert sum(m.scatter is not None for m in grouped) == 0

    artifact.save(model, tmp_path / "model")
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(artifact.load(tmp_path / "model")(x), expected)

    # Run by ONNX Runtime with batches of 2 and 3 before it is written; here with one image.
    path = export_onnx(model, tmp_path / "densenet.onnx", (x[:1],))
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
    assert abs(torch.from_numpy(found) - expected[:1]).max() <= 1e-4 * expected[:1].abs().max()
