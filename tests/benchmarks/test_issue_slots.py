"""issue_slots.py: loops are found in a listing of machine code, and their slots counted."""

from issue_slots import Loop, innermost_loops, kernels, pairs_of

LISTING = """
		Function : _Zgather
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;           /* 0x00000a0000017a02 */
        /*0010*/                   LDS.128 R4, [R0] ;
        /*0020*/                   FFMA R8, R4, R2, R3 ;
        /*0030*/                   FFMA R8, R5, R2, R8 ;
        /*0040*/                   FSETP.GEU.AND P0, PT, R8, R9, PT ;
        /*0050*/               @P0 FFMA R10, R8, R4, R10 ;
        /*0060*/              @!P0 FFMA R11, R8, R5, R11 ;
        /*0070*/                   FFMA R12, R8, R6, R12 ;
        /*0080*/                   FFMA R13, R8, R7, R13 ;
        /*0090*/               @P1 BRA `(.L_x_1) 0x10 ;
        /*00a0*/               @P2 BRA 0x0 ;
        /*00b0*/                   EXIT ;
		Function : _Zother
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/                   BRA 0x0 ;
"""


def test_the_innermost_loop_is_found_and_its_pairs_counted():
    found = kernels(LISTING)
    assert list(found) == ["_Zgather", "_Zother"]
    (loop,) = found["_Zgather"]
    assert len(loop.names) == 9 and loop.multiply_adds == 6 and loop.count("FSETP") == 1
    assert found["_Zother"] == []  # nothing is multiplied there
    # Two multiply-adds of a score and four columns are six: one pair, nine slots.
    assert pairs_of("Forward<float, HardThreshold<float>, 4, true", loop) == 1
    assert pairs_of("RowPass<float, HardThreshold<float>, 0>", loop) == 1
    assert pairs_of("fill<float>", loop) is None


def test_loops_side_by_side_inside_another_and_one_that_stages():
    code = [
        *["MOV R1, R2"] * 2, *["FFMA R1, R2, R3, R1"] * 6, "@P0 BRA 0x20",
        *["FFMA R1, R2, R3, R1"] * 5, "@P0 BRA 0x90",
        *["@!UP0 DFMA R2, R4, R6, R2"] * 7, "@UP1 BRA 0xf0",
        "@P1 BRA 0x10",
    ]  # fmt: skip
    listing = "\n\t\tFunction : _Zboth  \n" + "".join(
        f"        /*{16 * place:04x}*/ {text} ;\n" for place, text in enumerate(code)
    )
    (loops,) = kernels(listing).values()
    assert [(len(loop.names), loop.multiply_adds) for loop in loops] == [(7, 6), (8, 7)]
    assert list(kernels(listing)) == ["_Zboth"]


def test_the_multiply_adds_of_a_pair():
    twelve = Loop(("FFMA R1",) * 12)
    assert pairs_of("KeyPass<float, HardThreshold<float>, 4", twelve) == 1
    assert pairs_of("RowPass<float, HardThreshold<float>, 4", twelve) == 1.5
    assert pairs_of("Forward<double, SoftThreshold<double>, 4", twelve) == 2
    assert pairs_of("Forward<float, HardThreshold<float>, 0, true, false>", twelve) == 3
    seven = Loop(("FFMA R1",) * 7)
    assert pairs_of("Forward<float, HardThreshold<float>, 0, false, true>, a part", seven) == 1


def test_a_loop_that_stages_is_none_over_pairs():
    assert kernels(LISTING.replace("LDS.128 R4, [R0]", "STS.128 [R0], R4"))["_Zgather"] == []


def test_reciprocals_are_the_pairs_of_the_gate():
    loop = Loop(("FFMA R1", "MUFU.RCP R2", "MUFU.RCP R3"))
    gate = "KeyPass<float, InverseGate<float>, 4"
    assert pairs_of(gate, loop) == 2
    assert pairs_of(gate, Loop(("FFMA R1", "MUFU.EX2 R2"))) is None


def test_tensor_cores_multiply_all_but_the_score():
    step = Loop(("FFMA R1",) * 8 + ("HMMA.16816.F32.BF16 R4",) * 24 + ("LDS.128 R8",))
    assert step.products == 24
    assert pairs_of("Forward<float, HardThreshold<float>, 32, true", step) == 4


def test_loops_beside_those_of_tensor_cores_are_none_over_pairs():
    adds = ["FFMA R1, R2, R3, R1"] * 6
    code = [*adds, "@P0 BRA 0x0", *adds, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA 0x70"]
    listing = "\n\t\tFunction : _Zboth\n" + "".join(
        f"        /*{16 * place:04x}*/ {text} ;\n" for place, text in enumerate(code)
    )
    assert [loop.products for loop in kernels(listing)["_Zboth"]] == [1]


def test_a_listing_without_code_has_no_loop():
    assert innermost_loops("") == []
