"""The GPU's table, measured with a timer that only pretends; no test here needs a GPU."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import kafops
from bench import gpu, gpu_device, gpu_report, gpu_table
from bench.gpu_table import Case, Row
from bench.paired import Spread
from models import files
from models.errors import UserError
from models.images import CIFAR10
from models.networks import build

ROOT = Path(__file__).parents[2]
FACTS = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "multiprocessors": 132,
    "memory_bytes": 85_000_000_000,
    "l2_bytes": 52_428_800,
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.14.1",
    "triton": "3.8.0",
    "kafops": "0.1.0",
    "python": "3.11.7",
    "system": "Linux",
    "processor": "Xeon",
    "backend": "cuda: compiled CUDA kernels",
    "backends": ["cuda", "triton"],
    "commit": "0123456789ab",
    "date": "2026-01-02",
}
CASE = Case("ResNet20", (2, 3, 4, 5), "bfloat16", "channels_last", "forward + backward")
NAME = "nvidia-h100-80gb-hbm3"
PLAIN = ["reference", "F.silu", "F.relu", "nn.PReLU"]
COMPILED = ["reference, torch.compile", "two-exponential formula, torch.compile"]


class FakeDevice:
    """A device on which every call takes as long as `seconds` says; it calls what it shall time where `calls` is set.

    `seconds` gets the kafops backend in force, or None, and the number of times that it was asked before.
    """

    type = "cpu"

    def __init__(self, seconds: Callable[[str | None, int], float] = lambda backend, n: 1.0, calls: bool = False):
        self.seconds, self.calls = seconds, calls
        self.asked = 0
        self.forced: str | None = None
        self.log: list[tuple[str, str | None]] = []

    @contextlib.contextmanager
    def force(self, name):
        self.forced = name
        yield
        self.forced = None

    def backends(self):
        return ("cuda", "triton")

    def facts(self):
        return dict(FACTS)

    def time(self, work):
        if self.calls:
            work()
        self.log.append(("time", self.forced))
        seconds = self.seconds(self.forced, self.asked)
        self.asked += 1
        return Spread(seconds, 0.9 * seconds, 1.2 * seconds)

    def peak_bytes(self, work):
        if self.calls:
            work()
        self.log.append(("peak", self.forced))
        return 1000

    def clocks(self):
        return {"sm_mhz": 1980.0, "power_w": None}

    def release(self):
        self.log.append(("release", None))


@pytest.fixture
def fake(monkeypatch):
    """Make a device that stands for the GPU, and for kafops' backends on it."""

    def make(*arguments, **options):
        device = FakeDevice(*arguments, **options)
        monkeypatch.setattr(kafops, "backend", device.force, raising=False)
        return device

    return make


# ------------------------------------------------------------------------------------------------------- the table


def test_shapes_by_hand():
    assert gpu_table.NETWORKS["ResNet20"].shapes == ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))
    assert gpu_table.NETWORKS["VGG16"].shapes == (
        (64, 64, 224, 224), (64, 128, 112, 112), (64, 256, 56, 56), (64, 512, 28, 28), (64, 512, 14, 14),
    )  # fmt: skip
    assert len(gpu_table.NETWORKS["ResNet50"].shapes) == 12
    assert gpu_table.NETWORKS["ResNet50"].shapes[-1] == (64, 2048, 7, 7)


def maps(network: nn.Module, kind: type[nn.Module], side: int) -> set[tuple[int, ...]]:
    """Return the (channels, side) of all that is handed to the activations, without computing anything."""
    seen = set()
    for module in network.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape[1:])))
    network.to("meta").eval()(torch.empty(1, 3, side, side, device="meta"))
    return {(shape[0], shape[1]) for shape in seen if len(shape) == 3 and shape[1] == shape[2]}


@pytest.mark.parametrize(("name", "function"), [("ResNet50", "resnet50"), ("VGG16", "vgg16")])
def test_shapes_are_those_of_torchvisions_networks(name, function):
    models = pytest.importorskip("torchvision").models
    assert maps(getattr(models, function)(), nn.ReLU, 224) == set(gpu_table.NETWORKS[name].maps)


def test_shapes_are_those_of_the_resnet20_of_models():
    network = build("resnet20", "relu", CIFAR10, seed=0)
    assert maps(network, nn.ReLU, 32) == set(gpu_table.NETWORKS["ResNet20"].maps)


@pytest.mark.parametrize("network", gpu_table.NETWORKS)
def test_largest_shape_of_a_network(network):
    shapes = gpu_table.NETWORKS[network].shapes
    assert gpu_table.LARGEST[network] in shapes
    assert math.prod(gpu_table.LARGEST[network]) == max(map(math.prod, shapes))


