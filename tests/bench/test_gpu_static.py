import dataclasses
import shutil

import pytest

from bench import gpu_compile, gpu_costs, gpu_static, gpu_static_page, sass
from bench.gpu_compile import Binary, CannotProve, Job
from bench.gpu_costs import TABLE, Limit

FORWARD, BACKWARD = (next(w for w in TABLE if w.title == title) for title in ("forward", "backward"))
FREE = next(w for w in TABLE if w.title == "forward, free dictionary")

FAST = """
.L_1:
        /*0010*/  LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/  MUFU.RCP R4, R4 ;
        /*0030*/  MUFU.EX2 R4, R4 ;
        /*0040*/  FFMA R4, R4, R4, R4 ;
        /*0050*/  STG.E.128 desc[UR6][R2.64], R4 ;
        /*0060*/  @P0 BRA `(.L_1) ;
"""
# The same with half the elements, as the rest of a loop that was unrolled.
SHORT = FAST.replace(".L_1", ".L_2").replace(".128", ".64")
# Four elements a turn, two points to a turn of the loop inside, and one point unrolled out of it.
DIRECT = """
.L_3:
        /*0100*/  LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0110*/  @P1 BRA `(.L_5) ;
        /*0120*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_4:
        /*0130*/  LDG.E R9, desc[UR6][R10.64] ;
        /*0140*/  STS [R1], R9 ;
        /*0150*/  @P2 BRA `(.L_4) ;
.L_5:
        /*0160*/  MUFU.EX2 R4, R4 ;
        /*0170*/  MUFU.EX2 R4, R4 ;
        /*0180*/  MUFU.EX2 R4, R4 ;
        /*0190*/  MUFU.EX2 R4, R4 ;
.L_6:
        /*01a0*/  LDS R9, [R1] ;
        /*01b0*/  MUFU.EX2 R4, R4 ;
        /*01c0*/  MUFU.EX2 R4, R4 ;
        /*01d0*/  MUFU.EX2 R4, R4 ;
        /*01e0*/  MUFU.EX2 R4, R4 ;
        /*01f0*/  MUFU.EX2 R4, R4 ;
        /*0200*/  MUFU.EX2 R4, R4 ;
        /*0210*/  MUFU.EX2 R4, R4 ;
        /*0220*/  MUFU.EX2 R4, R4 ;
        /*0230*/  @P3 BRA `(.L_6) ;
        /*0240*/  STG.E.128 desc[UR6][R2.64], R4 ;
        /*0250*/  @P0 BRA `(.L_3) ;
"""


def listing(*parts, name="k"):
    entry = f'\t.section\t.text.{name},"ax",@progbits\n.text.{name}:\n        /*0000*/  LDC R1, c[0x0][0x28] ;\n'
    return entry + "".join(parts) + "        /*f000*/  EXIT ;\n"


def binary(*parts, name="void kaf::forward_kernel<float, true>(kaf::Call)", architecture="sm_90", **fields):
    return Binary("cuda", architecture, name, "k", 72, {}, 0, 128, listing(*parts), **fields)


def code(*parts):
    return sass.parse(listing(*parts))["k"]


def table(monkeypatch, *works):
    """Let the table be these rows, in float32."""
    works = [dataclasses.replace(work, dtypes=("float32",)) for work in works]
    monkeypatch.setattr(gpu_costs, "TABLE", works)
    return works


def test_the_loop_with_most_elements_a_turn_is_measured():
    cost, elements = gpu_costs.measure(FORWARD, "float32", code(SHORT, FAST))
    assert elements == 4
    assert cost.slots == 6 / 4
    assert (cost.pipes["mufu"], cost.exp2, cost.loaded, cost.stored) == (0.5, 0.25, 4, 4)


def test_elements_follow_from_dtype_and_stores():
    assert gpu_costs.measure(FORWARD, "bfloat16", code(FAST))[1] == 8
    assert gpu_costs.measure(dataclasses.replace(FORWARD, stores=2), "float32", code(FAST))[1] == 2


def test_a_loop_with_another_inside_is_not_the_fast_one():
    assert gpu_costs.measure(FORWARD, "float32", code(DIRECT, FAST))[0].slots == 6 / 4
    with pytest.raises(CannotProve, match="no loop"):
        gpu_costs.measure(FORWARD, "float32", code(DIRECT))


def test_a_nest_is_counted_for_20_points():
    cost, elements = gpu_costs.measure(FREE, "float32", code(FAST, DIRECT))
    assert elements == 4
    assert cost.exp2 == 20
    # The loop inside turns 9.5 times, for 19 points; points are not staged at every turn.
    assert cost.slots == (8 + 9.5 * 10) / 4
    assert cost.pipes["shared"] == 9.5 / 4


