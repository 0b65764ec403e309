"""A network as one flat, functional graph for any batch size: what `lower` rewrites.

The graph is torch.export's, and not the user's forward with modules exchanged: it says who reads what, also for
functional activations, sums and weights that are computed in forward; it works for any batch size; and it runs without
the modules' own overhead. Its price: sizes other than the batch are those of the example.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._ops import OpOverload

from tersenet.errors import GraphError, first_line
from tersenet.graph.passes import evaluating
from tersenet.lowering.recorded import recorded
from tersenet.nn.adapter import select_channels
from tersenet.nn.winograd_relu_operator import as_operator

_aten = torch.ops.aten
_CHECKS = frozenset([_aten._assert_tensor_metadata.default])
_RESHAPES = frozenset([_aten.view.default, _aten._unsafe_view.default])
_NORMS = frozenset([_aten.batch_norm.default, _aten.instance_norm.default])
_DROPOUTS = frozenset([_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default])
_FRESH = frozenset(
    "conv1d conv2d conv3d conv_transpose2d linear batch_norm instance_norm group_norm layer_norm max_pool2d "
    "adaptive_avg_pool2d relu6 cat mean".split()
)
_LARGEST_CONSTANT = 2**24
"""Numbers in a tensor that is computed once and kept; larger ones are cheaper to compute than to read, but for those
that are no larger than what they are computed of, such as a masked weight."""


def program(model: nn.Module, example: tuple[Any, ...]) -> fx.GraphModule:
    """The operators of `model` in evaluation mode; parameters are attributes, and still the model's own tensors. A
    layer with its weight in the Winograd domain is one operator.

    Raises:
        GraphError: the network can't be exported, serves one batch size only, or changes its own state.
    """
    with evaluating(model), torch.no_grad(), as_operator():
        made = recorded(model, example)
        if made is None or not _without_mutation(made):
            made = _exported(model, example)
    _check(made, type(model).__name__)
    for node in made.graph.nodes:
        if node.target in _CHECKS:
            made.graph.erase_node(node)
        elif node.target in _RESHAPES:  # memory is channels-last, where a view may be none
            node.target = _aten.reshape.default
        elif node.target in _DROPOUTS and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
    fold_constants(made)
    for node in made.graph.nodes:
        if node.target is _aten.index_select.default:
            node.target = select_channels  # torch's own gives images back with each channel apart from the others
    return made


def _exported(model: nn.Module, example: tuple[Any, ...]) -> fx.GraphModule:
    """torch.export's graph, which takes more networks, and more time. Raises: GraphError, as `program`."""
    from tersenet.exporting.program import any_batch, batches

    inputs, name = batches(example)[2], type(model).__name__
    try:
        found = torch.export.export(model, inputs, dynamic_shapes=any_batch(model, inputs), strict=False)
        made = found.module(check_guards=False)
        if not _without_mutation(made):
            made = found.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise GraphError(
            f"{name} can't be lowered, because torch.export does not take it: {type(error).__name__}: "
            f"{first_line(error)}. If its forward branches by values, lower the part before the branch"
        ) from error
    assert isinstance(made, fx.GraphModule)
    if any(node.op == "placeholder" and isinstance(node.meta["val"].shape[0], int) for node in made.graph.nodes):
        raise GraphError(f"{name} can't be lowered: its forward runs for a fixed batch size only")
    return made


def _without_mutation(made: fx.GraphModule) -> bool:
    """Replace `relu_` and its like by `relu`, where nothing else sees the memory that they change.

    False where that can't be told: torch's own way, which copes with everything, takes twice the time of the export.
    """
    nodes = list(made.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        if _uses_statistics_of_the_batch(node):
            return False
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        changed: Any = node.args[0] if node.args else None
        packet = getattr(_aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        plain = getattr(packet, node.target._overloadname, None)
        # `pow_.Scalar` takes a tensor and a number, and `pow.Scalar` a number and a tensor.
        if plain is None or plain._schema.is_mutable or _types_of(plain) != _types_of(node.target):
            return False
        if not isinstance(changed, fx.Node) or not _is_own(changed):
            return False
        node.target = plain
        changed.replace_all_uses_with(node, lambda user, at=place[node]: place[user] > at)
    return True


def _types_of(operator: OpOverload) -> list[str]:
    """Of its arguments."""
    return [str(one.type) for one in operator._schema.arguments]  # pyright: ignore[reportPrivateUsage]


def _is_own(node: fx.Node) -> bool:
    """Whether an operator made this tensor in memory of its own, and nobody reads it through a view."""
    return is_fresh(node) and all(user.op == "output" or is_fresh(user, mutable=True) for user in node.users)


def is_fresh(node: fx.Node, mutable: bool = False) -> bool:
    """Whether an operator's result is in new memory; `mutable`: or in that of the argument which it changes."""
    if not isinstance(node.target, OpOverload):
        return False
    schema = node.target._schema  # pyright: ignore[reportPrivateUsage]
    if schema.is_mutable:
        return mutable
    if any(one.alias_info is not None for one in (*schema.arguments, *schema.returns)):
        return False
    # Operators that torch composes of others don't always declare that they may hand their argument through.
    composed = node.target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return not composed or schema.name.rpartition("::")[2] in _FRESH


def _uses_statistics_of_the_batch(node: fx.Node) -> bool:
    """A norm whose running statistics change in the pass, though its schema does not say so."""
    return node.target in _NORMS and len(node.args) > 5 and bool(node.args[5]) and node.args[3] is not None


def _check(made: fx.GraphModule, name: str) -> None:
    for node in made.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise GraphError(f"{name} can't be lowered: its forward changes its own state or input ({node.target})")
        if schema is not None and schema.name == "aten::as_strided":
            raise GraphError(f"{name} can't be lowered: its forward reads memory by strides (as_strided)")


def fold_constants(made: fx.GraphModule) -> None:
    """What is computed of parameters alone, such as a standardised weight or a border map, is computed now."""
    values: dict[fx.Node, Any] = {}
    for node in made.graph.nodes:
        if node.op == "get_attr":
            value = constant(made, node)
            if value is not None:
                values[node] = value
        elif _is_pure(node) and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        read = any(user not in values for user in node.users)
        if node.op != "get_attr" and read and isinstance(value, Tensor) and value.numel() <= _most(node, values):
            node.replace_all_uses_with(attribute(made, value, node))
    made.graph.eliminate_dead_code()


def _most(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    """Numbers that a constant may have."""
    sources = [values[source] for source in node.all_input_nodes]
    return max([_LARGEST_CONSTANT, *(source.numel() for source in sources if isinstance(source, Tensor))])


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return getattr(node.target, "__name__", "") == "getitem"


def constant(made: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that `node` stands for, or None if it is not a parameter, buffer or constant."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = made
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found.detach() if isinstance(found, Tensor) else None


def attribute(made: fx.GraphModule, value: Tensor, before: fx.Node) -> fx.Node:
    """A new node that reads `value`, placed before another node."""
    number = made.meta.get("constants", 0)
    while hasattr(made, name := f"constant_{number}"):
        number += 1
    made.meta["constants"] = number + 1
    made.register_buffer(name, value.detach())
    with made.graph.inserting_before(before):
        node = made.graph.get_attr(name)
    node.meta["val"] = value
    return node


def reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, or None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def erase(made: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Remove nodes, given in the order of the graph, that nobody reads any more."""
    for node in reversed(list(nodes)):
        made.graph.erase_node(node)