def test_every_case_is_measured_once_against_each_group_of_baselines():
    assert len({row.key for row in gpu_table.ROWS}) == len(gpu_table.ROWS)
    cases = [row.case for row in gpu_table.ROWS if row.group == "plain"]
    # 3 + 12 + 5 maps of which three are shared, three dtypes, two layouts, two modes; float64 of one map
    assert len(cases) == 17 * 3 * 2 * 2 + 2
    assert {row.case for row in gpu_table.ROWS if row.group == "compiled"} == set(cases)
    assert [c.shape for c in cases if c.dtype == "float64"] == [(128, 16, 32, 32)] * 2
    assert {c.network for c in cases if c.shape == (64, 256, 56, 56)} == {"ResNet50"}


def test_the_first_rows_come_first_and_compiled_baselines_last():
    first, rest = len(gpu_table.FIRST_ROWS), gpu_table.ROWS[len(gpu_table.FIRST_ROWS) :]
    assert gpu_table.ROWS[:first] == gpu_table.FIRST_ROWS
    assert {row.case.network for row in gpu_table.FIRST_ROWS} == set(gpu_table.NETWORKS)
    for rows in (gpu_table.FIRST_ROWS, rest):
        groups = [row.group for row in rows]
        assert groups == sorted(groups, reverse=True)  # plain, then compiled


def test_bytes_by_hand():
    assert CASE.bytes_of_x == 2 * 3 * 4 * 5 * 2
    assert CASE.bytes_moved == 5 * 240  # forward: read x, write y; backward: read x and dL/dy, write dL/dx
    assert Case("ResNet20", (2, 3, 4, 5), "float32", "contiguous", "forward").bytes_moved == 2 * 480


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_problem(dtype):
    case = Case("ResNet20", (2, 3, 4, 5), dtype, "channels_last", "forward")
    p = case.problem("cpu")
    alpha, gamma = p.parameters
    assert p.x.dtype == p.grad.dtype == getattr(torch, dtype)
    assert alpha.dtype == gamma.dtype == torch.float32
    assert p.x.is_contiguous(memory_format=torch.channels_last)
    assert p.grad.is_contiguous(memory_format=torch.channels_last)
    assert [t is u for t, u in zip(p.leaves, (p.x, alpha), strict=True)] == [True, True]
    assert gamma.tolist() == pytest.approx([(19 / 6) ** 2 / 6] * 3)
    assert torch.equal(p.x, case.problem("cpu").x)
    assert not torch.equal(p.x, p.grad)


@pytest.mark.parametrize("baseline", gpu_table.GROUPS["plain"], ids=lambda b: b.name)
@pytest.mark.parametrize("mode", gpu_table.MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_baselines_return_what_kafops_does(baseline, mode, dtype):
    p = Case("ResNet20", (2, 3, 4, 5), dtype, "channels_last", mode).problem("cpu")
    ours, theirs = (
        call() for call in (gpu_table.MODES[mode].call(kafops.kaf, p), baseline.call(gpu_table.MODES[mode], p))
    )
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # y, dL/dx
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_two_exponential_formula_returns_the_dtype_of_x():
    p = CASE.problem("cpu")
    y = gpu_table.two_exponentials(*p.arguments())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, kafops.reference.kaf(*p.arguments()))


# -------------------------------------------------------------------------------------------------------- measuring


def test_subjects_take_turns_each_on_its_backend(fake):
    device = fake()
    gpu.measure(Row(CASE, "plain"), device, rounds=3)
    one_round = [None] * 5 + ["cuda", "triton"]  # copy, four baselines, kafops twice
    assert [backend for what, backend in device.log if what == "peak"] == one_round
    assert [backend for what, backend in device.log if what == "time"] == one_round * 3
    assert device.log[:7] == [("peak", backend) for backend in one_round]


