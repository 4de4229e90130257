"""Learning rates as functions of training's progress, a number in (0, 1)."""


def triangular(progress: float, peak: float) -> float:
    """Rise from 0 to `peak` at half of training and fall back to 0: one cycle, as in Wong et al. 2020."""
    return peak * min(2 * progress, 2 - 2 * progress)


def step_progress(step: int, steps: int) -> float:
    """Place step 0, ..., steps - 1 strictly inside (0, 1), so that no step has learning rate 0."""
    return (step + 1) / (steps + 1)
