"""The layers: KAF for inputs of any rank, KAF1d/2d/3d with a rank check, and lazy forms that infer their channels."""

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, UninitializedParameter, is_lazy
from torch.overrides import has_torch_function

from kafops import bases, kernels, reference, same
from kafops import bounds as certified
from kafops import init as initial
from kafops.functional import call
from kafops.sharding import placed_as
from kafops.torch_private import is_fake, real_tensors

__all__ = ["KAF", "KAF1d", "KAF2d", "KAF3d", "LazyKAF", "LazyKAF1d", "LazyKAF2d", "LazyKAF3d"]


_OLD = -1  # the code of an old activation as a base, in `curve`
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class KAF(nn.Module):
    """Kernel activation function: one learned curve per channel, for inputs [N, C, *] of any rank.

    .. math:: f_c(x) = \\text{base}(x) + \\sum_{d=1}^{D} \\alpha_{c,d} \\exp(-\\gamma_c (x - \\delta_d)^2)

    with D points δ evenly spaced on [-boundary, boundary], Δ apart (the single point 0 for D = 1). Beyond the boundary
    a Gaussian curve returns to its base within six Δ, to 0 where it has none (other kernels: docs/other-kernels.md); x
    should be normalised then, and with the default boundary of 3, unit variance suits; `kafops.calibrate` puts the
    boundary where the inputs of a model are.

    Args:
        num_parameters: number of channels C, or 1 to share one curve among all, as `torch.nn.PReLU` does.
        dictionary_size: number of points D, default 20.
        boundary: half-width of the dictionary in the units of x, default 3.
        init: the curves to start from. None (default) is "elu" without a base and "zeros" with one, which leaves the
            base alone. "elu", "relu", "tanh" or another name of `kafops.init.FUNCTIONS`, a module or its class, or any
            callable Tensor → Tensor: a ridge fit to that function, less the base; "same": one to `old`, of which
            nothing else is kept; "isometric": random curves that keep gradients in scale in deep networks; "normal":
            random coefficients of std 0.3, with which gradients of deep networks explode; or an object of
            `kafops.init`, such as `Normal(std=0.8)`.
        gamma: bandwidth in units of 1/x², a number or a tensor [C] or [1]; default 1/(6Δ²) (but see kernel). Required
            for D = 1.
        learn_gamma: train the bandwidth of each channel, as its logarithm, so that it stays positive.
        learn_dictionary: train the points of each channel, from the even spacing on. Costs little more.
        device, dtype: of the parameters. The default is torch's default dtype, or float32 where that is a half type.
            bfloat16 and float16 are computed with in float32, but cost 0.3 and 0.02 in the output where coefficients
            are as large as those of fits (72); with a base they are small.
        kernel: "gaussian" (default), or another κ(√γ (x - δ)) in its place: "rational_quadratic", "matern32" or
            "bspline", defined in `kafops.kernels`. They cost more (docs/other-kernels.md). The default of gamma is
            1/(6Δ²) for all but "bspline", which has 3/(2Δ²): its knots are the points then.
        base: fixed function beneath the curves, keyword only: None (default), "identity", "relu", "silu" or "gelu",
            defined in `kafops.bases`; the layer starts as its base then, unless init says otherwise. Or "same", for a
            layer that starts as exactly what `old` is: where that is one of the bases, with this base; else with old
            itself as a base that is not fused, which costs its time and memory.
        channel_dim: dimension of x that has the channels, keyword only, default 1; -1 in transformers and MLPs.
        old: the activation that a layer with base="same" or init="same" takes the place of, keyword only: a module, a
            module class or a function. A module is copied, is no submodule and not in the state; it may have no
            parameters or buffers with base="same". Of no account without "same".
        fit: with base="same" and an old that is no base, keyword only: take the nearest base and fit curves to the
            rest, which is fast, but not exact; `fit_error` is the largest error on [-8, 8], or on twice the dictionary
            where that is wider. Beyond, the base alone remains, and it may go elsewhere than old: ReLU6 is fitted on
            "silu", which grows where ReLU6 is 6.

    Shape:
        Input [N, C, *], or with C at channel_dim, in float32, float64, bfloat16 or float16 (any shape where
        num_parameters is 1); output alike.

    State:
        Parameter `alpha` [C, D]; `gamma` [C], a buffer, or where learned the parameter `log_gamma` [C]; parameter
        `dictionary` [C, D] where learned. Absent ones are None; `bandwidths()` and `points()` serve both cases. Buffer
        `curve` [3], float64, says what curves these are: the boundary and the codes of kernel and base. Loading into a
        layer of others raises; `kafops.load_state_dict` takes the boundary over. States of version 0.1 load, too. Of an
        `old` that is no base a state knows that there is one, not which: build the layer with the same.

    As of PReLU's weight, the optimizer should not decay curves, which pulls them to 0, nor orthogonalise them as Muon
    does: `kafops.param_groups` puts them into groups of their own.

    `.half()`, `.bfloat16()` and the like leave the layer's state in float32, because coefficients in half precision
    cost up to 0.3 in the output. After `.to_empty()` call `reset_parameters()`, which restores gamma and curve too.

    Raises:
        TypeError, ValueError: an argument is out of its range; base="same" or init="same" without old; x does not fit
            (from `kafops.kaf`).

    Source: Scardapane et al., "Kafnets: kernel-based non-parametric activation functions for neural networks", 2017;
    trained points and bandwidths: "KAF-Free", Peconi, 2020.

    Example:
        >>> layer = kafops.KAF(64, init="silu")
        >>> y = layer(torch.randn(8, 64))
    """

    _ranks: tuple[int, ...] = ()
    _shape = "[N, C, *]"

    alpha: Tensor
    gamma: Tensor | None
    log_gamma: Tensor | None
    dictionary: Tensor | None
    curve: Tensor
    # Of layers that were pickled when there was nothing else.
    kernel: kernels.KernelName = "gaussian"
    base: bases.BaseName | Literal["same"] | None = None
    channel_dim: int = 1
    old: Callable[[Tensor], Tensor] | None = None
    fit_error: float | None = None
    _takes_boundary: bool = False  # from a state_dict

    def __init__(
        self,
        num_parameters: int,
        dictionary_size: int = 20,
        boundary: float = 3.0,
        init: initial.Init | None = None,
        gamma: float | Tensor | None = None,
        learn_gamma: bool = False,
        learn_dictionary: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        kernel: kernels.KernelName = "gaussian",
        *,
        base: bases.BaseName | Literal["same"] | None = None,
        channel_dim: int = 1,
        old: nn.Module | type[nn.Module] | Callable[[Tensor], Tensor] | None = None,
        fit: bool = False,
    ) -> None:
        super().__init__()
        lazy = isinstance(self, LazyModuleMixin)
        self.num_parameters = 0 if lazy else _positive_int("num_parameters", num_parameters)
        self.dictionary_size = _positive_int("dictionary_size", dictionary_size)
        self.boundary = _positive_number("boundary", boundary)
        self.kernel = kernels.named(kernel).name
        self.channel_dim = _int("channel_dim", channel_dim, "an integer")
        if dtype is None:
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        elif dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, flag in (("learn_gamma", learn_gamma), ("learn_dictionary", learn_dictionary), ("fit", fit)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {type(flag).__name__} {flag!r}")
        self.learn_gamma, self.learn_dictionary = learn_gamma, learn_dictionary
        with real_tensors():
            self._start_gamma = self._check_gamma(gamma, dtype)
            if old is not None:
                same.checked(old)
            if base == "same":
                base, init = self._take_place_of(old, init, fit)
            elif fit:
                raise ValueError(f'fit=True goes with base="same", got base={base!r}')
            self.base = base
            fused = None if self.old is not None else base
            bases.named(fused)
            start = initial.default(base) if init is None else init
            target = same.needed(old, "init") if start == "same" else start
            self._init = initial.resolve(target, self._grid(), self.kernel, fused)
        self._init_name = start if isinstance(start, str) else getattr(start, "__name__", None) or repr(start)
        if start == "same":
            self._init_name += f", old={same.name_of(old)}"

        def empty(*columns: int) -> Any:
            if lazy:
                with real_tensors():  # torch has none that are fake
                    return UninitializedParameter(**factory)
            return Parameter(torch.empty(self.num_parameters, *columns, **factory))

        self.alpha = empty(self.dictionary_size)
        self.log_gamma = empty() if learn_gamma else None
        self.dictionary = empty(self.dictionary_size) if learn_dictionary else None
        # A lazy gamma is None, not an UninitializedBuffer, which torch cannot deepcopy.
        self.register_buffer("gamma", None if lazy or learn_gamma else self.alpha.new_empty(self.num_parameters))
        self.register_buffer("curve", self._curve().to(self.alpha.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new curves by `init`, and put gamma, dictionary and curve back to their initial values."""
        self._fill(self._initial_values(self.num_parameters))

    def bandwidths(self) -> Tensor:  # [C]
        """Return γ of each channel [C], learned or not."""
        if self.log_gamma is not None:
            return self.log_gamma.exp()
        if self.gamma is None:
            raise RuntimeError(f"{type(self).__name__} has no bandwidths before its first call")
        return self.gamma

    def points(self) -> Tensor:  # [C, D] or [1, D]
        """Return the dictionary δ: [C, D] where learned, else the one even grid [1, D], of float32 or more."""
        if self.dictionary is not None:
            return self.dictionary
        like = self.alpha.new_empty(0, dtype=torch.promote_types(self.alpha.dtype, torch.float32))
        return reference.uniform_dictionary(self.dictionary_size, self.boundary, like)

    def bounds(
        self, lower: float | Tensor | None = None, upper: float | Tensor | None = None
    ) -> certified.CurveBounds:  # of [C]
        """Return certified bounds of each curve and of its slope on [lower, upper], and its Lipschitz constant there.

        Args:
            lower, upper: ends of the interval, numbers or tensors [C] or [1]; None for no end.

        Returns:
            Named tuple of `value` (minimum, maximum), `slope` (minimum, maximum) and `lipschitz`, the bound of |f′|:
            tensors [C], or [1] where the curve is shared, float64 on the CPU, without gradient.

        Raises:
            TypeError, ValueError: from `kafops.bounds.value_bounds`, which says how close they are.

        Example:
            >>> kafops.KAF(16).bounds(-1.0, 1.0).lipschitz.shape
            torch.Size([16])
        """
        if self.old is not None:
            raise ValueError(f"there are no bounds of a curve on {same.name_of(self.old)}, which is none of the bases")
        points = self.boundary if self.dictionary is None else self.dictionary
        return certified.curve_bounds(self.alpha, self.bandwidths(), points, lower, upper, self.kernel, base=self.base)

    def curves(self, grid: Tensor) -> Tensor:  # [n, C]
        """Return each channel's curve at the places of a grid, whatever rank the layer wants of its input.

        Args:
            grid: places [n], or [n, C] for a grid of each channel's own, floating.

        Returns:
            Tensor [n, C], [n, 1] where the curve is shared, with the dtype of grid, differentiable.

        Raises:
            TypeError, ValueError: grid is no floating tensor of such a shape.
            RuntimeError: the layer is lazy and was not called yet.

        Example:
            >>> grid = torch.linspace(-4, 4, 400)
            >>> lines = plt.plot(grid, layer.curves(grid).detach())
        """
        if is_lazy(self.alpha):
            raise RuntimeError(f"{type(self).__name__} has no curves before its first call")
        channels = self.alpha.shape[0]
        wanted = f"grid must be a floating tensor [n] or [n, C] = [n, {channels}]"
        if not isinstance(grid, Tensor) or not grid.is_floating_point():
            raise TypeError(f"{wanted}, got {grid.dtype if isinstance(grid, Tensor) else type(grid).__name__}")
        if grid.dim() == 1:
            grid = grid[:, None].expand(-1, channels)
        if grid.dim() != 2 or grid.shape[1] != channels:
            raise ValueError(f"{wanted}, got shape {list(grid.shape)}")
        return self._apply_curves(grid, 1)

    def forward(self, x: Tensor) -> Tensor:  # as x
        """Apply each channel's curve; shape, dtype and memory format are those of x."""
        if self._ranks:
            self._check_rank(x)
        return self._apply_curves(x, self.channel_dim)

    def _apply_curves(self, x: Tensor, channel_dim: int) -> Tensor:
        held, fixed = self._parameters.get("alpha"), self._buffers.get("gamma")  # which spares three lookups by name
        alpha = self.alpha if held is None else held
        gamma = self.bandwidths() if fixed is None else fixed
        y = call(x, alpha, gamma, self.dictionary, self.boundary, self.kernel, self._fused_base, channel_dim)
        if self.old is None:
            return y
        if isinstance(self.old, nn.Module) and not isinstance(x, Tensor):  # torch.fx, which knows submodules only
            return self.old.forward(x) + y
        return self.old(x) + y

    def __prepare_scriptable__(self) -> "KAF":
        """Raise: torch.jit.script calls this first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose curves are chosen in Python; use "
            "torch.jit.trace(model, example) for TorchScript, or torch.export.export or torch.compile in its place"
        )

    @property
    def _fused_base(self) -> bases.BaseName | None:
        """The base that is computed with the curves: None where an old activation is the base."""
        return None if self.base == "same" else self.base

    def extra_repr(self) -> str:
        """Return the arguments that the layer was built with; of gamma, not what it was trained to."""
        parts = [f"{self.num_parameters}, dictionary_size={self.dictionary_size}, boundary={self.boundary:g}"]
        parts.append(f"init={self._init_name}")
        gamma = self._start_gamma
        with real_tensors():
            known = len(gamma) == 1 and not is_fake(gamma)
            parts.append(f"gamma={gamma.item():.4g}" if known else f"gamma={len(gamma)} values")
        parts += [f"{name}=True" for name in ("learn_gamma", "learn_dictionary") if getattr(self, name)]
        parts += [f"kernel={self.kernel}"] * (self.kernel != "gaussian")
        parts += [f"base={self.base}"] * (self.base is not None)
        parts += [f"old={same.name_of(self.old)}"] * (self.old is not None)
        parts += [f"channel_dim={self.channel_dim}"] * (self.channel_dim != 1)
        return ", ".join(parts)

    def _curve(self) -> Tensor:  # [3], float64, on the CPU
        """Boundary, code of the kernel, code of the base: what the attributes say, for `curve` to keep."""
        base = _OLD if self.old is not None else bases.code(self.base)
        values = [self.boundary, kernels.KERNELS[self.kernel].code, base]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key, old = prefix + "curve", prefix + "_extra_state"
        saved = state_dict.pop(old, None)  # of 0.1: the boundary [], or [2] with the kernel's code
        if saved is not None and key not in state_dict:
            saved = saved.flatten().double()
            state_dict[key] = torch.cat([saved, saved.new_zeros(3 - saved.numel())])
        saved = state_dict.get(key)
        if isinstance(saved, Tensor) and not saved.is_meta and not is_fake(saved):
            self._check_curve(saved.full_tensor() if hasattr(saved, "full_tensor") else saved)
            # Exact, whatever the state_dict was cast to.
            state_dict[key] = placed_as(saved, self._curve().to(saved.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_curve(self, saved: Tensor) -> None:
        """Raise unless `curve` in a state_dict is this layer's: the same alpha would be another curve."""
        if saved.shape != (3,):
            raise ValueError(f"curve in the state_dict must have shape [3], got {list(saved.shape)}")
        boundary, *codes = saved.tolist()
        named: tuple[tuple[str, str | None, dict[int, str | None]], ...] = (
            ("kernel", self.kernel, {k.code: k.name for k in kernels.KERNELS.values()}),
            ("base", self.base, {0: None, _OLD: "same"} | {b.code: b.name for b in bases.BASES.values()}),
        )
        for (name, own, names), code in zip(named, codes, strict=True):
            found = names.get(round(code), f"number {code:g}, which this version of kafops does not know")
            if found != own:
                raise ValueError(
                    f"{name} in the state_dict is {found} but this layer was built with {name}={own!r}; build it with "
                    f"the {name} in the state_dict"
                )
        # Whoever casts or averages whole state_dicts rounds it.
        close = math.isclose(boundary, self.boundary, rel_tol=4 * torch.finfo(saved.dtype).eps)
        if not close and self._takes_boundary:
            self._move_boundary(_positive_number("boundary in the state_dict", boundary))
        elif self.dictionary is None and not close:
            raise ValueError(
                f"boundary in the state_dict is {boundary:g} but this layer was built with "
                f"boundary={self.boundary:g}; build it with boundary={boundary:g}, or load the state by "
                "kafops.load_state_dict, which takes it over"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickled layer, which version 0.1 wrote without `curve`."""
        super().__setstate__(state)
        if "curve" not in self._buffers:
            self.register_buffer("curve", self._curve().to(self.alpha.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KAF":
        """Move or convert as `nn.Module` does, but the layer's own state never below float32."""
        own: dict[int, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {id(self.curve): _apply_move}
        held = self._parameters | self._buffers
        for name in ("alpha", "log_gamma", "dictionary", "gamma"):
            if (p := held.get(name)) is not None:
                own[id(p)] = _apply_precise
                if p.grad is not None:
                    own[id(p.grad)] = _apply_precise
        super()._apply(lambda t: own[id(t)](fn, t) if id(t) in own else fn(t), recurse=False)
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self

    def train(self, mode: bool = True) -> "KAF":
        """Put the layer, and an old activation that is its base, in training or eval mode."""
        if isinstance(self.old, nn.Module):
            self.old.train(mode)
        return super().train(mode)

    def _take_place_of(self, old: Any, init: Any, fit: bool) -> tuple[Any, Any]:
        """Return the base and the init with which the layer is the old activation, keeping that where it is no base."""
        function = same.function_of(old)
        base = same.base_of(function)
        if base is not None:
            return base, init
        if init not in (None, "zeros"):
            raise ValueError(f'init must be None where base="same" keeps or fits {same.name_of(old)}, got {init!r}')
        if fit:
            base, init, self.fit_error = same.nearest(function, self._grid(), self._start_gamma[:1], self.kernel)
            return base, init
        vars(self)["old"] = function.train() if isinstance(function, nn.Module) else function  # no submodule
        return "same", "zeros"

    def _initial_values(self, num_parameters: int) -> tuple[Tensor, Tensor] | None:  # alpha [C, D], gamma [C]
        """Return the values to start from, or None where tensors have none."""
        if is_fake(self.alpha) or is_fake(self._start_gamma):
            return None
        with real_tensors():
            gamma = self._start_gamma.expand(num_parameters)
            alpha = self._init(self._grid(), gamma)
            self._check_alpha(alpha, num_parameters)
        return alpha, gamma

    def _check_alpha(self, alpha: Any, channels: int) -> None:
        """Raise unless coefficients of an initializer, perhaps a user's own, are such."""
        wanted = f"init must return finite floating coefficients [C, D] = [{channels}, {self.dictionary_size}]"
        if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
            raise TypeError(f"{wanted}, got {alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__}")
        if alpha.shape != (channels, self.dictionary_size):
            raise ValueError(f"{wanted}, got shape {list(alpha.shape)}")
        if not alpha.isfinite().all():
            raise ValueError(f"{wanted}, got {alpha[~alpha.isfinite()][0].item()}")

    @torch.no_grad()
    def _fill(self, values: tuple[Tensor, Tensor] | None, points: Tensor | None = None) -> None:
        if values is None or is_fake(self.alpha):
            return
        alpha, gamma = values
        with real_tensors():
            points = self._grid().expand_as(alpha) if points is None else points
            new = {"alpha": alpha, "gamma": gamma, "log_gamma": gamma.log(), "dictionary": points}
            for name, value in (new | {"curve": self._curve()}).items():
                if (t := getattr(self, name)) is not None:
                    t.copy_(placed_as(t, value))

    @torch.no_grad()
    def _move_boundary(self, boundary: float) -> None:
        """Put the dictionary that the layer starts from on another range, with γΔ² as it was.

        Parameters are left to be fitted to it, or loaded.
        """
        before = self._grid()
        self._start_gamma = self._start_gamma * (self.boundary / boundary) ** 2
        self.boundary = boundary
        self._init = self._init.for_dictionary(self._grid(), before)
        if isinstance(self._init, same.Nearest):
            self.fit_error = self._init.error(self._grid(), self._start_gamma[:1])
        self.curve.copy_(self._curve())

    def _grid(self) -> Tensor:  # [D], float64
        like = torch.empty(0, dtype=torch.float64, device="cpu")
        return reference.uniform_dictionary(self.dictionary_size, self.boundary, like)[0]

    def _check_rank(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            if has_torch_function((x,)):  # of torch.fx, and of unknown rank
                return
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if self._ranks and x.dim() not in self._ranks:
            raise ValueError(
                f"{type(self).__name__} wants x of shape {self._shape}, got {x.dim()} dimensions: {list(x.shape)}"
            )

    def _check_gamma(self, gamma: float | Tensor | None, dtype: torch.dtype) -> Tensor:  # [C] or [1], float64
        wanted = "gamma must be a positive finite number, or a floating tensor [C] or [1] of such"
        over, under = kernels.KERNELS[self.kernel].t
        if gamma is None:
            if self.dictionary_size == 1:
                raise ValueError("gamma must be given for dictionary_size=1, where no spacing sets it; got gamma=None")
            step = torch.tensor(2 * self.boundary / (self.dictionary_size - 1), dtype=torch.float64, device="cpu")
            value = over / (under * step**2).reshape(1)
        elif isinstance(gamma, Tensor):
            if not gamma.is_floating_point():
                raise TypeError(f"{wanted}, got gamma.dtype={gamma.dtype}")
            if gamma.requires_grad:
                raise ValueError(f"{wanted}, copied, so without requires_grad; learn_gamma=True makes it trainable")
            if gamma.dim() != 1 or len(gamma) == 0 or len(gamma) not in (1, self.num_parameters or len(gamma)):
                raise ValueError(f"{wanted}, got shape {list(gamma.shape)} with num_parameters={self.num_parameters}")
            if gamma.is_meta:
                raise ValueError(f"{wanted}, got one on meta, which has no values")
            value = gamma.to(device="cpu", dtype=torch.float64, copy=True)
        elif isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
            raise TypeError(f"{wanted}, got {type(gamma).__name__}")
        else:
            value = torch.tensor([float(gamma)], dtype=torch.float64, device="cpu")
        if is_fake(value):
            return value
        stored = value.to(dtype)  # float32 turns 1e-60 into 0 and 1e60 into inf
        if not ((stored > 0) & stored.isfinite()).all():
            bad = value[~((stored > 0) & stored.isfinite())][0].item()
            origin = f"{over}/({under}Δ²) = " if gamma is None else ""
            raise ValueError(f"{wanted} in {dtype}, got {origin}{bad}")
        return value


class KAF1d(KAF):
    """Kernel activation function, one learned curve per channel, on [N, C] or [N, C, L] as `torch.nn.BatchNorm1d`.

    Arguments, state and errors are those of `KAF`; an x of another rank is a ValueError.

    Example:
        >>> y = kafops.KAF1d(64)(torch.randn(8, 64))
    """

    _ranks = (2, 3)
    _shape = "[N, C] or [N, C, L]"


class KAF2d(KAF):
    """Kernel activation function, one learned curve per channel, on maps [N, C, H, W]: takes the place of `nn.ReLU`.

    Arguments, state and errors are those of `KAF`; an x of another rank is a ValueError.

    Not the "2D-KAF" of the Kafnets paper (`KAF2D` in older code), whose kernels live on pairs of activations and halve
    the channels; that one is to be `PairKAF2d`.

    Example:
        >>> y = kafops.KAF2d(16, init="silu")(torch.randn(8, 16, 32, 32))
    """

    _ranks = (4,)
    _shape = "[N, C, H, W]"


class KAF3d(KAF):
    """Kernel activation function, one learned curve per channel, on volumes [N, C, D, H, W].

    Arguments, state and errors are those of `KAF`; an x of another rank is a ValueError.

    Example:
        >>> y = kafops.KAF3d(16)(torch.randn(2, 16, 8, 8, 8))
    """

    _ranks = (5,)
    _shape = "[N, C, D, H, W]"


class _LazyKAF(LazyModuleMixin, KAF):
    """The part that the lazy layers share: parameters take their shape from the first x, or from a state_dict."""

    def __init__(
        self,
        dictionary_size: int = 20,
        boundary: float = 3.0,
        init: initial.Init | None = None,
        gamma: float | Tensor | None = None,
        learn_gamma: bool = False,
        learn_dictionary: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        kernel: kernels.KernelName = "gaussian",
        *,
        base: bases.BaseName | Literal["same"] | None = None,
        channel_dim: int = 1,
        old: nn.Module | type[nn.Module] | Callable[[Tensor], Tensor] | None = None,
        fit: bool = False,
    ) -> None:
        super().__init__(
            0, dictionary_size, boundary, init, gamma, learn_gamma, learn_dictionary, device, dtype, kernel,
            base=base, channel_dim=channel_dim, old=old, fit=fit,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw new curves; before the first call there are none, and nothing happens."""
        if not is_lazy(self.alpha):
            super().reset_parameters()

    def initialize_parameters(self, x: Tensor) -> None:
        """Take the number of channels from x."""
        self._check_rank(x)
        alpha = self._parameters["alpha"]  # as self.alpha is a proxy where torch.fx traces
        if alpha is None or not is_lazy(alpha):
            return
        if not isinstance(x, Tensor):
            name = type(self).__name__
            raise RuntimeError(f"{name} has no curves before its first call; call it once, then trace it")
        if not -x.dim() <= self.channel_dim < x.dim():
            raise ValueError(
                f"channel_dim must be a dimension of x, got channel_dim={self.channel_dim} for x {list(x.shape)}"
            )
        self._materialize(x.shape[self.channel_dim])

    def _materialize(self, num_parameters: int) -> None:
        if num_parameters < 1:
            raise ValueError(
                f"x must have at least one channel (dimension {self.channel_dim}) where {type(self).__name__} starts, "
                "got 0"
            )
        if len(self._start_gamma) not in (1, num_parameters):
            raise ValueError(f"gamma must have shape [{num_parameters}] or [1], got {list(self._start_gamma.shape)}")
        # May raise; the layer is then still lazy.
        values = None if is_fake(torch.empty(0)) else self._initial_values(num_parameters)
        self.num_parameters = num_parameters
        shape = (num_parameters, self.dictionary_size)
        for name, parameter in self.named_parameters(recurse=False):
            assert isinstance(parameter, UninitializedParameter)
            size = shape[:1] if name == "log_gamma" else shape
            if is_fake(new := torch.empty(size, dtype=parameter.dtype, device=parameter.device)):
                setattr(self, name, Parameter(new))
            else:
                parameter.materialize(size)
        if not self.learn_gamma:
            self.gamma = self.alpha.new_empty(num_parameters)
        self._fill(values)

    def _lazy_load_hook(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # All of the layer, with this D and initial values, so that torch's own checks see a wrong or missing entry.
        alpha = state_dict.get(prefix + "alpha")
        if isinstance(alpha, Tensor) and not is_lazy(alpha) and is_lazy(self.alpha):
            self._materialize(alpha.shape[0] if alpha.dim() else 1)


class LazyKAF(_LazyKAF):
    """A `KAF` that takes num_parameters from the first x it sees, and then is one.

    Arguments are those of `KAF`, without num_parameters.

    Example:
        >>> y = kafops.LazyKAF(channel_dim=-1)(torch.randn(8, 16, 64))
    """

    cls_to_become = KAF


class LazyKAF1d(_LazyKAF, KAF1d):
    """A `KAF1d` that takes num_parameters from the first x it sees, and then is one.

    Arguments are those of `KAF`, without num_parameters.

    Example:
        >>> y = kafops.LazyKAF1d()(torch.randn(8, 64))
    """

    cls_to_become = KAF1d


class LazyKAF2d(_LazyKAF, KAF2d):
    """A `KAF2d` that takes num_parameters from the first x it sees, and then is one.

    Arguments are those of `KAF`, without num_parameters.

    Example:
        >>> y = kafops.LazyKAF2d()(torch.randn(8, 16, 32, 32))
    """

    cls_to_become = KAF2d


class LazyKAF3d(_LazyKAF, KAF3d):
    """A `KAF3d` that takes num_parameters from the first x it sees, and then is one.

    Arguments are those of `KAF`, without num_parameters.

    Example:
        >>> y = kafops.LazyKAF3d()(torch.randn(2, 16, 8, 8, 8))
    """

    cls_to_become = KAF3d


def _apply_precise(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Apply a move or conversion; where it leads to a half type, move alone and keep float32 at least."""
    try:
        converted = fn(t)
    except ValueError:
        if not is_lazy(t):
            raise
        converted = fn(torch.empty(0, dtype=t.dtype, device=t.device))  # torch lacks bfloat16() of lazy parameters
        return t.to(converted.device, torch.promote_types(converted.dtype, torch.float32))
    if converted.dtype in (torch.float32, torch.float64, t.dtype):
        return converted
    if not converted.is_floating_point():
        raise TypeError(f"a KAF layer's state is floating, it cannot be converted to {converted.dtype}")
    return t.to(converted.device, torch.float32)


def _apply_move(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Apply a move or conversion, of which a move alone."""
    converted = fn(t)
    return converted if converted.dtype == t.dtype else t.to(converted.device)


def _int(name: str, value: int, wanted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__} {value!r}")
    return int(value)


def _positive_int(name: str, value: int) -> int:
    if _int(name, value, "an integer ≥ 1") < 1:
        raise ValueError(f"{name} must be an integer ≥ 1, got {name}={value}")
    return int(value)


def _positive_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a positive finite number, got {type(value).__name__} {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {name}={value}")
    return float(value)
