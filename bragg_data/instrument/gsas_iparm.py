"""Instrument files of GSAS: ``.prm`` and ``.iparm``, and the instrument in an ``.EXP`` file.

GSAS Technical Manual (Larson & Von Dreele, LAUR 86-748), instrument parameter file and
time-of-flight profile functions. A negative function has a table of rise and decay over d.
"""

import re
from dataclasses import replace

import numpy as np

from bragg_data.arrays import Array
from bragg_data.instrument import conversion
from bragg_data.instrument.diffractometer import Instrument, InstrumentError, instrument_of_entries
from bragg_data.instrument.incident import IncidentSpectrum, incident_spectrum
from bragg_data.instrument.peak_shape import PeakShape, peak_shape

_RECORD = re.compile(
    r"^(?:INS {3}(?:BANK|HTYPE|FPATH)|(?:INS|HST) [ \d]\d|EXPR {2}HTYP)", re.MULTILINE
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[EDed][-+]?\d+)?(?![.\w])", re.ASCII)
_READ = re.compile(r"BANK$|HTYPE$|FPATH1$|ICONS$|BNKPAR$|I ITYP$|TRNGE$|PRCF(?![2-9])|PAB")
_LETTERS = re.compile(r"\s+[A-Z](?![A-Za-z])")  # flags of an .EXP file
# Records of a bank in instrument files, read or not, and lines that are comments.
_KNOWN = re.compile(
    r"ICONS|BNKPAR|I (ITYP|HEAD)|PRCF[ 1-9]{0,2}|PAB\d[ \d]\d|I(COFF|ECO[FR])\d*|INAME|IRAD|"
    r"[MV]FIL|BAKGD\d*|BNKNAM|BNKTC\d+|OFST.*|DETAZM|DCS.*|DCALIB|ABSCOR|SDS.*"
)
_COMMENT = re.compile(r"\s*(#|!|COMM|ID\b|$)")

# The coefficients of the instrument in each profile function; those of the sample follow.
_COEFFICIENTS = {
    1: ("alpha_0", "alpha", "beta-0", "beta-1", "sig-0", "sig-1", "sig-2"),
    2: ("alpha_0", "alpha", "slow", "switch", "sig-0", "sig-1", "sig-2", "Z", "X", "Y"),
    3: ("alpha", "beta-0", "beta-1", "sig-0", "sig-1", "sig-2", "Z", "X", "Y"),
    4: ("alpha", "beta-0", "beta-1", "sig-1", "sig-2", "Y"),
}
_COEFFICIENTS[5] = _COEFFICIENTS[3]

_Records = dict[str, str]


def recognised(text: str) -> bool:
    """Return whether a text is a file of GSAS, by its records."""
    return bool(_RECORD.search(text))


def read_gsas_banks(text: str, where: str) -> list[conversion.OriginalBank]:
    """Read the banks of a file of GSAS; errors name it as ``where``.

    Raises an InstrumentError if it is of constant wavelength, or lacks or distorts a record.
    """
    # 12 characters name a record: "INS  3 ICONS", "INS   HTYPE ", "HST  3PRCF 1", "EXPR  HTYP1 ".
    general: _Records = {}
    banks: dict[int, _Records] = {}
    doubts = []
    for line in text.splitlines():
        kind, number, name = line[:4], line[4:6].strip(), line[6:12].strip()
        if kind in ("INS ", "HST ") and re.fullmatch("[0-9]+", number):
            records = banks.setdefault(int(number), {})
            if kind == "INS " and not _KNOWN.fullmatch(name):
                doubts.append(f"the record '{line[:12].strip()}' is unknown, and was not read.")
        elif kind in ("INS ", "EXPR"):
            records = general
        else:
            if "BANK" in general and not _COMMENT.match(line):
                doubts.append(f"the line '{line.strip()[:20]}' is no record, and was not read.")
            continue
        if name in records and _READ.match(name):
            doubts.append(f"the record '{line[:12].strip()}' occurs again: the last one was used.")
        records[name] = line[12:]
    kinds = " ".join(general.get(name, "") for name in ("HTYPE", "HTYP1")).split()
    if kinds and not any(kind.startswith("PNT") for kind in kinds):
        reason = "constant wavelength; only time of flight is supported"
        if kinds[0][2:3] != "C":
            reason = "only neutron time of flight (PNT) is supported"
        raise InstrumentError(f"{where} is of type {kinds[0]}: {reason}.")
    if "HTYP1" in general:
        banks = {n: b for n, b in banks.items() if len(kinds) < n or kinds[n - 1].startswith("PNT")}
    banks = {number: banks[number] for number in sorted(banks) if "ICONS" in banks[number]}
    if not banks:
        raise InstrumentError(
            f"{where} is a file of GSAS without constants (ICONS) of any time-of-flight bank. Give "
            f"the instrument parameter file (.prm, .iparm, .instprm)."
        )
    path = _numbers(general.get("FPATH1", ""))
    if re.search(r"^INS ", text, re.MULTILINE):  # not in an .EXP file
        announced = _numbers(general.get("BANK", ""))[:1]
        if announced != [len(banks)]:
            number = f"{announced[0]:g}" if announced else "no number of"
            doubts.append(f"the file announces {number} banks (INS   BANK) and has {len(banks)}.")
        if not kinds:
            doubts.append("the type (HTYPE) is missing: time of flight is assumed.")
        if not path:
            doubts.append("the primary flight path (FPATH1) is missing: the total one is unknown.")
    primary = path[0] if path else None
    return [
        replace(
            _bank(n, records, primary, where, doubts),
            window=_window(records),
            incident=_incident(records),
        )
        for n, records in banks.items()
    ]


