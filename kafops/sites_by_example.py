"""Find the uses of activations by forward passes on an example."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kafops.channels import ChannelDims, tensors
from kafops.sites import (
    Findings,
    FunctionCall,
    Place,
    Targets,
    Use,
    compiled_functions_in_eager,
    describe_caller,
    read_call,
    separate,
    unchanged,
)


def find_uses(
    model: nn.Module, places: Collection[Place], targets: Targets, skipped: Collection[nn.Module], example_input: Any
) -> Findings:
    """Run the model on the example, without gradients, and record what each activation is given.

    Once in eval mode, and once in training mode for what is not reached in eval mode, such as auxiliary heads; a model
    that cannot be run so in training mode, as norms of a single value cannot, is not looked at there.
    """
    findings = Findings()
    evaluation = _Recorder(model, targets, skipped)
    with unchanged(model):
        findings.outputs = evaluation.run(model, places, example_input)
    findings.uses = evaluation.uses
    training = _Recorder(model, targets, skipped)
    try:
        with unchanged(model, training=True):
            training.run(model, places, example_input)
    except Exception as e:
        findings.not_run_in_training = f"{type(e).__name__}: {e}"
        return findings
    reached = {u.place for u in evaluation.uses}
    for use in training.uses:
        if use.place not in reached if use.place else use.holder not in evaluation.entered:
            findings.uses.append(use)
    return findings


def outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    """Return the tensors that the model makes of the example in eval mode."""
    args, kwargs = _arguments(example_input)
    with unchanged(model), torch.no_grad(), compiled_functions_in_eager():
        return list(tensors(model(*args, **kwargs)))


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split into positional and keyword arguments, cloning tensors, which an in-place model would change."""
    example_input = _cloned(example_input)
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: _cloned(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cloned(v) for v in value)
    return value


@dataclass
class _Forward:
    """A forward that is running: of which module, and how many activations it has called."""

    module: nn.Module
    calls: int = 0


class _Recorder(TorchFunctionMode):
    """Records the activations of one forward pass, which it computes out of place.

    So it sees who reads what an activation in place would have overwritten: a new activation would not.
    """

    def __init__(self, model: nn.Module, targets: Targets, skipped: Collection[nn.Module]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.entered: set[nn.Module] = set()
        self._names = {m: name for name, m in model.named_modules()}
        self._targets = targets
        self._skipped = skipped
        self._owners: dict[nn.Module, Place] = {}
        self._running = [_Forward(model)]
        self._dims = ChannelDims()
        self._in_place: dict[nn.Module, Tensor | None] = {}
        self._overwritten: dict[int, list[tuple[Tensor, int]]] = defaultdict(list)  # by storage: input, number of use

    def run(self, model: nn.Module, places: Collection[Place], example_input: Any) -> list[Tensor]:
        args, kwargs = _arguments(example_input)
        self._owners = separate(places)
        for module in self._owners:
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
                self._in_place[module] = None
        self._dims.take_inputs((args, kwargs))
        with torch.no_grad(), compiled_functions_in_eager(), self._hooks(model), self:
            return list(tensors(model(*args, **kwargs)))

    @contextmanager
    def _hooks(self, model: nn.Module) -> Iterator[None]:
        handles = []
        try:
            # An object that another has taken the place of may still be called, by some other reference.
            for m in {*model.modules(), *self._owners, *(p.module for p in self._owners.values())}:
                handles.append(m.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(m.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered.add(module)
        place = self._owners.get(module)
        if place:
            x = next(iter((*args, *kwargs.values())), None)
            self._record(place.module, place, x)
            if module in self._in_place:
                self._in_place[module] = x
        self._running.append(_Forward(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        if self._in_place.get(module) is not None:
            self._overwrite(self._in_place[module], len(self.uses) - 1)
        self._check_reads(output, module)

    def _record(self, activation: nn.Module | FunctionCall, place: Place | None, x: Any) -> None:
        forward = self._running[-1]
        where = describe_caller(self._names.get(forward.module, ""))
        use = Use(activation, place, forward.module, forward.calls, where)
        forward.calls += 1
        if isinstance(x, Tensor):
            use = replace(use, shape=tuple(x.shape), channel_dim=self._dims.of(x), device=x.device, dtype=x.dtype)
        else:
            use = replace(use, problem=f"gets a {type(x).__name__}, not a tensor")
        self.uses.append(use)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        running = self._running[-1].module
        is_site = func in self._targets.functions and not self._targets.cover(running) and running not in self._skipped
        if is_site:
            x, call, in_place = read_call(func.__name__, args, kwargs)
            self._record(call, None, x)
            number = len(self.uses) - 1
            self._check_reads(x, running)
            out = call(x)
            if in_place:
                self._overwrite(x, number)
        else:
            out = func(*args, **kwargs)
            if any(True for _ in tensors(out)):  # not so what tells shapes
                self._check_reads((*args, *kwargs.values()), running)
        self._dims.follow(func, args, kwargs, out)
        return out

    def _overwrite(self, x: Any, number: int) -> None:
        if isinstance(x, Tensor):
            self._overwritten[_storage(x)].append((x, number))

    def _check_reads(self, values: Any, reader: nn.Module) -> None:
        """Find fault with each activation in place whose input is among the values."""
        if not self._overwritten:
            return
        for y in tensors(values):
            for x, number in self._overwritten.get(_storage(y), ()):
                use = self.uses[number]
                if not use.problem and _overlap(x, y):
                    where = self._names.get(reader, "") or "the model itself"
                    problem = f"works in place, and what it has overwritten is read again by {where}"
                    self.uses[number] = replace(use, problem=problem)


def _storage(x: Tensor) -> int:
    return id(x) if x.is_meta else x.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    if a.is_meta or a.dtype != b.dtype:
        return True
    ends = [t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (a, b)]
    memory = torch.zeros(max(ends) + 1, dtype=torch.bool)
    memory.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(memory.as_strided(b.shape, b.stride(), b.storage_offset()).any())
