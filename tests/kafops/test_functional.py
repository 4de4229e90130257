"""Arguments that kaf and kaf_free refuse, what they say, and that the operators below them never crash."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import kafops
from kafops import ops
from kafops.backends import cpu
from kafops.ops import Needs

# Arguments that fit: C = 3 channels, D = 6 points.
FITTING = {
    "x": torch.randn(4, 3, 5),
    "alpha": torch.randn(3, 6),
    "gamma": torch.ones(3),
    "dictionary": torch.randn(3, 6),
    "boundary": 3.0,
}


def call(free: bool, **other) -> Tensor:
    arguments = FITTING | other
    del arguments["boundary" if free else "dictionary"]
    return (kafops.kaf_free if free else kafops.kaf)(**arguments)


# What is wrong, the error, and what its message must say: the argument, what it got, what it wanted.
WRONG_EVERYWHERE = [
    ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
    ({"x": np.ones((4, 3))}, TypeError, r"x must be a torch\.Tensor, got ndarray"),
    ({"x": None}, TypeError, r"x must be a torch\.Tensor, got NoneType"),
    ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, r"x must have .* float32.*x\.dtype=torch\.int64"),
    ({"x": torch.ones(4, 3, dtype=torch.bool)}, TypeError, r"x must have one of the dtypes .*torch\.bool"),
    ({"x": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, r"x must have one of the dtypes .*torch\.complex64"),
    ({"x": torch.ones(4, 3).to(torch.float8_e5m2)}, TypeError, r"x must have one of the dtypes .*torch\.float8_e5m2"),
    ({"x": torch.nested.nested_tensor([torch.ones(3)])}, TypeError, r"x must be a dense .*nested tensor"),
    ({"x": torch.ones(4, 3).to_sparse()}, TypeError, r"x must be a dense .*torch\.sparse_coo.*to_dense"),
    ({"x": torch.ones(4, 2, 5)}, ValueError, r"alpha must have one row per channel.*has 2 channels.*3 rows"),
    ({"x": torch.ones(3)}, ValueError, r"x must have shape \[N, C, \*\].*got x \[3\] and alpha \[3, 6\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[N, C, \*\].*got x \[\]"),
    ({"x": torch.ones(4, 3, device="meta")}, ValueError, r"alpha is on cpu but x is on meta"),
    ({"alpha": 1.0}, TypeError, r"alpha must be a torch\.Tensor, got float"),
    ({"alpha": torch.ones(3, 6, dtype=torch.int32)}, TypeError, r"alpha must have .*float16, got alpha.*torch\.int32"),
    ({"alpha": torch.ones(3, 6, dtype=torch.complex64)}, TypeError, r"alpha must have .*got alpha.*torch\.complex64"),
    ({"alpha": torch.ones(3, 6).to_sparse()}, TypeError, r"alpha must be a dense"),
    ({"alpha": torch.ones(6)}, ValueError, r"alpha must have shape \[C, D\] or \[1, D\], got \[6\]"),
    ({"alpha": torch.ones(1, 3, 6)}, ValueError, r"alpha must have shape .*got \[1, 3, 6\]"),
    ({"alpha": torch.ones(2, 6)}, ValueError, r"alpha must have one row .*3 channels, alpha \[2, 6\] has 2 rows"),
    ({"alpha": torch.ones(0, 6)}, ValueError, r"alpha must have one row per channel.*0 rows"),
    ({"alpha": torch.ones(3, 0), "dictionary": torch.ones(3, 0)}, ValueError, r"alpha must have .*\[3, 0\] with D = 0"),
    ({"alpha": torch.ones(3, 6, device="meta")}, ValueError, r"alpha is on meta but x is on cpu"),
    ({"gamma": 1.0}, TypeError, r"gamma must be a torch\.Tensor, got float"),
    ({"base": "sliu"}, ValueError, r"base must be None or one of 'identity', .* got 'sliu'; did you mean 'silu'"),
    ({"base": 3}, TypeError, r"base must be None or one of .* got int"),
    ({"kernel": "gausian"}, ValueError, r"kernel must be one of .* did you mean 'gaussian'"),
    ({"channel_dim": 3}, ValueError, r"channel_dim must be a dimension of x, got channel_dim=3 for x \[4, 3, 5\]"),
    ({"channel_dim": -4}, ValueError, r"channel_dim must be a dimension of x, got channel_dim=-4"),
    ({"channel_dim": 1.0}, TypeError, r"channel_dim must be an integer, got float"),
    ({"channel_dim": True}, TypeError, r"channel_dim must be an integer, got bool"),
    ({"channel_dim": 0}, ValueError, r"one row per channel of x \(dimension 0\) .* x \[4, 3, 5\] has 4 channels"),
    ({"gamma": torch.ones(3, dtype=torch.int64)}, TypeError, r"gamma must have .*torch\.int64"),
    ({"gamma": torch.tensor(1.0)}, ValueError, r"gamma must have shape \[C\] or \[1\], got \[\]"),
    ({"gamma": torch.ones(3, 1)}, ValueError, r"gamma must have shape \[C\] or \[1\], got \[3, 1\]"),
    ({"gamma": torch.ones(2)}, ValueError, r"gamma must have one row per channel.*gamma \[2\] has 2 rows"),
    ({"gamma": torch.ones(3, device="meta")}, ValueError, r"gamma is on meta but x is on cpu"),
]  # fmt: skip
WRONG_BOUNDARIES = [
    (0.0, ValueError, r"boundary must be a positive finite number, got boundary=0\.0"),
    (-3, ValueError, r"boundary must be .*got boundary=-3"),
    (math.nan, ValueError, r"boundary must be .*got boundary=nan"),
    (math.inf, ValueError, r"boundary must be .*got boundary=inf"),
    (torch.tensor(3.0), TypeError, r"boundary must be a Python float, got Tensor; no gradient"),
    (torch.tensor(3.0, requires_grad=True), TypeError, r"boundary must be .*kaf_free takes a dictionary"),
    ("3", TypeError, r"boundary must be a Python float, got str"),
    (True, TypeError, r"boundary must be a Python float, got bool"),
    (None, TypeError, r"boundary must be a Python float, got NoneType"),
    (3j, TypeError, r"boundary must be a Python float, got complex"),
]  # fmt: skip
WRONG_DICTIONARIES = [
    (None, TypeError, r"dictionary must be a torch\.Tensor, got NoneType"),
    (3.0, TypeError, r"dictionary must be a torch\.Tensor, got float"),
    (torch.ones(3, 6, dtype=torch.int64), TypeError, r"dictionary must have .*torch\.int64"),
    (torch.ones(6), ValueError, r"dictionary must have shape \[C, D\] or \[1, D\], got \[6\]"),
    (torch.ones(3, 5), ValueError, r"dictionary and alpha must have the same number .*\[3, 5\] and alpha \[3, 6\]"),
    (torch.ones(3, 0), ValueError, r"dictionary and alpha must have the same number .*\[3, 0\]"),
    (torch.ones(2, 6), ValueError, r"dictionary must have one row per channel.*2 rows"),
    (torch.ones(3, 6, device="meta"), ValueError, r"dictionary is on meta but x is on cpu"),
]  # fmt: skip
WRONG = [
    *((free, *wrong) for wrong in WRONG_EVERYWHERE for free in (False, True)),
    *((False, {"boundary": value}, error, message) for value, error, message in WRONG_BOUNDARIES),
    *((True, {"dictionary": value}, error, message) for value, error, message in WRONG_DICTIONARIES),
]


@pytest.mark.parametrize(
    ("free", "wrong", "error", "message"), WRONG, ids=[f"{'kaf_free' if w[0] else 'kaf'}-{w[3][:50]}" for w in WRONG]
)
def test_wrong_arguments(free, wrong, error, message):
    with pytest.raises(error, match=message):
        call(free, **wrong)


@pytest.mark.parametrize("free", [False, True])
def test_fitting_arguments(free):
    """What the table above spoils is right otherwise."""
    y = call(free)
    assert y.shape == FITTING["x"].shape
    shared = {name: FITTING[name][:1] for name in ("alpha", "gamma", "dictionary")}
    for x in (torch.tensor(0.5), torch.randn(4), torch.randn(2, 7, 3), torch.randn(0, 9)):
        assert call(free, x=x, **shared).shape == x.shape


@pytest.mark.parametrize("boundary", [3, np.float64(3), np.float32(3)])
def test_boundary_that_is_a_number(boundary):
    assert torch.equal(call(False, boundary=boundary), call(False, boundary=float(boundary)))


def test_meta_tensors_get_shapes():
    arguments = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in FITTING.items()}
    for free in (False, True):
        y = call(free, **arguments)
        assert y.device.type == "meta"
        assert y.shape == FITTING["x"].shape


# ---------------------------------------------------------------------------------- the operators, called directly

X, ALPHA, GAMMA, DICTIONARY = (FITTING[name] for name in ("x", "alpha", "gamma", "dictionary"))
GRAD = torch.randn_like(X)
EVERYTHING = Needs.X | Needs.ALPHA | Needs.GAMMA | Needs.DICTIONARY | Needs.GRAD
META = {"x": X.to("meta"), "alpha": ALPHA.to("meta"), "gamma": GAMMA.to("meta"), "dictionary": DICTIONARY.to("meta")}

WRONG_TENSORS = {
    "alpha-rows": {"alpha": ALPHA[:2]},
    "alpha-no-rows": {"alpha": ALPHA[:0]},
    "alpha-vector": {"alpha": ALPHA[0]},
    "alpha-3d": {"alpha": ALPHA[None]},
    "alpha-no-points": {"alpha": ALPHA[:, :0], "dictionary": None},
    "alpha-half": {"alpha": ALPHA.half()},
    "alpha-int": {"alpha": ALPHA.long()},
    "alpha-sparse": {"alpha": ALPHA.to_sparse()},
    "alpha-meta": {"alpha": META["alpha"]},
    "gamma-rows": {"gamma": GAMMA[:2]},
    "gamma-0d": {"gamma": GAMMA[0]},
    "gamma-half": {"gamma": GAMMA.bfloat16()},
    "gamma-meta": {"gamma": META["gamma"]},
    "dictionary-points": {"dictionary": DICTIONARY[:, :4]},
    "dictionary-rows": {"dictionary": DICTIONARY[:2]},
    "dictionary-half": {"dictionary": DICTIONARY.half()},
    "dictionary-meta": {"dictionary": META["dictionary"]},
    "x-channels": {"x": X[:, :2]},
    "x-1d": {"x": X[0, 0]},
    "x-int": {"x": X.long()},
    "x-complex": {"x": X.to(torch.complex64)},
    "x-sparse": {"x": X.to_sparse()},
}
WRONG_GRADS = {
    "shorter": GRAD[:2],
    "narrower": GRAD[..., :1],
    "fewer-dims": GRAD[0],
    "more-dims": GRAD[None],
    "double": GRAD.double(),
    "half": GRAD.half(),
    "int": GRAD.long(),
    "sparse": GRAD.to_sparse(),
    "meta": GRAD.to("meta"),
}
refused = pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError))
compiled = pytest.mark.skipif(cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}")


def arguments(**other) -> tuple:
    named = {"x": X, "alpha": ALPHA, "gamma": GAMMA, "dictionary": DICTIONARY} | other
    return *named.values(), 3.0


@compiled
@pytest.mark.parametrize("wrong", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_operators_refuse_tensors_that_do_not_fit(wrong):
    x = wrong.get("x", X)
    grad = torch.ones(x.shape, dtype=x.dtype)
    with refused:
        ops.kaf(*arguments(**wrong))
    with refused:
        ops.kaf_backward(grad, *arguments(**wrong), int(EVERYTHING))
    with refused:
        ops.kaf_double_backward(grad, None, None, None, grad, *arguments(**wrong), int(EVERYTHING))


@compiled
@pytest.mark.parametrize("wrong", WRONG_GRADS.values(), ids=WRONG_GRADS)
def test_operators_refuse_gradients_that_do_not_fit(wrong):
    with refused:
        ops.kaf_backward(wrong, *arguments(), int(EVERYTHING))
    with refused:
        ops.kaf_double_backward(wrong, None, None, None, GRAD, *arguments(), int(EVERYTHING))
    with refused:
        ops.kaf_double_backward(GRAD, None, None, None, wrong, *arguments(), int(EVERYTHING))


@compiled
@pytest.mark.parametrize("name", ["alpha", "gamma", "dictionary"])
@pytest.mark.parametrize("change", ["row", "rank", "dtype", "meta"])
def test_operators_refuse_weights_of_gradients_that_do_not_fit(name, change):
    t = FITTING[name]
    wrong = {"row": t[:1], "rank": t[None], "dtype": t.half(), "meta": t.to("meta")}[change]
    v = [None, *(wrong if n == name else None for n in ("alpha", "gamma", "dictionary"))]
    with refused:
        ops.kaf_double_backward(*v, GRAD, *arguments(), int(EVERYTHING))


@compiled
def test_operator_refuses_the_weight_of_a_dictionary_that_is_not_there():
    with pytest.raises(RuntimeError, match="needs a dictionary"):
        ops.kaf_double_backward(None, None, None, DICTIONARY, GRAD, *arguments(dictionary=None), int(EVERYTHING))


@compiled
@pytest.mark.parametrize("needs", [0, int(Needs.DICTIONARY), int(Needs.GRAD), 32, -1, 2**62])
def test_needs_that_ask_for_nothing_or_too_much(needs):
    """Bits that mean nothing here are ignored; a dictionary that is not there has no gradient."""
    outputs = ops.kaf_backward(GRAD, *arguments(dictionary=None), needs)
    wanted = [X.shape, ALPHA.shape, GAMMA.shape] if needs == -1 else [(0,)] * 3
    assert [t.shape for t in outputs] == [*wanted, (0,)]