def test_record_by_hand(fake):
    device = fake(lambda backend, n: {"cuda": 2.0, "triton": 4.0}.get(backend, 1.0 + n))
    record = gpu.measure(Row(CASE, "compiled"), device, rounds=2)
    assert record == {
        "key": "ResNet20 (2, 3, 4, 5) bfloat16 channels_last, forward + backward, compiled",
        "network": "ResNet20",
        "shape": (2, 3, 4, 5),
        "dtype": "bfloat16",
        "layout": "channels_last",
        "mode": "forward + backward",
        "group": "compiled",
        "bytes_moved": 1200,
        "copy_bytes": 480,
        "baselines": COMPILED,
        "backends": ["cuda", "triton"],
        "times": {
            "copy": [[1.0, 0.9, 1.2], [6.0, 0.9 * 6, 1.2 * 6]],
            COMPILED[0]: [[2.0, 0.9 * 2, 1.2 * 2], [7.0, 0.9 * 7, 1.2 * 7]],
            COMPILED[1]: [[3.0, 0.9 * 3, 1.2 * 3], [8.0, 0.9 * 8, 1.2 * 8]],
            "cuda": [[2.0, 0.9 * 2, 1.2 * 2]] * 2,
            "triton": [[4.0, 0.9 * 4, 1.2 * 4]] * 2,
        },
        "peak_bytes": dict.fromkeys(["copy", *COMPILED, "cuda", "triton"], 1000),
        "failed": {},
        "clocks": {"sm_mhz": 1980.0, "power_w": None},
    }


def test_what_is_timed_computes(fake):
    """Every subject is called for its memory and its time, on tensors of the case."""
    record = gpu.measure(Row(CASE, "plain"), fake(calls=True), rounds=1)
    assert not record["failed"]
    assert list(record["times"]) == ["copy", *PLAIN, "cuda", "triton"]


@pytest.fixture
def broken(monkeypatch):
    """A function that lets the reference raise from its n-th call on."""

    def install(error, since=0):
        calls = []

        def raising(*arguments):
            calls.append(arguments)
            if len(calls) > since:
                raise error
            return arguments[0] * arguments[1].sum()

        monkeypatch.setattr(kafops.reference, "kaf", raising)

    return install


@pytest.mark.parametrize("since", [0, 1, 3], ids=["at once", "in the first round", "in the third round"])
def test_a_baseline_that_does_not_fit(since, fake, broken):
    broken(torch.OutOfMemoryError("CUDA out of memory"), since)
    device = fake(calls=True)
    record = gpu.measure(Row(CASE, "plain"), device, rounds=4)
    assert record["failed"] == {"reference": "out of memory"}
    assert set(record["times"]) == set(record["peak_bytes"]) == {"copy", *PLAIN[1:], "cuda", "triton"}
    assert all(len(rounds) == 4 for rounds in record["times"].values())
    assert device.log.count(("release", None)) == 1  # what the failed call had taken is given back


def test_a_baseline_that_fails_is_recorded(fake, broken):
    broken(NotImplementedError("no such thing\nand a long story"))
    record = gpu.measure(Row(CASE, "plain"), fake(calls=True), rounds=1)
    assert record["failed"] == {"reference": "NotImplementedError: no such thing"}


def test_inputs_that_do_not_fit(fake, monkeypatch):
    def too_large(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Case, "problem", too_large)
    record = gpu.measure(Row(CASE, "plain"), fake())
    assert record["failed"] == dict.fromkeys(["copy", *PLAIN, "cuda", "triton"], "out of memory")
    assert record["times"] == record["peak_bytes"] == {}


def test_kafops_out_of_memory_is_recorded(fake, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kafops, "kaf", too_large)
    record = gpu.measure(Row(CASE, "plain"), fake(calls=True), rounds=1)
    assert record["failed"] == {"cuda": "out of memory", "triton": "out of memory"}


def test_kafops_must_not_fail(fake, monkeypatch):
    def wrong(*arguments):
        raise ValueError("misaligned address")

    monkeypatch.setattr(kafops, "kaf", wrong)
    with pytest.raises(RuntimeError, match=r"cuda failed on ResNet20 \(2, 3, 4, 5\) bfloat16 .*: misaligned address"):
        gpu.measure(Row(CASE, "plain"), fake(calls=True), rounds=1)


def test_a_device_that_failed_measures_nothing_more(fake, broken):
    broken(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match=r"reference failed on .* illegal memory access"):
        gpu.measure(Row(CASE, "plain"), fake(calls=True), rounds=1)


