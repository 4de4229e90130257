from pathlib import Path

import pytest

from bench import gpu_compile, sass

# What `nvdisasm -c` prints, shortened: a loop with a branch in it, and a loop with another within.
LISTING = """
//--------------------- .text.kernel --------------------------
	.section	.text.kernel,"ax",@progbits
        .global         kernel
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0030*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0040*/                   FFMA R8, R8, R9, R10.reuse ;
        /*0050*/              @!P1 FMUL R8, R8, R8 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   MUFU.EX2 R9, R9 ;
        /*0080*/                   F2FP.BF16.F32.PACK_AB R9, R9, R8 ;
.L_x_1:
        /*0090*/                   STG.E.128 desc[UR6][R4.64], R8 ;
        /*00a0*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00b0*/                   NOP ;
        /*00c0*/               @P0 BRA `(.L_x_0) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   LDG.E R8, desc[UR6][R2.64] ;
.L_x_4:
        /*00f0*/                   LDS.64 R6, [R5] ;
        /*0100*/                   MUFU.EX2 R9, R9 ;
        /*0110*/                   MUFU.EX2 R7, R7 ;
        /*0120*/               @P2 BRA `(.L_x_4) ;
        /*0130*/                   STG.E.U16 desc[UR6][R4.64], R8 ;
        /*0140*/               @P0 BRA `(.L_x_3) ;
        /*0150*/                   EXIT ;
.L_x_9:
        /*0160*/                   BRA `(.L_x_9);
"""


@pytest.fixture
def code():
    return sass.parse(LISTING)["kernel"]


def at(code, address):
    return next(loop for loop in code.loops if code.instructions[loop.header].address == address)


def pipes(cost):
    return {pipe: n for pipe, n in cost.pipes.items() if n}


def test_lines_become_instructions(code):
    assert len(code.instructions) == 23
    load, store, branch = (code.instructions[i] for i in (3, 9, 6))
    assert (load.opcode, load.modifiers, load.predicated) == ("LDG", ("E", "128"), False)
    assert store.operands == "desc[UR6][R4.64], R8"
    assert (branch.targets, branch.predicated) == ((".L_x_1",), True)


def test_loops_are_found_and_one_that_holds_another_is_no_leaf(code):
    # The endless loop after the last EXIT, which is padding, is never reached.
    assert [code.instructions[loop.header].address for loop in code.loops] == [0x30, 0xE0, 0xF0]
    assert [code.instructions[loop.header].address for loop in code.leaves] == [0x30, 0xF0]
    assert code.inner(at(code, 0xE0)) == [at(code, 0xF0)]
    assert code.inner(None) == [at(code, 0x30), at(code, 0xE0)]


def test_a_turn_counts_predicated_instructions_and_the_longer_branch_but_no_nop(code):
    turn = code.path(at(code, 0x30)).cost
    assert pipes(turn) == {"fma": 2, "alu": 1, "mufu": 1, "convert": 1, "global": 2, "other": 2}
    assert turn.slots == 9
    assert (turn.loaded, turn.stored, turn.loaded_wide, turn.stored_wide) == (16, 16, 16, 16)


def test_a_turn_of_a_nest_counts_inner_turns(code):
    nest = at(code, 0xE0)
    assert pipes(code.path(nest, lambda _: 0).cost) == {"global": 2, "other": 1}
    turn = code.path(nest, lambda _: 2.5).cost
    assert pipes(turn) == {"global": 2, "other": 1 + 2.5, "shared": 2.5, "mufu": 5}
    assert (turn.loaded, turn.stored, turn.shared_words) == (4, 2, 2.5 * 2)


def test_once_through_a_program(code):
    # The path that stores most is that of the loop, if it turns once.
    assert code.path(None, lambda loop: 1).cost.slots == 3 + 9 + 1
    assert code.path(None, lambda loop: 0).cost.slots == 4


