"""Swap the fixed activations of an existing model for trainable ones."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kafops import sites_by_example, sites_by_graph
from kafops.bases import BaseName
from kafops.inputs import observed
from kafops.modules import KAF
from kafops.plans import Site, listed, make_plan
from kafops.replacements import Moved, Replacement, ReplacementReport
from kafops.sites import Findings, Place, Targets, qualified_name, unchanged

__all__ = ["DEFAULT_TARGETS", "replace_activations"]

_TIMM = ("GELU", "GELUTanh", "HardMish", "HardSwish", "Mish", "QuickGELU", "Swish")
_TIMM_ME = ("HardMishMe", "HardSwishMe", "MishMe", "SwishMe")
_TRANSFORMERS = ("AccurateGELU", "ClippedGELU", "FastGELU", "GELU", "Laplace", "Mish", "NewGELU", "QuickGELU",
                 "ReLUSquared", "SiLU")  # fmt: skip

DEFAULT_TARGETS: tuple[type[nn.Module] | str, ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    *(f"timm.layers.activations.{name}" for name in _TIMM),
    *(f"timm.layers.activations_me.{name}" for name in _TIMM_ME),
    *(f"transformers.activations.{name}Activation" for name in _TRANSFORMERS),
    "transformers.activations.GELUTanh",
    "transformers.activations.PytorchGELUTanh",
)

# Matched by name along the class hierarchy, since importing these classes is slow and some builds of torch lack them.
_FINISHED_FORMS = {
    "OptimizedModule": "torch.compile",
    "ScriptModule": "torch.jit.script or torch.jit.trace",
    "DataParallel": "wrapping in DataParallel",
    "DistributedDataParallel": "wrapping in DistributedDataParallel",
    "FullyShardedDataParallel": "wrapping in FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
}

_LIKE_ACTIVATIONS = ("act", "elu", "swish", "mish", "silu", "tanh", "sigmoid", "softplus", "softsign", "glu", "snake")


def replace_activations(
    model: nn.Module,
    factory: Callable[..., nn.Module],
    targets: type[nn.Module] | str | Iterable[type[nn.Module] | str] = DEFAULT_TARGETS,
    example_input: Any = None,
    *,
    channel_dim: int | Mapping[str, int] | None = None,
    skip: str | Iterable[str] = (),
    base: BaseName | Literal["same"] | None = None,
    fit: bool = False,
) -> ReplacementReport:
    """Replace the activations of a model, in place, by modules made for the channels of each.

    An activation is a module, or the call of a function or method that computes what a target does, as F.relu(x) or
    x.relu(). Either every one is replaced or, on an error, none. All other modules, parameters, buffers and hooks stay
    the objects they were. A new module takes over the device of its site and the training flag of the old module,
    nothing else: hooks on an old module go with it. Make the optimizer afterwards: one made before does not know the
    new parameters.

    One module object used several times per forward is replaced by one new module where all its uses have the same
    width, else by one for each name it has, or for each call: the `relu` of a ResNet's Bottleneck becomes `relu`,
    `relu_2` and `relu_3`. A function becomes a child of the module whose forward calls it, by the function's name. For
    these a forward is rewritten: traced by torch.fx with its children as leaves, in training and in eval mode, and put
    into a subclass of the module's class that can be copied and pickled. The settings that such a forward reads of its
    module cannot be changed from then on. Where it cannot be traced, a repeated module becomes one with a curve for
    each width.

    The channels are the dimension that the layer before made or normalises: 1 after a convolution, the last after a
    linear layer, followed through permutes and reshapes. This is seen in a forward pass on `example_input`, without
    gradients, in eval mode and in training mode, which leaves the model, the input and the random generators as they
    were (except for parameters, or tensors held outside of buffers, that a forward changes in place). Without
    `example_input` it is read off the code with torch.fx, as far as it is certain there: after a convolution (on
    batched input), a norm, or a linear layer whose input is a matrix, which the model's own input is taken to be.

    Args:
        model: any module that holds activations, not yet compiled, scripted, or wrapped for parallel use.
        factory: makes the new module: called with the number of channels, and by name with what it has parameters for:
            `channel_dim` (1, or counted from the end), `rank`, `old` (the module or function that was there) and `site`
            (its name). `kafops.KAF` takes every site; `kafops.KAF2d` suits models whose sites are all [N, C, H, W];
            settings go in through `functools.partial` or a lambda. Each new module is tried on small tensors of zeros
            before the model is touched.
        targets: classes to replace, or their qualified names, matched exactly: nn.Hardtanh does not match its subclass
            nn.ReLU6. By default ReLU, ReLU6, LeakyReLU, ELU, CELU, SELU, GELU, SiLU, Mish and Hardswish of torch, and
            those of timm and transformers; not Sigmoid, Tanh and their like, which mostly serve as gates and outputs.
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments; anything else is passed to
            the model as its only argument.
        channel_dim: where the channels are: a mapping from names of sites to dimensions, or one number for all sites
            where it cannot be told. A factory that makes curves shared by all, as lambda channels: kafops.KAF(1), does
            not need it.
        skip: qualified names of modules to leave alone, with all that is in them.
        base: passed on to the factory where given. "same" makes each site start as exactly what it was: see
            `kafops.KAF`.
        fit: passed on with base="same": fits, rather than keeps, what is no base.

    Returns:
        A list of `Replacement`, one for each new module; `print` shows it as a table. Its `model` is the model given.

    Raises:
        TypeError: an argument has the wrong type, or the factory returns no module or has no parameter `base`.
        ValueError: there is nothing to replace, or the model has what cannot be replaced: a site that is not reached,
            or has channels in a dimension that cannot be told; an activation in place whose input is read again, which
            a new module would not overwrite; a functional call in a forward that cannot be traced; a lazy module, a
            compiled or wrapped model; or the factory's module does not fit its site.
        Exception: whatever the model raises on `example_input`, or the factory when called.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> report = kafops.replace_activations(model, kafops.KAF, example_input=images, base="same")
        >>> print(report)
        site           old → new   channels  rank  uses
        relu           ReLU → KAF        64     4     1
        layer1.0.relu  ReLU → KAF        64     4     2
        ...
    """
    wanted = _checked_targets(targets)
    factory = _checked_factory(factory, base, fit)
    _check_model(model, wanted)
    skip = _checked_skip(skip)
    _check_channel_dim(channel_dim)
    skipped = _skipped(model, skip)
    places = _find_places(model, wanted, skipped)
    if example_input is None:
        findings = sites_by_graph.find_uses(model, places, wanted, skipped)
    else:
        findings = sites_by_example.find_uses(model, places, wanted, skipped, example_input)
    if not findings.uses and not places:
        raise ValueError(_nothing_found(model, wanted, bool(skip)))
    _check_reached(places, findings, example_input is not None)
    plan = make_plan(model, places, wanted, findings.uses, skip, channel_dim)
    replacements = [_make_replacement(factory, site) for site in plan.sites]
    undo = plan.install([r.new for r in replacements])
    moved, outside = None, {}
    if example_input is not None:
        try:
            with observed(_layers_on_values(replacements)) as seen:
                moved = Moved.between(findings.outputs, sites_by_example.outputs(model, example_input))
            outside = {name: of.share for name, of in seen.items() if of.called}
        except BaseException:
            undo()
            raise
    left = _others(model, {r.new for r in replacements}, wanted)
    remarks = plan.remarks
    if findings.not_run_in_training:
        remarks.append(f"not looked at in training mode, in which the example fails: {findings.not_run_in_training}")
    return ReplacementReport(replacements, left, moved, remarks, outside, model)


# ------------------------------------------------------------------------------------------------------ the arguments


def _checked_targets(targets: Any) -> Targets:
    kinds = tuple(targets) if isinstance(targets, (tuple, list, set, frozenset)) else (targets,)
    for t in kinds:
        if not isinstance(t, str) and not (isinstance(t, type) and issubclass(t, nn.Module)):
            raise TypeError(f"targets must be module classes such as nn.ReLU, or their qualified names, got {t!r}")
    return Targets(kinds)


def _checked_skip(skip: Any) -> set[str]:
    names = [skip] if isinstance(skip, str) else list(skip) if isinstance(skip, Iterable) else [skip]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"skip must be a qualified name, such as 'head', or several of them, got {skip!r}")
    return set(names)


def _check_channel_dim(channel_dim: Any) -> None:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    of_sites = isinstance(channel_dim, Mapping)
    if channel_dim is None or whole(channel_dim):
        return
    if not of_sites or not all(isinstance(name, str) and whole(dim) for name, dim in channel_dim.items()):
        raise TypeError(
            "channel_dim must be an integer, a mapping from names of sites to integers, such as {'head.act': -1}, or "
            f"None, got {channel_dim!r}"
        )


def _checked_factory(factory: Any, base: str | None, fit: bool) -> Callable[..., nn.Module]:
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"factory must be a callable that makes a module for a number of channels, such as kafops.KAF; got a "
            f"{type(factory).__name__} module, which could serve one width only"
        )
    if not callable(factory):
        raise TypeError(f"factory must be callable, got {type(factory).__name__}")
    given = {name: value for name, value in (("base", base), ("fit", fit or None)) if value is not None}
    if not given.keys() <= _asked_for(factory):
        raise TypeError(f"factory must have a parameter named {' and '.join(given)} to be given one, as kafops.KAF has")
    return partial(factory, **given) if given else factory


def _asked_for(factory: Callable[..., Any]) -> set[str]:
    """Return the names of the parameters that may be given by name, and are not yet."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # no signature to be had, as for some builtins
        return set()
    given: set[str] = set()
    while isinstance(factory, partial):
        given |= factory.keywords.keys()
        factory = factory.func
    return {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - given


def _check_model(model: nn.Module, targets: Targets) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if targets.match(model):
        raise ValueError(
            f"model is itself a {type(model).__name__}, and no module holds it in which it could be replaced; use "
            "the factory's module instead of it"
        )
    for name, module in model.named_modules():
        step = next((_FINISHED_FORMS[c.__name__] for c in type(module).__mro__ if c.__name__ in _FINISHED_FORMS), None)
        if step or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or 'model'} has class {type(module).__name__}: replace the activations before "
                f"{step or 'torch.compile'}, not after"
            )
        if _is_lazy(module):
            raise ValueError(
                f"{name or 'model'} is a {type(module).__name__} whose size is not known yet; run the model once on "
                "an input, then replace the activations"
            )


