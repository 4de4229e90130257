"""Find the uses of activation modules from the structure alone, by a symbolic trace with torch.fx."""

import inspect
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from kafops.sites import Findings, Place, Targets, Use, describe_caller, read_call, separate, unchanged

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._NormBase  # BatchNorm and InstanceNorm of any rank
# Leaves by torch.fx's rule, though activations run inside; no trace gets through, so that they are never overlooked.
_OPAQUE = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer,
           nn.TransformerDecoderLayer)  # fmt: skip
_ELEMENTWISE = (nn.Identity, nn.Dropout, nn.AlphaDropout)
_KEEPS_CHANNELS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.Upsample,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
_ARITHMETIC = {"add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "truediv", "div", "maximum"}
_KEEPING_FUNCTIONS = {
    "dropout", "contiguous", "clone", "detach", "interpolate", "layer_norm",
    "max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
}  # fmt: skip


class _Layout(NamedTuple):
    """What is certain about a tensor of the graph; of one that is not [N, C, *] nothing is, and None stands for it."""

    channels: int | None
    rank: int | None
    source: nn.Module | None  # the last layer with parameters, which tells device and dtype


_MODEL_INPUT = _Layout(None, None, None)


def find_uses(
    model: nn.Module, places: Collection[Place], targets: Targets, skipped: Collection[nn.Module]
) -> Findings:
    """Trace the model and follow the number of channels from layer to layer to every use of an activation.

    Convolutions are taken to get batched input, and a linear layer fed by the model's own input [N, features]. Any
    other doubt is recorded as the use's problem.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """
    with unchanged(model):
        owners = separate(places)
        graph = _trace(model, targets)
        modules = dict(model.named_modules(remove_duplicate=False))
    layouts: dict[fx.Node, _Layout | None] = {}
    calls: Counter[str] = Counter()  # of activations, by running forward
    findings = Findings()
    for node in graph.nodes:
        place = owners.get(modules[node.target]) if node.op == "call_module" else None
        holder = modules[node.meta.get("path", "")]
        if place or (_calls_activation(node, targets) and holder not in skipped):
            findings.uses.append(_use(node, place, holder, calls[node.meta["scope"]], layouts))
            calls[node.meta["scope"]] += 1
            layouts[node] = layouts.get(_input(node))
        else:
            layouts[node] = _infer(node, layouts, modules)
    return findings


class _Tracer(fx.Tracer):
    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self._targets = targets

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._targets.cover(m) or _is_kafops(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _OPAQUE)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        running = [("", ""), *((scope, path) for scope, (path, _) in self.module_stack.items())]
        node.meta["scope"], node.meta["path"] = running[-2 if kind == "call_module" else -1]
        node.meta["where"] = describe_caller(node.meta["path"])
        return node


def _trace(model: nn.Module, targets: Targets) -> fx.Graph:
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, (type(None), bool, int, float))}
    try:
        return _Tracer(targets).trace(model, defaults or None)
    except Exception as e:
        raise ValueError(
            f"the structure of {type(model).__name__} cannot be read off its code ({type(e).__name__}: {e}); pass "
            "example_input, an input to run it on"
        ) from e


def _calls_activation(node: fx.Node, targets: Targets) -> bool:
    return node.target in {"call_method": targets.function_names, "call_function": targets.functions}.get(node.op, ())


def _use(
    node: fx.Node, place: Place | None, holder: nn.Module, index: int, layouts: Mapping[fx.Node, _Layout | None]
) -> Use:
    x, in_place = _input(node), getattr(place.module, "inplace", False) if place else False
    activation: Any = place.module if place else None
    if place is None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        x, activation, in_place = read_call(name, node.args, node.kwargs)
    use = Use(activation, place, holder, index, node.meta["where"])
    if in_place and (not node.users or any(user > node for user in x.users)):
        return replace(use, problem="works in place, and what it has overwritten is read again")
    layout = layouts.get(x)
    if layout is None or layout.channels is None or layout.rank is None:
        problem = "gets an input whose channels cannot be told without running the model; pass example_input"
        return replace(use, problem=problem)
    tensor = next(iter(_state(layout.source)), torch.empty(0))
    shape = (0, layout.channels, *(0,) * (layout.rank - 2))
    return replace(use, shape=shape, channel_dim=1, device=tensor.device, dtype=tensor.dtype)


