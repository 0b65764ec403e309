"""A YOLO-like detector of your own, plain torch: pruned, trained, saved, loaded, and equal in ONNX Runtime."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import tersenet as tn


class Conv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv(width, width, 3), Conv(width, width, 3))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class C2f(nn.Module):
    """Split in two; each bottleneck goes on from the one before, and all that was on the way is joined."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.split = Conv(inputs, outputs)
        self.blocks = nn.ModuleList(Bottleneck(outputs // 2, shortcut) for _ in range(depth))
        self.join = Conv((2 + depth) * (outputs // 2), outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.join(torch.cat(parts, 1))


class SPPF(nn.Module):
    """One pooling three times over, and every stage of it joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.join = Conv(width, width // 2), Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Head(nn.Module):
    """Of one level: `bins` for each side of a box, and one score per class, in every place."""

    def __init__(self, inputs: int, classes: int, bins: int) -> None:
        super().__init__()
        self.boxes = nn.Sequential(Conv(inputs, 32, 3), Conv(32, 32, 3), nn.Conv2d(32, 4 * bins, 1))
        self.scores = nn.Sequential(Conv(inputs, 32, 3), Conv(32, 32, 3), nn.Conv2d(32, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.boxes(x), self.scores(x)), 1)


class Detector(nn.Module):
    """(N, 3, H, W) -> three maps (N, 4 * bins + classes, H / s, W / s) with s = 8, 16, 32."""

    def __init__(self, width: int = 16, classes: int = 5, bins: int = 8) -> None:
        super().__init__()
        w2, w4, w8, w16 = 2 * width, 4 * width, 8 * width, 16 * width
        self.stem = nn.Sequential(Conv(3, width, 3, 2), Conv(width, w2, 3, 2), C2f(w2, w2, 1, shortcut=True))
        self.stage3 = nn.Sequential(Conv(w2, w4, 3, 2), C2f(w4, w4, 2, shortcut=True))
        self.stage4 = nn.Sequential(Conv(w4, w8, 3, 2), C2f(w8, w8, 1, shortcut=True))
        self.stage5 = nn.Sequential(Conv(w8, w16, 3, 2), C2f(w16, w16, 1, shortcut=True), SPPF(w16))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4, self.top3 = C2f(w16 + w8, w8), C2f(w8 + w4, w4)
        self.down3, self.out4 = Conv(w4, w4, 3, 2), C2f(w4 + w8, w8)
        self.down4, self.out5 = Conv(w8, w8, 3, 2), C2f(w8 + w16, w16)
        self.heads = nn.ModuleList(Head(w, classes, bins) for w in (w4, w8, w16))

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.stage3(self.stem(x))
        c4 = self.stage4(c3)
        c5 = self.stage5(c4)
        p4 = self.top4(torch.cat((self.up(c5), c4), 1))
        p3 = self.top3(torch.cat((self.up(p4), c3), 1))
        n4 = self.out4(torch.cat((self.down3(p3), p4), 1))
        n5 = self.out5(torch.cat((self.down4(n4), c5), 1))
        return [head(level) for head, level in zip(self.heads, (p3, n4, n5), strict=True)]


def as_if_trained(net: nn.Module, images: Tensor) -> nn.Module:
    """In place of your weights. A fresh network's signal fades out, and then any two of them are nearly equal."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 1.0  # the statistics become those of this one batch
    with torch.no_grad():
        net.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return net


def train(net: nn.Module, images: Tensor, targets: list[Tensor], steps: int) -> None:
    """With a toy loss: a detector's own matches boxes to places."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net.train()
    for _ in range(steps):
        loss = sum((nn.functional.mse_loss(y, t) for y, t in zip(net(images), targets, strict=True)), torch.zeros(()))
        optimiser.zero_grad()
        loss.backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        optimiser.step()
        print(f"loss {loss.item():.4f}")
    net.eval()


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, relative to the largest output of its level."""
    return max(((f - w).abs().max() / w.abs().max()).item() for f, w in zip(found, wanted, strict=True))


def onnx_difference(net: nn.Module, image: Tensor, path: Path) -> float | None:
    """Between the network and its file in ONNX Runtime; None where that is not installed."""
    if not all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime")):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(tn.export(net, path, image), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        return difference([torch.from_numpy(y) for y in found], net(image))


def main(epochs: int = 1) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 96, 96)
    targets = [torch.rand(4, 4 * 8 + 5, size, size) for size in (12, 6, 3)]

    # Nothing is trained yet: the batch only says what an image looks like.
    detector = as_if_trained(Detector(), images)
    data = {"train": [(images, targets)]}
    # What batch norm makes of removed channels may go, since training follows; else it is kept, by extra operators.
    lean = {"steps.0.constants": "zero"}
    result = tn.compress(detector, "magnitude", data=data, target="macs=50%", overrides=lean)
    before, after, net = result.report.before, result.report.after, result.model
    print(f"MACs {before.macs:,} -> {after.macs:,}, parameters {before.params:,} -> {after.params:,}")
    print(f"compact against masked: {result.report.steps[0].equality}")
    train(net, images, targets, steps=epochs)

    image = images[:1]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tn.save(net, folder)
        again = tn.load(folder, base=Detector())
        assert all(map(torch.equal, again(image), net(image)))
        print("saved and loaded: equal outputs")
        apart = onnx_difference(net, image, Path(folder) / "detector.onnx")
    print("ONNX left out: pip install 'tersenet[onnx]'" if apart is None else f"ONNX Runtime differs by {apart:.1e}")
    assert apart is None or apart < 1e-4


if __name__ == "__main__":
    main()