def _is_lazy(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and is_lazy(t) for t in tensors)


def _skipped(model: nn.Module, skip: set[str]) -> set[nn.Module]:
    """Return the modules to leave alone; the sites of functions have names, but are no modules yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {inner for name in skip & modules.keys() for inner in modules[name].modules()}


def _find_places(model: nn.Module, targets: Targets, skipped: set[nn.Module]) -> list[Place]:
    """Return where target modules are registered; one inside another is part of the outer one."""
    found: dict[tuple[nn.Module, str], list[str]] = {}
    outer: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not targets.match(module) or name.startswith(outer):
            continue
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        if module not in skipped:
            if isinstance(parent, nn.TransformerEncoderLayer):
                raise ValueError(
                    f"{name} belongs to an nn.TransformerEncoderLayer, which computes a {type(module).__name__} by "
                    "itself in eval mode, whatever module is there"
                )
            found.setdefault((parent, child), []).append(name)
        outer = (*outer, name + ".")
    return [Place(p, child, tuple(names), p._modules[child]) for (p, child), names in found.items()]  # type: ignore[arg-type]


def _nothing_found(model: nn.Module, targets: Targets, skips: bool) -> str:
    if skips and any(targets.match(m) for m in model.modules()):
        return f"skip leaves no activation of this {type(model).__name__} to replace"
    seen = Counter(qualified_name(type(m)) for m in model.modules() if _looks_like_an_activation(m))
    there = "; it has " + ", ".join(f"{n} {kind}" for kind, n in seen.items()) if seen else ""
    return (
        f"{type(model).__name__} holds no module whose class is one of the targets, and calls none of their functions: "
        f"{targets}{there}"
    )


def _looks_like_an_activation(module: nn.Module) -> bool:
    kind = qualified_name(type(module)).lower()
    named = "torch.nn.modules.activation" in kind or any(part in kind.rpartition(".")[2] for part in _LIKE_ACTIVATIONS)
    return named and not list(module.children()) and not isinstance(module, nn.MultiheadAttention)


# --------------------------------------------------------------------------------------------------- the new modules


def _check_reached(places: list[Place], findings: Findings, has_example: bool) -> None:
    reached = {u.activation for u in findings.uses if u.place}
    unreached: dict[nn.Module, list[str]] = {}
    for p in places:
        if p.module not in reached:
            unreached.setdefault(p.module, []).extend(p.names)
    if not unreached:
        return
    seen = "the forward pass on example_input (in eval mode)" if has_example else "the forward pass (in eval mode)"
    why = findings.not_run_in_training
    raise ValueError(
        f"{seen} does not call these modules:\n{listed(', '.join(names) for names in unreached.values())}\n"
        + (f"in training mode it fails: {why}\n" if why else "")
        + "delete them if they are unused, pass an example_input that reaches them, or leave them alone by skip="
    )


def _make_replacement(factory: Callable[..., nn.Module], site: Site) -> Replacement:
    use = site.uses[0]
    known = use.channel_dim is not None
    channels = use.channels if known else max(2, use.shape[-1])
    offered = {
        "channels": channels,
        "channel_dim": site.channel_dim,
        "rank": use.rank,
        "old": site.old,
        "site": site.names[0],
    }
    asked = _asked_for(factory)
    by_name = {name: value for name, value in offered.items() if name in asked}
    new = factory(**by_name) if "channels" in asked else factory(channels, **by_name)
    if not isinstance(new, nn.Module):
        raise TypeError(f"factory({channels}) must return an nn.Module, got {type(new).__name__}")
    new = new.to(use.device)
    if known:
        _try_out(new, site)
    else:
        _check_shared(new, site)
    training = site.old.training if isinstance(site.old, nn.Module) else use.holder.training
    return Replacement(
        site.names, site.old, new.train(training), use.channels, use.rank, len(site.uses), site.channel_dim
    )


def _try_out(new: nn.Module, site: Site) -> None:
    """Raise unless the new module maps small tensors of its site's width, rank and dtype to others of their shape.

    Two, of which only the width is the same, so that no module of the size of anything else gets through.
    """
    use = site.uses[0]
    wanted = f"{site.names[0]}, which needs a module for {use.rank}-dimensional input of {use.channels} channels"
    wanted += "" if site.channel_dim == 1 else f" in dimension {site.channel_dim}"
    advice = "kafops.KAF takes any rank, and a factory is told channel_dim and rank where it has parameters for them"
    for size in (2, 3):
        shape = [size] * use.rank
        shape[use.channel_dim or 0] = use.channels
        x = torch.zeros(shape, dtype=use.dtype, device=use.device)
        try:
            y = _called(new, x)
        except Exception as e:
            raise ValueError(f"factory made a {type(new).__name__} that fails at {wanted}: {e}\n{advice}") from e
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"factory made a {type(new).__name__} that turns shape {list(x.shape)} into {got} at {wanted}"
            )


def _check_shared(new: nn.Module, site: Site) -> None:
    """Raise unless the new module serves any shape, as one does that has one curve for all."""
    use = site.uses[0]
    try:
        for size in (2, 3):
            _called(new, torch.zeros([size] * use.rank, dtype=use.dtype, device=use.device))
    except Exception as e:
        raise ValueError(
            f"{site.names[0]} gets shape {list(use.shape)}, of which it is not known which dimension holds the "
            f"channels, in {use.where}\nsay so by channel_dim={{{site.names[0]!r}: ...}}, let the factory make a curve "
            "that all share, as lambda channels: kafops.KAF(1), or leave it alone by skip="
        ) from e


def _called(module: nn.Module, x: Tensor) -> Any:
    lazy = any(_is_lazy(m) for m in module.modules())  # takes its size from this very input, which is to stay
    with torch.no_grad(), nullcontext() if lazy else unchanged(module):
        return module(x)


def _layers_on_values(replacements: Iterable[Replacement]) -> dict[str, KAF]:
    """Return the KAF layers among the new modules by name, without those on the meta device or of no size yet."""
    layers = {r.names[0]: r.new for r in replacements if isinstance(r.new, KAF)}
    return {name: layer for name, layer in layers.items() if not is_lazy(layer.alpha) and not layer.alpha.is_meta}


def _others(model: nn.Module, replaced: set[nn.Module], targets: Targets) -> list[tuple[str, str]]:
    return [
        (name, type(m).__name__)
        for name, m in model.named_modules()
        if m not in replaced and targets.cover(m) and not isinstance(m, nn.MultiheadAttention)
    ]