def test_a_nest_of_the_fast_path_is_not_the_direct_one():
    with pytest.raises(CannotProve, match="no loop"):
        gpu_costs.measure(FREE, "float32", code(DIRECT.replace("LDG.E.128", "MUFU.RCP R4, R4 ;\n /*0108*/ LDG.E.128")))


def test_a_kernel_without_a_loop_is_counted_once_through():
    straight = "".join(line for line in FAST.splitlines(keepends=True) if "BRA" not in line)
    cost, elements = gpu_costs.measure(FORWARD, "float32", code(straight))
    assert (cost.slots, elements) == (7 / 4, 4)


def test_rows_match_kernels_by_name(monkeypatch):
    table(monkeypatch, FORWARD, FREE)
    others = [
        binary(FAST, name=f"void kaf::{n}(kaf::Call)")
        for n in ("backward_kernel<float, true>", "forward_kernel<double, true>")
    ]
    rows = gpu_costs.rows([*others, binary(FAST, DIRECT)])
    assert [(row.work.title, row.cost.slots) for row in rows] == [("forward", 1.5), ("forward, free dictionary", 25.75)]
    assert rows[0].occupancy == 28 / 64


def test_a_missing_kernel_proves_nothing(monkeypatch):
    table(monkeypatch, BACKWARD)
    with pytest.raises(CannotProve, match=r"CUDA C\+\+ has no kernel for backward, float32, sm_90"):
        gpu_costs.rows([binary(FAST)])


def fault_of(monkeypatch, *parts, work=FORWARD, **fields):
    table(monkeypatch, work)
    b = binary(*parts, **fields)
    return gpu_costs.faults([b], gpu_costs.rows([b]))


def test_no_fault(monkeypatch):
    assert fault_of(monkeypatch, FAST) == []


def test_a_spill_is_a_fault(monkeypatch):
    table(monkeypatch)
    b = dataclasses.replace(binary(FAST), spills={"bytes of stack": 8})
    assert gpu_costs.faults([b], []) == [
        "CUDA C++, sm_90, void kaf::forward_kernel<float, true>(kaf::Call): 8 bytes of stack"
    ]


@pytest.mark.parametrize(("access", "kind"), [("LDG", "loaded"), ("STG", "stored")])
def test_a_narrow_access_is_a_fault(monkeypatch, access, kind):
    lines = [line.replace(".128", ".64") * 2 if access in line else line for line in FAST.splitlines(keepends=True)]
    assert fault_of(monkeypatch, *lines) == [
        f"CUDA C++, sm_90, forward, float32: 0 of 4 bytes per element are {kind} by accesses of 128 bits"
    ]


def test_a_narrow_access_is_no_fault_where_none_is_due(monkeypatch):
    work = dataclasses.replace(FORWARD, wide=False)
    assert fault_of(monkeypatch, FAST.replace(".128", ".64"), work=work) == []


def test_limits_are_for_float32_on_an_h100(monkeypatch):
    work = dataclasses.replace(FORWARD, limit=Limit(slots=1.4, mufu=0.4, ratio=0.9))
    assert fault_of(monkeypatch, FAST, work=work) == [
        "CUDA C++, sm_90, forward, float32: instructions per element 1.5, more than 1.4",
        "CUDA C++, sm_90, forward, float32: MUFU per element 0.5, more than 0.4",
        "CUDA C++, sm_90, forward, float32: predicted time / memory-bound time 1, more than 0.9",
    ]
    assert fault_of(monkeypatch, FAST, work=work, architecture="sm_80") == []
    assert fault_of(monkeypatch, FAST, work=dataclasses.replace(work, limit=Limit(1.5, 0.5, 1))) == []


def test_the_limits_of_the_project():
    assert FORWARD.limit == Limit(slots=64, mufu=6, ratio=1.1)
    assert BACKWARD.limit == Limit(slots=130, mufu=None, ratio=1.1)
    assert [FORWARD.moved("float32"), BACKWARD.moved("float32")] == [8, 12]
    assert [FORWARD.moved("bfloat16"), BACKWARD.moved("bfloat16")] == [4, 6]


@pytest.fixture
def measured(monkeypatch):
    table(monkeypatch, FORWARD)
    binaries = [binary(FAST, architecture=a) for a in ("sm_80", "sm_89", "sm_90", "sm_100")]
    return binaries, gpu_costs.rows(binaries)


