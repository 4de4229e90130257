"""The gates for machine code, on listings written by hand and on kernels that an H100 has timed."""

import dataclasses
import json
import re
import shutil

import pytest

from bench import gpu_compile, gpu_gates, gpu_static
from bench.gpu_compile import Binary, CannotProve, Job
from bench.gpu_gates import Counted, Work

FORWARD = Work("forward, float32", r"\bforward<float>\(", "float32", 1, 1, elements=4096, shared=2048, table=2048)

# A block of 128 threads copies 2048 bytes in 4 turns of 4 bytes a thread, then does 32 elements a thread, 4 a turn.
FILL = """
.L_0:
        /*0010*/  LDG.E R8, desc[UR6][R10.64] ;
        /*0020*/  STS [R9], R8 ;
        /*0030*/  @P0 BRA `(.L_0) ;
        /*0040*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""
HOT = """
.L_1:
        /*0050*/  LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0060*/  LDS.128 R12, [R4] ;
        /*0070*/  MUFU.EX2 R4, R4 ;
        /*0080*/  FFMA R4, R4, R12, R4 ;
        /*0090*/  IADD3 R2, R2, 0x1, RZ ;
        /*00a0*/  STG.E.128 desc[UR6][R2.64], R4 ;
        /*00b0*/  @P0 BRA `(.L_1) ;
"""
# The rest of a loop that was unrolled, and another of what a block does once.
REST = HOT.replace(".L_1", ".L_2").replace(".128", ".64")
SUMS = """
.L_3:
        /*00f0*/  SHFL.BFLY R4, R4, 0x10 ;
        /*0100*/  @P0 BRA `(.L_3) ;
