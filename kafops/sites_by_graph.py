"""Find the uses of activation modules from the structure alone, by a symbolic trace with torch.fx."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from kafops.sites import Findings, Use, describe_caller, functional_forms, functional_names, unchanged

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


def find_uses(model: nn.Module, sites: Mapping[nn.Module, list[str]], targets: tuple[type[nn.Module], ...]) -> Findings:
    """Trace the model and follow the number of channels from layer to layer to every use of a site.

    Convolutions are taken to get batched input, and a linear layer fed by the model's own input [N, features]. Any
    other doubt is recorded as the use's problem.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """
    with unchanged(model):
        graph = _trace(model, targets)
    modules = dict(model.named_modules(remove_duplicate=False))
    functions, names = functional_forms(targets), functional_names(targets)
    layouts: dict[fx.Node, _Layout | None] = {}
    findings = Findings()
    for node in graph.nodes:
        if node.op == "call_module" and modules[node.target] in sites:
            findings.uses.append(_use(modules[node.target], node, layouts))
            layouts[node] = layouts.get(_input(node))
        else:
            layouts[node] = _infer(node, layouts, modules)
        called = node.target in (names if node.op == "call_method" else functions)
        if node.op in ("call_function", "call_method") and called:
            name = node.target if isinstance(node.target, str) else node.target.__name__
            findings.functional_calls.append(f"{name}() in {node.meta['where']}")
    return findings


class _Tracer(fx.Tracer):
    def __init__(self, targets: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._targets = targets

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._targets) or _is_kafops(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _OPAQUE)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        running = ["", *(path for path, _ in self.module_stack.values())]
        node.meta["where"] = describe_caller(running[-2 if kind == "call_module" else -1])
        return node


def _trace(model: nn.Module, targets: tuple[type[nn.Module], ...]) -> fx.Graph:
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, (type(None), bool, int, float))}
    try:
        return _Tracer(targets).trace(model, defaults or None)
    except Exception as e:
        raise ValueError(
            f"the structure of {type(model).__name__} cannot be read off its code ({type(e).__name__}: {e}); pass "
            "example_input, an input to run it on"
        ) from e


def _use(module: nn.Module, node: fx.Node, layouts: Mapping[fx.Node, _Layout | None]) -> Use:
    layout = layouts.get(_input(node))
    where = node.meta["where"]
    if layout is None or layout.channels is None or layout.rank is None:
        return Use(module, where, problem="gets an input whose channels cannot be told without running the model")
    tensor = next(iter(_state(layout.source)), torch.empty(0))
    return Use(module, where, layout.channels, layout.rank, tensor.device, tensor.dtype)


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
