import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text

from bench import figure, report, result, table
from bench.paired import Spread

ROOT = Path(__file__).parent.parent.parent
MACHINE = {
    "processor": "Intel(R) Xeon(R) Gold 6430 CPU @ 2.10GHz",
    "backend": "cpu: compiled kernels, instruction set avx512",
    "threads": 2,
    "load": 0.25,
    "kafops": "0.1.0",
    "torch": "2.14.1",
    "python": "3.11.7",
    "system": "Linux",
    "commit": "0123456789ab",
    "date": "2026-01-02",
    "quick": True,
}
FASTER = {
    "key": "a",
    "what": "forward",
    "baseline_name": "reference",
    "limit": 1 / 50,
    "unit": "s",
    "calls": 10,
    "candidate": [0.01, 0.02, 0.03],
    "baseline": [1.0, 1.0, 1.0],
    "copy": [0.004, 0.004, 0.004],
    "copy_bytes": 4_000_000,  # 1 GB/s
    "bytes_moved": 1_000_000,
    "error": 1.3e-7,
    "baseline_error": 5e-7,
}
COSTLIER = FASTER | {
    "key": "b",
    "baseline_name": "F.silu",
    "limit": 3,
    "calls": 1,
    "candidate": [4.0, 3.5, 2.0],
    "bytes_moved": None,
    "error": None,
    "baseline_error": None,
}
CONTEXT = COSTLIER | {"key": "c", "baseline_name": "F.relu", "limit": None}
BYTES = {
    "key": "d",
    "what": "bytes kept",
    "baseline_name": "x",
    "limit": 1.0,
    "unit": "B",
    "calls": 1,
    "candidate": [16_779_904],
    "baseline": [16_779_904],
}
ENTRIES = [FASTER, COSTLIER, CONTEXT, BYTES]


def page(entries=ENTRIES):
    return report.markdown(map(result.analyse, entries), MACHINE, report.copy_bandwidth(entries))


def test_analyse_gives_times_per_call_and_paired_ratios():
    r = result.analyse(FASTER)
    assert r.candidate == pytest.approx(Spread(0.002, 0.0014, 0.0026))
    assert r.baseline.median == pytest.approx(0.1)
    assert r.ratio.median == pytest.approx(0.02)
    assert r.met is True


def test_share_of_copy_compares_bytes_per_second_of_the_same_round():
    # 1 MB in 1, 2 and 3 ms where the copy moves 1 MB/ms.
    assert result.analyse(FASTER).share_of_copy == pytest.approx(Spread(0.5, 0.5 - 0.6 * (0.5 - 1 / 3), 0.8))


def test_a_limit_is_met_by_the_median():
    assert result.analyse(COSTLIER).met is False
    assert result.analyse(COSTLIER | {"limit": 3.5}).met is True
    assert result.analyse(CONTEXT).met is None


def test_page_counts_targets_and_keeps_context_apart():
    targets, context = page().split("## For context")
    assert "2 of 3 targets met" in targets
    assert "F.relu" in context
    assert "F.relu" not in targets


def test_page_rows():
    rows = [line for line in page().splitlines() if line.startswith("| forward") or line.startswith("| bytes")]
    assert rows[0] == (
        "| forward | reference | 50 times faster | 50 times faster (38.5 to 71.4) | yes | 2 ms (1.4 ms to 2.6 ms) | "
        "100 ms | 1 MB | 50% | 1.3e-07 | 5.0e-07 |"
    )
    assert rows[1] == (
        "| forward | F.silu | within 3× | 3.50× (2.60 to 3.80) | **no** | 3.5 s (2.6 s to 3.8 s) | 1 s |  |  |  |  |"
    )
    assert rows[2] == "| bytes kept | x | no more | 1.00× (1.00 to 1.00) | yes | 16.8 MB | 16.8 MB |  |  |  |  |"


def test_page_names_the_machine():
    for fact in ("Gold 6430", "avx512", "2 threads", "before the run 0.2", "torch 2.14.1", "0123456789ab", "1 GB/s"):
        assert fact in page()


def test_every_row_of_the_page_has_as_many_cells():
    cells = {line.count("|") for line in page().splitlines() if line.startswith("|")}
    assert len(cells) == 1


