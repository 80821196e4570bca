"""Files of columns: time of flight, d-spacing or Q, intensity, and its standard deviation."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bragg_data.measurement.readers import axis, common, gsas
from bragg_data.measurement.readers.checks import RawProfile, checked_profile
from bragg_data.measurement.readers.common import Profile, ProfileError, Reading
from bragg_data.measurement.readers.digits import warnings_of_digits

_COLUMN_NAMES = {
    "tof": {"tof", "tof_us", "time_of_flight", "time-of-flight", "t", "time", "x"},
    "intensity": {"intensity", "y", "yobs", "y_obs", "i", "iobs", "counts", "observed", "obs"},
    "sigma": {
        *("sigma", "e", "err", "error", "esd", "s", "dy", "sig", "uncertainty", "std"),
        *("standard uncertainty", "standard deviation", "standard error"),
    },
    "weight": {"weight", "w"},
}
_NOT_READ = frozenset(
    [
        *("ycalc", "y_calc", "ycal", "calc", "fit", "none"),
        *("bkg", "ybkg", "background", "yback", "bck"),
        *("diff", "difference", "residual", "res", "yobs-ycal", "obs-calc"),
    ]
)
_LONGEST = 500  # characters of a line of names or numbers
_OVERFLOW = re.compile(r"\*+(\s*[\s,;]\s*[-+\d.eE]+)+")  # a number wider than its field
_EDGES = re.compile(r"bin edges|(?:lower|left) edges|edges of bins", re.IGNORECASE)
_CENTRES = re.compile(r"(?:bin |mid)(?:centre|center|point)s?|midpoints", re.IGNORECASE)


def read_columns(lines: Sequence[str], path: Path, bank: int | None, reading: Reading) -> Profile:
    """Return the profile of a file of columns, or raise a ProfileError."""
    comments: list[str] = []
    data: list[tuple[int, str]] = []
    table = None
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if not stripped or stripped[0] in common.COMMENT:
            comments += [stripped] if stripped else []
        elif data or _starts_with_number(stripped):
            if not data and (table := common.table_at_once(lines[number - 1 :])) is not None:
                break
            data.append((number, stripped))
        elif number <= 100:  # a title, or the names of the columns
            comments.append(stripped)
        else:
            break
    gsas.refuse_damaged_record(comments, path)
    if table is None:
        words = _numbers(data, comments, path)
        table = np.array(words, dtype=float)
    else:
        words = [line.split() for line in lines[number - 1 :] if line.strip()]
    width = table.shape[1]
    doubts = _doubts_of_rows(comments, width) + warnings_of_digits(words)
    if any("\xa0" in line and line.lstrip()[:1] not in common.COMMENT for line in lines):
        doubts.append("Numbers are separated by non-breaking spaces: they were read as blanks.")
    if width < 2:
        raise ProfileError(f"{path} has one column; time of flight and intensity are expected.")
    names = _names_of(comments, width)
    named = _named_columns(comments, width)
    index, declared = named or ({"tof": 0, "intensity": 1}, None)
    if named is None and width > 2:
        index["sigma"] = 2
    strange = None
    if named is not None and names is not None:
        unused = (name for k, name in enumerate(names[1]) if k not in index.values())
        strange = [name for name in unused if name not in _NOT_READ]
    doubts += _doubts_of_names(comments, strange, index, width)
    sigma = table[:, index["sigma"]] if "sigma" in index else None
    if "weight" in index and sigma is None:
        weight = table[:, index["weight"]]
        with np.errstate(divide="ignore", invalid="ignore"):
            sigma = np.where(weight == 0, 0.0, 1 / np.sqrt(weight))
        sigma[~np.isfinite(weight)] = np.nan
    header = common.header_from_comments(comments)
    # A density at the given times, as in GSAS-II's exports and FullProf's files. GSAS-II reads
    # these times as lower bin edges, and calibrations refined there on such files contain that.
    text = " ".join([lines[0], *comments])
    edges = bool(reading.bin_edges)
    warnings = tuple(doubts)
    if reading.bin_edges is None and _EDGES.search(text):
        edges = True
        warnings += ("By the file's header its times are bin edges: they were read as such.",)
    known_centres = edges or reading.bin_edges is not None or bool(_CENTRES.search(text))
    raw = RawProfile(
        path=path,
        format="columns",
        x=table[:, index["tof"]],
        intensity=table[:, index["intensity"]],
        sigma=sigma,
        bank=bank,
        title=header.get("title", "") or header.get("comment", "").partition("; ")[0],
        header=header,
        declared=declared or axis.declared_by_header(comments),
        edges=edges,
        # GSAS-II's exports and FullProf's files are over centres.
        maybe_edges=not (known_centres or re.search("ycalc|winplotr", text, re.IGNORECASE)),
        warnings=warnings,
    )
    return checked_profile(raw, reading.x_unit)


def _doubts_of_rows(comments: Sequence[str], width: int) -> list[str]:
    """Warn of lines that are no rows, and look like rows that are damaged or left out."""
    for line in (line for line in comments if len(line) < _LONGEST):
        bare = line.lstrip(common.COMMENT)
        words = _fields(bare)
        numbers = sum(map(_starts_with_number, words))
        rows = len(words) == width and 2 * numbers >= width and (numbers == width or bare == line)
        rows = rows or bool(_OVERFLOW.fullmatch(line))
        if rows or (bare == line and re.fullmatch(r"[^A-DF-Za-df-z]*\d[^A-DF-Za-df-z]*", bare)):
            return [f"A line that looks like a row was left out: {line[:60]!r}."]
    return []


def _doubts_of_names(
    comments: Sequence[str], strange: list[str] | None, index: Mapping[str, int], width: int
) -> list[str]:
    """Warn of columns whose meaning is inferred, or not read; strange names have none."""
    if {"sigma", "weight"} <= index.keys():
        return ["Columns are named as standard deviation and as weight: the former is used."]
    if strange and not {"sigma", "weight"} & index.keys():
        return [
            f"No column is named as standard deviation, and '{strange[0][:20]}' is unknown: that "
            f"of counting statistics is used."
        ]
    like_names = any(
        len(re.split(r"[,;\t]", line)) == width and re.search(r"[A-Za-z]", line)
        for line in comments
        if len(line) < _LONGEST
    )
    if strange is None and width > 2 and (width > 3 or like_names):
        return [
            f"The {width} columns have no names that are known: they were taken as time of flight, "
            f"intensity and its standard deviation."
        ]
    return []


def _fields(line: str) -> list[str]:
    return re.split(r"\s*[,;]\s*|\s+", line.strip().rstrip(",; "))


def _with_decimal_commas(line: str) -> list[str]:
    words = (word.strip(",") for word in re.split(r"[;\s]+", line))
    return [word.replace(",", ".") for word in words if word]


def _starts_with_number(line: str) -> bool:
    try:
        [float(word) for word in _fields(line)]
    except ValueError:
        return False
    return True


def _numbers(
    data: Sequence[tuple[int, str]], comments: Sequence[str], path: Path
) -> list[list[str]]:
    """Return the words of each row, which are numbers, as many in each."""
    if not data:
        raise ProfileError(
            f"{path} holds no numbers. Expected: columns of time of flight in µs, intensity and "
            f"its standard deviation, or a GSAS file with BANK records."
        )
    texts = [text for _, text in data]
    split: Callable[[str], list[str]] = str.split
    if any("," in text or ";" in text for text in texts):
        split = _with_decimal_commas if _has_decimal_commas(texts, comments, path) else _fields
    if split is _fields and len({(text.count(","), text.count(";")) for text in texts}) > 1:
        usual = texts[0].count(","), texts[0].count(";")
        odd = next(text for text in texts if (text.count(","), text.count(";")) != usual)
        raise ProfileError(
            f"{path} separates its numbers in different ways: {texts[0][:40]!r} and {odd[:40]!r}."
        )
    rows: list[list[str]] = []
    for number, text in data:
        row = split(text.replace("_", "?"))  # float() takes 1_0 for 10.
        try:
            for word in row:
                float(word)
        except ValueError as error:
            raise ProfileError(
                f"{path} cannot be read at line {number}: {text[:60]!r} is not numbers."
            ) from error
        if rows and len(row) != len(rows[0]):
            raise ProfileError(f"{path}: {len(row)} columns at line {number}, not {len(rows[0])}.")
        rows.append(row)
    return rows


def _has_decimal_commas(texts: Sequence[str], comments: Sequence[str], path: Path) -> bool:
    """Return whether commas are decimal, not separators; a ProfileError if they may be both."""
    texts = [text.rstrip(",; ") for text in texts]
    words = [w.strip(",") for text in texts for w in re.split(r"[;\s]+", text)]
    inside = [word for word in words if "," in word]
    if not inside:
        return False
    points = any("." in word or "e" in word.lower() for word in words)
    spaced = any(re.search(r",\s", text) for text in texts)
    if not any(re.search(r"[;\s]", text) for text in texts):
        # Nothing else separates columns. Without points "2000,5,10" may be 2000.5 and 10.
        width = inside[0].count(",") + 1
        ambiguous = not points and width > 2 and _names_of(comments, width) is None
        if ambiguous and width == 3 and not _fraction_before(inside):
            ambiguous = False
        decimal = False
    elif points or spaced:
        ambiguous, decimal = not (points and spaced), False
    else:
        grouped = all(re.fullmatch(r"\d{1,3}(,\d{3})+", word) for word in inside)
        ambiguous, decimal = grouped or any(word.count(",") > 1 for word in inside), True
    if ambiguous:
        raise ProfileError(
            f"{path} has commas that may be decimal or separate columns or thousands: "
            f"{next(text for text in texts if ',' in text)[:60]!r}. Write decimal points, or "
            f"separate columns by semicolons."
        )
    return decimal


def _fraction_before(words: Sequence[str]) -> bool:
    """Return whether of three whole numbers the second looks like the decimals of the first."""
    cells = [word.split(",") for word in words if word.count(",") == 2]
    if any(re.fullmatch(r"0\d+", cell[1]) for cell in cells):
        return True
    whole = [(int(b), int(c)) for _, b, c in cells if f"{b}{c}".isdecimal() and len(b + c) < 30]
    # As counts and their standard deviation the second is the larger one.
    return sum(c > b for b, c in whole) > len(whole) / 2


def _names_of(candidates: Sequence[str], width: int) -> tuple[str, list[str]] | None:
    """Return the line of column names, as many as columns, and the names without their units."""
    for line in reversed(candidates):
        bare = re.sub(r"\([^()]*\)|\[[^][]*\]", "", line.strip().lstrip(common.COMMENT))
        by_comma = [name.strip() for name in re.split(r"[,;\t]", bare)]
        names = by_comma if len(by_comma) == width > 1 else _fields(bare)
        names = [name.strip("\"'").lower() for name in names]
        if len(names) != width or any(re.fullmatch(r"[=:\d.+-]+", name) for name in names):
            continue  # such as "2theta = 122.0" before three columns
        known = {name for variants in _COLUMN_NAMES.values() for name in variants}
        if known & set(names) or axis.declared_by_name(names[0]) is not None:
            return line, names
    return None


def _named_columns(
    candidates: list[str], width: int
) -> tuple[dict[str, int], axis.Declared | None] | None:
    """Take the line of column names out of the header's lines; what the axis is by its name."""
    named = _names_of(candidates, width)
    if named is None:
        return None
    line, names = named
    columns = {
        meaning: names.index(matches[0])
        for meaning, variants in _COLUMN_NAMES.items()
        if (matches := [name for name in names if name in variants])
    }
    name = names[columns.get("tof", 0)]
    unit = re.search(rf"(?<!\w){re.escape(name)}\s*([(\[][^)\]]*[)\]])", line, re.IGNORECASE)
    declared = axis.declared_by_name(name + (unit[1] if unit else ""))
    if "tof" not in columns and declared is not None:
        columns["tof"] = 0
        if "intensity" not in columns:
            columns = {"tof": 0, "intensity": 1, **({"sigma": 2} if width > 2 else {})}
    if "tof" not in columns or "intensity" not in columns:
        return None
    candidates.remove(line)
    return columns, declared
