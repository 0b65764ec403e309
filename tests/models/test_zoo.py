"""`timm:NAME` and `torchvision:NAME`: what they build, what they refuse, and what comes back from a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tersenet
from tersenet.errors import ArtifactError, TersenetError, UnknownNameError
from tersenet.exporting import artifact
from tersenet.graph.compact import compact
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import InputSpec, Record, attach, record_of
from tersenet.models import zoo
from tersenet.models.build import build, build_skeleton
from tersenet.models.open import Source, example_of
from zoo_support import needs

pytestmark = needs("timm", "torchvision")


def opened(name: str, shape: tuple[int, ...] | None = None, classes: int | None = None) -> tuple[nn.Module, Record]:
    model = Source(name).open(shape, classes)
    record = record_of(model)
    assert record is not None
    return model, record


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("timm:resnet10t", (3, 176, 176), 1000),
        ("timm:mobilenetv3_small_050.lamb_in1k", (3, 224, 224), 1000),
        ("torchvision:squeezenet1_1", (3, 224, 224), 1000),
        ("torchvision:mobilenet_v3_small", (3, 224, 224), 1000),
    ],
)
def test_a_name_stands_for_its_published_shape_and_classes(name: str, shape: tuple[int, ...], classes: int) -> None:
    model, record = opened(name)
    assert (record.base, record.arguments, record.input.shape) == (name, {}, shape)
    with torch.no_grad():
        assert model(torch.zeros(1, *shape)).shape == (1, classes)


def test_data_decide_channels_and_classes() -> None:
    model, record = opened("timm:resnet10t", (1, 32, 32), 7)
    assert record.arguments == {"num_classes": 7, "in_chans": 1}
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    model, record = opened("torchvision:squeezenet1_1", (3, 64, 64), 7)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(TersenetError, match=r"torchvision:squeezenet1_1 takes images of 3 channels.* have 1: timm's"):
        opened("torchvision:squeezenet1_1", (1, 8, 8))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("timm:vit_tiny_patch16_224", {"img_size": 96}), ("torchvision:vit_b_32", {"image_size": 96})],
)
def test_a_network_for_one_image_size_is_made_for_that_of_the_data(name: str, arguments: dict[str, int]) -> None:
    model, record = opened(name, (3, 96, 96))
    assert record.arguments == arguments
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_shapes_of_other_tasks() -> None:
    with_names = {
        name: zoo.entry(f"torchvision:{name}") for name in ("inception_v3", "r3d_18", "fcn_resnet50", "ssd300_vgg16")
    }
    shapes = {name: found.shape(build_skeleton(found.spec)) for name, found in with_names.items()}
    expected = {"inception_v3": (3, 299, 299), "r3d_18": (3, 16, 112, 112)}
    assert shapes == expected | {"fcn_resnet50": (3, 520, 520), "ssd300_vgg16": (3, 300, 300)}


def test_training_heads_are_left_out_unless_asked_for() -> None:
    """They are not traced: pruning would leave them on channels that are gone."""
    plain = build_skeleton("torchvision:googlenet").state_dict()
    whole = build_skeleton("torchvision:googlenet", aux_logits=True).state_dict()
    assert {name.partition(".")[0] for name in whole.keys() - plain.keys()} == {"aux1", "aux2"}


# Weights


def test_weights_come_with_their_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(3)
    trained = build("timm:test_vit")
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    source = Source("timm:test_vit", str(tmp_path / "w.safetensors"))
    model = source.open()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())
    assert source.normalise == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert Source("timm:test_vit").normalise is None


def test_torchvisions_files_have_training_heads_too(tmp_path: Path) -> None:
    whole = build("torchvision:googlenet", aux_logits=True)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    model = Source("torchvision:googlenet", str(tmp_path / "w.pth")).open()
    assert torch.equal(model.get_submodule("fc").weight, whole.get_submodule("fc").weight)
    record = record_of(model)
    assert record is not None
    assert record.arguments == {"transform_input": True}
    with pytest.raises(TersenetError, match="are not those of this SqueezeNet"):
        Source("torchvision:squeezenet1_1", str(tmp_path / "w.pth")).open()


# Names and arguments that are refused


@pytest.mark.parametrize("name", ["timm:resnet17", "timm:hf-hub:timm/resnet18.a1_in1k", "timm:local-dir:x", "timm:"])
def test_only_what_timm_lists(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model of timm .*`tersenet models 'timm:"):
        build(name)


def test_near_names_are_offered() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        build("timm:resnet-18")
    with pytest.raises(UnknownNameError, match=r"did you mean .*'mobilenet_v2'"):
        build("torchvision:mobilenetv2")
    with pytest.raises(UnknownNameError, match=r"unknown model of timm 'resnet18\.none'"):
        build("timm:resnet18.none")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "unknown argument of model 'timm:resnet18' 'checkpoint_path'"),
        ("timm:resnet18", {"pretrained": True}, "unknown argument .* 'pretrained'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "unknown argument .* 'weights'"),
        ("timm:resnet18", {"num_classes": 10**9}, "num_classes=1000000000 must be an integer from 1 to 100,000"),
        ("timm:resnet18", {"in_chans": "3"}, "in_chans='3' must be an integer"),
        ("timm:resnet18", {"drop_rate": 2.0}, r"drop_rate=2\.0 must be a number from 0 to 1"),
        ("torchvision:googlenet", {"aux_logits": 1}, "aux_logits=1 must be true or false"),
        ("timm:resnet18", {"img_size": 64}, r"can't be built with \(img_size=64\): .*img_size"),
    ],
)
def test_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        build(name, **arguments)


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf"'timm:resnet18' needs {missing}, which is not installed: pip install 'tersenet\[zoo\]'"
    with pytest.raises(TersenetError, match=message):
        build("timm:resnet18")


# Saving and loading


def halved(name: str, shape: tuple[int, ...], **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Source(name, arguments=tuple(arguments.items())).open(shape)
    graph = ModelGraph(model, example_of(model, batch=2))
    compact(graph, {g.name: torch.arange(g.size // 2).numpy() for g in graph.groups if g.frozen is None and g.size > 1})
    return model.eval()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("timm:resnet10t", {"num_classes": 5}),
        pytest.param("torchvision:squeezenet1_1", {"num_classes": 5}, marks=pytest.mark.slow),
    ],
)
def test_a_pruned_one_loads_in_a_new_process_without_a_base(
    tmp_path: Path, name: str, arguments: dict[str, int]
) -> None:
    model = halved(name, (3, 32, 32), **arguments)
    assert sum(p.numel() for p in model.parameters()) < 0.5 * sum(
        p.numel() for p in build(name, **arguments).parameters()
    )
    artifact.save(model, tmp_path / "m")
    code = f"""
