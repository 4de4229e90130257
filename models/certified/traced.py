"""A network as a row of steps, from a symbolic trace with torch.fx and one forward pass for the shapes."""

import copy
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

import kafops
from models.activations import KWinners
from models.activations.smooth import PSSiLU, SmoothReLU
from models.certified.intervals import logits
from models.certified.operations import (
    Activation,
    Add,
    Affine,
    AveragePool,
    Convolution,
    Flatten,
    Image,
    Linear,
    MaxPool,
    Mean,
    Operation,
    PadChannels,
    Step,
    Unshuffle,
    Winners,
)
from models.certified.scalars import scalar
from models.evaluation import evaluation_mode
from models.networks.blocks import Normalise
from models.networks.resnet import PadShortcut
from models.support.errors import UserError

_ACTIVATIONS = (
    kafops.KAF, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Softplus, nn.Tanh, nn.Sigmoid,
    SmoothReLU, PSSiLU,
)  # fmt: skip
_KEEP = (nn.Identity, nn.modules.dropout._DropoutNd)
_OURS = (kafops.KAF, KWinners, SmoothReLU, PSSiLU, Normalise, PadShortcut)

_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_RESHAPES: tuple[Any, ...] = (torch.flatten, torch.reshape, "flatten", "reshape", "view")
_CLONES: tuple[Any, ...] = ("clone", torch.clone)
_SAME: tuple[Any, ...] = ("contiguous", "detach")
_MEANS: tuple[Any, ...] = (torch.mean, "mean")
_IN_PLACE: tuple[Any, ...] = (operator.iadd, "add_", "relu_")
_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((torch.sigmoid, "sigmoid"), nn.Sigmoid),
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
    F.softplus: nn.Softplus,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.pixel_unshuffle: nn.PixelUnshuffle,
}


_CLOSE = 1e-6  # of the largest logit: float64 rounds some 1e-13, and softplus's threshold may be magnified


class BoundError(UserError):
    """A network that cannot be bounded, with the part of it that is not known here."""


def steps(model: nn.Module, shape: Sequence[int]) -> list[Step]:
    """Return what a network computes in evaluation mode, step by step; the last step makes its output.

    Modules: convolutions, linear layers, batch norms, max and average pooling, pixel unshuffle, dropout, the
    activations of `models.activations`, and whatever adds and flattens such things, as torchvision's ResNets do.

    Args:
        model: the network; it is left as it is, and in its mode.
        shape: of one image, without N, such as (3, 32, 32).

    Raises:
        BoundError: torch.fx cannot trace the network, or it holds something else; the message names it. So it is where
            a tensor is used again that something has overwritten, or where the steps compute another output for a
            random image than the network.

    Example:
        >>> network = steps(model, (1, 28, 28))
    """
    with evaluation_mode(model), torch.no_grad():
        graph = _trace(model)
        first = next(model.parameters(), torch.empty(0))
        image = torch.zeros(1, *shape, device=first.device, dtype=first.dtype)
        ShapeProp(fx.GraphModule(model, graph)).propagate(image)
        network = _Lowering(model).lower(graph)
        _compare(network, model, shape)
        return network


def _compare(network: Sequence[Step], model: nn.Module, shape: Sequence[int]) -> None:
    """Refuse steps that do not compute what the network does, both in float64; softplus differs by 2e-9."""
    image = torch.rand(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(model).to("cpu", torch.float64)(image.clone())
    found = logits(network, image)
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=_CLOSE * _largest(wanted)):
        raise BoundError(
            f"{type(model).__name__} cannot be bounded: it computes something else than its steps do, one by one, so "
            "part of it is not known here"
        )


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _OURS) or super().is_leaf_module(module, name)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        raise BoundError(
            f"{type(model).__name__} cannot be bounded: torch.fx cannot trace it ({error}); what a forward does must "
            "not depend on the values of its input"
        ) from error