def test_the_shortest_path_that_moves_so_many_words_of_shared_memory():
    text = """
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/               @P0 BRA `(.L_1) ;
        /*0010*/               @P1 BRA `(.L_2) ;
        /*0020*/                   LDS.64 R0, [R1] ;
        /*0030*/                   FADD R0, R0, R1 ;
.L_2:
        /*0040*/                   LDS R0, [R1] ;
.L_1:
        /*0050*/                   EXIT ;
"""
    code = sass.parse(text)["k"]
    assert [code.path(None, words=words).cost.slots for words in (0, 1, 2, 3, 9)] == [2, 4, 6, 6, 6]
    assert code.path(None).cost.slots == 6


def test_costs_can_be_added_and_divided(code):
    turn = code.path(at(code, 0x30)).cost
    assert turn.per(4).slots == 9 / 4
    assert turn.per(4).stored == 4
    assert (turn + turn).pipes["fma"] == 4


@pytest.mark.parametrize(
    ("name", "pipe", "width"),
    [
        ("LDG.E.128", "global", 16),
        ("LDG.E.ENL2.256", "global", 32),
        ("LDG.E.64.CONSTANT", "global", 8),
        ("LDG.E", "global", 4),
        ("LDG.E.U16", "global", 2),
        ("STG.E.U8", "global", 1),
        ("LDS.128", "shared", 16),
        ("LDL.64", "local", 8),
        ("STL", "local", 4),
        ("SHFL.BFLY", "shared", 0),
        ("HFMA2.MMA", "fma", 0),
        ("IMAD.MOV.U32", "fma", 0),
        ("FFMA2", "fma", 0),
        ("FADD32I", "fma", 0),
        ("DFMA", "fp64", 0),
        ("DSETP.GT.AND", "fp64", 0),
        ("I2F.RP", "convert", 0),
        ("F2F.F64.F32", "convert", 0),
        ("MUFU.RCP", "mufu", 0),
        ("FMNMX", "alu", 0),
        ("FSEL", "alu", 0),
        ("LOP3.LUT", "alu", 0),
        ("LDC.64", "other", 8),
        ("ULDC.64", "other", 0),
        ("BSYNC.RECONVERGENT", "other", 0),
        ("UIADD3", "other", 0),
        ("SOMETHING.NEW", "alu", 0),
    ],
)
def test_pipe_and_width(name, pipe, width):
    opcode, *modifiers = name.split(".")
    instruction = sass.Instruction(0, opcode, tuple(modifiers))
    assert (instruction.pipe, instruction.bytes) == (pipe, width)


def in_flight(*lines):
    text = "\t.section\t.text.k,\n.L_1:\n" + "".join(f"  /*00{i}0*/ {line} ;\n" for i, line in enumerate(lines, 10))
    code = sass.parse(text)["k"]
    return code.path(code.loops[0]).in_flight


LOAD, OTHER, USE, AGAIN = "LDG.E.128 R4, [R2.64]", "LDG.E.64 R8, [R2.64+0x10]", "FADD R0, R7, R0", "@P0 BRA `(.L_1)"


@pytest.mark.parametrize(
    ("lines", "bytes_"),
    [
        ((LOAD, USE, AGAIN), 16),
        ((LOAD, OTHER, USE, AGAIN), 24),
        ((LOAD, USE, OTHER, AGAIN), 24),  # the other is under way while the next turn loads
        ((LOAD, USE, OTHER, "FADD R0, R9, R0", AGAIN), 16),
        ((USE, LOAD, AGAIN), 16),  # waited for in the next turn
        ((OTHER, "STG.E.64 [R2.64], R8", LOAD, USE, AGAIN), 16),  # a store reads what was loaded
        ((OTHER, "LDG.E R7, [R8.64]", USE, AGAIN), 8),  # an address does too
    ],
)
def test_loads_in_flight(lines, bytes_):
    assert in_flight(*lines) == bytes_


def test_packed_instructions_are_known():
    lines = [sass.Instruction(0, "FFMA2"), sass.Instruction(16, "FADD2"), sass.Instruction(32, "HFMA2")]
    assert sass.cost(lines).packed == 2


