"""The steps that bench.pinns times are right, for every equation, way to derivatives and mode."""

import pytest
import torch

import kafops
from bench.pinns import ACTIVATIONS, EQUATIONS, step, train


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", ["autograd", "torch.func"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_a_step_has_the_reference_s_gradients(name, way, compiled):
    """Third derivatives in float32, of a loss that is some hundreds: off by 1e-4 of a gradient's largest number."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = step(EQUATIONS[name], ACTIVATIONS["KAF"], way, compiled, 32)()
    with kafops.backend("reference"):
        want = step(EQUATIONS[name], ACTIVATIONS["KAF"], "autograd", False, 32)()
    assert len(got) == len(want) > 6
    for g, w in zip(got, want, strict=True):
        if w is None:  # of what the loss does not depend on, as a bias of the last layer where only derivatives are
            assert g is None or not g.any()
        else:
            torch.testing.assert_close(g, w, rtol=0, atol=1e-4 * w.abs().max().item())


def test_training_gets_nearer_to_the_solution():
    before, after = (train(EQUATIONS["wave"], ACTIVATIONS["KAF"], 1e-2, steps, 0) for steps in (1, 300))
    assert after < before / 2
