"""What becomes of every file in ../shared/data/oddities: usable with these findings, or set aside for this reason."""

from pathlib import Path

import pytest

from models.ct.decode import read_hu
from models.ct.reasons import Reason
from models.ct.series import read_series

CORNERSTONE = "cornerstone/CTImage.dcm"
ONE = {"single_slice"}
# name -> codes of the findings, or the reason it is set aside for
ODDITIES: dict[str, set[str] | Reason] = {
    CORNERSTONE: ONE,
    f"{CORNERSTONE}_BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2.dcm": ONE,
    f"{CORNERSTONE}_DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99.dcm": ONE,
    f"{CORNERSTONE}_JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90.dcm": ONE,
    f"{CORNERSTONE}_JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91.dcm": {*ONE, "lossy_source"},
    f"{CORNERSTONE}_JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80.dcm": ONE,
    f"{CORNERSTONE}_JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81.dcm": {*ONE, "lossy_source"},
    f"{CORNERSTONE}_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": {*ONE, "lossy_source"},
    f"{CORNERSTONE}_JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70.dcm": ONE,
    f"{CORNERSTONE}_JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57.dcm": ONE,
    f"{CORNERSTONE}_JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50.dcm": {*ONE, "lossy_source"},
    f"{CORNERSTONE}_JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm": {*ONE, "lossy_source"},
    f"{CORNERSTONE}_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": {*ONE, "lossy_source"},
    f"{CORNERSTONE}_LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1.dcm": ONE,
    f"{CORNERSTONE}_LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2.dcm": ONE,
    f"{CORNERSTONE}_RLELosslessTransferSyntax_1.2.840.10008.1.2.5.dcm": ONE,
    "cornerstone/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": {"unit_unspecified", "lossy_source"},
    "misc/covid19-ny-sbu_A002304_axial.dcm": ONE,
    "misc/covid19-ny-sbu_A002304_coronal.dcm": Reason.NOT_AXIAL,
    "misc/dcmqi_ct3slice_01.dcm": ONE,
    "misc/dcmqi_ct3slice_02.dcm": ONE,
    "misc/dcmqi_ct3slice_03.dcm": ONE,
    "misc/dcmqi_ct3slice_SEG_liver.dcm": Reason.NOT_CT,
    "misc/tcga-ucec_D1-A0ZP_topogram.dcm": Reason.LOCALIZER,
    "pydicom/bad_sequence.dcm": Reason.INVALID_UID,  # its UIDs are hexadecimal hashes
    "pydicom/eCT_Supplemental.dcm": {"unit_unspecified"},
    "pydicom/explicit_VR-UN.dcm": ONE,
    # anonymised by emptying all three UIDs
    **{
        f"totalseg_ct20/CT.1.3.12.2.1107.5.1.4.60064.300000221208081134280000165{number}": Reason.INVALID_UID
        for number in range(73, 93)
    },
}


@pytest.mark.parametrize("name", ODDITIES)
def test_every_oddity_has_its_outcome(data: Path, name: str):
    series = read_series([data / "oddities" / name])

    if isinstance(expected := ODDITIES[name], Reason):
        assert [each.reason for _, each in series.set_aside] == [expected]
        assert series.slices == ()
    else:
        assert {each.code for each in series.verdict().findings} == expected
        for each in series.slices:
            assert read_hu(each.path, each.frame).shape == (each.rows, each.columns)


def test_no_oddity_is_left_out_of_the_table(data: Path):
    folder = data / "oddities"

    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(ODDITIES)
