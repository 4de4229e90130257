"""What is measured on a GPU, with a timer that only pretends, or on the CPU; no test here needs a GPU."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kafops
from bench import gpu, gpu_device, gpu_report, gpu_table
from bench.gpu_table import Case, Training
from models.support.errors import UserError

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0", "torch": "2.14.1", "triton": "3.8.0",
         "kafops": "0.1.0", "backends": ["cuda", "triton"], "commit": "0123456789ab", "date": "2026-01-02"}  # fmt: skip
NAME = "nvidia-h100-80gb-hbm3"
SMALL = Case((2, 3, 4, 5), "bfloat16", "channels_last", "backward of x, alpha")
TRAINING = Training(batch=2, side=32)


class FakeDevice:
    """The CPU, with two backends that are but names; a round of a call takes what `seconds` says, else what it took."""

    type = "cpu"

    def __init__(self, seconds=None):
        self.seconds, self.forced, self.log = seconds or {}, None, []

    @contextlib.contextmanager
    def force(self, name):
        self.forced = name
        yield
        self.forced = None

    def backends(self):
        return ("cuda", "triton")

    def facts(self):
        return dict(FACTS)

    def time(self, works, rounds, kernels):
        times = {name: [] for name in works}
        for round_ in range(rounds):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                taken = time.perf_counter() - start
                times[name].append(self.seconds.get(name, taken) * (1 + round_))
                self.log.append((name, kernels))
        return times

    def peak_bytes(self, work):
        work()
        return 1000

    def graph(self, work):
        self.log.append("graph")
        return work

    def wait(self):
        pass

    def clocks(self):
        return {"sm_mhz": 1980.0, "power_w": None}

    def release(self):
        pass


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders and a README of this test's own."""
    monkeypatch.setattr(gpu, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("Before.\n\n<!-- gpu-table -->\n\nold\n\n<!-- /gpu-table -->\n\nAfter.\n")
    return tmp_path


@pytest.fixture
def fake(monkeypatch, places):
    """Make a run on a device that stands for the GPU, and for kafops' backends on it."""

    def make(seconds=None, minutes=8, quick=False, **options):
        device = FakeDevice(seconds)
        monkeypatch.setattr(kafops, "backend", device.force)
        run = gpu.Run(device, quick, minutes, **options)
        run.rounds = 2
        return run

    return make


def results(run):
    return run.summary["results"]


# -------------------------------------------------------------------------------------------------------- what is timed


@pytest.mark.parametrize("what", gpu_table.PASSES)
@pytest.mark.parametrize(("dtype", "layout"), [("float32", "contiguous"), ("bfloat16", "channels_last")])
@pytest.mark.parametrize("free", [False, True])
def test_a_case_calls_what_its_title_says(what, dtype, layout, free):
    case = Case((2, 3, 4, 5), dtype, layout, what, free=free)
    call, others = case.works("cpu")
    outputs = call()
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    like_x = [t for t in outputs if t.numel() == 120]
    passes = {"forward": 1 + 1, "backward": 2 + 1, "double": 3 + 2}[what.split()[0]]  # tensors read and written
    assert passes == gpu_table.PASSES[what]
    assert len(like_x) == (2 if what == "double backward" else 1)
    assert all(t.dtype == getattr(torch, dtype) for t in like_x)
    assert all(t.is_contiguous(memory_format=gpu_table.LAYOUTS[layout]) for t in like_x)
    gradients = {"forward": 0, "backward of x": 0, "backward of x, alpha": 1, "double backward": 1,
                 "backward of all": 3 if free else 2}  # fmt: skip
    assert sum(t.numel() in (60, 3) for t in outputs) == gradients[what]
    assert list(others) == [gpu_table.COPY, gpu_table.SILU][: 1 if what == "double backward" else 2]
    for work in others.values():
        assert (y := work()).shape == (2, 3, 4, 5)
        assert y.dtype == getattr(torch, dtype)


def test_a_case_computes_kaf():
    case = Case((2, 3, 4, 5), size=5, base="gelu")
    y, x = case.works("cpu")[0](), case.works("cpu")[1][gpu_table.COPY]()
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    alpha = 0.8 * torch.randn(3, 5, generator=generator)
    want = kafops.reference.kaf(x.double(), alpha.double(), torch.full((3,), 1 / (6 * 1.5**2)).double(), 3.0)
    torch.testing.assert_close(y, (want + F.gelu(x.double())).float())


def test_every_case_is_named_and_timed_once():
    cases = [*gpu_table.FIRST, *gpu_table.REST]
    assert len({(c.shape, c.dtype, c.layout, c.title) for c in cases}) == len(cases)
    assert Case((2, 3), what="forward", size=64, base="silu").title == "forward, D = 64, base silu"
    assert Case((2, 3), free=True, kernel="matern32").title == "forward, free dictionary, matern32"
    assert {c.shape for c in gpu_table.FIRST} == {gpu_table.LARGE, *gpu_table.SMALL}
    # The goals' rows: every dtype and layout of the large map, forward and backward.
    for dtype in ("float32", "bfloat16", "float16"):
        for layout in gpu_table.LAYOUTS:
            for what in ("forward", "backward of x, alpha"):
                assert Case(gpu_table.LARGE, dtype, layout, what) in cases


def test_a_resnet50_has_an_activation_at_each_site():
    channels = []

    def activation(c):
        channels.append(c)
        return nn.ReLU()

    network = gpu_table.resnet50(activation, num_classes=10)
    assert len(channels) == 1 + 3 * 16
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == 49
    assert [channels.count(c) for c in (64, 256, 128, 512, 1024, 2048)] == [7, 15, 8, 10, 6, 3]
    seen = {}
    for m in network.modules():
        if isinstance(m, nn.ReLU):
            m.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0].shape[1]}))
    network.to("meta").eval()(torch.empty(1, 3, 32, 32, device="meta"))
    assert sorted(seen.values()) == sorted(channels)