def test_compiled_baselines_are_compiled_for_any_number_of_shapes(fake, monkeypatch):
    """PyTorch runs a function uncompiled, or here raises, when it has been compiled for 8 shapes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    gpu_table._compiled.cache_clear()
    try:
        for batch in range(2, 12):
            row = Row(Case("ResNet20", (batch, 3, 4, 5), "float32", "contiguous", "forward"), "compiled")
            assert not gpu.measure(row, fake(calls=True), rounds=1)["failed"]
    finally:
        gpu_table._compiled.cache_clear()


# ---------------------------------------------------------------------------------------------------------- results


def record(row: Row = gpu_table.ROWS[0], **changes):
    """A record of two rounds: kafops takes 2 and 3 ms, or twice that on Triton, a copy 1 ms, a baseline 4 and 12 ms."""
    baselines = [b.name for b in gpu_table.GROUPS[row.group]]

    def rounds(*milliseconds):
        return [[m * 1e-3, 0.9e-3 * m, 1.2e-3 * m] for m in milliseconds]

    case = row.case
    return {
        "key": row.key,
        **{name: getattr(case, name) for name in case.__dataclass_fields__},
        "group": row.group,
        "bytes_moved": case.bytes_moved,
        "copy_bytes": 2 * case.bytes_of_x,
        "baselines": baselines,
        "backends": ["cuda", "triton"],
        "times": {"copy": rounds(1, 1), **dict.fromkeys(baselines, rounds(4, 12)), "cuda": rounds(2, 3),
                  "triton": rounds(4, 6)},
        "peak_bytes": dict.fromkeys(["copy", *baselines, "cuda", "triton"], 2_000_000),
        "failed": {},
        "clocks": {"sm_mhz": 1755.0},
    } | changes  # fmt: skip


def test_ratios_pair_the_rounds():
    (entry,) = gpu_report.analyse([record()])
    # 2 / 4 and 3 / 12: the ratio of medians, 2.5 / 8, is another number
    assert entry["backends"]["cuda"]["ratios"]["F.silu"] == Spread(0.375, pytest.approx(0.3), pytest.approx(0.45))
    assert entry["backends"]["triton"]["ratios"]["F.silu"].median == pytest.approx(0.75)


def test_share_of_the_copy():
    (entry,) = gpu_report.analyse([record()])  # forward moves as many bytes as the copy, in 2 and 3 times its time
    assert entry["backends"]["cuda"]["share_of_copy"].median == pytest.approx((1 / 2 + 1 / 3) / 2)
    (entry,) = gpu_report.analyse([record(gpu_table.ROWS[1])])  # forward + backward: 5 passes, a copy's 2 in 1 ms
    assert entry["mode"] == "forward + backward"
    assert entry["backends"]["cuda"]["share_of_copy"].median == pytest.approx(2.5 * (1 / 2 + 1 / 3) / 2)


def test_times_are_medians_over_rounds():
    (entry,) = gpu_report.analyse([record()])
    assert astuple(entry["backends"]["cuda"]["seconds"]) == pytest.approx((2.5e-3, 2.25e-3, 3e-3))
    # 205,520,896 bytes of x, read and written in 1 ms
    assert entry["copy"]["bytes_per_second"].median == pytest.approx(2 * 64 * 256 * 56 * 56 * 4 / 1e-3)


def compiled(row: Row) -> Row:
    return Row(row.case, "compiled")


def test_a_case_joins_its_groups_of_baselines():
    row = gpu_table.ROWS[0]
    later = record(compiled(row))
    later["times"]["cuda"] = [[9.0, 9.0, 9.0]] * 2
    (entry,) = gpu_report.analyse([later, record(row)])
    assert list(entry["baselines"]) == [*PLAIN, *COMPILED]
    assert entry["backends"]["cuda"]["seconds"].median == pytest.approx(2.5e-3)  # of the first group
    assert entry["backends"]["cuda"]["ratios"][COMPILED[0]].median == pytest.approx((9 / 4e-3 + 9 / 12e-3) / 2)


def test_the_latest_record_of_a_row_counts():
    old = record(failed={"reference": "RuntimeError: a bad day"})
    (entry,) = gpu_report.analyse([old, record()])
    assert "failed" not in entry["baselines"]["reference"]


def out_of_memory():
    r = record(failed={"reference": "out of memory"})
    del r["times"]["reference"], r["peak_bytes"]["reference"]
    return r


def test_out_of_memory_in_the_table():
    (entry,) = gpu_report.analyse([out_of_memory()])
    assert entry["baselines"]["reference"] == {"failed": "out of memory"}
    assert gpu_report.ratio(entry, "cuda", "reference") == "out of memory"
    assert gpu_report.ratio(entry, "cuda", "F.silu") == "0.38× (0.30 to 0.45)"


def test_ratio_in_words():
    (entry,) = gpu_report.analyse([record()])
    assert gpu_report.ratio(entry, "cuda", "reference") == "2.67 times faster (2.22 to 3.33)"
    assert gpu_report.ratio(entry, "cuda", COMPILED[0]) == ""  # not measured yet
    slower = record()
    slower["times"]["cuda"] = slower["times"]["reference"] * 1
    slower["times"]["reference"] = [[1e-3] * 3] * 2
    (entry,) = gpu_report.analyse([slower])
    assert gpu_report.ratio(entry, "cuda", "reference") == "8.00× (5.60 to 10.40)"
    r = record(failed={"cuda": "out of memory"})
    del r["times"]["cuda"]
    (entry,) = gpu_report.analyse([r])
    assert gpu_report.ratio(entry, "cuda", "F.silu") == "kafops: out of memory"


def test_json_keeps_everything():
    s = gpu_report.summary(FACTS, [*map(record, gpu_table.ROWS[:3]), out_of_memory()])
    text = gpu_report.to_json(s)
    assert [line.startswith('{"network"') for line in text.splitlines()].count(True) == len(s["rows"]) == 3
    again = gpu_report.from_json(text)
    assert again["machine"] == FACTS
    assert (again["measured"], again["of"], again["rounds"]) == (3, 412, 2)
    assert again["clocks"] == {"sm_mhz": [1755.0, 1755.0]}
    for row, wanted in zip(again["rows"], s["rows"], strict=True):
        ours, theirs = (astuple(r["backends"]["cuda"]["seconds"]) for r in (row, wanted))
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert row["baselines"]["reference"].get("failed") == wanted["baselines"]["reference"].get("failed")
    assert gpu_report.to_json(again) == text


def test_page():
    page = gpu_report.markdown(gpu_report.summary(FACTS, [record(), record(gpu_table.ROWS[1]), out_of_memory()]))
    assert "# Speed of kafops on NVIDIA H100 80GB HBM3" in page
    assert "commit 0123456789ab: 2 of 412 rows measured" in page
    for fact in ("driver 580.1", "CUDA 13.0", "torch 2.14.1", "triton 3.8.0", "132 multi", "SM clock 1755 to 1755 MHz"):
        assert fact in page
    forward, both = page.split("## Forward\n")[1].split("## Forward + backward\n")
    assert forward.splitlines()[3] == (
        "| ResNet50 | (64, 256, 56, 56) | float32 | contiguous | 411 GB/s | cuda | 2.5 ms (2.25 ms to 3 ms) | 42% | "
        "2 MB | out of memory | 0.38× (0.30 to 0.45) | 0.38× (0.30 to 0.45) | 0.38× (0.30 to 0.45) |  |  |"
    )
    assert both.splitlines()[4].startswith(
        "| ResNet50 | (64, 256, 56, 56) | float32 | contiguous | 411 GB/s | triton |"
    )
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_page_without_clocks():
    page = gpu_report.markdown(gpu_report.summary(FACTS, [record(clocks=None)]))
    assert "clocks unknown" in page


# ----------------------------------------------------------------------------------------------------------- README

README = "# kafops\n\nBefore.\n\n<!-- gpu-table -->\n\nold\n\n<!-- /gpu-table -->\n\nAfter.\n"


def test_readme_without_a_result_has_no_table():
    section = gpu_report.readme_section([])
    assert "There is no table of GPU times yet" in section
    assert gpu_report.with_section(README, section) == README.replace("old", section)


def test_readme_table():
    records = [record(), record(compiled(gpu_table.ROWS[0])), out_of_memory() | {"key": gpu_table.ROWS[1].key}]
    records[2]["mode"] = "forward + backward"
    table, text = gpu_report.readme_section([gpu_report.summary(FACTS, records)]).split("\n\n")
    assert table.splitlines() == [
        "| kafops | against | CUDA C++, float32 | CUDA C++, bfloat16 | Triton, float32 | Triton, bfloat16 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| forward | bandwidth of a copy | 42% |  | 21% |  |",
        "| forward | plain PyTorch | 2.67 times faster (2.22 to 3.33) |  | 1.33 times faster (1.11 to 1.67) |  |",
        "| forward | `F.silu` | 0.38× (0.30 to 0.45) |  | 0.75× (0.60 to 0.90) |  |",
        "| forward | `F.relu` | 0.38× (0.30 to 0.45) |  | 0.75× (0.60 to 0.90) |  |",
        "| forward | `nn.PReLU` | 0.38× (0.30 to 0.45) |  | 0.75× (0.60 to 0.90) |  |",
        "| forward | plain PyTorch under torch.compile | 2.67 times faster (2.22 to 3.33) |  "
        "| 1.33 times faster (1.11 to 1.67) |  |",
        "| forward | a faster formula (two exponentials) under torch.compile | 2.67 times faster (2.22 to 3.33) |  "
        "| 1.33 times faster (1.11 to 1.67) |  |",
        "| forward + backward | bandwidth of a copy | 42% |  | 21% |  |",
        "| forward + backward | plain PyTorch | out of memory |  | out of memory |  |",
        "| forward + backward | `F.silu` | 0.38× (0.30 to 0.45) |  | 0.75× (0.60 to 0.90) |  |",
        "| forward + backward | `F.relu` | 0.38× (0.30 to 0.45) |  | 0.75× (0.60 to 0.90) |  |",
        "| forward + backward | `nn.PReLU` | 0.38× (0.30 to 0.45) |  | 0.75× (0.60 to 0.90) |  |",
        "| forward + backward | plain PyTorch under torch.compile |  |  |  |  |",
        "| forward + backward | a faster formula (two exponentials) under torch.compile |  |  |  |  |",
    ]
    assert all(len(line) <= 120 for line in text.splitlines())
    assert " ".join(text.splitlines()) == (
        "Ratios of times on an NVIDIA H100 80GB HBM3 (driver 580.1, torch 2.14.1), medians of rounds in which all take "
        "turns, with the 20th and 80th percentile; x is (64, 256, 56, 56), the largest map of a ResNet50, D = 20. The "
        "command is `make gpu`; it writes the [full table](bench/results/nvidia-h100-80gb-hbm3.md) with the maps of "
        "three networks, times, memory and clocks."
    )
    assert "`make gpu`" in text


def test_readme_without_markers():
    with pytest.raises(UserError, match="no pair of markers <!-- gpu-table -->"):
        gpu_report.with_section("# kafops\n\n<!-- gpu-table -->\n", "x")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders and a README of this test's own."""
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_readme_of_all_committed_results(places):
    for name in ("NVIDIA B200", "NVIDIA A100"):
        facts = FACTS | {"gpu": name}
        text = gpu_report.to_json(gpu_report.summary(facts, [record()]))
        files.write_text(gpu_report.RESULTS / f"{gpu_report.file_stem(facts)}.json", text)
    files.write_json(gpu_report.RESULTS / "intel-xeon-avx512.json", {"machine": {"processor": "Xeon"}, "rows": []})
    assert gpu.main(["--readme"]) == 0
    text = (places / "README.md").read_text()
    assert text.index("on an NVIDIA A100") < text.index("on an NVIDIA B200")
    assert text.startswith("# kafops\n\nBefore.\n\n<!-- gpu-table -->\n\n| kafops | against |")
    assert text.endswith("and clocks.\n\n<!-- /gpu-table -->\n\nAfter.\n")
    assert gpu.main(["--readme"]) == 0
    assert (places / "README.md").read_text() == text


