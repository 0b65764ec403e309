"""What each family of operators does to channels: what is tied, what is free, what is frozen and why."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graph_support import check_exact, conv
from tersenet.errors import GraphError
from tersenet.graph.compact import compact
from tersenet.graph.labels import axis_vector, compressed, spread
from tersenet.graph.model import ModelGraph
from tersenet.nn.channel_pad import ZeroPadShortcut

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """Named layers, and a forward from the test."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def net(forward: Callable[[Any, Tensor], Any], width: int = 8, wide: int | None = None, **layers: Any) -> Net:
    """conv `a` (3 -> width), what the test does with its output, conv `z` (wide -> 5), a mean."""
    return Net(
        lambda m, x: m.z(forward(m, m.a(x))).mean((2, 3)),
        a=conv(3, width),
        z=conv(wide or width, 5, 1),
        **layers,
    )


def groups_of(model: nn.Module, x: Tensor = X, residual: Any = "coupled") -> dict[str, tuple[int, str | None]]:
    graph = ModelGraph(model, (x,), residual)
    return {group.name: (group.size, group.frozen) for group in graph.groups}


PASSED_ON = {
    "relu": lambda m, y: F.relu(y),
    "relu_inplace": lambda m, y: F.relu_(y),
    "silu": lambda m, y: F.silu(y),
    "hardswish": lambda m, y: F.hardswish(y),
    "sigmoid times itself": lambda m, y: y * torch.sigmoid(y),
    "clamp": lambda m, y: y.clamp(0, 6),
    "number": lambda m, y: (2 * y + 1) / 3 - 0.5,
    "max_pool": lambda m, y: F.max_pool2d(y, 3, 2, 1),
    "avg_pool": lambda m, y: F.avg_pool2d(y, 2),
    "adaptive": lambda m, y: F.adaptive_avg_pool2d(y, 3),
    "nearest": lambda m, y: F.interpolate(y, scale_factor=2),
    "bilinear": lambda m, y: F.interpolate(y, size=(5, 7), mode="bilinear"),
    "pad image": lambda m, y: F.pad(y, (1, 2, 0, 1)),
    "reflect": lambda m, y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "crop": lambda m, y: y[:, :, 1:-1, ::2],
    "rows swapped": lambda m, y: y.flip(2).roll(1, 3).transpose(2, 3),
    "channels last": lambda m, y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "tokens": lambda m, y: y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(y.shape),
    "mean over image": lambda m, y: (y - y.mean((2, 3), keepdim=True)).abs(),
    "max over image": lambda m, y: y / (1 + y.amax((2, 3), keepdim=True)),
    "dropout": lambda m, y: F.dropout(y, 0.5, m.training),
    "where": lambda m, y: torch.where(y > 0, y, 0.1 * y),
    "channels reversed": lambda m, y: y.flip(1),
    "expanded": lambda m, y: y.mean((2, 3), keepdim=True).expand_as(y),
    "squeezed": lambda m, y: y.mean((2, 3), keepdim=True).squeeze(-1).unsqueeze(-1),
    "scale": lambda m, y: y * m.scale,
    "prelu": lambda m, y: m.prelu(y),
    "one slope": lambda m, y: m.slope(y),
    "batch norm": lambda m, y: m.bn(y),
    "table": lambda m, y: y.index_select(2, m.rows),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_channels_are_passed_on(name: str) -> None:
    layers = {"scale": nn.Parameter(torch.rand(8, 1, 1)), "prelu": nn.PReLU(8), "slope": nn.PReLU()}
    model = net(PASSED_ON[name], **layers, bn=nn.BatchNorm2d(8), rows=torch.tensor([3, 1, 2]))
    assert groups_of(model) == {"a": (8, None), "z": (5, "the network's output")}
    check_exact(model, (X,))


class Standardised(nn.Conv2d):
    """A convolution whose weights are computed from its parameters, as in NFNets."""

    def __init__(self, C_in: int, C_out: int, k: int = 3) -> None:
        super().__init__(C_in, C_out, k, padding=k // 2)
        self.gain = nn.Parameter(torch.rand(C_out, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Attention(nn.Module):
    """Multi-head attention over the pixels, by hand or fused, with a table of biases."""

    def __init__(self, C: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, C // heads, fused
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.table = nn.Parameter(torch.randn(16, heads))
        self.register_buffer("index", torch.arange(64 * 64).view(64, 64) % 16)

    def forward(self, y: Tensor) -> Tensor:
        N, _, H, W = y.shape
        x = y.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(N, H * W, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(64, 64, -1).permute(2, 0, 1)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            x = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5 + bias).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(N, H * W, -1)).transpose(1, 2).reshape(y.shape)


class Split(nn.Module):
    """Sizes that are kept as numbers, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.first = [3, 5], 2
        self.b, self.c = conv(3, 4), conv(5, 6)

    def forward(self, y: Tensor) -> Tensor:
        left, right = torch.split(y, self.sizes, 1)
        z = torch.cat((self.b(left), self.c(right)), 1)
        return torch.cat((z[:, : self.first] + y[:, : self.first], z[:, self.first :]), 1)


class Narrow(nn.Module):
    """Numbers in attributes of operators that torch takes apart anywhere but in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.length = 2, 5

    def forward(self, y: Tensor) -> Tensor:
        with torch.inference_mode():
            return y.narrow(1, self.start, self.length).reshape(len(y), self.length, *y.shape[2:])


UNDERSTOOD = {
    "pixel shuffle": (lambda m, y: torch.cat([F.pixel_shuffle(y, 2)] * 4, 1), {"a": 2}, {}),
    "pixel unshuffle": (lambda m, y: F.pixel_unshuffle(y, 2), {"a": 8}, {"wide": 32}),
    "group norm": (lambda m, y: m.gn(y), {"a": 4}, {"gn": nn.GroupNorm(2, 8)}),
    "one group": (lambda m, y: m.gn(y), {"a": 8}, {"gn": nn.GroupNorm(1, 8)}),
    "instance norm": (lambda m, y: m.norm(y), {"a": 8}, {"norm": nn.InstanceNorm2d(8, affine=True)}),
    "layer norm": (
        lambda m, y: m.ln(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        {"a": 8},
        {"ln": nn.LayerNorm(8)},
    ),
    "response norm": (
        lambda m, y: y * (y.norm(dim=(2, 3), keepdim=True) / (y.norm(dim=(2, 3), keepdim=True).mean(1, True) + 1e-6)),
        {"a": 8},
        {},
    ),
    "computed scale": (lambda m, y: y * m.scale.abs(), {"a": 8}, {"scale": nn.Parameter(torch.rand(8, 1, 1))}),
    "weight norm": (lambda m, y: m.c(y), {"a": 8, "c": 6}, {"c": "weight_norm", "wide": 6}),
    "standardised": (lambda m, y: m.c(y), {"a": 8, "c": 6}, {"c": Standardised(8, 6), "wide": 6}),
    "attention": (lambda m, y: y + m.at(y), {"a": 8, "at.qkv": 4}, {"at": Attention(8, 4, fused=False)}),
    "fused attention": (lambda m, y: y + m.at(y), {"a": 8, "at.qkv": 4}, {"at": Attention(8, 4, fused=True)}),
    "numbers in attributes": (lambda m, y: m.split(y), {"split.b": 2, "split.c": 6}, {"split": Split(), "wide": 10}),
    "numbers in inference mode": (lambda m, y: m.part(y), {"a": 5}, {"part": Narrow(), "wide": 5}),
    "gate of one channel": (lambda m, y: y * torch.sigmoid(m.gate(y)), {"a": 8}, {"gate": conv(8, 1)}),
    "radix": (
        lambda m, y: (y.view(2, 2, -1, 8, 8) * y.view(2, 2, -1, 8, 8).mean((3, 4), True).softmax(1)).sum(1),
        {"a": 4},
        {"wide": 4},
    ),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_channels_are_understood(name: str) -> None:
    """Operators that mix, split or normalise channels, and weights that are computed: removed exactly."""
    forward, free, more = UNDERSTOOD[name]
    layers = copy.deepcopy(more)
    wide = layers.pop("wide", 8)
    if layers.get("c") == "weight_norm":
        layers["c"] = nn.utils.parametrizations.weight_norm(conv(8, 6, bias=True))
    model = net(forward, wide=wide, **layers)
    groups = groups_of(model)
    found = {n.removesuffix(".parametrizations.weight").removesuffix("#2"): g for n, g in groups.items()}
    assert {n: found[n][0] for n in free if found[n][1] is None} == free, groups
    check_exact(model, (X,))


REFUSED = {
    "softmax": (lambda m, y: y.softmax(1), r"aten\.softmax.*test_graph_rules.py:\d+.* works along channels"),
    "sum over channels": (lambda m, y: y + y.sum(1, keepdim=True), r"aten\.add.*one value for all channels"),
    "largest": (lambda m, y: y * y.amax(1, keepdim=True), r"aten\.amax.*reduces over channels"),
    "mean over all": (lambda m, y: y - y.mean(), r"aten\.sub.*one value for all channels"),
    "constant": (lambda m, y: y * torch.arange(8.0).view(8, 1, 1), r"aten\.mul.*:\d+.* tensor of fixed size"),
    "joined to a constant": (lambda m, y: torch.cat((y, m.more.expand(2, 2, 8, 8)), 1)[:, :8], r"joins a constant"),
    "first channels": (lambda m, y: torch.cat((y[:, :3], y[:, :5]), 1), r"fixed in forward at .*:\d+ \(aten.slice"),
    "one channel": (lambda m, y: y * y.select(1, 2).unsqueeze(1), r"select.* takes channels by their numbers"),
    "channel table": (lambda m, y: y.index_select(1, m.order), r"index_select.* takes channels by their numbers"),
    "rolled": (lambda m, y: y.roll(1, 1), r"roll.* takes channels by their numbers"),
    "uneven split": (lambda m, y: torch.cat(y.split([3, 5], 1)[::-1], 1), r"fixed in forward at .*split_with_sizes"),
    "sorted": (lambda m, y: y.sort(1)[0], r"aten\.sort.*works along channels"),
    "position": (lambda m, y: y + m.place, r"a parameter that all channels share"),
    "weight of the input": (lambda m, y: F.conv2d(y, y[:1, :, :1, :1].repeat(8, 1, 1, 1)), r"computed from the input"),
    "all with all": (lambda m, y: (y.flatten(2) @ y.flatten(2).mT).unsqueeze(3), r"bmm.*multiplies all channels"),
    "divided by their number": (lambda m, y: y / y.shape[1], r"at .*:\d+ \(aten.div: it computes with . in place of 8"),
    "times a root": (lambda m, y: y * y.shape[1] ** 0.5, r"aten.mul: it computes with 2\.\d+ in place of 2\.828"),
    "a factor by name": (lambda m, y: torch.add(y, y, alpha=y.shape[1]), r"aten.add: it computes with . in place of 8"),
    "by its number": (lambda m, y: y.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8), r"at .*:\d+ \(aten.view"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_are_frozen_with_the_reason(name: str) -> None:
    forward, reason = REFUSED[name]
    layers = {"place": nn.Parameter(torch.rand(8, 8))}
    tensors = {"more": torch.ones(1, 2, 1, 1), "order": torch.arange(7, -1, -1)}
    model = net(forward, **layers, **tensors)
    graph = ModelGraph(model, (X,))
    frozen = graph.frozen_groups()
    assert "a" in frozen
    assert re.search(reason, frozen["a"]), frozen["a"]
    before = model.a.weight.clone()
    with pytest.raises(GraphError, match="channels of a can't be removed"):
        compact(graph, {"a": np.arange(2)})
    assert torch.equal(model.a.weight, before)


def test_a_branch_at_the_end_that_depends_on_a_number_of_channels_keeps_them() -> None:
    """A copy with fewer channels runs what the network runs, but for its last operator."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(hidden := m.a(x))
        return y * 2 if hidden.shape[1] >= 8 else y

    model = Net(forward, a=conv(3, 8), b=conv(8, 4))
    frozen = ModelGraph(model, (X,)).frozen_groups()
    assert re.search(
        r"fixed in forward at .*:\d+ \(aten.mul: its operators depend on the number of channels", frozen["a"]
    )
    check_exact(model, (X,))


# -- several layers that are tied


def test_a_sum_ties_and_a_concatenation_offsets() -> None:
    model = Net(
        lambda m, x: m.z(torch.cat((m.a(x) + m.b(x), m.c(x)), 1)).mean((2, 3)),
        a=conv(3, 6),
        b=conv(3, 6),
        c=conv(3, 4),
        z=conv(10, 5, 1),
    )
    graph = ModelGraph(model, (X,))
    assert [(g.name, g.producers, g.size) for g in graph.groups] == [
        ("a", ("a", "b"), 6),
        ("c", ("c",), 4),
        ("z", ("z",), 5),
    ]
    (reading,) = [(m, graph.ends[m.end]) for m in graph.group("c").members if graph.ends[m.end].role == "consume"]
    assert reading[1].layer == "z"
    assert reading[0].places.reshape(-1).tolist() == [6, 7, 8, 9], "behind the six of the sum"
    check_exact(model, (X,))


def test_flattened_images_are_removed_in_blocks() -> None:
    model = Net(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), (2, 3)).flatten(1)), a=conv(3, 5), fc=nn.Linear(30, 4))
    graph = ModelGraph(model, (X,))
    (reading,) = [m for m in graph.group("a").members if graph.ends[m.end].role == "consume"]
    assert reading.places.tolist() == [list(range(6 * i, 6 * i + 6)) for i in range(5)]
    check_exact(model, (X,))


def test_a_broadcast_gate_is_tied_channel_by_channel() -> None:
    def forward(m: Any, y: Tensor) -> Tensor:
        return y * torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3), keepdim=True)))))

    model = net(forward, down=conv(8, 4, 1, bias=True), up=conv(4, 8, 1, bias=True))
    graph = ModelGraph(model, (X,))
    assert graph.group("a").producers == ("a", "up")
    check_exact(model, (X,))


def test_a_broadcast_over_channels_freezes_the_mask_only() -> None:
    groups = groups_of(net(lambda m, y: y * torch.sigmoid(m.gate(y)), gate=conv(8, 1)))
    assert groups["a"] == (8, None)
    assert "broadcasts it over channels" in str(groups["gate"][1])


def test_depthwise_passes_channels_on_also_with_a_multiplier() -> None:
    for multiplier in (1, 3):
        model = net(
            lambda m, y: F.relu(m.bn(m.dw(y))),
            wide=8 * multiplier,
            dw=conv(8, 8 * multiplier, groups=8),
            bn=nn.BatchNorm2d(8 * multiplier),
        )
        assert groups_of(model)["a"] == (8, None)
        graph, _ = check_exact(model, (X,))
        dw = graph.model.get_submodule("dw")
        assert (dw.in_channels, dw.out_channels, dw.groups) == (5, 5 * multiplier, 5)


def test_groups_of_a_convolution_stay_equal() -> None:
    model = net(lambda m, y: m.g(F.relu(y)), wide=12, g=conv(8, 12, groups=2))
    assert groups_of(model)["a"] == (4, None)
    assert groups_of(model)["g"] == (6, None)
    graph, _ = check_exact(model, (X,))
    assert (model.g.in_channels, model.g.out_channels, model.g.groups) == (6, 8, 2)
    assert graph.group("g").size == 4


def _shuffle(y: Tensor) -> Tensor:
    N, C, H, W = y.shape
    return y.view(N, 2, C // 2, H, W).transpose(1, 2).reshape(N, C, H, W)


REGROUPED = {
    "channel shuffle": lambda m, y: _shuffle(y),
    "chunk": lambda m, y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "halves": lambda m, y: torch.cat((y[:, y.shape[1] // 2 :], y[:, : y.shape[1] // 2]), 1),
    "even and odd": lambda m, y: torch.cat((y[:, 0::2], y[:, 1::2]), 1),
    "split": lambda m, y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1),
    "narrow": lambda m, y: torch.cat((y.narrow(1, y.shape[1] // 2, y.shape[1] // 2), y), 1)[:, : y.shape[1]],
    "channel_shuffle": lambda m, y: F.channel_shuffle(y, 2),
}


@pytest.mark.parametrize("name", REGROUPED)
def test_what_is_regrouped_stays_in_step(name: str) -> None:
    model = net(REGROUPED[name], bn=nn.BatchNorm2d(8))
    size, frozen = groups_of(model)["a"]
    assert (size, frozen) == (4, None) or "numbers" in str(frozen)
    check_exact(model, (X,), seed=3)


# -- modules and tensors that occur twice


def test_a_module_that_is_run_twice_is_one_layer() -> None:
    model = net(lambda m, y: m.b(F.relu(m.b(F.relu(y)))), b=conv(8, 8))
    graph = ModelGraph(model, (X,))
    assert graph.group("a").producers == ("a", "b")
    assert sum(layer.name == "b" for layer in graph.found.layers) == 2
    check_exact(model, (X,))


def test_a_module_with_two_names_is_one_layer() -> None:
    shared = conv(8, 6)
    model = net(
        lambda m, y: m.b(F.relu(m.bn(y))) + m.c(F.relu(m.bn(y))), wide=6, b=shared, c=shared, bn=nn.BatchNorm2d(8)
    )
    check_exact(model, (X,))
    assert model.b is model.c


def test_tied_weights_of_two_modules_stay_one() -> None:
    model = net(lambda m, y: m.c(F.relu(m.b(F.relu(y)))), b=conv(8, 8), c=conv(8, 8))
    model.c.weight = model.b.weight
    assert groups_of(model)["a"] == (8, None)
    check_exact(model, (X,))
    assert model.c.weight is model.b.weight
    assert model.c.in_channels == model.b.out_channels == 5


# -- outputs, inputs, shortcuts


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict"])
def test_outputs_are_protected_also_of_convolutional_heads(output: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        heads = {"boxes": m.boxes(y), "classes": m.classes(y).sigmoid()}
        return {"tensor": heads["boxes"], "tuple": tuple(heads.values()), "dict": heads}[output]

    groups = groups_of(Net(forward, a=conv(3, 8), boxes=conv(8, 4, 1), classes=conv(8, 6, 1)))
    assert groups["a"] == (8, None)
    assert groups["boxes"] == (4, "the network's output")
    if output != "tensor":
        assert groups["classes"] == (6, "the network's output")


def test_input_channels_are_never_cut() -> None:
    graph = ModelGraph(net(lambda m, y: y), (X,))
    reading = next(end for end in graph.ends if end.layer == "a" and end.role == "consume")
    kept = graph.removed({"a": np.arange(2)})
    assert not kept[graph.units.of[reading.labels]].any()


def test_shortcut_a_shrinks_with_its_stage() -> None:
    model = net(lambda m, y: F.relu(m.pad(y) + m.b(y)), wide=14, pad=ZeroPadShortcut(2, 4, 2), b=conv(8, 14, 3, 2))
    check_exact(model, (X,), "coupled", rate=0.5)
    pad = model.pad
    assert pad.before + pad.after < 6
    assert pad.before + model.a.out_channels + pad.after == model.b.out_channels
    fixed = net(lambda m, y: m.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4)), wide=14, b=conv(8, 14, 3, 2))
    assert any("pads channels by numbers fixed in forward" in str(frozen) for _, frozen in groups_of(fixed).values())


def test_a_per_channel_scale_behind_a_block_forbids_only_the_independent_mode() -> None:
    def forward(m: Any, y: Tensor) -> Tensor:
        return F.relu(y + m.b(y) * m.scale)

    for residual in ("coupled", "independent"):
        model = net(forward, b=conv(8, 8), scale=nn.Parameter(torch.rand(8, 1, 1)))
        groups = groups_of(model, residual=residual)
        if residual == "independent":
            assert "residual: coupled can prune it" in str(groups["b"][1])
        check_exact(model, (X,), residual)


def test_a_gate_on_what_is_summed_forbids_only_the_independent_mode() -> None:
    def forward(m: Any, y: Tensor) -> Tensor:
        return m.c(y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True)))) + y

    for residual in ("coupled", "independent"):
        model = net(forward, c=conv(8, 8), gate=conv(8, 8, 1))
        graph, _ = check_exact(model, (X,), residual)
        assert ("a" in graph.frozen_groups()) == (residual == "independent")


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims: int) -> None:
    Conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    Norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    model = nn.Sequential(
        Conv(3, 8, 3, padding="same"), Norm(8), nn.ReLU(), Conv(8, 6, 3, padding=2, dilation=2), nn.Flatten(2)
    )
    check_exact(model, (torch.zeros(2, 3, *(6, 5, 7)[:dims]),))


def test_transposed_convolutions_and_tokens() -> None:
    up = net(
        lambda m, y: F.relu(m.bn(m.up(F.relu(y)))), wide=6, up=nn.ConvTranspose2d(8, 6, 2, 2), bn=nn.BatchNorm2d(6)
    )
    assert groups_of(up)["up"] == (6, None)
    check_exact(up, (X,))
    tokens = net(
        lambda m, y: m.out(F.gelu(m.into(y.flatten(2).mT))).mT.reshape(y.shape[0], -1, 8, 8) + y,
        into=nn.Linear(8, 12),
        out=nn.Linear(12, 8),
    )
    for residual in ("coupled", "independent"):
        check_exact(tokens, (X,), residual)


def test_label_tensors_take_no_memory_for_the_image() -> None:
    labels = spread(np.arange(1, 9), (2, 8, 500, 500))
    assert labels.untyped_storage().nbytes() == 64
    assert compressed(labels).shape == (1, 8, 1, 1)
    assert axis_vector(labels, 1).tolist() == list(range(1, 9))
    assert axis_vector(labels.transpose(1, 2), 1) is None
