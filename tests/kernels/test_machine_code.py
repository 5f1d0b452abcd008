"""What `scripts/compile_kernels.py` finds in the machine code of a kernel for sm_90."""

import pytest

pytest.importorskip("triton")

from compile_kernels import written_in_flight

# A product whose left operand is unpacked in registers R88 to R91, step by step.
LOOP = """
.L_x_1:
        /*12a0*/                   DEPBAR.LE SB0, 0x3 ;
        /*12b0*/                   LDS.U16 R4, [R89+UR4] ;
        /*12c0*/                   {write} ;
        /*12d0*/                   WARPGROUP.ARRIVE ;
        /*12e0*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0 ;
        /*12f0*/                   WARPGROUP.DEPBAR.LE gsb0, {staying} ;
        /*1300*/              @P2 BRA `(.L_x_1) ;
        /*1310*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1320*/                   MOV R88, R24 ;
        /*1330*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("write", "staying", "count"),
    [
        ("PRMT R88, R4, 0x5410, R5", "0x0", 0),  # waited for before the next step writes
        ("PRMT R88, R4, 0x5410, R5", "0x1", 2),  # in the second trip and in the third
        ("PRMT R91, R4, 0x5410, R5", "0x1", 2),
        ("LDS.64 R87, [R5]", "0x1", 2),  # two registers, the second of them
        ("LDS.128 R84, [R5]", "0x1", 0),
        ("PRMT R92, R88, 0x5410, R5", "0x1", 0),  # reads them
        ("STS [R88], R4", "0x1", 0),
        ("ISETP.GE.AND P0, PT, R88, R4, PT", "0x1", 0),
    ],
)
def test_writes_to_an_operand_in_flight_are_counted(write: str, staying: str, count: int) -> None:
    assert written_in_flight(LOOP.format(write=write, staying=staying)) == count


def test_an_operand_that_shared_memory_holds_is_in_no_register() -> None:
    code = LOOP.format(write="MOV R88, R4", staying="0x1")
    assert written_in_flight(code.replace("R24, R88, gdesc", "R24, gdesc[UR8], gdesc")) == 0


def test_each_group_in_flight_counts() -> None:
    """Two may stay: what the step before the last one reads is written as well."""
    code = LOOP.format(write="PRMT R88, R4, 0x5410, R5", staying="0x2")
    assert written_in_flight(code) == 2