def test_indirect_branches_and_calls():
    text = """
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/                   BRX R2 -0x10                                 (*"BRANCH_TARGETS .L_1,.L_2"*) ;
.L_1:
        /*0010*/                   EXIT ;
.L_2:
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div) ;
        /*0030*/                   BRA `(.L_2) ;
        .type           $__internal_0_$__cuda_sm20_div,@function
$__internal_0_$__cuda_sm20_div:
        /*0040*/                   RET.REL.NODEC R2 `(k) ;
"""
    code = sass.parse(text)["k"]
    assert sorted(code.blocks) == [0, 1, 2]
    assert code.blocks[0].successors == (1, 2)
    assert [loop.header for loop in code.loops] == [2]


@pytest.mark.parametrize(
    ("line", "goes_on"),
    [
        ("BRA `(.L_1)", False),
        ("@P1 BRA `(.L_1)", True),
        ("@PT BRA `(.L_1)", False),
        ("BRA P4, `(.L_1)", True),
        ("BRA.U !UP0, `(.L_1)", True),
        ("BRA.DIV ~URZ, `(.L_1)", True),
        ("CALL.REL.NOINC `(.L_1)", False),
        ("@!P5 CALL.REL.NOINC `(.L_1)", True),
    ],
)
def test_branches_that_may_go_on(line, goes_on):
    text = f"""
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/  {line} ;
        /*0010*/  FADD R0, R0, R1 ;
.L_1:
        /*0020*/  EXIT ;
"""
    assert sass.parse(text)["k"].blocks[0].successors == ((2, 1) if goes_on else (2,))


def test_several_kernels_have_their_own_labels():
    text = "".join(LISTING.replace("kernel", name) for name in ("a", "b"))
    codes = sass.parse(text)
    assert sorted(codes) == ["a", "b"]
    assert codes["a"].labels[".L_x_0"] == codes["b"].labels[".L_x_0"] == 3


def test_a_loop_with_two_entries_is_no_natural_loop_and_ends():
    text = """
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/               @P0 BRA `(.L_2) ;
.L_1:
        /*0010*/                   FADD R0, R0, R1 ;
.L_2:
        /*0020*/                   FMUL R0, R0, R1 ;
        /*0030*/               @P1 BRA `(.L_1) ;
        /*0040*/                   EXIT ;
"""
    code = sass.parse(text)["k"]
    assert code.loops == []
    assert code.path(None).cost.slots == 4


@pytest.mark.skipif(not gpu_compile.has_tools(), reason="no nvcc, nvdisasm, cuobjdump or c++filt")
def test_a_kernel_compiled_by_nvcc(tmp_path: Path):
    source = tmp_path / "saxpy.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(192) saxpy(float4* y, const float4* x, float a, int n) {\n'
        "#pragma unroll 1\n"
        "  for (int i = threadIdx.x; i < n; i += 192) {\n"
        "    const float4 v = x[i];\n"
        "    y[i] = make_float4(a * v.x + 1, a * v.y + 1, a * v.z + 1, a * v.w + 1);\n"
        "  }\n"
        "}\n"
    )
    cubin = tmp_path / "saxpy.cubin"
    gpu_compile.run("nvcc", "-cubin", "-arch=sm_90", "-O3", source, "-o", cubin)
    (binary,) = gpu_compile.inspect(cubin, "cuda", "sm_90")
    assert (binary.name, binary.threads, binary.spills, binary.shared) == ("saxpy", 192, {}, 0)
    code = sass.parse(binary.assembly)["saxpy"]
    (loop,) = code.leaves
    turn = code.path(loop).cost
    assert (turn.loaded_wide, turn.stored_wide, turn.stored) == (16, 16, 16)
    assert turn.pipes["fma"] - sum(i.opcode == "IMAD" for i in code.blocks[loop.header].instructions) == 4
    assert (turn.pipes["mufu"], turn.pipes["global"]) == (0, 2)
