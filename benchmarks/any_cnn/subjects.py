"""Building a network as if it had been trained, its example input, its cost, and the difference of two of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# A segmentation network has no size of its own; the small one keeps the float64 check short.
SEGMENTATION_SIZE, DETECTION_SIZE, SMALL_SIZE = 224, 320, 128
CLASSES = {"segmentation": 21, "detection": 91}
# Names of modules in torchvision's detectors: what they give is compared too.
DETECTION_HEADS = ("rpn.head", *(f"roi_heads.{part}_predictor" for part in ("box", "mask", "keypoint")), "head")


@dataclass
class Subject:
    """One network. `size` is its own input size, `small` the one that it is traced and checked at."""

    name: str
    kind: str
    model: nn.Module
    size: tuple[int, int]
    small: tuple[int, int]
    classes: int

    def example(self, size: tuple[int, int], batch: int = 1, seed: int = 0) -> tuple[Any, ...]:
        """The arguments of forward, in the network's own dtype."""
        dtype = next(self.model.parameters()).dtype
        noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        # Detectors take a list of images with values from 0 to 1.
        return ([image.sigmoid() for image in noise],) if self.kind == "detection" else (noise,)


def build(name: str) -> Subject:
    """Untrained but not degenerate, in float64 and evaluation mode; the same at every call."""
    torch.manual_seed(0)
    source, _, leaf = name.partition(":")
    kind = source.partition("/")[2] or "classification"
    if source == "timm":
        import timm

        model = timm.create_model(leaf)
        height, width = model.pretrained_cfg["input_size"][1:]
    else:
        from torchvision.models import get_model

        backbone = {} if kind == "classification" else {"weights_backbone": None}
        model = get_model(leaf, weights=None, **backbone)
        height = width = _torchvision_size(leaf, kind, model)
    if kind == "detection" and model.transform.fixed_size is None:
        model.transform.min_size = (DETECTION_SIZE,)  # else every image is enlarged to 800
    model = randomise(model.double())
    subject = Subject(name, kind, model, (height, width), (height, width), CLASSES.get(kind, 1000))
    small = (SMALL_SIZE, SMALL_SIZE)
    if kind != "detection" and runs(model, subject.example(small)):
        subject.small = small
    return subject


def _torchvision_size(leaf: str, kind: str, model: nn.Module) -> int:
    from torchvision.models import get_model_weights

    if kind != "classification":
        return SEGMENTATION_SIZE if kind == "segmentation" else DETECTION_SIZE
    own = getattr(model, "image_size", None)
    return own or next(iter(get_model_weights(leaf))).transforms().crop_size[0]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases as after some training, and numbers in place of every constant or almost zero parameter: a
    layer scale of 1e-6 or a zero gain would hide what goes wrong behind it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.copy_(0.2 * noise(parameter))
            elif "Norm" in type(module).__name__:
                parameter.copy_(1 + 0.3 * noise(parameter))
            elif float(parameter.std(correction=0)) < 1e-3:
                parameter.copy_(0.5 + 0.2 * noise(parameter))
            else:
                # Drawn in float32, many were equal: `peer` finds weights again by their values.
                parameter.mul_(1 + 1e-6 * noise(parameter))
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(0.3 * noise(module.running_mean))
            module.running_var.copy_(0.5 + noise(module.running_var).abs())
            if module.bias is not None:
                module.bias.add_(0.5)  # mostly positive constants behind removed filters
    return model.eval()


def runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        outputs(model, inputs)
    except Exception:
        return False
    return True


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple[Any, ...], forward: Callable[..., Any] | None = None) -> list[Tensor]:
    """Every tensor in the outputs, and what a detector's heads gave: its boxes alone may be none.

    Of one-stage detectors the heads only, which are all that is computed: of thousands of boxes with almost equal
    scores, the last digit decides which are chosen. `forward` is called in place of the model, and calls it.
    """
    seen: list[Any] = []
    detector = isinstance(inputs[0], list)
    heads = [module for name, module in model.named_modules() if detector and name in DETECTION_HEADS]
    hooks = [head.register_forward_hook(lambda module, inputs, output: seen.append(output)) for head in heads]
    try:
        output = (forward or model.eval())(*copy.deepcopy(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    one_stage = detector and hasattr(model, "head")
    return list(tensors(seen if one_stage else [*seen, output]))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference of any output relative to that output's largest value; inf for other shapes.

    Raises: ValueError for outputs that prove nothing, because all are zero, empty or not finite.
    """
    if [x.shape for x in left] != [x.shape for x in right]:
        return float("inf")
    if not all(bool(x.isfinite().all()) for x in left) or not any(x.numel() and bool(x.any()) for x in left):
        raise ValueError("the masked network's outputs are all zero, empty or not finite: nothing to compare")
    return max(
        float((x - y).double().abs().max()) / max(float(x.double().abs().max()), 1e-12)
        for x, y in zip(left, right, strict=True)
        if x.numel()
    )


def cost(subject: Subject) -> dict[str, Any]:
    """MACs (convolutions, linear layers, matrix products) at the network's own size, and parameters.

    On meta, which costs nothing; a network that needs the values of its tensors runs for real. The heads that run once
    for every box are left out: how many boxes there are depends on the weights.
    """
    example = subject.example(subject.size)
    try:
        if subject.kind == "detection":
            raise RuntimeError("detectors choose boxes by their values")
        counted = _count(_on_meta(subject.model), tuple(x.to("meta") for x in example))
    except Exception:
        counted = _count(subject.model, example)
    return {**counted, "params": sum(p.numel() for p in subject.model.parameters())}


def _on_meta(model: nn.Module) -> nn.Module:
    # What deepcopy finds in its memo it does not copy: the weights take no memory. Without gradients, because the flop
    # counter stumbles over views of parameters.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), False) for p in model.parameters()}
    return copy.deepcopy(model, memo).to("meta")


@torch.no_grad()
def _count(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter:
        model(*example)
    by_boxes = sum(sum(counts.values()) for name, counts in counter.flop_counts.items() if name.endswith(".roi_heads"))
    operators = sorted(str(o) for o in counter.flop_counts["Global"])
    return {"macs": (counter.get_total_flops() - by_boxes) // 2, "operators": operators}


def traits(subject: Subject, operators: list[str]) -> dict[str, bool]:
    """`attention`: activations are multiplied with activations. `norms`: statistics are taken over channels."""
    own = (m for m in subject.model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm) or m._parameters)
    kinds = {type(module).__name__ for module in own}
    return {
        "attention": any("bmm" in o or "attention" in o for o in operators),
        "norms": any("Norm" in kind and not any(p in kind for p in ("BatchNorm", "InstanceNorm")) for kind in kinds),
    }
