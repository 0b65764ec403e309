"""Networks recorded operator by operator: the graph that torch.export makes, or a refusal."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graph.random_networks import RandomNetwork
from graph_support import randomise
from tersenet.graph.passes import evaluating, tensors_in
from tersenet.lowering import program as program_of
from tersenet.lowering.fold import fold_affine
from tersenet.lowering.fuse import fuse
from tersenet.lowering.program import program
from tersenet.lowering.recorded import recorded, size_at
from tersenet.models.build import build
from tersenet.nn.adapter import ChannelAdapter
from zoo_support import needs


def by(model: nn.Module, *inputs: Tensor) -> fx.GraphModule | None:
    with evaluating(model):
        return recorded(model, inputs)


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The other way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_of, "recorded", Mock(return_value=None))
        return program(model, inputs)


def contents(made: fx.GraphModule) -> tuple[Any, ...]:
    """How much is folded, the layers, and what else there is; without whole slices, which only torch.export has, and
    without numbers that are computed of the batch size, which each has its own way."""
    folded = fold_affine(made)
    layers = fuse(made)
    made.graph.eliminate_dead_code()
    calls = [node for node in made.graph.nodes if node.op == "call_function"]
    names = Counter(getattr(getattr(node.target, "_schema", None), "name", "") for node in calls if not _is_whole(node))
    return folded, {(layer.name, str(getattr(layer, "kind", ""))) for layer in layers.values()}, names - Counter([""])


def _is_whole(node: fx.Node) -> bool:
    aten = torch.ops.aten
    if node.target in (aten.alias.default, aten.slice.Tensor):
        given: Any = dict(zip(("x", "dim", "start", "end", "step"), node.args, strict=False))
        return given.get("start", 0) == 0 and given.get("end", 2**62) >= 2**62 and given.get("step", 1) == 1
    return getattr(node.target, "__name__", "") in ("getitem", "mul") or node.target is aten.sym_size.int


def assert_same(model: nn.Module, *inputs: Tensor, like_export: bool = True) -> fx.GraphModule:
    """Recorded, and the same outputs at several batch sizes; and the same graph as torch.export's."""
    found = by(model, *inputs)
    assert found is not None
    made = program(model, inputs)
    for batch in (1, 2, 5):
        samples = tuple(
            torch.randn(batch, *x.shape[1:]) if x.is_floating_point() else x[:1].expand(batch, *x.shape[1:])
            for x in inputs
        )
        with torch.no_grad():
            expected, outputs = model(*(x.clone() for x in samples)), made(*samples)
        assert type(outputs) is type(expected)
        for a, b in zip(tensors_in(outputs), tensors_in(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if like_export:
        assert contents(made) == contents(exported(model, inputs))
    return found


@pytest.mark.parametrize(
    "name", ["resnet8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("preresnet20", "vgg16_bn_cifar"))]
)
def test_shipped_networks(name: str) -> None:
    assert_same(randomise(build(name)), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 60))])
def test_random_networks(seed: int) -> None:
    inputs = 1 + seed % 2
    model = randomise(RandomNetwork(seed, depth=3, inputs=inputs), seed)
    assert_same(model, *(torch.randn(3, 3, 14, 14) for _ in range(inputs)))


def test_what_an_adapter_keeps_between_passes() -> None:
    """A border map is computed of sizes, and kept for the next pass."""
    model = ChannelAdapter(nn.Conv2d(3, 4, 3, padding=1), gather=(0, 2, 3), taps=True).eval()
    nn.init.normal_(model.get_buffer("taps"))
    x = torch.randn(2, 4, 8, 8)
    model(x)
    kept = vars(model)["_map"]
    assert kept is not None
    assert_same(model, x, like_export=False)
    assert vars(model)["_map"][2] is kept[2]


Forward = Callable[[Any, Any], Any]