class _Lowering:
    """Turns the nodes of a traced graph into steps.

    A step's result never changes. A network may overwrite one, as in-place activations do, where nothing needs the old
    values any more; memory that several nodes share is known by the first of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.steps: list[Step] = []
        self.numbers: dict[fx.Node, int] = {}  # of the step whose result a node is
        self.memory: dict[fx.Node, fx.Node] = {}
        self.overwritten: dict[fx.Node, set[fx.Node]] = {}  # by memory: nodes whose values are gone

    def lower(self, graph: fx.Graph) -> list[Step]:
        for node in graph.nodes:
            if node.op == "output":
                return self._until(node)
            if _shape(node) is not None and node.op != "get_attr":
                self._add(node)
        raise BoundError("the network has no output")

    def _until(self, output: fx.Node) -> list[Step]:
        result = output.args[0]
        if not isinstance(result, fx.Node) or result not in self.numbers:
            raise BoundError("the network must return one tensor, the logits")
        return self.steps[: self.numbers[result] + 1]

    def _add(self, node: fx.Node) -> None:
        name = str(node.target if node.op == "call_module" else node.name)
        sources = [argument for argument in node.all_input_nodes if argument in self.numbers]
        operation = self._operation(node, name, sources)
        self._remember(node, name, sources, operation)
        if operation is None:
            self.numbers[node] = self.numbers[sources[0]]
            return
        shape = _shape(node)
        assert shape is not None
        self.numbers[node] = len(self.steps)
        # x + x is one source, twice.
        taken = node.args if isinstance(operation, Add) else sources
        inputs = tuple(self.numbers[source] for source in taken if isinstance(source, fx.Node))
        self.steps.append(Step(name, operation, inputs, shape[1:]))

    def _remember(self, node: fx.Node, name: str, sources: list[fx.Node], operation: Operation | None) -> None:
        for source in sources:
            if source in self.overwritten.get(self.memory[source], ()):
                raise BoundError(
                    f"{name} of the network cannot be bounded: it takes {source.name} after that was overwritten in "
                    "place; use inplace=False, or clone it before"
                )
        writes = operation is not None and self._in_place(node)
        shares = writes or (operation is None and node.target not in _CLONES) or isinstance(operation, Flatten)
        self.memory[node] = self.memory[sources[0]] if shares else node
        if writes:
            shared = self.memory[node]
            self.overwritten[shared] = {other for other in self.memory if self.memory[other] is shared} - {node}

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.modules[str(node.target)], "inplace", False))
        asked = node.kwargs.get("inplace", False) or (node.target in _FUNCTIONS and True in node.args[1:])
        return node.target in _IN_PLACE or bool(asked)

    def _operation(self, node: fx.Node, name: str, sources: list[fx.Node]) -> Operation | None:
        if node.op == "placeholder":
            return Image()
        try:
            for argument in node.all_input_nodes:
                if _shape(argument) is not None and argument not in self.numbers:
                    raise BoundError(f"it takes {argument.target}, a tensor that does not come from the image")
            if node.op == "call_module":
                return _of_module(self.modules[str(node.target)], _shape_of(sources))
            return _of_call(node, sources)
        except UserError as error:
            raise BoundError(f"{name} of the network cannot be bounded: {error}") from None


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta: Any = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def _shape_of(sources: Sequence[fx.Node]) -> tuple[int, ...]:
    shape = _shape(sources[0]) if sources else None
    if shape is None:
        raise BoundError("it takes nothing that comes from the image")
    return shape


def _of_call(node: fx.Node, sources: list[fx.Node]) -> Operation | None:
    shape, result, called = _shape_of(sources), _shape(node), node.target
    options = {name: value for name, value in node.kwargs.items() if name not in ("inplace", "input")}
    arguments = node.args[1:]
    if called in _ADDITIONS:
        both = len(node.args) == 2 and all(isinstance(a, fx.Node) and _shape(a) == result for a in node.args)
        if both and not options:
            return Add()
        raise BoundError("only the sum of two tensors of one shape is known")
    if called in _CLONES or called in _SAME or (called is F.dropout and not node.kwargs.get("training", True)):
        return None
    if called in _RESHAPES:
        if result == shape:
            return None
        if result == (1, math.prod(shape)):
            return Flatten()
        raise BoundError(f"of reshapes only [N, C, *] -> [N, features] is known, got {shape} -> {result}")
    if called in _MEANS:
        dims = options.get("dim", arguments[0] if arguments else None)
        return _mean(shape, dims, keep=result is not None and len(result) == len(shape))
    if called in _FUNCTIONS:
        if called in (F.max_pool2d, F.avg_pool2d) and len(arguments) > 3:
            raise BoundError("give it more than kernel_size, stride and padding by name")
        return _of_module(_FUNCTIONS[called](*arguments, **options), shape)
    raise BoundError(f"the function {getattr(called, '__name__', called)} is not known; use a module of torch.nn")


def _mean(shape: tuple[int, ...], dims: Any, keep: bool) -> Operation:
    given = dims if isinstance(dims, (tuple, list)) else () if dims is None else (dims,)
    if {d % len(shape) for d in given} != set(range(2, len(shape))) or len(shape) < 3:
        raise BoundError(f"of means only that over all positions is known, got dim={dims} of shape {list(shape)}")
    return Mean(keep)


@functools.singledispatch
def _module(module: nn.Module, shape: tuple[int, ...]) -> Operation | None:
    raise BoundError(f"{type(module).__module__}.{type(module).__qualname__} is not known")


def _of_module(module: nn.Module, shape: tuple[int, ...]) -> Operation | None:
    if isinstance(module, kafops.KAF) and module.num_parameters != 1 and module.channel_dim % len(shape) != 1:
        raise BoundError(
            f"its channels are in dimension {module.channel_dim} of {list(shape)}; bounds are known for "
            "curves by channels in dimension 1, or one curve for all"
        )
    if isinstance(module, _ACTIVATIONS):
        return Activation(scalar(module))
    return None if isinstance(module, _KEEP) else _module(module, shape)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _exact(tensor)


def _tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


@_module.register(nn.modules.conv._ConvNd)
def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> Operation:
    if module.transposed or module.padding_mode != "zeros":
        raise BoundError("of convolutions only those padded with zeros, not transposed, are known")
    dimensions = len(module.kernel_size)
    if len(shape) != dimensions + 2:
        raise BoundError(f"it wants a batch, [N, C, *] of {dimensions + 2} dimensions, got {len(shape)}")
    if module.padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple((span // 2, span - span // 2) for span in spans)
    else:
        given = _tuple(0 if module.padding == "valid" else module.padding, dimensions)
        padding = tuple((p, p) for p in given)
    weight, bias = _exact(module.weight), _optional(module.bias)
    return Convolution(weight, bias, tuple(module.stride), padding, tuple(module.dilation), module.groups)


@_module.register(nn.Linear)
def _linear(module: nn.Linear, shape: tuple[int, ...]) -> Operation:
    if len(shape) != 2:
        raise BoundError(f"a linear layer is known on [N, features], got {len(shape)} dimensions; flatten before it")
    return Linear(_exact(module.weight), _optional(module.bias))


@_module.register(nn.modules.batchnorm._BatchNorm)
def _norm(module: nn.modules.batchnorm._BatchNorm, shape: tuple[int, ...]) -> Operation:
    if module.running_mean is None or module.running_var is None:
        raise BoundError("a batch norm without running statistics is a function of the batch, not of the image")
    factor = (_exact(module.running_var) + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * _exact(module.weight)
    bias = torch.zeros_like(factor) if module.bias is None else _exact(module.bias)
    return _affine(factor, -_exact(module.running_mean) * factor, bias)


@_module.register(Normalise)
def _normalise(module: Normalise, shape: tuple[int, ...]) -> Operation:
    mean, std = _exact(module.mean).flatten(), _exact(module.std).flatten()
    return _affine(1 / std, -mean / std, torch.zeros_like(mean))


def _affine(factor: Tensor, moved: Tensor, bias: Tensor) -> Affine:
    """Return x · factor + moved + bias; each was rounded four times at most."""
    return Affine(factor, moved + bias, 8 * torch.finfo(torch.float64).eps * (moved.abs() + bias.abs()))


@_module.register(nn.modules.pooling._MaxPoolNd)
def _max_pool(module: nn.modules.pooling._MaxPoolNd, shape: tuple[int, ...]) -> Operation:
    n = len(shape) - 2
    if module.return_indices:
        raise BoundError("a max pooling that returns indices is not known")
    kernel, dilation = _tuple(module.kernel_size, n), _tuple(module.dilation, n)
    return MaxPool(kernel, _tuple(module.stride, n), _tuple(module.padding, n), dilation, module.ceil_mode)


@_module.register(nn.AvgPool1d)
@_module.register(nn.AvgPool2d)
@_module.register(nn.AvgPool3d)
def _average_pool(module: nn.AvgPool2d, shape: tuple[int, ...]) -> Operation:
    n = len(shape) - 2
    kernel, padding = _tuple(module.kernel_size, n), _tuple(module.padding, n)
    if module.ceil_mode or getattr(module, "divisor_override", None) or (any(padding) and not module.count_include_pad):
        raise BoundError("average pooling is known without ceil_mode and divisor_override, with padding counted")
    return AveragePool(kernel, _tuple(module.stride, n), padding)


@_module.register(nn.modules.pooling._AdaptiveAvgPoolNd)
def _adaptive_pool(module: nn.modules.pooling._AdaptiveAvgPoolNd, shape: tuple[int, ...]) -> Operation | None:
    sizes = shape[2:]
    given = _tuple(module.output_size, len(sizes))
    wanted = [size if out is None else out for out, size in zip(given, sizes, strict=True)]
    if all(out == 1 for out in wanted):
        return Mean(keep=True)
    if any(size % out for out, size in zip(wanted, sizes, strict=True)):
        raise BoundError(f"adaptive average pooling is known where it divides the size, got {list(sizes)} -> {wanted}")
    kernel = tuple(size // out for out, size in zip(wanted, sizes, strict=True))
    return AveragePool(kernel, kernel, (0,) * len(sizes)) if any(k > 1 for k in kernel) else None


@_module.register(nn.Flatten)
def _flatten(module: nn.Flatten, shape: tuple[int, ...]) -> Operation | None:
    if module.start_dim != 1 or module.end_dim not in (-1, len(shape) - 1):
        raise BoundError(f"only nn.Flatten(1, -1) is known, got ({module.start_dim}, {module.end_dim})")
    return Flatten() if len(shape) > 2 else None


@_module.register(nn.PixelUnshuffle)
def _unshuffle(module: nn.PixelUnshuffle, shape: tuple[int, ...]) -> Operation:
    return Unshuffle(module.downscale_factor)


@_module.register(PadShortcut)
def _pad_shortcut(module: PadShortcut, shape: tuple[int, ...]) -> Operation:
    before = module.new_channels // 2
    return PadChannels(module.stride, before, module.new_channels - before)


@_module.register(KWinners)
def _winners(module: KWinners, shape: tuple[int, ...]) -> Operation:
    per_channel = module.per == "channel" and len(shape) > 2
    return Winners(module.winners(math.prod(shape[2 if per_channel else 1 :])), per_channel)
