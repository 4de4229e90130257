import pytest

from models.schedules import step_progress, triangular


@pytest.mark.parametrize(("progress", "lr"), [(0, 0), (0.25, 0.1), (0.5, 0.2), (0.75, 0.1), (1, 0), (0.1, 0.04)])
def test_triangular_values(progress: float, lr: float) -> None:
    assert triangular(progress, peak=0.2) == pytest.approx(lr)


def test_a_training_of_seven_steps() -> None:
    rates = [triangular(step_progress(step, 7), peak=0.4) for step in range(7)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("steps", [1, 2, 315])
def test_no_step_has_rate_zero(steps: int) -> None:
    assert all(0 < triangular(step_progress(step, steps), peak=1) <= 1 for step in range(steps))