class Call(nn.Module):
    """A network of one function, with a convolution, a buffer and a plain tensor to use."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("count", torch.zeros(()))
        self.table, self.steps, self.cache = torch.arange(4.0), 0, dict[str, Any]()
        self.kept: Any = None
        self._function = forward

    def forward(self, *args: Tensor) -> Any:
        return self._function(self, *args)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def _numpy_table(net: Any, x: Tensor) -> Tensor:
    return net.conv(x) * torch.from_numpy(np.arange(4, dtype=np.float32)).view(4, 1, 1)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x)
        return x * x.sigmoid()


RIGHT: dict[str, Forward] = {
    "one": lambda net, x: F.relu_(net.norm(net.conv(x))),
    "tuple": lambda net, x: (net.conv(x), None, 3, x.shape[0], "a"),
    "list": lambda net, x: [net.conv(x), [x]],
    "ordered": lambda net, x: OrderedDict[str, Tensor](out=net.conv(x), aux=x * 2),
    "named": lambda net, x: Pair(net.conv(x), x),
    "input": lambda net, x: x,
    "parameter": lambda net, x: (net.conv(x), net.conv.weight),
    "several": lambda net, x: torch.cat([y.relu() for y in net.conv(x).split(2, 1)][::-1], 1),
    "values": lambda net, x: net.conv(x).max(1).values,
    "batch": lambda net, x: net.conv(x).reshape(x.shape[0] * 2, -1).view(x.shape[0], -1),
    "batch_factor": lambda net, x: net.conv(x) * x.shape[0],
    "numbers": lambda net, x: net.conv(x) + torch.arange(x.shape[0]).view(-1, 1, 1, 1),
    "from_python": lambda net, x: net.conv(x) * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1),
    "scalar": lambda net, x: net.conv(x) + torch.tensor(2.5),
    "table": lambda net, x: net.conv(x) * net.table.view(4, 1, 1),
    "numpy": _numpy_table,
    "devices": lambda net, x: net.conv(x) + torch.ones(4, 1, 1, device=x.device).to(net.conv.weight.device),
    "like": lambda net, x: net.conv(x) + torch.zeros_like(x).mean() + x.new_ones(2).sum(),
    "mask": lambda net, x: torch.where(x > 0, x, -x).masked_fill(x.abs() > 1, 0),
    "function": lambda net, x: Swish.apply(net.conv(x)),  # pyright: ignore
    "device_of_input": lambda net, x: net.conv(x) if x.device.type == "cpu" and x.is_cpu and not x.is_meta else x,
    "dropout": lambda net, x: F.dropout(F.dropout2d(net.conv(x), training=False).flatten(1), 0.5, False, True),
    "index": lambda net, x: x[:, torch.tensor([2, 0])][..., ::2][:, None],
    "view": lambda net, x: x.view(3, -1),
    "attention": lambda net, x: F.scaled_dot_product_attention(x, x, x),
    "fourier": lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x) * 2),  # pyright: ignore
    "kept": lambda net, x: setattr(net, "kept", net.conv(x)) or net.kept * 2,
    "double": lambda net, x: net.conv(x).double().softmax(1, torch.float32).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_recorded(name: str) -> None:
    model = Call(RIGHT[name]).eval()
    assert by(model, torch.randn(2, 3, 8, 8)) is not None
    assert model.kept is None
    assert_same(model, torch.randn(2, 3, 8, 8), like_export=False)


def _loop(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.conv(x[i : i + 1])[0] for i in range(x.shape[0])])


def _counted(net: Any, x: Tensor) -> Tensor:
    net.steps += 1
    return x * net.steps


def _remembered(net: Any, x: Tensor) -> Tensor:
    if "map" not in net.cache:
        net.cache["map"] = torch.ones(3, 1, 1) * 2
    return x * net.cache["map"]


def _moving(net: Any, x: Tensor) -> Tensor:
    net.table = net.table * 0.9 + x.mean()
    return x + net.table[0]


def _autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.conv(x).float()


def _padded(net: Any, x: Tensor) -> Tensor:
    return net.conv(F.pad(x, (0, 0, 0, 0, 0, 0, 0, -x.shape[0] % 4)))


REFUSED: dict[str, Forward] = {
    "branch": lambda net, x: x if x.sum() > 0 else -x,
    "item": lambda net, x: x * x.max().item(),
    "number_of_parameter": lambda net, x: x * float(net.conv.bias[0]),
    "tolist": lambda net, x: x * x.mean((1, 2, 3)).tolist()[0],
    "numpy": lambda net, x: x + torch.from_numpy(x.detach().numpy()),
    "array": lambda net, x: x + float(np.asarray(x).max()),
    "nonzero": lambda net, x: x[x > 0],
    "equal": lambda net, x: x if torch.equal(x, x) else -x,
    "copied": lambda net, x: copy.deepcopy(x) * 2,
    "address": lambda net, x: x * (1 if x.data_ptr() % 64 else 2),
    "data": lambda net, x: x.data * 2,
    "large_batch": lambda net, x: net.conv(x) if x.shape[0] > 8 else net.conv(x) * 1,
    "even_batch": lambda net, x: x if x.shape[0] % 2 == 0 else x * 2,
    "padded_batch": _padded,
    "least": lambda net, x: x * min(x.shape[0], 2),
    "mean": lambda net, x: x.sum(0, keepdim=True) * (1 / x.shape[0]),
    "loop": _loop,
    "fixed": lambda net, x: x.view(2, -1, 8, 8),
    "list_index": lambda net, x: x[:, [2, 0]],
    "table_of_batch": lambda net, x: x + torch.from_numpy(np.arange(len(x), dtype=np.float32)).view(-1, 1, 1, 1),
    "random": lambda net, x: x * random.random(),
    "counted": _counted,
    "moving": _moving,
    "remembered": _remembered,
    "buffer": lambda net, x: x * net.count.add_(1),
    "weight": lambda net, x: net.conv(x) + net.conv.bias.relu_()[0],
    "resized": lambda net, x: net.conv(x).unsqueeze_(0),
    "autocast": _autocast,
    "set_data": lambda net, x: setattr(y := net.conv(x), "data", x) or y,
    "gradient": lambda net, x: torch.autograd.grad(x.requires_grad_().pow(2).sum(), x)[0],  # pyright: ignore
    "class": lambda net, x: slice(net.conv(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_to_export(name: str) -> None:
    model = Call(REFUSED[name]).eval()
    before, attributes = copy.deepcopy(model.state_dict()), dict(vars(model))
    x = torch.randn(2, 3, 8, 8)
    assert by(model, x) is None
    assert vars(model) == attributes
    assert model.cache == {}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))  # nothing is recorded any more


def test_changes_in_place_that_a_view_sees_are_left_to_export() -> None:
    def forward(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.conv(x)
        half = y[:, :2]
        F.relu_(y)
        return half, y

    model = Call(forward).eval()
    made = program(model, (torch.randn(1, 3, 8, 8),))
    x = torch.randn(3, 3, 8, 8)
    for a, b in zip(made(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


def _doubled(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return y * 2


def test_hooks_and_weights_made_of_others() -> None:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    ).eval()
    model[1].register_forward_hook(_doubled)
    before = model[0].weight
    assert_same(model, torch.randn(1, 3, 9, 9), like_export=False)
    assert model[0].weight is before or type(model[0].weight) is Tensor


def test_attention_and_recurrence() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.memory = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.memory(self.attention(x))[0]

    assert_same(Sequence().eval(), torch.randn(2, 5, 8), like_export=False)


@torch.library.custom_op("tersenet_test::shifted", mutates_args=())
def shifted(x: Tensor, by: float) -> Tensor:
    return x + by


@shifted.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_of_somebody_else_is_one_call() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return shifted(net.conv(x), 2.0)

    found = assert_same(Call(forward).eval(), torch.randn(1, 3, 8, 8))
    targets = [node.target for node in found.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.conv2d.default, torch.ops.tersenet_test.shifted.default]


def test_sizes_and_names() -> None:
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 3, stride=2), head=nn.Sequential(nn.ReLU(), nn.Flatten())))
    found = by(model, torch.randn(2, 3, 9, 9))
    assert found is not None
    nodes = {node.name: node for node in found.graph.nodes}
    assert size_at(nodes["conv2d"], 3) == (3, 4, 4, 4)
    assert size_at(nodes["flatten"], 1) == (1, 64)
    assert list(nodes["conv2d"].meta["nn_module_stack"]) == ["stem"]
    assert found.get_parameter("stem.weight") is model.get_parameter("stem.weight")


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_contexts_of_the_caller(context: Any) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    with context():
        assert by(model, torch.randn(1, 3, 8, 8)) is not None


def test_nothing_heavy_is_loaded() -> None:
    """torch.export and what it needs would take seconds in a fresh process."""
    code = """