def _bank(
    number: int, records: _Records, path: float | None, where: str, doubts: list[str]
) -> conversion.OriginalBank:
    here = f"{where}, bank {number},"
    constants = _numbers(records["ICONS"])
    difc, difa, tzero = (*constants, 0.0, 0.0, 0.0)[:3]
    geometry = _numbers(records.get("BNKPAR", ""))
    if len(geometry) < 2:
        raise InstrumentError(f"{here} lacks flight path and 2θ (BNKPAR).")
    function, names, coefficients, warnings = _profile(number, records, here)
    warnings = [*doubts, *warnings]
    if len(constants) < 3:
        warnings.append(f"bank {number}: ICONS lacks difA or Zero, and zero is used.")
    if not _in_columns(records["ICONS"]):
        warnings.append(f"bank {number}: difC, difA or Zero (ICONS) is not in its columns.")
    if geometry[0] < 0:
        warnings.append(
            f"bank {number}: its flight path of {geometry[0]:g} m (BNKPAR) is negative."
        )
    kind = _numbers(records.get("I ITYP", ""))
    if len(kind) < 4 or not kind[1] < kind[2]:
        warnings.append(f"bank {number}: its window of times (I ITYP) is missing or incomplete.")
    stated = any(any(_numbers(v)) for key, v in records.items() if key.startswith("ICOFF"))
    known = not kind or kind[0] in (0, 1, 2, 4)
    if kind and kind[0] and (stated or not known):
        which = (
            "(ICOFF)" if _incident(records) else f"of type {kind[0]:g} (I ITYP) is not read, and"
        )
        warnings.append(
            f"bank {number}: the incident spectrum {which} was not used; profiles have to be "
            f"divided by it, or by that of vanadium."
        )
    shape = dict(zip(names, coefficients, strict=False))
    alpha_0 = shape.pop("alpha_0", 0.0)
    moderator = alpha_0, shape["alpha"], shape.pop("slow", 0.0), shape.pop("switch", 0.0)
    table = _table(function, records, here)
    if function == 2 or table is not None:
        shape["alpha"] = 1.0  # the moderator's is no rise, and that of a table may be 0
    elif alpha_0 and shape["alpha"] <= 0:
        shape["alpha"] = alpha_0
    values = shape | {
        "fltPath": 0.0 if path is None else path + geometry[0],
        "2-theta": geometry[1],
        "difC": difc,
        "difA": difa,
        "difB": 0.0,
        "Zero": tzero,
    }
    entries = {"Bank": f"{number}", "Type": "PNT"} | {k: repr(v) for k, v in values.items()}
    instrument = instrument_of_entries(entries, number, where, warnings)
    d = _spacings(records, instrument)
    if table is not None:
        return _bank_of_table(instrument, d, table, f"GSAS's table of peak shapes (PAB{function})")
    if function == 2:
        name = "GSAS's profile function 2 (Ikeda-Carpenter)"
        return conversion.bank_of_moderator(replace(instrument, moderator=moderator), d, name)
    if alpha_0:
        original = conversion.peaks_of(instrument.with_parameters(alpha=moderator[1]), alpha_0)
        return conversion.fitted_bank(original, instrument, d, "GSAS's function 1 with alp-0")
    bank = conversion.OriginalBank(instrument, conversion.peaks_of(instrument), d)
    return conversion.with_warnings(bank, instrument.warnings)