"""


def binary(*parts, name="void forward<float>(uint4 const*)", architecture="sm_90", **fields):
    listing = '\t.section\t.text.k,"ax",@progbits\n.text.k:\n        /*0000*/  LDC R1, c[0x0][0x28] ;\n'
    listing += "".join(parts) + "        /*f000*/  EXIT ;\n"
    usual = {"registers": 32, "spills": {}, "shared": 0, "threads": 128}
    return Binary("cuda", architecture, name, "k", **usual | fields, assembly=listing)


def counted(*parts, work=FORWARD, **fields):
    return gpu_gates.count(work, binary(*parts, **fields))


def test_an_element_pays_for_all_that_a_block_does():
    c = counted(FILL, HOT)
    # LDC, BAR and EXIT once, 3 instructions in each of 4 turns, 7 in each of 8, for 32 elements.
    assert c.instructions == (3 + 4 * 3 + 8 * 7) / 32
    assert (c.fma, c.alu, c.xu, c.fp64) == (8 / 32, 8 / 32, 8 / 32, 0)
    assert c.shared == (4 + 8 * 4) / 32
    assert (c.warps, c.in_flight) == (64, 64 * 32 * 16)


def test_the_rest_of_a_loop_does_not_count():
    # Only what leads through it: nothing here.
    assert counted(FILL, HOT, REST).instructions == counted(FILL, HOT).instructions


def test_other_loops_turn_once():
    assert counted(FILL, HOT, SUMS).instructions == counted(FILL, HOT).instructions + 2 / 32


def test_what_is_added_in_float64_is_no_element():
    """The last block adds what all have left, and may store more in a turn than the loop over elements does."""
    last = (
        HOT.replace(".L_1", ".L_7")
        .replace("FFMA R4, R4, R12, R4", "DADD R4, R4, R12")
        .replace("STG.E.128", "STG.E.ENL2")
    )
    assert counted(FILL, HOT, last) == counted(FILL, HOT)


# An element without a table takes a loop over points, or a longer way.
FALLBACK = HOT.replace(
    "        /*0060*/  LDS.128",
    """        /*0051*/  @P1 BRA `(.L_4) ;
        /*0052*/  @P2 BRA `(.L_5) ;
        /*0053*/  FADD R4, R4, R4 ;
        /*0054*/  FADD R4, R4, R4 ;
        /*0055*/  LDS.128 R12, [R4] ;
        /*0056*/  BRA `(.L_6) ;
.L_4:
        /*0057*/  LDG.E R13, [R4.64] ;
        /*0058*/  MUFU.EX2 R4, R4 ;
        /*0059*/  @P3 BRA `(.L_4) ;
        /*005a*/  BRA `(.L_6) ;
.L_5:
        /*0060*/  LDS.128""",
).replace("        /*0070*/", ".L_6:\n        /*0070*/")


def test_the_path_that_counts_is_the_shortest_that_looks_up():
    work = dataclasses.replace(FORWARD, lookups=1)
    c = counted(FILL, FALLBACK, work=work)
    assert c.instructions == counted(FILL, HOT).instructions + 8 * 2 / 32  # two branches more
    assert (c.xu, c.shared) == (8 / 32, counted(FILL, HOT).shared)
    # Without a word to look up the way past the loop is the shortest.
    assert counted(FILL, FALLBACK).shared == 4 / 32


def test_warps_follow_from_registers_threads_and_memory():
    assert counted(HOT, registers=116).warps == 16
    assert counted(HOT, shared=100 << 10).warps == 2 * 4  # with the 2 KB of the launch


def test_a_kernel_without_a_loop_over_elements_proves_nothing():
    with pytest.raises(CannotProve, match="no loop that loads and stores"):
        counted(FILL)
    with pytest.raises(CannotProve, match="no kernel for forward, float32"):
        list(gpu_gates.find(FORWARD, [binary(HOT, name="void backward<float>(uint4 const*)")]))


def faults(*parts, work=FORWARD, architecture="sm_90", **fields):
    return gpu_gates.faults(work, counted(*parts, work=work, **fields), architecture)


def test_no_fault():
    assert faults(FILL, HOT) == []


def test_too_little_in_flight():
    assert faults(FILL, HOT, registers=96) == [
        "10 KiB of loads in flight on an SM (96 registers, 20 warps), 24 are needed"
    ]
    assert faults(FILL, HOT, registers=96, architecture="sm_80") == []
    assert "48 are needed" in faults(FILL, HOT, architecture="sm_100")[0]


def test_too_many_instructions():
    many = HOT.replace("MUFU.EX2 R4, R4 ;", "MUFU.EX2 R4, R4 ;" + "\n /*0074*/ FADD R4, R4, R4 ;" * 320)
    assert faults(FILL, many) == ["82.2 instructions for an element, more than 80"]
    assert faults(FILL, many, work=dataclasses.replace(FORWARD, instructions=83.0)) == []
    assert faults(FILL, many, architecture="sm_100", registers=16) == [
        "32 KiB of loads in flight on an SM (16 registers, 64 warps), 48 are needed"
    ]


@pytest.mark.parametrize("access", ["LDG", "STG"])
def test_a_narrow_access(access):
    lines = [line.replace(".128", ".64") * 2 if access in line else line for line in HOT.splitlines(keepends=True)]
    narrow = "4 bytes of an element are moved by accesses of less than 16 bytes"
    assert faults(FILL, *lines)[0] == narrow
    assert narrow not in faults(FILL, *lines, work=dataclasses.replace(FORWARD, wide=False))


def test_spills():
    assert gpu_gates.spills(binary(HOT, spills={"bytes of stack": 8}, narrow="no load of 128 bits")) == [
        "8 bytes of stack",
        "no load of 128 bits",
    ]
    assert gpu_gates.spills(binary(HOT)) == []


# ------------------------------------------------------------------------------ what an H100 said of kernels counted so

MEASURED = gpu_gates.measured()


def clears(m):
    return not gpu_gates.faults(m.work, m.counted, "sm_90")


def test_the_gates_rank_kernels_as_an_h100_did():
    """Whatever clears them was faster, as a share of a copy, than whatever does not."""
    slow, fast = ([m.share for m in MEASURED if clears(m) is so] for so in (False, True))
    assert len(slow) == 15
    assert len(fast) == 22
    assert max(slow) < 0.7 < 0.75 < min(fast)
    old = [m for m in MEASURED if m.source.startswith("csrc/")]
    assert len(old) == 8
    assert not any(map(clears, old))


def test_one_that_equals_another_was_as_fast():
    """The rule by which a product's kernel may be expected at a prototype's time holds among those that were timed."""
    pairs = [
        (a.share / b.share, a.work.title, b.work.title)
        for a in MEASURED
        for b in MEASURED
        if a is not b and (a.work.dtype, a.work.loads, a.work.wide) == (b.work.dtype, b.work.loads, b.work.wide)
        if not a.counted.worse_than(b.counted)
    ]
    assert len(pairs) >= 10
    assert min(pairs)[0] >= 1, min(pairs)


def test_counts_are_near_what_an_h100_executed():
    """Paths are chosen for their stores, and small loops pass once: it is no more exact than that."""
    entries = [e for e in json.loads(gpu_gates.MEASURED.read_text())["kernels"] if "executed" in e]
    ratios = [e["counted"]["instructions"] / e["executed"] for e in entries]
    assert len(ratios) == 8
    assert all(0.9 < r < 1.1 for r in ratios), ratios


COUNTED = Counted(40, 48, 24 << 10, 20.0, 10.0, 8.0, 1.0, 0.0, 4.0)


@pytest.mark.parametrize(
    ("worse", "better"),
    [(dict(instructions=22.1), 21.9), (dict(fma=11.1), 10.9), (dict(shared=4.5), 4.3), (dict(xu=1.2), 1.05),
     (dict(warps=43), 44), (dict(in_flight=22_000), 22_400)],
)  # fmt: skip
def test_ten_percent_are_allowed(worse, better):
    (name,) = worse
    assert dataclasses.replace(COUNTED, **worse).worse_than(COUNTED) == [name]
    assert dataclasses.replace(COUNTED, **{name: better}).worse_than(COUNTED) == []


def test_expected_is_the_fastest_of_those_it_is_compared_with():
    titles = [m.work.title for m in MEASURED if m.work.title.startswith("forward, float32")]
    work = dataclasses.replace(FORWARD, like=tuple(titles[1:3]))
    best = dataclasses.replace(MEASURED[0].counted, instructions=1, fma=1, alu=1, xu=0, shared=1, in_flight=1 << 20)
    assert gpu_gates.expected(work, best, MEASURED).share == 0.99
    assert gpu_gates.expected(FORWARD, best, MEASURED) is None
    assert gpu_gates.expected(work, dataclasses.replace(best, warps=16), MEASURED) is None


def test_the_products_works_name_what_was_measured():
    titles = {m.work.title for m in MEASURED}
    works = list(gpu_gates.works())
    assert len({w.title for w in works}) == len(works)
    assert all(set(w.like) <= titles for w in works)
    assert sum(bool(w.like) for w in works) == 10  # nothing was measured in float16


def test_counts_are_written_where_they_were(tmp_path):
    copy = tmp_path / "measured.json"
    copy.write_text(gpu_gates.MEASURED.read_text())
    gpu_gates.write_counts({m.work.title: m.counted for m in MEASURED}, copy)
    assert gpu_gates.measured(copy) == MEASURED
    title = MEASURED[0].work.title
    gpu_gates.write_counts({title: COUNTED}, copy)
    assert gpu_gates.measured(copy) == [dataclasses.replace(MEASURED[0], counted=COUNTED), *MEASURED[1:]]


# ----------------------------------------------------------------------------------------------------------- compilers


def test_jobs_are_every_source_and_dtype_for_every_architecture():
    found = gpu_compile.jobs(gpu_compile.BACKENDS, ["sm_90", "gfx942"])
    assert Job("cuda", "csrc/cuda/float32.cu", "sm_90") in found
    assert Job("prototype", "bench/prototypes/cells.cu", "sm_90") in found
    assert [job.source for job in found if job.architecture == "gfx942"] == list(gpu_compile.DTYPES)


def test_a_missing_compiler_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_compile, "CACHE", tmp_path)
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **where: None if name == "nvcc" else found(name, **where))
    assert gpu_static.main(["--backend", "cuda", "--architecture", "sm_90"]) == 1
    assert "error: cannot prove anything: nvcc is neither on PATH" in capsys.readouterr().err


def test_a_compiler_that_fails_is_quoted(tmp_path):
    with pytest.raises(CannotProve, match="No such file"):
        gpu_compile.run("ls", tmp_path / "nothing")


def test_the_command_lists_faults(monkeypatch, capsys):
    names = [re.sub(r"\\([b()])", lambda found: found[1].replace("b", ""), w.kernel) for w in gpu_gates.works()]
    slow = [binary(FILL, HOT, name=name, registers=96) for name in names]
    monkeypatch.setattr(gpu_compile, "compile_all", lambda work, report: slow)
    assert gpu_static.main(["--backend", "cuda"]) == 1
    out, err = capsys.readouterr()
    assert "FAULT: sm_90, forward, float32: 10 KiB of loads in flight" in err
    assert "known to fall short: sm_90, forward, channels_last, bfloat16: 10 KiB of loads in flight" in out
    assert "sm_90, forward, channels_last, bfloat16" not in err
    assert re.search(r"^forward, float32 +96 +20 +10 ", out, re.MULTILINE)
    assert f"{len(slow)} kernels compiled" in out


def test_a_work_that_no_longer_falls_short_may_not_be_said_to(monkeypatch):
    monkeypatch.setattr(gpu_gates, "faults", lambda work, counted, architecture: [])
    fine = counted(FILL, HOT)
    monkeypatch.setattr(gpu_gates, "count", lambda work, binary: fine)
    monkeypatch.setattr(gpu_gates, "find", lambda work, binaries: binaries)
    wrong = gpu_static.judge([binary(FILL, HOT)])
    assert sorted(wrong) == sorted(f"sm_90, {t}: passes, and is named as one that does not" for t in gpu_gates.SHORT)
    assert {w.title for w in gpu_gates.works()} > gpu_gates.SHORT


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
    spilled = AMD.replace("vgpr_spill_count: 0", "vgpr_spill_count: 3").replace(
        "private_segment_fixed_size: 0", "private_segment_fixed_size: 16"
    )
    narrow = spilled.replace("store_dwordx4", "store_dwordx2")
    assert gpu_gates.spills(gpu_compile.inspect_amd(narrow, "gfx942", "k", wide=True)) == [
        "3 vector registers spilled", "16 bytes of private memory", "no store of 128 bits"
    ]  # fmt: skip
    assert gpu_compile.inspect_amd(narrow, "gfx942", "k", wide=False).narrow == ""


@pytest.mark.skipif(not gpu_compile.has_tools(), reason="no nvcc, nvdisasm, cuobjdump or c++filt")
def test_a_prototype_compiles_to_what_was_counted():
    binaries, _ = gpu_compile.compile_one(Job("prototype", "bench/prototypes/half_tables.cu", "sm_90"))
    ours = [m for m in MEASURED if m.source.endswith("half_tables.cu")]
    assert len(ours) == 3
    for m in ours:
        (b,) = gpu_gates.find(m.work, binaries)
        assert gpu_gates.spills(b) == []
        now = gpu_gates.count(m.work, b)
        assert gpu_gates.faults(m.work, now, "sm_90") == []
        assert now.worse_than(m.counted) == []  # another nvcc may do a little better or worse