def test_the_readme_is_what_its_results_say():
    readme = (ROOT / "README.md").read_text()
    assert gpu_report.with_section(readme, gpu_report.readme_section(gpu_report.committed())) == readme


def test_file_stem():
    assert gpu_report.file_stem(FACTS) == NAME
    assert gpu_report.file_stem({"gpu": "NVIDIA GeForce RTX™ 4090 (Laptop)"}) == "nvidia-geforce-rtx-4090-laptop"


# --------------------------------------------------------------------------------------------------- a run of rows


@pytest.fixture
def few_rows(monkeypatch):
    """A table of three rows of which two come first."""
    rows = [gpu_table.ROWS[0], gpu_table.ROWS[1], compiled(gpu_table.ROWS[0])]
    rows = [Row(Case("ResNet20", (2, 3, 4, 5), r.case.dtype, r.case.layout, r.case.mode), r.group) for r in rows]
    monkeypatch.setattr(gpu_table, "ROWS", rows)
    monkeypatch.setattr(gpu_table, "FIRST_ROWS", rows[:2])
    return rows


def measured(places) -> list[str]:
    lines = (places / "out" / f"gpu-{NAME}.jsonl").read_text().splitlines()
    return [record["key"] for record in map(json.loads, lines) if "key" in record]


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"))