def _profile(
    number: int, records: _Records, here: str
) -> tuple[int, tuple[str, ...], list[float], list[str]]:
    """Return the profile function of a bank, its coefficients with their names, and warnings."""
    header = _numbers(records.get("PRCF1", records.get("PRCF", "")))
    if not header:
        raise InstrumentError(f"{here} has no profile function (PRCF).")
    if abs(header[0]) not in _COEFFICIENTS:
        raise InstrumentError(
            f"{here} has the profile function {header[0]:g}; known are 1 to 5 of time of flight."
        )
    function = abs(int(header[0]))
    prefix = "PRCF1" if "PRCF1" in records else "PRCF"
    # "PRCF11", or "PRCF 1" in files of a single function.
    lines = [records.get(f"{prefix}{n}", records.get(f"PRCF {n}", "")) for n in range(1, 10)]
    coefficients = [value for line in lines for value in _numbers(line)]
    names = _COEFFICIENTS[function]
    if len(coefficients) < len(names):
        raise InstrumentError(
            f"{here} has {len(coefficients)} coefficients of profile function {function} where "
            f"{len(names)} are needed."
        )
    warnings = []
    if any(match.end() % 15 for line in lines for match in _NUMBER.finditer(line)):
        warnings.append(f"bank {number}: a coefficient of its profile is not in its columns.")
    announced = header[1] if len(header) > 1 else 0.0
    if not announced <= len(coefficients) < announced + 4:  # lines may be filled up
        warnings.append(
            f"bank {number}: profile function {function} has {len(coefficients)} coefficients, "
            f"another number than its record (PRCF) announces."
        )
    sample = [c for c in coefficients[len(names) :] if c]
    if sample:
        warnings.append(
            f"bank {number}: {len(sample)} coefficients of the sample in profile function "
            f"{function} were left out."
        )
    return function, names, coefficients, warnings


def _table(function: int, records: _Records, here: str) -> Array | None:
    """Return the table of a profile function of negative type: d, shift in µs, rise and decay."""
    if _numbers(records.get("PRCF1", records.get("PRCF", "")))[0] > 0:
        return None
    lines = (records.get(f"PAB{function}{k:2d}", "") for k in range(1, 100))
    rows = [_numbers(line) for line in lines if line.strip()]
    if len(rows) < 4 or {len(row) for row in rows} != {4}:
        raise InstrumentError(
            f"{here} has a negative profile function, {-function}, and needs its table of four "
            f"lines or more (PAB{function}), each of d, shift of T, alpha and beta."
        )
    table = np.array(sorted(rows)).T
    if not (min(table[0, 0], table[2].min(), table[3].min()) > 0 and np.diff(table[0]).min() > 0):
        raise InstrumentError(
            f"{here}: d, alpha and beta of its table (PAB{function}) have to be positive, and d "
            f"different."
        )
    return table


def _bank_of_table(start: Instrument, d: Array, table: Array, name: str) -> conversion.OriginalBank:
    """Return the bank of a table: T = difC d + difA d² + Zero + shift, interpolated as α and β."""
    spacings, shift, rise, decay = table
    low, high = max(d[0], spacings[0]), min(d[-1], spacings[-1])
    if high < 1.5 * low:
        low, high = spacings[0], spacings[-1]
    d = np.geomspace(low, high, len(d))

    def tof(x: Array) -> Array:
        return np.asarray(start.tof_from_d_spacing(x) + np.interp(x, spacings, shift))

    def shape(x: Array) -> PeakShape:
        widths = peak_shape(start, x, size=np.inf, microstrain=0.0)
        return widths._replace(
            rise=np.interp(x, spacings, rise), decay=np.interp(x, spacings, decay)
        )

    return conversion.bank_of_functions(start, d, (tof, shape), name)


def _spacings(records: _Records, instrument: Instrument) -> Array:
    """Return d-spacings in a bank's window of times (ms), or those of usual wavelengths."""
    window = _window(records)
    if window is not None:
        ends = (np.array(window) - instrument.tzero) / instrument.difc
        return conversion.spacings_between(ends, instrument.two_theta)
    return conversion.usual_spacings(instrument.two_theta)


def _window(records: _Records) -> tuple[float, float] | None:
    """Return a bank's window of times in µs; None where it is missing or impossible."""
    window = _numbers(records.get("TRNGE", "")) or _numbers(records.get("I ITYP", ""))[1:3]
    if len(window) != 2 or not 0 <= window[0] < window[1]:
        return None
    return 1000 * window[0], 1000 * window[1]


def _incident(records: _Records) -> IncidentSpectrum | None:
    """Return a bank's incident spectrum; None where it is missing, or of an unknown kind."""
    kind = _numbers(records.get("I ITYP", ""))[:1]
    values = [v for n in "123" for v in _numbers(records.get(f"ICOFF{n}", ""))]
    return incident_spectrum(round(kind[0]), tuple(values)) if kind else None


def _in_columns(record: str) -> bool:
    """Return whether each of the first three fields of ten characters has one number.

    The first two end their fields; behind the third follows a whole number, or nothing.
    """
    record = _LETTERS.split(record, maxsplit=1)[0]
    spans = [match.span() for match in _NUMBER.finditer(record)]
    fields = [start // 10 for start, _ in spans if start < 30]
    aligned = all(end % 10 == 0 for _, end in spans[:2])
    return aligned and fields == [0, 1, 2][: len(spans)] and "." not in record[30:35]


def _numbers(text: str) -> list[float]:
    """Return the numbers of a record, up to its first letter."""
    text = _LETTERS.split(text, maxsplit=1)[0]
    if damaged := _NUMBER.sub(" ", text).split():
        raise InstrumentError(f"{damaged[0][:20]!r} in '{text.strip()[:60]}' is no number.")
    return [float(n.upper().replace("D", "E")) for n in _NUMBER.findall(text)]
