"""Networks that are known to be hard for structured pruning, written anew at a size for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import ConvBN, conv


class AddCat(nn.Module):
    """Sums of concatenations: the parts of both are tied piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 4), conv(3, 6), conv(3, 6), conv(3, 4)
        self.out = conv(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat((self.a(x), self.b(x)), 1) + torch.cat((self.c(x), self.d(x)), 1)).mean((2, 3))


class MultiConcat(nn.Module):
    """Concatenations of concatenations, one part in several of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBN(3, 4), ConvBN(3, 6), ConvBN(10, 8)
        self.out = nn.Linear(22, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = torch.cat((a, b), 1)
        return self.out(torch.cat((self.c(both), a, both), 1).mean((2, 3)))


class GroupWise(nn.Module):
    """Grouped convolutions with different numbers of groups, and a depthwise one, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBN(3, 16), ConvBN(16, 16, groups=2), ConvBN(16, 24, groups=4)
        self.dw, self.out = ConvBN(24, 48, groups=24), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dw(self.c(self.b(self.a(x)))).mean((2, 3)))


class DwConv(nn.Module):
    """Two depthwise convolutions of different kernels over one tensor, added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBN(3, 12), ConvBN(12, 12, 3, groups=12), ConvBN(12, 12, 5, groups=12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out((self.b(y) + self.c(y) + y).mean((2, 3)))


class MultiBind(nn.Module):
    """One tensor in two sums, so that three layers become one group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBN(3, 8), ConvBN(3, 8), ConvBN(3, 8)
        self.y, self.z = conv(8, 5, 1), conv(8, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self.a(x), self.b(x), self.c(x)
        return self.y(a + b).mean((2, 3)), self.z(b + c).mean((2, 3))


class Expand(nn.Module):
    """A vector of channels that is expanded over the image and joined to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = ConvBN(3, 8), nn.Linear(8, 6), conv(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        g = F.relu(self.b(y.mean((2, 3))))[:, :, None, None].expand(-1, -1, y.shape[2], y.shape[3])
        return self.out(torch.cat((y, g), 1)).mean((2, 3))


class MultipleUse(nn.Module):
    """A convolution at three scales, with a batch norm of its own at each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared = ConvBN(3, 8), conv(8, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.a(x)
        scales = [y, F.avg_pool2d(y, 2), F.max_pool2d(y, 4)]
        made = [F.relu(n(self.shared(s))) for n, s in zip(self.norms, scales, strict=True)]
        return [self.out(m.mean((2, 3))) for m in made]


class Attention(nn.Module):
    """Convolutions, then attention over pixels with heads, as a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.stem = 2, ConvBN(3, 8)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2)
        N, L, _ = y.shape
        q, k, v = (f(y).reshape(N, L, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, -1)
        return self.out((y + self.proj(mixed)).mean(1))


class NonLocal(nn.Module):
    """Attention by convolutions (query, key, value maps) with a learned strength."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key, self.value = ConvBN(3, 8), conv(8, 4, 1), conv(8, 4, 1), conv(8, 8, 1)
        self.strength, self.out = nn.Parameter(torch.tensor([0.5])), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        weights = (self.query(y).flatten(2).mT @ self.key(y).flatten(2)).softmax(-1)
        mixed = (self.value(y).flatten(2) @ weights.mT).view(y.shape)
        return self.out((y + self.strength * mixed).mean((2, 3)))


class CascadedConcat(nn.Module):
    """Split, concatenate, split again; each piece has its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.widths, self.more = [4, 8], [6, 10]
        self.a, self.b, self.c = ConvBN(3, 12), ConvBN(4, 6), ConvBN(8, 10)
        self.d, self.e, self.out = ConvBN(6, 4), ConvBN(10, 6), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x), self.widths, dim=1)
        y = torch.cat((self.b(left), self.c(right)), 1)
        left, right = torch.split(y, self.more, dim=1)
        return self.out(torch.cat((self.d(left), self.e(right)), 1).mean((2, 3)))


class ConcatAlongRows(nn.Module):
    """A concatenation along the image: both parts keep the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = ConvBN(3, 8), ConvBN(3, 8), conv(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat((self.a(x), self.b(x)), 2)).mean((2, 3))


class TwoInTwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = ConvBN(3, 8), ConvBN(2, 6), ConvBN(14, 10)
        self.y, self.z = conv(10, 4, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x), self.b(more)
        c = self.c(torch.cat((a, b), 1))
        return self.y(c), self.z(torch.cat((c, b), 1).mean((2, 3)))


class OddParameters(nn.Module):
    """Parameters outside of layers, layers that never run, and one output channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = ConvBN(3, 8), ConvBN(8, 8), ConvBN(8, 8)
        self.scale, self.shift = nn.Parameter(torch.linspace(1, 2, 8)), nn.Parameter(torch.linspace(-1, 1, 8))
        self.nobody = nn.Parameter(torch.ones(8))
        self.out = conv(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x) * self.scale.view(1, -1, 1, 1))
        return self.out(y + self.shift[:, None, None])


class Reshaped(nn.Module):
    """Flattened with its places, through a hidden layer, and back into an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.b = ConvBN(3, 6), nn.Linear(6 * 16, 8 * 4), conv(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(self.a(x), 4)
        z = F.relu(self.fc(y.view(y.shape[0], -1)))
        return self.b(z.view(z.shape[0], -1, 2, 2))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass by, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 16)
        self.bodies = nn.ModuleList(
            nn.Sequential(ConvBN(8, 8, 1), ConvBN(8, 8, groups=8, act=False), ConvBN(8, 8, 1)) for _ in range(2)
        )
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for body in self.bodies:
            a, b = y.chunk(2, 1)
            y = torch.cat((a, body(b)), 1)
            N, C, H, W = y.shape
            y = y.view(N, 2, C // 2, H, W).transpose(1, 2).reshape(N, C, H, W)
        return self.out(y.mean((2, 3)))


class Res2Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.stem, self.entry, self.exit = ConvBN(3, 16), ConvBN(16, 24, 1), ConvBN(24, 16, 1, act=False)
        self.convs = nn.ModuleList(ConvBN(6, 6) for _ in range(3))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = torch.split(self.entry(x), self.width, 1)
        made, last = [], parts[0]
        for i, body in enumerate(self.convs):
            last = body(parts[i] if i == 0 else last + parts[i])
            made.append(last)
        return self.out(F.relu(self.exit(torch.cat([*made, parts[-1]], 1)) + x).mean((2, 3)))


class CrossStage(nn.Module):
    """CSP: one expanding convolution, its halves go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = ConvBN(3, 8), ConvBN(8, 16, 1)
        self.blocks = nn.ModuleList(nn.Sequential(ConvBN(8, 6, 1), ConvBN(6, 8)) for _ in range(2))
        self.b, self.join, self.out = ConvBN(8, 8, 1), ConvBN(16, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.stem(x))
        a, b = y.split(y.shape[1] // 2, dim=1)
        for block in self.blocks:
            b = b + block(b)
        return self.out(self.join(torch.cat((a, self.b(b)), 1)).mean((2, 3)))


class DualPath(nn.Module):
    """DPN: the first channels of a layer are added to a trunk, the others are joined to a growing one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = 8
        self.a, self.b, self.c, self.d = ConvBN(3, 8), ConvBN(3, 4), ConvBN(12, 6), ConvBN(6, 11)
        self.out = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        added, grown = self.a(x), self.b(x)
        y = self.d(self.c(torch.cat((added, grown), 1)))
        added = added + y[:, : self.trunk]
        grown = torch.cat((grown, y[:, self.trunk :]), 1)
        return self.out(torch.cat((added, grown), 1).mean((2, 3)))


class MixedKernels(nn.Module):
    """MixNet: unequal stored widths, one depthwise kernel for each."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [6, 4, 2]
        self.stem = ConvBN(3, 12)
        self.convs = nn.ModuleList(conv(w, w, k, groups=w) for w, k in zip(self.splits, (3, 5, 7), strict=True))
        self.bn, self.out = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), self.splits, 1)
        y = torch.cat([c(p) for c, p in zip(self.convs, parts, strict=True)], 1)
        return self.out(F.relu(self.bn(y)).mean((2, 3)))


class PartialSum(nn.Module):
    """RexNet: a narrower input is added to the first channels."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = 8
        self.stem, self.body, self.out = ConvBN(3, 8), ConvBN(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y = torch.cat((y[:, 0 : self.in_channels] + x, y[:, self.in_channels :]), dim=1)
        return self.out(y.mean((2, 3)))


class SelectiveKernel(nn.Module):
    """SKNet: a softmax over two branches for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = 2
        self.stem, self.a, self.b = ConvBN(3, 8), ConvBN(8, 12, 3), ConvBN(8, 12, 5)
        self.down, self.up, self.out = ConvBN(12, 6, 1), conv(6, 24, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.stack((self.a(x), self.b(x)), 1)
        weights = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True)))
        weights = weights.view(x.shape[0], self.paths, -1, 1, 1).softmax(1)
        return self.out((y * weights).sum(1).mean((2, 3)))


class SplitAttention(nn.Module):
    """ResNeSt: a grouped convolution makes the branches of a radix softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.radix = 2
        self.stem, self.wide = ConvBN(3, 8), ConvBN(8, 16, groups=2)
        self.down, self.up, self.out = conv(8, 6, 1), conv(6, 16, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.stem(x))
        N, C, H, W = y.shape
        y = y.reshape(N, self.radix, C // self.radix, H, W)
        weights = self.up(F.relu(self.down(y.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(N, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(N, -1, 1, 1)
        return self.out((y * weights.reshape(N, self.radix, C // self.radix, 1, 1)).sum(1).mean((2, 3)))


class Ghost(nn.Module):
    """GhostNet: cheap channels computed from the others, some of them dropped at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.out_chs = 12
        self.stem, self.primary, self.cheap = ConvBN(3, 8), ConvBN(8, 6, 1), ConvBN(6, 6, groups=6)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.primary(self.stem(x))
        y = torch.cat([a, self.cheap(a)], dim=1)
        return self.out(y[:, : self.out_chs].mean((2, 3)))


class Standardised(nn.Conv2d):
    """NFNet: weights are standardised over each filter, times a gain."""

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__(C_in, C_out, 3, padding=1)
        self.gain, self.scale = nn.Parameter(torch.linspace(0.5, 1.5, C_out).view(C_out, 1, 1, 1)), (9 * C_in) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        scale = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class NormFree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Standardised(3, 8), Standardised(8, 6), Standardised(6, 8)
        self.skip_gain, self.out = nn.Parameter(torch.tensor(0.7)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.a(x))
        y = self.c(F.silu(self.b(y)) * 1.7) * self.skip_gain * 0.2 + y
        return self.out(y.mean((2, 3)))


class ResponseNorm(nn.Module):
    """ConvNeXtV2: depthwise, layer norm, two linear layers with a global response norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw, self.norm = conv(3, 8, bias=True), conv(8, 8, 7, groups=8, bias=True), nn.LayerNorm(8)
        self.wide, self.narrow, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)
        self.gamma, self.beta = nn.Parameter(torch.linspace(-1, 1, 16)), nn.Parameter(torch.linspace(1, -1, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.wide(self.norm(self.dw(x).permute(0, 2, 3, 1))))
        size = y.norm(p=2, dim=(1, 2), keepdim=True)
        scaled = y * size / (size.mean(-1, keepdim=True) + 1e-6)
        y = y + torch.addcmul(self.beta.view(1, 1, 1, -1), self.gamma.view(1, 1, 1, -1), scaled)
        return self.out((x + self.narrow(y).permute(0, 3, 1, 2)).mean((2, 3)))


class RepVGG(nn.Module):
    """Three branches of one block, one of them only a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, 8)
        self.big, self.small, self.identity = ConvBN(8, 8, act=False), ConvBN(8, 8, 1, act=False), nn.BatchNorm2d(8)
        self.next, self.out = ConvBN(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(self.next(F.relu(self.big(x) + self.small(x) + self.identity(x))).mean((2, 3)))


class C2f(nn.Module):
    """YOLOv8: halves, and every bottleneck's output joined to them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.stem, self.cv1 = 6, ConvBN(3, 8), ConvBN(8, 12, 1)
        self.m = nn.ModuleList(nn.Sequential(ConvBN(6, 4), ConvBN(4, 6)) for _ in range(2))
        self.cv2, self.out = ConvBN(24, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: list[Any] = list(self.cv1(self.stem(x)).split(self.c, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.out(self.cv2(torch.cat(y, 1)).mean((2, 3)))
