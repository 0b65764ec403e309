"""Random small networks: what people write into CNNs, in random order and widths. Everything is drawn from one seed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import conv


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def norm(random: Random, C: int) -> nn.Module:
    kinds = [nn.BatchNorm2d] * 4 + [
        ChannelNorm,
        lambda C: nn.GroupNorm(random.choice((1, 1 + (C % 2 == 0))), C),
        nn.InstanceNorm2d,
    ]
    return random.choice(kinds)(C)


def act(random: Random, C: int) -> nn.Module:
    return random.choice((nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.PReLU(C), nn.PReLU()))


def layer(random: Random, C_in: int, C_out: int, k: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, mostly a norm, mostly an activation."""
    made = nn.Sequential(conv(C_in, C_out, k, groups=groups, bias=random.random() < 0.5))
    if random.random() < 0.8:
        made.append(norm(random, C_out))
    if random.random() < 0.8:
        made.append(act(random, C_out))
    return made


class Block(nn.Module):
    """Reads `C` channels and makes `C_out`, in images of the same size. `random` is used only while building."""

    def __init__(self, random: Random, C: int) -> None:
        super().__init__()
        self.C_out = C
        self.build(random, C)

    def build(self, random: Random, C: int) -> None:
        raise NotImplementedError


class Plain(Block):
    def build(self, random: Random, C: int) -> None:
        self.C_out = width(random)
        self.body = layer(random, C, self.C_out, random.choice((1, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Grouped(Block):
    def build(self, random: Random, C: int) -> None:
        self.C_out = width(random)
        self.body = layer(random, C, self.C_out, groups=random.choice((2, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Depthwise(Block):
    def build(self, random: Random, C: int) -> None:
        self.C_out = C * random.choice((1, 1, 2))
        self.body = layer(random, C, self.C_out, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(Block):
    """Two layers, perhaps a layer scale, a sum; perhaps a projection."""

    def build(self, random: Random, C: int) -> None:
        wide = width(random)
        self.C_out = C if random.random() < 0.7 else width(random)
        self.body = nn.Sequential(layer(random, C, wide), conv(wide, self.C_out, 1), norm(random, self.C_out))
        self.skip = nn.Identity() if self.C_out == C else conv(C, self.C_out, 1)
        scaled = random.random() < 0.3
        self.gamma = nn.Parameter(torch.full((self.C_out, 1, 1), 0.7)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.gamma is not None:
            y = y * self.gamma
        return F.relu(self.skip(x) + y)


class Concat(Block):
    """Branches side by side, perhaps with the input between them."""

    def build(self, random: Random, C: int) -> None:
        widths = [width(random) for _ in range(random.choice((2, 3)))]
        self.branches = nn.ModuleList(layer(random, C, w, random.choice((1, 3))) for w in widths)
        self.dense = random.random() < 0.4
        self.C_out = sum(widths) + C * self.dense

    def forward(self, x: Tensor) -> Tensor:
        made = [branch(x) for branch in self.branches]
        return torch.cat([made[0], x, *made[1:]] if self.dense else made, 1)


class Sum(Block):
    """Branches on top of each other: added, multiplied, the larger one."""

    def build(self, random: Random, C: int) -> None:
        self.C_out = width(random)
        self.a, self.b = layer(random, C, self.C_out), layer(random, C, self.C_out, 1)
        self.combine = random.choice((torch.add, torch.mul, torch.maximum))

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self.a(x), self.b(x))


class Shuffle(Block):
    def build(self, random: Random, C: int) -> None:
        self.groups = random.choice((2, 4))
        self.body = layer(random, C, C, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        N, C, H, W = y.shape
        return y.view(N, self.groups, C // self.groups, H, W).transpose(1, 2).reshape(N, C, H, W)


class Halves(Block):
    """One half of the channels goes through a layer."""

    def build(self, random: Random, C: int) -> None:
        self.body = layer(random, C // 2, C // 2)
        self.swap = random.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        b = self.body(b)
        return torch.cat((b, a) if self.swap else (a, b), 1)


class SplitList(Block):
    """Parts of unequal, stored widths, each with its own kernel."""

    def build(self, random: Random, C: int) -> None:
        self.entry = layer(random, C, C, 1)
        self.widths = [C // 4, C - C // 4]
        self.parts = nn.ModuleList(
            conv(w, w, k, groups=random.choice((1, w))) for w, k in zip(self.widths, (3, 1), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.entry(x), self.widths, 1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1)


class Cascade(Block):
    """Parts of one stored width; each layer reads the one before it too (Res2Net)."""

    def build(self, random: Random, C: int) -> None:
        self.width = C // 4
        self.entry = layer(random, C, C, 1)
        self.convs = nn.ModuleList(layer(random, self.width, self.width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = torch.split(self.entry(x), self.width, 1)
        made = [first]
        for body, part in zip(self.convs, rest, strict=True):
            made.append(body(part if len(made) == 1 else part + made[-1]))
        return torch.cat(made, 1)


class Squeeze(Block):
    """Squeeze-and-excite, with linear layers or convolutions."""

    def build(self, random: Random, C: int) -> None:
        self.linear = random.random() < 0.5
        make: Callable[[int, int], nn.Module] = nn.Linear if self.linear else lambda a, b: conv(a, b, 1, bias=True)
        self.down, self.up = make(C, 4), make(4, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            gate = self.up(F.relu(self.down(x.mean((2, 3)))))
            return x * gate.sigmoid().view(x.shape[0], -1, 1, 1)
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Twice(Block):
    """One module that runs twice."""

    def build(self, random: Random, C: int) -> None:
        self.body = layer(random, C, C)
        self.added = random.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(F.relu(self.body(x)))
        return y + x if self.added else y


class Up(Block):
    """Twice as large by a transposed convolution or a pixel shuffle, and pooled back."""

    def build(self, random: Random, C: int) -> None:
        self.C_out = width(random)
        if random.random() < 0.5:
            self.up: nn.Module = nn.ConvTranspose2d(C, self.C_out, 2, 2)
        else:
            self.up = nn.Sequential(conv(C, 4 * self.C_out), nn.PixelShuffle(2))
        self.norm = norm(random, self.C_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.norm(self.up(x)), 2)


class Scale(Block):
    """A learned scale and shift of every channel."""

    def build(self, random: Random, C: int) -> None:
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, C).view(C, 1, 1))
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, C).view(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


BLOCKS: tuple[type[Block], ...] = (
    Plain, Grouped, Depthwise, Residual, Residual, Concat, Sum, Shuffle, Halves, SplitList, Cascade, Squeeze, Twice,
    Up, Scale,
)  # fmt: skip


def width(random: Random) -> int:
    return random.choice((8, 8, 12, 16))


class Backbone(nn.Module):
    """Perhaps two inputs; random blocks; the last two images in a dict."""

    def __init__(self, random: Random, depth: int, inputs: int) -> None:
        super().__init__()
        C = width(random)
        self.stems = nn.ModuleList(layer(random, 3, C) for _ in range(inputs))
        self.joined = random.random() < 0.5
        self.widths = [C * inputs if self.joined else C]
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = random.choice(BLOCKS)(random, self.widths[-1])
            self.blocks.append(block)
            self.widths.append(block.C_out)

    def forward(self, *images: Tensor) -> dict[str, Tensor]:
        stems = [stem(x) for stem, x in zip(self.stems, images, strict=True)]
        x = torch.cat(stems, 1) if self.joined else sum(stems[1:], stems[0])
        last = x
        for block in self.blocks:
            last, x = x, block(x)
        return {"fine": last, "coarse": F.avg_pool2d(x, 2)}


class RandomNetwork(nn.Module):
    """A backbone and one of four heads: mean and linear, flatten and linear, convolution, several outputs."""

    def __init__(self, seed: int, depth: int, inputs: int) -> None:
        super().__init__()
        random = Random(seed)
        torch.manual_seed(seed)
        self.backbone = Backbone(random, depth, inputs)
        fine, coarse = self.backbone.widths[-2:]
        self.head = random.choice(("mean", "flat", "image", "several"))
        if self.head == "flat":
            self.classifier: nn.Module = nn.Linear(coarse * 4, 5)
        else:
            self.classifier = nn.Linear(coarse, 5)
        self.boxes, self.mask = conv(fine, 4, bias=True), conv(coarse, 2, 1)

    def forward(self, *images: Tensor) -> Any:
        found = self.backbone(*images)
        if self.head == "image":
            return self.mask(found["coarse"])
        if self.head == "flat":
            return self.classifier(F.adaptive_avg_pool2d(found["coarse"], 2).flatten(1))
        scores = self.classifier(found["coarse"].mean((2, 3)))
        return scores if self.head == "mean" else (scores, self.boxes(found["fine"]), self.mask(found["coarse"]))