def test_it_computes_what_torchvisions_does():
    from torchvision.models import resnet50

    ours, theirs = gpu_table.resnet50(lambda _: nn.ReLU()).eval(), resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_a_training_step_trains(monkeypatch):
    made = []
    original = gpu_table.resnet50
    monkeypatch.setattr(gpu_table, "resnet50", lambda activation: made.append(original(activation)) or made[0])
    step = TRAINING.step(gpu_table.ACTIVATIONS[gpu_table.KAF], "cpu")
    before = [p.detach().clone() for p in made[0].parameters()]
    step()
    alphas = [n for n, p in made[0].named_parameters() if n.endswith("alpha") and p.grad is not None]
    assert len(alphas) == 49
    assert not any(torch.equal(a, b) for a, b in zip(before, made[0].parameters(), strict=True))


@pytest.mark.slow
def test_a_training_step_is_one_graph(monkeypatch):
    """`torch.compile` is asked for the whole graph of a ResNet50, whose blocks have a forward of their own."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile_(network, backend="eager", **options))
    TRAINING.step(gpu_table.ACTIVATIONS[gpu_table.KAF], "cpu", compiled=True)()


# ------------------------------------------------------------------------------------------------------------ measuring


def test_all_take_turns_on_a_case(fake):
    run = fake({"copy": 1e-3, "F.silu": 2e-3, "cuda": 1.5e-3})
    gpu.kernels(run, [SMALL], ["cuda"])
    assert run.device.log == [(name, True) for name in ("copy", "F.silu", "cuda")] * 2
    (record,) = results(run)
    assert record["seconds"]["cuda"] == pytest.approx([2.25e-3, 1.8e-3, 2.7e-3])  # of 1.5 and 3 ms
    assert (record["title"], record["failed"]) == ("backward of x, alpha", {})
    assert gpu_report.share(record, "cuda") == pytest.approx(1.5 * 1 / 1.5)
    assert gpu_report.share(record, "triton") is None
    assert record["clocks"] == {"sm_mhz": 1980.0, "power_w": None}


def test_a_call_is_made_on_its_backend(fake, monkeypatch):
    run, seen = fake(), []
    monkeypatch.setattr(Case, "works", lambda case, device: (lambda: seen.append(run.device.forced), {}))
    gpu.kernels(run, [SMALL], ["cuda", "triton"])
    assert seen == ["cuda", "triton"] * 3  # once untimed


def test_each_result_is_on_disk_as_it_comes(fake):
    run = fake()
    gpu.kernels(run, [SMALL], ["cuda"])
    assert len(json.loads(run.path.read_text())["results"]) == 1
    gpu.host(run, calls=1, rounds=1)
    assert [r["kind"] for r in json.loads(run.path.read_text())["results"]] == ["kernel", "host", "host"]
    assert run.path.name == f"{NAME}.json"


def failing(monkeypatch, error):
    def raises():
        raise error

    monkeypatch.setattr(Case, "works", lambda case, device: (raises, {"copy": lambda: None}))


def test_what_does_not_fit_is_said(fake, monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    run = fake()
    gpu.kernels(run, [SMALL], ["cuda"])
    assert results(run)[0]["failed"] == {"cuda": "out of memory"}
    assert list(results(run)[0]["seconds"]) == ["copy"]
    assert gpu_report.failures(run.summary) == []


def test_a_failure_of_kafops_is_said_and_others_go_on(fake, monkeypatch):
    failing(monkeypatch, ValueError("misaligned address\nand a long story"))
    run = fake()
    gpu.kernels(run, [SMALL, SMALL], ["cuda"])
    assert len(results(run)) == 2
    assert gpu_report.failures(run.summary) == ["backward of x, alpha, cuda: ValueError: misaligned address"] * 2


def test_a_device_that_failed_measures_nothing_more(fake, monkeypatch):
    failing(monkeypatch, torch.AcceleratorError("an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):
        gpu.kernels(fake(), [SMALL], ["cuda"])


def test_nothing_begins_after_the_time(fake):
    times = iter([0.0, 0.0, 59.0, 61.0])
    run = fake(minutes=1, clock=lambda: next(times))
    gpu.kernels(run, [SMALL] * 3, ["cuda"])
    assert len(results(run)) == 2


def test_the_hosts_part_of_a_call(fake):
    run = fake()
    gpu.host(run, calls=2, rounds=2)
    assert [r["what"] for r in results(run)] == ["forward", "forward + backward"]
    for record in results(run):
        assert list(record["seconds"]) == ["nn.ReLU", "KAF2d", "nn.SiLU", "nn.PReLU"]
        assert all(0 < s[1] <= s[0] <= s[2] for s in record["seconds"].values())


def small_network(activation):
    return nn.Sequential(nn.Conv2d(3, 8, 3), activation(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))


def test_steps_take_turns(fake, monkeypatch):
    monkeypatch.setattr(gpu_table, "resnet50", small_network)
    run = fake({"KAF2d": 3.0, "nn.ReLU": 2.0})
    for mode in ("eager", "CUDA graph"):
        gpu.steps(run, TRAINING, mode)
    assert run.device.log[:4] == [(name, False) for name in gpu_table.ACTIVATIONS]
    assert run.device.log.count("graph") == 4
    eager, graph = results(run)
    assert (eager["what"], graph["what"]) == ("eager", "CUDA graph")
    assert eager["seconds"]["KAF2d"][0] == 4.5
    assert eager["peak_bytes"] == dict.fromkeys(gpu_table.ACTIVATIONS, 1000)
    assert gpu_report.say(eager).startswith(
        "ResNet50, batch 2, bfloat16, channels_last, eager: nn.ReLU 3 s 1.000x, KAF2d 4.5 s 1.500x"
    )


def test_layers_that_fail_are_said(fake, monkeypatch):
    def step(training, activation, device, compiled):
        raise torch.OutOfMemoryError if activation is gpu_table.ACTIVATIONS["nn.SiLU"] else ValueError("no graph")

    monkeypatch.setattr(Training, "step", step)
    run = fake()
    gpu.steps(run, TRAINING, "CUDA graph")
    assert results(run)[0]["failed"] == dict.fromkeys(gpu_table.ACTIVATIONS, "ValueError: no graph") | {
        "nn.SiLU": "out of memory"
    }
    assert gpu_report.failures(run.summary) == ["CUDA graph, KAF2d: ValueError: no graph"]
    assert "out of memory" in gpu_report.markdown(run.summary)


def test_steps_that_take_long_to_begin_leave_some_out(fake, monkeypatch):
    monkeypatch.setattr(Training, "step", lambda *arguments: lambda: None)
    times = iter([0.0, 100.0, 150.0, 430.0, 430.0])
    run = fake(minutes=8, clock=lambda: next(times))
    gpu.steps(run, TRAINING, "compiled", needed=60)
    assert list(results(run)[0]["seconds"]) == ["nn.ReLU", "KAF2d"]


def test_tests_come_first_and_nothing_is_timed_where_one_fails(fake, monkeypatch):
    commands = []

    def answer(command, **options):
        commands.append((command[1:], options["env"].get("KAFOPS_BACKEND")))
        return SimpleNamespace(returncode=len(commands) // 2)

    monkeypatch.setattr(gpu.subprocess, "run", answer)
    run = fake()
    with pytest.raises(UserError, match=r"as this fails: KAFOPS_BACKEND=cuda KAFOPS_TEST_DEVICE=cuda python -m pytest"):
        gpu.measure(run, TRAINING)
    check, tests = commands
    assert check == (["-m", "kafops.check", "--device", "cuda"], "cuda")
    assert tests[0][-2:] == ["tests/kafops/test_kernels.py", "tests/kafops/test_gpu_operators.py"]
    assert [(r["kind"], r["outcome"]) for r in results(run)] == [("test", "passed"), ("test", "failed")]


def test_a_part_that_fails_does_not_lose_the_others(fake, monkeypatch, places, capsys):
    run = fake(quick=True)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: SimpleNamespace(returncode=0))
    monkeypatch.setattr(gpu_table, "FIRST", [SMALL])
    monkeypatch.setattr(gpu, "host", lambda run: {}["no layer"])
    monkeypatch.setattr(gpu_table, "resnet50", small_network)
    monkeypatch.setattr(gpu, "Run", lambda *a: run)
    monkeypatch.setattr(gpu_device, "why_not", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", lambda: run.device)
    monkeypatch.setattr(gpu.measure, "__defaults__", (TRAINING,))
    assert gpu.main(["--quick"]) == 1
    assert [r["kind"] for r in results(run)] == ["test", "kernel", "failure", "step", "step"]
    assert "- the host's part of a call: KeyError: 'no layer'" in (places / "results" / f"{NAME}.md").read_text()
    assert "error: kafops failed: the host's part of a call, error: KeyError: 'no layer'" in capsys.readouterr().err


def test_a_device_that_fails_late_loses_nothing_that_was_measured(fake, monkeypatch, places):
    run = fake(quick=True)

    def fails(*arguments):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: SimpleNamespace(returncode=0))
    monkeypatch.setattr(gpu_table, "FIRST", [SMALL])
    monkeypatch.setattr(gpu, "host", fails)
    monkeypatch.setattr(gpu, "Run", lambda *a: run)
    monkeypatch.setattr(gpu_device, "why_not", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", lambda: run.device)
    assert gpu.main(["--quick"]) == 1
    written = json.loads((places / "results" / f"{NAME}.json").read_text())
    assert [r["kind"] for r in written["results"]] == ["test", "kernel"]


def test_a_case_whose_timing_fails_is_said_and_others_go_on(fake, monkeypatch):
    run = fake()
    time_, broken = run.device.time, [ValueError("no event")]
    monkeypatch.setattr(run.device, "time", lambda *a, **o: time_(*a, **o) if not broken else raise_(broken.pop()))
    gpu.kernels(run, [SMALL, SMALL], ["cuda"])
    first, second = results(run)
    assert (first["seconds"], first["failed"]) == ({}, {"error": "ValueError: no event"})
    assert second["failed"] == {}
    assert gpu_report.failures(run.summary) == ["backward of x, alpha, error: ValueError: no event"]


def raise_(error):
    raise error


def test_tests_that_take_too_long_are_said_to(fake, monkeypatch):
    def answer(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", answer)
    run = fake(quick=False)
    gpu.test(run)
    assert len(results(run)) == 4  # two checks, the kernels' tests, those that need a GPU
    assert {r["outcome"] for r in results(run)} == {"none failed before time was up"}


@pytest.mark.parametrize("quick", [True, False])
def test_a_whole_run(quick, fake, places, monkeypatch, capsys):
    run = fake({"copy": 1.0, "F.silu": 1.0, "cuda": 2.0, "triton": 4.0}, quick=quick)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **o: SimpleNamespace(returncode=0))
    monkeypatch.setattr(
        Case, "works", lambda case, device: (lambda: None, {"copy": lambda: None, "F.silu": lambda: None})
    )
    monkeypatch.setattr(Training, "step", lambda *arguments: lambda: None)
    monkeypatch.setattr(gpu, "Run", lambda *a: run)
    monkeypatch.setattr(gpu_device, "why_not", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", lambda: run.device)
    assert gpu.main(["--quick"] if quick else []) == 0
    kinds = [r["kind"] for r in results(run)]
    first = len(gpu_table.FIRST)
    if quick:
        assert kinds == ["test"] + ["kernel"] * first + ["host"] * 2 + ["step"] * 2
    else:
        others = sum(c.shape == gpu_table.LARGE for c in gpu_table.FIRST)
        rest = ["kernel"] * (len(gpu_table.REST) + others) + ["step"]
        assert kinds == ["test"] * 4 + ["kernel"] * first + ["host"] * 2 + ["step"] * 2 + rest
    written = json.loads((places / "results" / f"{NAME}.json").read_text())
    assert len(written["results"]) == len(kinds)
    page = (places / "results" / f"{NAME}.md").read_text()
    assert page == gpu_report.markdown(written)
    assert "After the results: SM clock 1980 to 1980 MHz." in page
    triton = "–" if quick else "0.25"
    assert "| float32, contiguous | 0.50 / 0.75 |" in (places / "README.md").read_text()
    assert (triton == "0.25") == ("| 0.25 / 0.38 |" in (places / "README.md").read_text())
    assert "(64, 256, 56, 56) float32 contiguous, forward: copy 1.5 s, F.silu 1.5 s 1.00, cuda 3 s 0.50" in (
        capsys.readouterr().out
    )


def test_a_run_in_which_kafops_failed_is_written_and_fails(fake, monkeypatch, places, capsys):
    run = fake()
    failing(monkeypatch, ValueError("wrong"))
    monkeypatch.setattr(gpu, "measure", lambda run: gpu.kernels(run, [SMALL], ["cuda"]))
    monkeypatch.setattr(gpu, "Run", lambda *a: run)
    monkeypatch.setattr(gpu_device, "why_not", lambda: None)
    monkeypatch.setattr(gpu_device, "Cuda", lambda: run.device)
    assert gpu.main([]) == 1
    assert "error: kafops failed: backward of x, alpha, cuda: ValueError: wrong" in capsys.readouterr().err
    assert "ValueError: wrong" in (places / "results" / f"{NAME}.md").read_text()


# -------------------------------------------------------------------------------------------------------------- reports


def record(**changes):
    seconds = {"copy": [1e-3, 0.9e-3, 1.2e-3], "F.silu": [1.5e-3, 1.4e-3, 1.6e-3], "cuda": [3e-3, 2.9e-3, 3.1e-3]}
    case = Case(gpu_table.LARGE, **{"what": "backward of x, alpha"} | changes)
    return {"kind": "kernel", **dataclasses.asdict(case), "title": case.title, "seconds": seconds, "failed": {}}


def step(**seconds):
    seconds = {f"nn.{n}" if n != "KAF2d" else n: [s] for n, s in seconds.items()}
    return {
        "kind": "step",
        "what": "eager",
        "network": "ResNet50",
        **dataclasses.asdict(Training()),
        "seconds": seconds,
    }


def summary(*records):
    return {"format": gpu_report.FORMAT, "machine": FACTS, "results": list(records)}


def test_page():
    page = gpu_report.markdown(summary(record(), record(size=64), step(ReLU=0.02, KAF2d=0.025)))
    assert "Measured on 2026-01-02, commit 0123456789ab: driver 580.1, cuda 13.0, torch 2.14.1" in page
    lines = page.splitlines()
    assert (
        "| (64, 256, 56, 56) | float32 | contiguous | backward of x, alpha | 1 ms | CUDA C++ | 3 ms (2.9 ms to 3.1 ms) "
        "| 0.50 | 1.00 |"
    ) in lines
    assert "| ResNet50, batch 128, bfloat16, channels_last, eager | 20 ms, 1.000× | 25 ms, 1.250× |  |  |" in lines
    for part in page.split("\n\n"):
        assert len({line.count("|") for line in part.splitlines() if line.startswith("|")}) <= 1


def test_readme_table():
    steps = step(ReLU=0.02, KAF2d=0.025, SiLU=0.021)
    large = [record(), record(what="forward"), record(what="forward", size=64), record(dtype="bfloat16")]
    section = gpu_report.readme_section([summary(*large, steps, step(ReLU=1.0))])
    table, text = section.split("\n\n")
    assert table.splitlines() == [
        "| x | CUDA C++ | `F.silu` |",
        "| --- | --- | --- |",
        "| float32, contiguous | 0.33 / 0.50 | 0.67 / 1.00 |",
        "| bfloat16, contiguous | – / 0.50 | – / 1.00 |",
    ]
    assert all(len(line) <= 120 for line in text.splitlines())
    assert " ".join(text.splitlines()) == (
        "Shares of a copy's speed on an NVIDIA H100 80GB HBM3, forward / backward of x and α, x (64, 256, 56, 56), "
        "D = 20; measured on 2026-01-02, commit 0123456789ab, torch 2.14.1. A training step (ResNet50, batch 128, "
        "bfloat16, channels_last, eager) takes 1.25 with KAF2d, 1.05 with nn.SiLU times that with nn.ReLU. The [full "
        f"table](bench/results/{NAME}.md) has more."
    )
    assert "`make gpu`" in gpu_report.readme_section([])


def test_readme_of_all_committed_results(places):
    for name in ("NVIDIA B200", "NVIDIA A100"):
        facts = FACTS | {"gpu": name}
        gpu_report.write_json(gpu_report.RESULTS / f"{gpu_report.file_stem(facts)}.json",
                              summary(record()) | {"machine": facts})  # fmt: skip
    (gpu_report.RESULTS / "intel-xeon-avx512.json").write_text('{"machine": {"processor": "Xeon"}, "rows": []}')
    assert gpu.main(["--readme"]) == 0
    text = (places / "README.md").read_text()
    assert text.index("on an NVIDIA A100") < text.index("on an NVIDIA B200")
    assert text.startswith("Before.\n\n<!-- gpu-table -->\n\n| x | CUDA C++ |")
    assert text.endswith("has more.\n\n<!-- /gpu-table -->\n\nAfter.\n")
    assert gpu.main(["--readme"]) == 0
    assert (places / "README.md").read_text() == text


def test_readme_without_markers():
    with pytest.raises(UserError, match="no pair of markers <!-- gpu-table -->"):
        gpu_report.with_section("# kafops\n\n<!-- gpu-table -->\n", "x")


def test_what_is_committed_says_what_its_json_says():
    readme = (ROOT / "README.md").read_text()
    assert gpu_report.with_section(readme, gpu_report.readme_section(gpu_report.committed())) == readme
    for s in gpu_report.committed():
        page = gpu_report.RESULTS / f"{gpu_report.file_stem(s['machine'])}.md"
        assert page.read_text() == gpu_report.markdown(s)


def test_what_an_h100_said_of_f073876():
    (h100,) = (s for s in gpu_report.committed() if s["machine"]["commit"] == "f073876")
    assert (h100["machine"]["gpu"], h100["machine"]["date"]) == ("NVIDIA H100", "2026-11-26")
    shares = {
        (r["dtype"], r["layout"], r["title"], name): gpu_report.share(r, name)
        for r in h100["results"]
        if r["kind"] == "kernel" and tuple(r["shape"]) == gpu_table.LARGE
        for name in r["seconds"]
    }
    assert shares["float32", "contiguous", "forward", "cuda"] == pytest.approx(0.62, abs=0.005)
    assert shares["float32", "contiguous", "forward", "triton"] == pytest.approx(0.85, abs=0.005)
    assert shares["bfloat16", "channels_last", "backward of x, alpha", "cuda"] == pytest.approx(0.28, abs=0.005)
    assert shares["float32", "contiguous", "double backward", "cuda"] == pytest.approx(0.16, abs=0.006)
    (first, *_) = (r for r in h100["results"] if r["kind"] == "step")
    assert first["seconds"]["KAF2d"][0] / first["seconds"]["nn.ReLU"][0] == pytest.approx(1.345, abs=0.001)


def test_numbers_have_four_digits(tmp_path):
    gpu_report.write_json(tmp_path / "x.json", summary(record() | {"seconds": {"copy": [1.23456e-3]}}))
    assert json.loads((tmp_path / "x.json").read_text())["results"][0]["seconds"] == {"copy": [1.235e-3]}


def test_file_stem():
    assert gpu_report.file_stem(FACTS) == NAME
    assert gpu_report.file_stem({"gpu": "NVIDIA GeForce RTX™ 4090 (Laptop)"}) == "nvidia-geforce-rtx-4090-laptop"


# ----------------------------------------------------------------------------------------------------------- the device


def test_why_not(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in gpu_device.why_not()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch finds no CUDA device" in gpu_device.why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends = SimpleNamespace(available=lambda kind: ("reference",), explain=lambda t: "reference: plain PyTorch")
    monkeypatch.setattr(kafops, "backends", backends)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: device)
    assert gpu_device.why_not() == "kafops has no kernels for this GPU: reference: plain PyTorch"
    backends.available = lambda kind: ("cuda", "triton", "reference")
    assert gpu_device.why_not() is None


def test_the_command_without_a_gpu_exits_with_1():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def cuda_device() -> gpu_device.Cuda:
    device = gpu_device.Cuda.__new__(gpu_device.Cuda)
    device._properties = SimpleNamespace(uuid="1234")
    return device


@pytest.mark.parametrize("kernels", [True, False])
def test_the_timer_lets_the_host_ahead_outside_of_what_it_times(kernels, monkeypatch):
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]
            log.append("event")

        def elapsed_time(self, end):
            return end.at - self.at

    def takes(name, milliseconds):
        def work():
            log.append(name)
            now[0] += milliseconds

        return work

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: takes("spin", 1)())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    device = cuda_device()
    device._flush = SimpleNamespace(zero_=takes("flush", 5))
    times = device.time({"a": takes("a", 2), "b": takes("b", 3)}, 2, kernels)
    assert times == {"a": pytest.approx([2e-3] * 2), "b": pytest.approx([3e-3] * 2)}
    before = ["flush", "spin"] if kernels else []
    assert log == ([*before, "event", "a", "event", *before, "event", "b", "event", "wait"]) * 2


@pytest.mark.parametrize("answer", [FileNotFoundError(), subprocess.CalledProcessError(9, "nvidia-smi"), "No devices"])
def test_clocks_that_nobody_tells(answer, monkeypatch):
    def run(command, **options):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(gpu_device.subprocess, "run", run)
    assert cuda_device().clocks() is None


def test_clocks(monkeypatch):
    monkeypatch.setattr(gpu_device.subprocess, "run", lambda *a, **o: SimpleNamespace(stdout="1980, 2619, [N/A], 41\n"))
    assert cuda_device().clocks() == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": None, "temperature_c": 41.0}