def test_a_whole_run(fake, places, few_rows, capsys):
    device = fake()
    assert gpu.run(device) == 0
    assert measured(places) == [row.key for row in few_rows]
    s = gpu_report.from_json((places / "results" / f"{NAME}.json").read_text())
    assert (s["measured"], s["of"], len(s["rows"])) == (3, 3, 2)
    assert (places / "results" / f"{NAME}.md").read_text() == gpu_report.markdown(s)
    assert "bench/results/nvidia-h100-80gb-hbm3.md" in (places / "README.md").read_text()
    output = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3: 3 of 3 rows to measure" in output
    assert "cuda 1 s (100% of copy): 1.00× (1.00 to 1.00) against reference" in output
    assert gpu.run(device, console=quiet()) == 0
    assert len(measured(places)) == 3  # nothing was left to measure


def test_quick_measures_the_first_rows_which_are_a_result(fake, places, few_rows):
    assert gpu.run(fake(), quick=True, console=quiet()) == 0
    assert measured(places) == [row.key for row in few_rows[:2]]
    assert "2 of 3 rows measured" in (places / "results" / f"{NAME}.md").read_text()
    assert gpu.run(fake(), console=quiet()) == 0  # the rest, later
    assert measured(places) == [row.key for row in few_rows]


def test_without_the_first_rows_it_is_no_result(fake, places, few_rows):
    times = iter([0.0, 0.0, 60.0])
    assert gpu.run(fake(), minutes=1, clock=lambda: next(times), console=quiet()) == 0
    assert measured(places) == [few_rows[0].key]
    assert not (places / "results").exists()
    assert "1 of 3 rows measured" in (places / "out" / f"{NAME}.md").read_text()
    assert (places / "README.md").read_text() == README


