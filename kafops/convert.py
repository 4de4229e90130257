"""Swap the fixed activations of an existing model for trainable ones."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kafops import sites_by_example, sites_by_graph
from kafops.sites import Findings, Use, is_activation, unchanged

__all__ = ["DEFAULT_TARGETS", "Replacement", "ReplacementReport", "replace_activations"]

DEFAULT_TARGETS: tuple[type[nn.Module], ...] = (
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


@dataclass(frozen=True)
class Replacement:
    """One activation module that was replaced.

    Attributes:
        names: qualified names it is registered under; several where the model holds the same object more than once.
        old: the module that was taken out.
        new: the module that is now there.
        channels: size of dimension 1 of its input.
        rank: number of dimensions of its input: 2 for [N, C], 4 for [N, C, H, W].
        uses: calls per forward pass; all of them use the same new module.
    """

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module
    channels: int
    rank: int
    uses: int


class ReplacementReport(list[Replacement]):
    """The replacements made, in the order in which the model registers them; `str()` gives a table.

    Attributes:
        left: qualified name and class name of each other activation module, which stayed as it was.
    """

    def __init__(self, replacements: Iterable[Replacement], left: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(replacements)
        self.left = list(left)

    def __str__(self) -> str:
        header = ("site", "old → new", "channels", "rank", "uses")
        rows = [(", ".join(r.names), _change(r), str(r.channels), str(r.rank), str(r.uses)) for r in self]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [_aligned(row, widths) for row in (header, *rows)]
        lines.append(f"activation modules replaced: {len(self)}")
        if any(r.uses > 1 for r in self):
            lines.append("uses > 1: one module, so the same curves, at each of its uses in a forward pass")
        if self.left:
            kinds = Counter(kind for _, kind in self.left)
            lines.append("left as they were: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        return "\n".join(lines)

    __repr__ = __str__


def replace_activations(
    model: nn.Module,
    factory: Callable[..., nn.Module],
    targets: type[nn.Module] | tuple[type[nn.Module], ...] = DEFAULT_TARGETS,
    example_input: Any = None,
) -> ReplacementReport:
    """Replace the activation modules of a model, in place, by modules made for the width and rank of each site.

    Either every site is replaced or, on an error, none. All other modules, parameters, buffers and hooks stay the
    objects they were. A new module takes over the device of its site and the training flag of the old module, nothing
    else: hooks on an old module go with it. One module object used several times per forward is replaced by one new
    module, provided that all its uses see the same width and rank. Make the optimizer afterwards: one made before
    does not know the new parameters.

    Channels are dimension 1, as in PyTorch. Their number is found by one forward pass on `example_input`, in eval mode
    and without gradients, which leaves the model, the input and the random generators as they were (except for
    parameters, or tensors held outside of buffers, that a forward changes in place). Without `example_input` it is
    read off the code with torch.fx, as far as it is certain there: after a convolution (on batched input), a norm, or
    a linear layer whose input is a matrix, which the model's own input is taken to be.

    Args:
        model: any module that holds activations as submodules, not yet compiled, scripted, or wrapped for parallel use.
        factory: called as `factory(channels)`, or `factory(channels, rank=rank)` where it has a parameter named
            `rank`; returns the new module. `kafops.KAF` takes every rank; `kafops.KAF2d` suits models whose sites are
            all [N, C, H, W]; settings go in through `functools.partial` or a lambda. Each new module is tried on a
            small tensor of zeros before the model is touched.
        targets: classes to replace, matched exactly: nn.Hardtanh does not match its subclass nn.ReLU6. By default
            ReLU, ReLU6, LeakyReLU, ELU, CELU, SELU, GELU, SiLU, Mish and Hardswish; not Sigmoid, Tanh and their like,
            which mostly serve as gates and outputs.
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments; anything else is passed to
            the model as its only argument.

    Returns:
        A list of `Replacement`, one for each module object replaced; `print` shows it as a table.

    Raises:
        TypeError: an argument has the wrong type, or the factory returns no module.
        ValueError: there is nothing to replace, or the model has what cannot be replaced: a functional call such as
            F.relu(x), one module used at different widths, a site that the forward pass does not reach, channels in
            another dimension than 1 or in one that cannot be told, a lazy module, a compiled or wrapped model; or the
            factory's module does not fit its site.
        Exception: whatever the model raises on `example_input`, or the factory when called.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> report = kafops.replace_activations(model, partial(kafops.KAF, init="relu"))
        >>> print(report)
        site           old → new   channels  rank  uses
        relu           ReLU → KAF        64     4     1
        layer1.0.relu  ReLU → KAF        64     4     2
        ...
    """
    targets = _checked_targets(targets)
    _check_factory(factory)
    _check_model(model, targets)
    sites = _find_sites(model, targets)
    if not sites:
        wanted = ", ".join(t.__name__ for t in targets)
        raise ValueError(
            f"{type(model).__name__} holds no module whose class is one of the targets: {wanted} (a "
            "functional call such as F.relu(x) is no module, and cannot be replaced)"
        )
    if example_input is None:
        findings = sites_by_graph.find_uses(model, sites, targets)
    else:
        findings = sites_by_example.find_uses(model, sites, targets, example_input)
    uses = _agreed_uses(sites, findings, example_input is not None)
    replacements = [_make_replacement(factory, module, sites[module], uses[module]) for module in sites]
    for r in replacements:
        for name in r.names:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = r.new
    return ReplacementReport(replacements, _others(model, {r.new for r in replacements}, targets))


def _checked_targets(targets: Any) -> tuple[type[nn.Module], ...]:
    targets = tuple(targets) if isinstance(targets, (tuple, list, set, frozenset)) else (targets,)
    for t in targets:
        if not (isinstance(t, type) and issubclass(t, nn.Module)):
            raise TypeError(f"targets must be module classes such as nn.ReLU, got {t!r}")
    return targets


def _check_factory(factory: Any) -> None:
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"factory must be a callable that makes a module for a number of channels, such as kafops.KAF; got a "
            f"{type(factory).__name__} module, which could serve one width only"
        )
    if not callable(factory):
        raise TypeError(f"factory must be callable, got {type(factory).__name__}")


def _check_model(model: nn.Module, targets: tuple[type[nn.Module], ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if type(model) in targets:
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


def _find_sites(model: nn.Module, targets: tuple[type[nn.Module], ...]) -> dict[nn.Module, list[str]]:
    """Return each target module with all names it is registered under; one inside another is part of the outer one."""
    sites: dict[nn.Module, list[str]] = {}
    outer: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in targets and not name.startswith(outer):
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
                raise ValueError(
                    f"{name} belongs to an nn.TransformerEncoderLayer, which computes a {type(module).__name__} by "
                    "itself in eval mode, whatever module is there"
                )
            sites.setdefault(module, []).append(name)
            outer = (*outer, name + ".")
    return sites


def _agreed_uses(
    sites: dict[nn.Module, list[str]], findings: Findings, has_example: bool
) -> dict[nn.Module, list[Use]]:
    """Group the uses by module, and raise unless each can be replaced."""
    if findings.functional_calls:
        raise ValueError(
            "the model computes activations by functional calls, which cannot be replaced from outside:\n"
            f"{_listed(findings.functional_calls)}\n"
            "make each an nn.Module attribute (self.act = nn.ReLU()) and call that; or convert only submodules without "
            "such calls; or narrow targets"
        )
    uses: dict[nn.Module, list[Use]] = {m: [] for m in sites}
    for use in findings.uses:
        uses[use.module].append(use)
    unreached = [", ".join(sites[m]) for m, found in uses.items() if not found]
    if unreached:
        seen = "the forward pass on example_input (in eval mode)" if has_example else "the forward pass (in eval mode)"
        raise ValueError(
            f"{seen} does not call these modules:\n{_listed(unreached)}\n"
            "delete them if they are unused, pass an example_input that reaches them, or convert the submodules that "
            "are in use"
        )
    problems = [f"{sites[u.module][0]} {u.problem}, in {u.where}" for u in findings.uses if u.problem]
    if problems:
        advice = (
            "leave these out by converting the other submodules, or replace them by hand"
            if has_example
            else "pass example_input, an input to run the model on"
        )
        raise ValueError(f"the channels cannot be taken from dimension 1 at:\n{_listed(problems)}\n{advice}")
    for module, found in uses.items():
        _check_agreement(sites[module], found)
    return uses


def _check_agreement(names: list[str], uses: list[Use]) -> None:
    if len({(u.channels, u.rank, u.device) for u in uses}) == 1:
        return
    calls = [f"{u.channels} channels, rank {u.rank}, on {u.device}, in {u.where}" for u in uses]
    raise ValueError(
        f"one {type(uses[0].module).__name__} object ({', '.join(names)}) is used at sites that differ:\n"
        f"{_listed(calls)}\ngive each width a module of its own (self.act1 = nn.ReLU(), self.act2 = nn.ReLU())"
    )


def _make_replacement(
    factory: Callable[..., nn.Module], old: nn.Module, names: list[str], uses: list[Use]
) -> Replacement:
    use = uses[0]
    new = factory(use.channels, rank=use.rank) if _takes_rank(factory) else factory(use.channels)
    if not isinstance(new, nn.Module):
        raise TypeError(f"factory({use.channels}) must return an nn.Module, got {type(new).__name__}")
    new = new.to(use.device)
    _try_out(new, names[0], use)
    return Replacement(tuple(names), old, new.train(old.training), use.channels, use.rank, len(uses))


def _takes_rank(factory: Callable[..., nn.Module]) -> bool:
    try:
        return "rank" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # no signature to be had, as for some builtins
        return False


def _try_out(new: nn.Module, name: str, use: Use) -> None:
    """Raise unless the new module maps a small tensor of its site's width, rank and dtype to one of the same shape."""
    x = torch.zeros(2, use.channels, *(2,) * (use.rank - 2), dtype=use.dtype, device=use.device)
    wanted = f"{name}, which needs a module for {use.rank}-dimensional input of {use.channels} channels"
    advice = "kafops.KAF takes any rank, and a factory with a parameter named rank is told it"
    lazy = any(_is_lazy(m) for m in new.modules())  # takes its size from this very input, which is to stay
    try:
        with torch.no_grad(), nullcontext() if lazy else unchanged(new):
            y = new(x)
    except Exception as e:
        raise ValueError(f"factory made a {type(new).__name__} that fails at {wanted}: {e}\n{advice}") from e
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"factory made a {type(new).__name__} that turns shape {list(x.shape)} into {got} at {wanted}")


def _others(model: nn.Module, replaced: set[nn.Module], targets: tuple[type[nn.Module], ...]) -> list[tuple[str, str]]:
    return [
        (name, type(m).__name__)
        for name, m in model.named_modules()
        if m not in replaced and is_activation(m, targets) and not isinstance(m, nn.MultiheadAttention)
    ]


def _change(r: Replacement) -> str:
    return f"{type(r.old).__name__} → {type(r.new).__name__}"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(cells).rstrip()


def _listed(lines: list[str], limit: int = 10) -> str:
    unique = list(dict.fromkeys(lines))
    more = [f"  and {len(unique) - limit} more"] if len(unique) > limit else []
    return "\n".join([f"  {line}" for line in unique[:limit]] + more)