import sys, torch
from torch import nn
import tersenet as tn
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
    nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5))
tn.lower(net, torch.rand(1, 3, 16, 16), choice="direct")(torch.rand(2, 3, 16, 16))
print(sorted({"sympy", "torch._dynamo", "torch._inductor", "scipy", "networkx", "pydantic"} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


SAMPLE = """
torchvision:resnet18 torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:densenet121
torchvision:shufflenet_v2_x0_5 torchvision:regnet_y_400mf torchvision:efficientnet_b0 torchvision:inception_v3
torchvision:squeezenet1_0 torchvision:mnasnet0_5 torchvision:convnext_tiny torchvision:vit_b_16 torchvision:maxvit_t
torchvision:alexnet torchvision:vgg11 torchvision:googlenet timm:res2net50_26w_4s timm:hrnet_w18_small
timm:ghostnet_100 timm:repvgg_a0 timm:dla34 timm:cspresnet50 timm:mobilevit_xs timm:nfnet_f0 timm:mixnet_s
timm:skresnet18 timm:rexnet_100 timm:seresnet18 timm:resnest14d timm:ese_vovnet19b_dw timm:coatnet_nano_rw_224
timm:poolformer_s12 timm:mobileone_s0 timm:mobilenetv4_conv_small timm:dpn68 timm:ecaresnet26t
timm:inception_next_atto timm:edgenext_xx_small timm:starnet_s1 timm:pvt_v2_b0 timm:tresnet_m timm:xcit_nano_12_p16_224
""".split()


IN_PLACE = ("torchvision:efficientnet_b0", "timm:ghostnet_100")
"""torch.export makes others of what they change in place: a dropout that does nothing, a slice of everything."""


@pytest.mark.slow
@needs("torchvision", "timm")
@pytest.mark.parametrize("name", SAMPLE)
def test_open_networks(name: str) -> None:
    from tersenet.models.torchvision_cpu import ready

    models = ready().models
    source, _, leaf = name.partition(":")
    if source == "timm":
        import timm

        model, size = timm.create_model(leaf), 224
    else:
        model, size = getattr(models, leaf)(weights=None), 299 if leaf == "inception_v3" else 224
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gains of zero would hide what is behind them
            nn.init.uniform_(parameter, 0.5, 1)
    assert_same(randomise(model), torch.randn(1, 3, size, size), like_export=name not in IN_PLACE)