import torch, tersenet
x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
print(tersenet.load({str(tmp_path / "m")!r})(x).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model(x).detach())


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_vit",
        pytest.param("timm:swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
        pytest.param("timm:swinv2_tiny_window8_256", marks=pytest.mark.slow),
    ],
)
def test_what_no_state_dict_holds_is_real_after_loading(tmp_path: Path, name: str) -> None:
    """Masks and position tables: some are made on the device of a parameter, or from the values of one."""
    model, record = opened(name)
    loaded = tersenet.load(artifact.save(model, tmp_path / "m"))
    x = torch.randn(1, *record.input.shape)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_skeleton_draws_no_random_numbers_and_has_no_weights() -> None:
    torch.manual_seed(0)
    model = build_skeleton("timm:test_vit")
    assert all(p.is_meta for p in model.parameters())
    first = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(1))
    assert not any(p.is_meta for p in nn.Linear(1, 1).parameters())


@pytest.mark.parametrize(
    ("base", "arguments", "message"),
    [
        ("timm:resnet18", {"pretrained": True}, "unknown argument of model 'timm:resnet18' 'pretrained'"),
        ("timm:hf-hub:x/y", {}, "unknown model of timm"),
        ("torchvision:../x", {}, "unknown model of torchvision"),
        ("timmy:resnet18", {}, "timmy:resnet18, which only you can vouch for"),
    ],
)
def test_a_strangers_file_builds_nothing_else(
    tmp_path: Path, base: str, arguments: dict[str, Any], message: str
) -> None:
    model = nn.Linear(1, 1)
    attach(model, Record(base=base, arguments=arguments, input=InputSpec(shape=(3, 8, 8))))
    artifact.save(model, tmp_path / "m")
    with pytest.raises(ArtifactError, match=message):
        artifact.load(tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_every_family_has_a_skeleton(package: str) -> None:
    names = zoo.names(package)
    for name in names[:: 40 if package == "timm" else 3]:
        model = build_skeleton(name)
        state = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        assert all(id(b) in state or not b.is_meta for b in model.buffers()), name
