"""How long an element takes on a GPU by each limit: the memory's bandwidth, the issue of instructions, each pipe."""

from dataclasses import dataclass

from bench.gpus import ALU, ISSUE, SHARED_WORDS, XU, Gpu
from bench.sass import Cost


@dataclass(frozen=True)
class Prediction:
    """Seconds per element by limit. The largest is the prediction: all else is thought to overlap with it."""

    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda limit: self.seconds[limit])

    @property
    def time(self) -> float:
        return self.seconds[self.bound]

    @property
    def ratio(self) -> float:
        """Return time / memory-bound time."""
        return self.time / self.seconds["memory"]


def predict(cost: Cost, moved: float, gpu: Gpu) -> Prediction:
    """Predict an element's time from what it costs a thread and the bytes that must be moved for it."""
    pipes, sm = cost.pipes, gpu.architecture
    work = {
        "issue": (cost.slots, ISSUE),
        "FMA": (pipes["fma"] + cost.packed, sm.fp32),
        "ALU": (pipes["alu"], ALU),
        "XU": (pipes["mufu"] + pipes["convert"], XU),
        "FP64": (pipes["fp64"], sm.fp64),
        "L1": (cost.words, SHARED_WORDS),
    }
    return Prediction({"memory": moved / gpu.bandwidth} | {name: gpu.seconds(*w) for name, w in work.items()})