def test_the_page(measured):
    page = gpu_static_page.markdown(*measured, faults=[])
    assert page.startswith("# GPU kernels: compiled, not run\n")
    assert "- CUDA C++: 4 kernels for sm_80, sm_89, sm_90, sm_100; at most 72 registers" in page
    assert "no kernel spills" in page
    lines = page.splitlines()
    assert "| forward | CUDA C++ | instructions per element | 1.5 | 64 | yes |" in lines
    assert ("| forward | float32 | CUDA C++ | 8 | 1.00 memory | 1.00 memory | 1.00 memory | 1.00 memory |") in lines
    assert "| forward | float32 | CUDA C++ | **1.5** | 0.2 | 0.5 | 0.5 | 0.2 | 72 | 44% | 4 | 14 |" in lines
    assert "| forward | float32 | CUDA C++ | 1.5, 72, 44% | 1.5, 72, 58% | 1.5, 72, 44% | 1.5, 72, 44% |" in lines
    assert (
        "| H100 SXM [H] | sm_90 | 3.35 TB/s | 132 | 1980 MHz | 128 | 128 | 64 | 16 | 64 | 32 | 65536 | 2048 |" in lines
    )
    for letter in "GCAHBL":
        assert any(line.startswith(f"- [{letter}] ") for line in lines)


def test_the_page_names_faults(measured):
    page = gpu_static_page.markdown(*measured, faults=["this is wrong"])
    assert "- **fault**: this is wrong" in page
    assert "no kernel spills" not in page


def test_tables_have_rows_of_one_length(measured):
    cells = [
        {line.count("|") for line in part.splitlines() if line.startswith("|")}
        for part in gpu_static_page.markdown(*measured, faults=[]).split("\n\n")
    ]
    assert {len(counts) for counts in cells} == {0, 1}


def test_the_figure_says_that_nothing_was_run(measured, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench import gpu_static_figure

    drawn = []
    monkeypatch.setattr(gpu_static_figure.style, "png", lambda figure: drawn.append(figure) or b"")
    gpu_static_figure.draw(measured[1])
    assert "not run" in drawn[0].get_suptitle()
    assert [axes.get_title(loc="left").split(",")[0] for axes in drawn[0].axes] == [gpu.name for gpu in gpu_costs.GPUS]


def test_jobs_are_every_source_and_dtype_for_every_architecture():
    found = gpu_compile.jobs(["cuda", "triton"], ["sm_90", "gfx942"])
    assert Job("cuda", "csrc/cuda/float32.cu", "sm_90") in found
    assert not any(job.backend == "cuda" and job.architecture == "gfx942" for job in found)
    assert [job.source for job in found if job.architecture == "gfx942"] == list(gpu_compile.DTYPES)


@pytest.fixture
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_compile, "CACHE", tmp_path)


def test_a_missing_compiler_is_named(monkeypatch, capsys, nothing_kept):
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **where: None if name == "nvcc" else found(name, **where))
    assert gpu_static.main(["--backend", "cuda", "--architecture", "sm_90"]) == 1
    assert "error: cannot prove anything: nvcc is neither on PATH" in capsys.readouterr().err


def test_a_compiler_that_fails_is_quoted(tmp_path):
    with pytest.raises(CannotProve, match="No such file"):
        gpu_compile.run("ls", tmp_path / "nothing")


AMD = """
	global_load_dwordx4 v[6:9], v[4:5], off
	global_store_dwordx4 v[22:23], v[6:9], off
amdhsa.kernels:
  - .agpr_count:     0
    .group_segment_fixed_size: 512
    .max_flat_workgroup_size: 256
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     104
    .vgpr_spill_count: 0
"""


def test_a_kernel_for_amd():
    b = gpu_compile.inspect_amd(AMD, "gfx942", "k", wide=True)
    assert (b.registers, b.shared, b.threads, b.spills, b.narrow) == (104, 512, 256, {}, "")


def test_faults_of_a_kernel_for_amd():
    spilled = AMD.replace("vgpr_spill_count: 0", "vgpr_spill_count: 3").replace(
        "private_segment_fixed_size: 0", "private_segment_fixed_size: 16"
    )
    narrow = spilled.replace("store_dwordx4", "store_dwordx2")
    b = gpu_compile.inspect_amd(narrow, "gfx942", "k", wide=True)
    assert gpu_costs.faults([b], []) == [
        "Triton, gfx942, k: 3 vector registers spilled, 16 bytes of private memory, no store of 128 bits"
    ]
    assert gpu_compile.inspect_amd(narrow, "gfx942", "k", wide=False).narrow == ""


@pytest.mark.skipif(not gpu_compile.has_tools(), reason="no nvcc, nvdisasm, cuobjdump or c++filt")
def test_the_float32_kernels_are_within_their_limits(monkeypatch):
    monkeypatch.setattr(gpu_costs, "TABLE", [dataclasses.replace(work, dtypes=("float32",)) for work in TABLE])
    binaries, _ = gpu_compile.compile_one(Job("cuda", "csrc/cuda/float32.cu", "sm_90"))
    rows = gpu_costs.rows(binaries)
    assert [row.work.title for row in rows] == [work.title for work in TABLE]
    assert gpu_costs.faults(binaries, rows) == []