def test_time_is_up_before_the_first_row(fake, places, few_rows, capsys):
    assert gpu.run(fake(), minutes=0) == 0
    assert measured(places) == []
    assert "stopped: 0 minutes are over; the same command goes on from here" in capsys.readouterr().out


def test_an_interrupted_row_is_measured_again(fake, places, few_rows):
    def seconds(backend, n):
        if n == 40:  # the first row asks 35 times
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        gpu.run(fake(seconds), console=quiet())
    assert measured(places) == [few_rows[0].key]
    device = fake()
    assert gpu.run(device, console=quiet()) == 0
    assert measured(places) == [row.key for row in few_rows]
    assert device.asked == 35 + 25  # the second row, and the compiled group's of copy, two baselines, kafops twice


def test_ctrl_c_finishes_the_row(fake, places, few_rows):
    def seconds(backend, n):
        if n == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    assert gpu.run(fake(seconds), console=quiet()) == 130
    assert measured(places) == [few_rows[0].key]
    assert (places / "out" / f"{NAME}.json").exists()


def test_half_a_line_is_measured_again(fake, places, few_rows):
    assert gpu.run(fake(), console=quiet()) == 0
    log = places / "out" / f"gpu-{NAME}.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert gpu.run(fake(), console=quiet()) == 0
    assert measured(places) == [row.key for row in few_rows]
    assert json.loads((places / "results" / f"{NAME}.json").read_text())["measured"] == 3


def test_a_baseline_that_failed_gets_another_attempt(fake, places, few_rows, broken):
    broken(NotImplementedError("a bad day"))
    assert gpu.run(fake(calls=True), quick=True, console=quiet()) == 0
    broken(torch.OutOfMemoryError("CUDA out of memory"))
    assert gpu.run(fake(calls=True), quick=True, console=quiet()) == 0
    keys = [row.key for row in few_rows[:2]]
    assert measured(places) == keys * 2
    assert gpu.run(fake(calls=True), quick=True, console=quiet()) == 0
    assert measured(places) == keys * 2  # what does not fit once does not fit
    assert "out of memory" in (places / "results" / f"{NAME}.md").read_text()


@pytest.mark.parametrize("name", ["commit", "torch", "driver"])
def test_rows_of_different_runs_are_not_mixed(name, fake, places, few_rows):
    assert gpu.run(fake(), quick=True, console=quiet()) == 0
    other = fake()
    other.facts = lambda: FACTS | {name: "other", "date": "2026-01-03"}
    with pytest.raises(UserError, match=rf"{name} is {FACTS[name]} there and other here. --fresh discards them"):
        gpu.run(other, console=quiet())
    assert len(measured(places)) == 2
    assert gpu.run(other, quick=True, fresh=True, console=quiet()) == 0
    assert len(measured(places)) == 2
    assert json.loads((places / "results" / f"{NAME}.json").read_text())["machine"][name] == "other"


def test_a_run_goes_on_after_its_own_report_has_changed_files(fake, places, few_rows):
    assert gpu.run(fake(), quick=True, console=quiet()) == 0
    later = fake()
    later.facts = lambda: FACTS | {"commit": "0123456789ab+", "date": "2026-01-03"}
    assert gpu.run(later, console=quiet()) == 0
    assert measured(places) == [row.key for row in few_rows]
    machine = json.loads((places / "results" / f"{NAME}.json").read_text())["machine"]
    assert (machine["commit"], machine["date"]) == ("0123456789ab", "2026-01-02")


