"""DTensors in two gloo processes: every operator, sharded in every dimension, has the values of plain tensors."""

from functools import partial

import pytest
import torch
from forms import assert_equal_to_rounding
from processes import group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kafops
from kafops import ops

PROCESSES = 2
SHAPE = (4, 6, 5, 3)  # of which two do not divide by two
F64 = torch.float64

PLACEMENTS = {"replicated": Replicate()} | {f"dim {d}": Shard(d) for d in range(4)}
ALPHA = {"alpha whole": Replicate(), "alpha by channels": Shard(0)}


def plain(t, placement):
    return t


def distributed(t, placement):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    return None if t is None else distribute_tensor(t, mesh, [placement], src_data_rank=None)  # all have the same t


def draw(rows, count=1, seed=0, shape=SHAPE):
    """Tensors like x, then those like alpha, gamma and the dictionary."""
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(shape, generator=g, dtype=F64) for _ in range(count)]
    alpha, dictionary = (torch.randn(rows, 7, generator=g, dtype=F64) for _ in range(2))
    return *x, alpha, torch.rand(rows, generator=g, dtype=F64) + 0.5, dictionary


def gradients(place, of_x, of_alpha, rows=6, penalty=False, **options):
    """A curve's values and gradients, or those of a gradient penalty."""
    x, alpha, gamma, dictionary = draw(rows)
    by_row = of_alpha if rows > 1 else Replicate()
    tensors = [place(x, of_x), place(alpha, by_row), place(gamma, Replicate()), place(dictionary, by_row)]
    for t in tensors:
        t.requires_grad_()
    y = kafops.kaf_free(*tensors, **options)
    if penalty:
        (g,) = torch.autograd.grad(y.sin().sum(), tensors[0], create_graph=True)
        loss = g.square().sum()
    else:
        loss = y.sin().sum()
    return y, *torch.autograd.grad(loss, tensors)


def operators(place, of_x, of_alpha, rows=6, n=0, m=0, needs=15, even=False):
    """Calls of the operators themselves."""
    grad, v_x, x, alpha, gamma, dictionary = draw(rows, 3)
    _, v_alpha, v_gamma, v_dictionary = draw(rows, seed=1)
    by_row = of_alpha if rows > 1 else Replicate()
    grad, v_x, x = (place(t, of_x) for t in (grad, v_x, x))
    alpha, dictionary, v_alpha, v_dictionary = (place(t, by_row) for t in (alpha, dictionary, v_alpha, v_dictionary))
    gamma, v_gamma = (place(t, Replicate()) for t in (gamma, v_gamma))
    dictionary = None if even else dictionary
    tensors = (x, alpha, gamma, dictionary)
    results = [ops.kaf(*tensors, 2.5, 0, 0, n, m), *ops.kaf_backward(grad, *tensors, 2.5, needs, 0, 0, n, m)]
    weights = (v_x, v_alpha, v_gamma, v_dictionary)
    for given in ((0, 1, 2) if even else (0, 1, 2, 3), (1,), (0,) if even else (3,)):
        v = [w if i in given else None for i, w in enumerate(weights)]
        results += ops.kaf_double_backward(*v, grad, *tensors, 2.5, needs | 16)
    return results


def ensembles(place, of_x, of_alpha):
    """Calls under vmap with gradients: over x and parameters, over x alone, over parameters alone."""
    results = []
    for mapped in ((0, 0, 0, 0), (0, None, None, None), (None, 0, 0, 0)):
        tensors = [t if dim is None else torch.stack([t, 2 * t]) for t, dim in zip(draw(6), mapped, strict=True)]
        samples = [0 if dim is None else 1 for dim in mapped]

        def at(placement, dim):
            return Shard(placement.dim + dim) if isinstance(placement, Shard) else placement

        placements = (at(of_x, samples[0]), at(of_alpha, samples[1]), Replicate(), at(of_alpha, samples[3]))
        tensors = [place(t, p).requires_grad_() for t, p in zip(tensors, placements, strict=True)]
        y = torch.vmap(kafops.kaf_free, mapped)(*tensors).contiguous()  # DTensor's own views need that in backward
        results += [y, *torch.autograd.grad(y.sin().sum(), tensors)]
    return results


def compiled(place, of_x, of_alpha):
    """Values and gradients under torch.compile."""
    x, alpha, gamma, dictionary = draw(6)
    tensors = [place(x, of_x), place(alpha, of_alpha), place(gamma, Replicate()), place(dictionary, of_alpha)]
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = torch.compile(kafops.kaf_free, backend="aot_eager", fullgraph=True)(*tensors)
    return y, *torch.autograd.grad(y.sin().sum(), tensors)


def tensor_parallel(place, *_):
    """Linear layers split by columns and by rows, and the curves between them with the channels."""
    torch.manual_seed(0)
    first, curves, last = nn.Linear(5, 6), kafops.KAF(6, learn_gamma=True, learn_dictionary=True), nn.Linear(6, 4)
    net = nn.Sequential(first, curves, last).double()
    x = place(torch.randn(8, 5, dtype=F64), Replicate())
    for layer in net:
        for name, p in layer.named_parameters():
            placement = Replicate() if layer is last and name == "bias" else Shard(1 if layer is last else 0)
            setattr(layer, name, nn.Parameter(place(p.detach(), placement)))
    y = net(x)
    return y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))


CASES = {
    f"{name}, x {x}, {alpha}": partial(function, of_x=PLACEMENTS[x], of_alpha=ALPHA[alpha])
    for name, function in {
        "gradients": gradients,
        "gradients, one curve": partial(gradients, rows=1),
        "gradients, silu below, last dimension": partial(gradients, base="silu", rows=3, channel_dim=-1),
        "gradients, matern32": partial(gradients, kernel="matern32"),
        "penalty": partial(gradients, penalty=True),
        "operators": operators,
        "operators, even": partial(operators, even=True),
        "operators, one curve": partial(operators, rows=1),
        "operators, n = 2, m = 1": partial(operators, n=2, m=1),
        "operators, gradient of alpha alone": partial(operators, needs=2),
        "vmap": ensembles,
    }.items()
    for x in PLACEMENTS
    for alpha in ALPHA
}
CASES["tensor parallel"] = tensor_parallel
CASES |= {f"compiled, x {x}": partial(compiled, of_x=PLACEMENTS[x], of_alpha=Replicate()) for x in PLACEMENTS}
CASES["compiled, by channels"] = partial(compiled, of_x=Shard(1), of_alpha=Shard(0))


def worker(rank, directory):
    with group(rank, PROCESSES, directory):
        results = {}
        for name, case in CASES.items():
            try:
                got = case(distributed)
                assert all(isinstance(t, DTensor) for t in got)
                results[name] = [t.full_tensor().detach() for t in got]
            except Exception as error:  # told by the case's own test; all processes raise, or none
                results[name] = repr(error)
        torch.save(results, f"{directory}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharding")
    torch.multiprocessing.spawn(worker, (str(directory),), nprocs=PROCESSES)
    return [torch.load(directory / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_as_plain_tensors(results, name):
    want = [t.detach() for t in CASES[name](plain)]
    for got in (r[name] for r in results):
        assert not isinstance(got, str), got
        assert_equal_to_rounding(got, want)
