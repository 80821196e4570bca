"""The real files of ten instruments: what each is recognised as, or why it is refused."""

import re
from pathlib import Path

import pytest

from bragg_data.crystallography.cell import CrystalError
from bragg_data.instrument.instprm import InstrumentError
from bragg_data.measurement.readers import ProfileError
from bragg_data.recognition import recognise
from pipelines.inspection.report import report_of

SHARED = Path(__file__).parents[4] / "shared"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / "real").is_dir(),
        reason="the real files (shared/real, shared/measured) are not on this machine",
    ),
]

# File: kind, format, facility that the file itself names, and numbers of banks (or of phases)
RECOGNISED = {
    "measured/gem_srtio3/GEM.instprm": ("instrument", "GSAS-II .instprm", None, 6),
    "measured/gem_srtio3/SRTIO3_5K.EXP": ("instrument", "GSAS .EXP", None, 4),
    "measured/gem_srtio3/gem05984.gss": ("profile", "GSAS ALT", None, 4),
    "measured/nomad_diamond/NOM_127827.gsa": ("profile", "GSAS FXYE", "SNS", 6),
    "measured/nomad_si640e/bank4_pattern.csv": ("profile", "columns", None, 1),
    "real/hipd_round_robin/6719.dat": ("profile", "GSAS STD", None, 6),
    "real/hipd_round_robin/I22jan99.prm": ("instrument", "GSAS .prm", None, 8),
    "real/hipd_round_robin/corundum.cif": ("structure", "CIF", None, 1),
    "real/hippo_quartzite/14445.gda": ("profile", "GSAS STD", "Lujan", 30),
    "real/hippo_quartzite/hippo_sc_050819_30panel.prm": ("instrument", "GSAS .prm", None, 30),
    "real/imateria_ceo2/imateria.cif": ("profile", "pdCIF", "J-PARC", 1),
    "real/nomad_nano3/GSAS_NaNO3_230C.gsa": ("profile", "GSAS FXYE", "SNS", 6),
    "real/nomad_si/Si_test-1.xye": ("profile", "columns", "SNS", 1),
    "real/powgen_lab6/PG3_17541.gsa": ("profile", "GSAS FXYE", "SNS", 1),
    "real/powgen_lab6/PGHR_60-2015A.prm": ("instrument", "GSAS .prm", "SNS", 6),
    "real/powgen_mn3o4/PG3_20256-2_60K.xye": ("profile", "columns", "SNS", 1),
    "real/powgen_nac/NAC.cif": ("structure", "CIF", None, 1),
    "real/sepd_si/TOF_irf_file.irf": ("instrument", "FullProf .irf", None, 1),
    "real/sepd_si/arg_si.cif": ("structure", "CIF", None, 1),
    "real/sepd_si/arg_si.dat": ("profile", "GSAS ALT", None, 1),
    "real/sepd_si/arg_si.pcr": ("instrument", "FullProf .pcr", None, 1),
    "real/sepd_si/arg_si.xys": ("profile", "columns", None, 1),
    "real/vulcan_steel/435.gda": ("profile", "GSAS FXYE", "SNS", 2),
    "real/vulcan_steel/Vulcan.prm": ("instrument", "GSAS .prm", "SNS", 2),
    "real/wish_nac/55025-5_6raw.gss": ("profile", "GSAS FXYE", "ISIS", 1),
}
OF_CONSTANT_WAVELENGTH = "only time of flight is supported"
REFUSED = {
    "real/constant_wavelength/Er2Ge2O7_op2112_Ge113_2K.gss": OF_CONSTANT_WAVELENGTH,
    "real/constant_wavelength/HB2A_ge113_op2112_Si_cycle866.instprm": OF_CONSTANT_WAVELENGTH,
    "real/constant_wavelength/INST_XRY.PRM": OF_CONSTANT_WAVELENGTH,
    "real/constant_wavelength/PBSO4.CWN": OF_CONSTANT_WAVELENGTH,
    "real/constant_wavelength/PBSO4.XRA": OF_CONSTANT_WAVELENGTH,
    "real/constant_wavelength/inst_d1a.prm": OF_CONSTANT_WAVELENGTH,
    "measured/nomad_si640e/bank4_reflections_Silicon.csv": "list of reflections",
    "real/vulcan_steel/28902sampleenv_chopped_mean.txt": "holds no numbers",
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_what_a_real_file_is(name: str) -> None:
    report = report_of(recognise(SHARED / name))
    contents = report.banks or report.instruments or report.phases or ()
    seen = report.kind, report.format, report.facility, len(contents)
    assert seen == RECOGNISED[name]
    assert all(len(sentence) < 500 for sentence in report.warnings)


@pytest.mark.parametrize("name", REFUSED)
def test_a_real_file_that_is_refused(name: str) -> None:
    with pytest.raises((ProfileError, InstrumentError, CrystalError), match=REFUSED[name]):
        recognise(SHARED / name)


def test_doubts_of_real_files() -> None:
    """A bank with the angle of another one; defaults; calibrations that the profiles name."""
    nitrate = report_of(recognise(SHARED / "real/nomad_nano3/GSAS_NaNO3_230C.gsa"))
    assert any(re.match("Bank 6: .*22.06 m and 2θ 15.1° give difC", w) for w in nitrate.warnings)
    folder = SHARED / "measured" / "nomad_si640e"
    nomad = report_of(recognise(next(folder.glob("*.instprm"))))
    assert any("give difC 12208.3, and the file's is 1439.6" in w for w in nomad.warnings)
    hipd = report_of(recognise(SHARED / "real/hipd_round_robin/6719.dat"))
    assert hipd.banks is not None
    assert [(bank.difc, bank.two_theta) for bank in hipd.banks[:2]] == [
        (5074.11, 151.0),
        (5073.42, -151.0),
    ]
    assert hipd.banks[1].calibration == "I22jan99.prm, bank 2, by its number"