def _state(module: nn.Module | None) -> list[torch.Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _source(module: nn.Module, x: _Layout | None) -> nn.Module | None:
    return module if _state(module) else x.source if x else None


def _input(node: fx.Node) -> Any:
    return next(iter((*node.args, *node.kwargs.values())), None)


def _infer(
    node: fx.Node, layouts: Mapping[fx.Node, _Layout | None], modules: Mapping[str, nn.Module]
) -> _Layout | None:
    if node.op == "placeholder":
        return _MODEL_INPUT
    if node.op == "call_module":
        return _after_module(modules[str(node.target)], layouts.get(_input(node)))
    if node.op in ("call_function", "call_method"):
        return _after_function(node, layouts)
    return None


def _after_module(m: nn.Module, x: _Layout | None) -> _Layout | None:
    if isinstance(m, _Conv):
        return _Layout(m.out_channels, 2 + len(m.kernel_size), m)
    if isinstance(m, nn.Linear):
        return _Layout(m.out_features, 2, m) if x is not None and x.rank in (None, 2) else None
    if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
        return _Layout(m.num_features, 4 if isinstance(m, nn.BatchNorm2d) else 5, _source(m, x))
    if isinstance(m, nn.Flatten):
        return _flattened(x, m.start_dim, m.end_dim)
    if isinstance(m, _ELEMENTWISE) or _is_pointwise_activation(m):
        return x
    if x is None or x.rank is None:
        return None
    if isinstance(m, (_Norm, nn.GroupNorm)):
        channels = m.num_channels if isinstance(m, nn.GroupNorm) else m.num_features
        return x._replace(channels=channels, source=_source(m, x))
    return x if isinstance(m, _KEEPS_CHANNELS) else None


def _after_function(node: fx.Node, layouts: Mapping[fx.Node, _Layout | None]) -> _Layout | None:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    x = layouts.get(_input(node))
    if name in _ARITHMETIC:
        return _joined([layouts[a] for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)])
    if name == "flatten":
        dims = [*node.args[1:], *(node.kwargs.get(k) for k in ("start_dim", "end_dim") if k in node.kwargs)]
        return _flattened(x, *dims) if len(dims) < 3 else None
    if name in ("view", "reshape"):
        sizes = node.args[1] if len(node.args) == 2 else node.args[1:]
        is_matrix = isinstance(sizes, (tuple, list)) and len(sizes) == 2
        return _Layout(None, 2, x.source if x else None) if is_matrix else None
    return x if name in _KEEPING_FUNCTIONS and x is not None and x.rank is not None else None


def _flattened(x: _Layout | None, start_dim: Any = 0, end_dim: Any = -1) -> _Layout | None:
    if (start_dim, end_dim) != (1, -1):
        return None
    if x is not None and x.rank == 2:
        return x
    return _Layout(None, 2, x.source if x else None)


def _joined(operands: list[_Layout | None]) -> _Layout | None:
    """Return the layout of a sum or product, known where all its tensors agree."""
    first = operands[0] if operands else None
    agree = all(x is not None and first is not None and x[:2] == first[:2] for x in operands)
    return first if agree else None


def _is_pointwise_activation(m: nn.Module) -> bool:
    torch_activation = type(m).__module__ == "torch.nn.modules.activation"
    return (torch_activation and not isinstance(m, (nn.GLU, nn.MultiheadAttention))) or _is_kafops(m)


def _is_kafops(m: nn.Module) -> bool:
    return type(m).__module__.partition(".")[0] == "kafops"