@pytest.fixture
def as_gpu(fake, monkeypatch):
    """A device that `main` takes for the GPU."""
    device = fake()
    monkeypatch.setattr(gpu_device, "why_not", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", lambda: device)
    return device


def test_a_full_disk_leaves_the_old_result(as_gpu, places, few_rows, monkeypatch, capsys):
    assert gpu.main(["--quick"]) == 0
    old = {path: path.read_bytes() for path in (*(places / "results").iterdir(), places / "README.md")}
    with monkeypatch.context() as patch:

        def full(*arguments):
            raise OSError(28, "No space left on device")

        patch.setattr(files.os, "replace", full)
        assert gpu.main([]) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (*(places / "results").iterdir(), places / "README.md")} == old
    asked = as_gpu.asked
    assert gpu.main([]) == 0
    assert as_gpu.asked == asked  # the rows were safe
    assert json.loads((places / "results" / f"{NAME}.json").read_text())["measured"] == 3


def test_check_prints_the_backends(as_gpu, capsys):
    assert gpu.main(["--check"]) == 0
    assert capsys.readouterr().out == "cuda\ntriton\n"


# ----------------------------------------------------------------------------------------------------- the device


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.main(["--check"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith("error: PyTorch finds no CUDA device")
    assert not captured.out


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in gpu_device.why_not()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_device.importlib.util, "find_spec", lambda name: None)
        assert "pip install triton" in gpu_device.why_not()
    monkeypatch.setattr(gpu_device.importlib.util, "find_spec", lambda name: name)
    backends = SimpleNamespace(available=lambda kind: ("reference",), explain=lambda t: "reference: plain PyTorch")
    monkeypatch.setattr(kafops, "backends", backends)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: device)
    assert gpu_device.why_not() == "kafops has no kernels for this GPU: reference: plain PyTorch"
    backends.available = lambda kind: ("cuda", "triton", "reference")
    assert gpu_device.why_not() is None


def test_the_command_without_a_gpu_exits_with_1():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def cuda_device(uuid="1234") -> gpu_device.Cuda:
    device = gpu_device.Cuda.__new__(gpu_device.Cuda)
    device._properties = SimpleNamespace(uuid=uuid)
    return device


def test_milliseconds_become_seconds(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    asked = {}

    def do_bench(work, **options):
        asked.update(options)
        return [2.0, 1.0, 4.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert cuda_device().time(lambda: None) == Spread(0.002, 0.001, 0.004)
    assert asked["quantiles"] == [0.5, 0.2, 0.8]


class FakeDriver:
    """The parts of Triton's driver that do_bench uses; a call takes 1 ms more each time, everything else nothing."""

    def __init__(self):
        self.log: list[str] = []
        self.now = 0.0

    def get_device_interface(self):
        driver = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = driver.now
                driver.log.append("event")

            def elapsed_time(self, end):
                return end.at - self.at

        return SimpleNamespace(Event=Event, synchronize=lambda: None)

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        self.log.append("flush")

    def work(self):
        self.log.append("work")
        self.now += self.log.count("work")


def test_the_installed_timer_flushes_before_each_call_outside_what_it_times(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    driver = FakeDriver()
    monkeypatch.setattr(testing, "runtime", SimpleNamespace(driver=SimpleNamespace(active=driver)))
    seconds = cuda_device().time(driver.work)
    turn = ["flush", "event", "work", "event"]
    turns = (len(driver.log) - driver.log.index("event")) // 4
    calls = int(gpu_device.REPEAT_MS / ((2 + 3 + 4 + 5 + 6) / 5))  # it is called once, and five times to estimate
    assert driver.log[-4 * calls :] == turn * calls
    assert turns >= calls
    before = driver.log.count("work") - calls
    assert seconds == pytest.approx(Spread(*((before + 1 + q * (calls - 1)) * 1e-3 for q in (0.5, 0.2, 0.8))))


def answering(monkeypatch, answer: str | Exception):
    def run(command, **options):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(gpu_device.subprocess, "run", run)


def test_clocks(monkeypatch):
    answering(monkeypatch, "1980, 2619, [N/A], 41\n")
    assert cuda_device().clocks() == {
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "power_w": None,
        "temperature_c": 41.0,
    }


@pytest.mark.parametrize("answer", [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi"), "No devices"])
def test_clocks_that_nobody_tells(answer, monkeypatch):
    answering(monkeypatch, answer)
    assert cuda_device().clocks() is None


def test_names_of_baselines_are_unique():
    names = [b.name for b in gpu_table.BASELINES]
    assert len(set(names)) == len(names) == 6