@pytest.mark.parametrize(
    ("limit", "unit", "text"),
    [
        (None, "s", ""),
        (1, "s", "no slower"),
        (1, "B", "no more"),
        (1 / 2.5, "s", "2.5 times faster"),
        (3.5, "s", "within 3.5×"),
    ],
)
def test_target_in_words(limit, unit, text):
    assert report.target(limit, unit) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.274, "s", "1.27 s"),
        (0.000_054_4, "s", "54.4 µs"),
        (2e-10, "s", "0.2 ns"),
        (16_777_216, "B", "16.8 MB"),
        (12, "B", "12 B"),
        (999.9e-3, "s", "1000 ms"),
    ],
)
def test_quantity(value, unit, text):
    assert report.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("processor", "backend", "stem"),
    [
        (MACHINE["processor"], MACHINE["backend"], "intel-xeon-gold-6430-avx512"),
        ("Intel(R) Xeon(R) Processor", "cpu: compiled kernels, instruction set avx2", "intel-xeon-avx2"),
        ("AMD EPYC 9654", "reference: plain PyTorch, because there is no _C", "amd-epyc-9654-reference"),
    ],
)
def test_file_stem(processor, backend, stem):
    assert report.file_stem({"processor": processor, "backend": backend}) == stem


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, and a table whose rows are those of ENTRIES."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "table_keys", lambda: {entry["key"] for entry in ENTRIES})
    return tmp_path / "results"


def run_file(folder, entries=ENTRIES, quick=True):
    path = folder / "run.json"
    benchmarks = [{"extra_info": entry} for entry in entries]
    path.write_text(json.dumps({"machine_info": {"kafops": MACHINE | {"quick": quick}}, "benchmarks": benchmarks}))
    return path


def test_main_writes_page_summary_and_figure(tmp_path, results, capsys):
    assert report.main([str(run_file(tmp_path, quick=False))]) == 0
    stem = results / "intel-xeon-gold-6430-avx512"
    assert stem.with_suffix(".md").read_text() == page()
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads(stem.with_suffix(".json").read_text())
    assert [row["met"] for row in summary["rows"]] == [True, False, None, True]
    assert summary["rows"][1]["ratio"]["median"] == 3.5
    assert page() in capsys.readouterr().out


@pytest.mark.parametrize(("entries", "quick"), [(ENTRIES, True), (ENTRIES[1:], False)])
def test_a_quick_or_partial_run_is_not_a_result(entries, quick, tmp_path, results, capsys):
    assert report.main([str(run_file(tmp_path, entries, quick))]) == 0
    assert not results.exists()
    assert (tmp_path / "intel-xeon-gold-6430-avx512.md").exists()
    assert ("rows are missing: a" in capsys.readouterr().out) is not quick


def test_main_without_rows_fails_clearly(tmp_path, capsys):
    assert report.main([str(run_file(tmp_path, entries=[]))]) == 1
    assert "holds no row" in capsys.readouterr().err


@pytest.mark.parametrize("entries", [ENTRIES, [FASTER], [COSTLIER]])
def test_figure_has_every_row(entries, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figure.style, "png", lambda drawing: drawn.append(drawing) or b"")
    figure.draw(list(map(result.analyse, entries)), MACHINE)
    labels = [label.get_text() for axes in drawn[0].axes for label in axes.get_yticklabels()]
    assert sorted(labels) == sorted(f"{e['what']}, against {e['baseline_name']}" for e in entries)


def test_a_figure_shows_the_whole_of_its_titles(monkeypatch):
    """A title wider than the bars ends where they end, and does not leave the figure."""
    drawn = []
    monkeypatch.setattr(figure.style, "png", lambda drawing: drawn.append(drawing) or drawing.draw_without_rendering())
    figure.draw([result.analyse(e | {"what": 2 * "a long description of "}) for e in ENTRIES], MACHINE)
    for axes in drawn[0].axes:
        (title,) = [t for t in axes.findobj(Text) if "the bar shall" in t.get_text()]
        box = title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= drawn[0].bbox.x1


def test_a_summary_draws_the_figure_of_its_run(tmp_path):
    results = list(map(result.analyse, ENTRIES))
    (tmp_path / "a.json").write_text(json.dumps(report.summary(results, MACHINE)))
    assert report.main([str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.png").read_bytes() == figure.draw(results, MACHINE)
    assert not (tmp_path / "a.md").exists()


def test_a_run_of_pytest_benchmark_becomes_a_page(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "-q", "-p", "no:cacheprovider", "-k", "small_call"]
    # Where it is a worker of pytest-xdist, pytest-benchmark measures nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT, env=environment, check=True, capture_output=True)
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    r = result.analyse(benchmark["extra_info"])
    assert r.key == "small call"
    assert len(benchmark["extra_info"]["candidate"]) == len(benchmark["extra_info"]["baseline"]) == 3
    assert r.candidate.median > 0


def test_keys_of_the_table_are_unique():
    keys = [row.key for row in (*table.TARGETS, *table.CONTEXT)]
    assert len(set(keys)) == len(keys)
