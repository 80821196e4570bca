"""Strict parsers of instrument files: None for what is not the original with other numbers."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d{1,3})?"
KEYS = (
    *("Type", "Bank", "Azimuth", "fltPath", "2-theta", "difC", "difA", "difB", "Zero", "alpha"),
    *("beta-0", "beta-1", "beta-q", "sig-0", "sig-1", "sig-2", "sig-q", "X", "Y", "Z"),
)
FIELDS = (
    *("bank", "flight_path", "two_theta", "difc", "difa", "difb", "tzero", "alpha"),
    *("beta_0", "beta_1", "beta_q", "sig_0", "sig_1", "sig_2", "sig_q", "x", "y", "z"),
)
_HEADING = re.compile(r"#\W*Bank\W*(\d+)\W", re.IGNORECASE)
_FREE = re.compile(r"COMM|  Instrumental|! *(TOF-TWOTH|Tof-min\(us|Scale)| 0\.71| +1234567890")
_COLUMNS = re.compile(  # that are read, in comments of FullProf
    r"job|npr|tof-m\w+|zero|code|dtt.*|2theta.*|(sigma|gamma)-.|(alpha?|beta)[01]|bank|\d+|!",
    re.IGNORECASE,
)
_GEOMETRY = 0.4  # relative difference of difC from that of path and angle, in use nearly to it


def instprm(content: bytes) -> list[tuple[float, ...]] | None:
    """Return the values of the banks of a ``.instprm`` file in the order of FIELDS."""
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError:
        return None
    banks: list[tuple[int, dict[str, str]]] = []
    for line in text.splitlines():
        entry = line.strip().strip(";")
        if match := _HEADING.match(entry):
            banks.append((int(match[1]), {}))
        elif not entry.startswith("#") and entry:
            key, colon, value = (part.strip() for part in entry.partition(":"))
            if banks and not set(KEYS) - set(banks[-1][1]) and banks[-1][1][key] != value:
                banks.append((0, {}))
            if not banks:
                banks.append((0, {}))
            if not colon or banks[-1][1].get(key, value) != value:
                return None
            banks[-1][1][key] = value
    values = []
    for number, entries in banks:
        entries = {"Bank": f"{number}"} | entries if number else entries
        entries.setdefault("Z", "0")  # written since 2019
        entries.setdefault("Azimuth", "0")
        if set(entries) != set(KEYS) or entries["Type"][:3] != "PNT":
            return None
        if any(not re.fullmatch(NUMBER, entries[key]) for key in KEYS[1:]):
            return None
        of_bank = tuple(float(entries[key]) for key in KEYS[1:] if key != "Azimuth")
        if number not in (0, of_bank[0]) or not plausible(of_bank):
            return None
        values.append(of_bank)
    return values or None


def plausible(values: Sequence[float]) -> bool:
    """Return whether constants, in the order of FIELDS, are those of an instrument."""
    v = dict(zip(FIELDS, values, strict=True))
    if not (0 < abs(v["two_theta"]) <= 180 and v["difc"] > 0 and v["alpha"] > 0):
        return False
    sine = abs(math.sin(math.radians(v["two_theta"] / 2)))
    if v["flight_path"] < 0 or (
        v["flight_path"] and abs(v["difc"] / (505.557 * v["flight_path"] * sine) - 1) > _GEOMETRY
    ):
        return False
    d = np.geomspace(0.25 / max(sine, 0.02), 2.5 / max(sine, 0.02), 25)
    variance = v["sig_0"] + v["sig_1"] * d**2 + v["sig_2"] * d**4 + v["sig_q"] * d
    decay = v["beta_0"] + v["beta_1"] / d**4 + v["beta_q"] / d**2
    fwhm = v["x"] * d + v["y"] * d**2 + v["z"]
    terms = v["difa"] * d * d + v["difb"] / d + v["tzero"]
    return bool(
        (variance >= 0).all()
        and (decay > 0).all()
        and (fwhm >= 0).all()
        and (np.abs(terms) < 0.1 * v["difc"] * d).all()
        and max(map(abs, values)) < 1e12
    )


def like(
    original: str, fixed_columns: int = 0, unordered: bool = False
) -> Callable[[bytes], str | None]:
    """Return a function that makes a file canonical, if it is the original with other numbers.

    In each line, numbers behind ``fixed_columns`` may differ; all else has to be the same, but
    for the number of blanks between words and the case of letters outside fixed columns. Titles,
    and words of comments that name no value that is read, may differ. Lines that name what they
    have may be ``unordered``; then comments may be repeated, and those that name nothing be lost.
    """
    patterns = []
    for line in original.splitlines():
        head, rest = line[:fixed_columns], line[fixed_columns:]
        if _FREE.match(line):
            patterns.append(("", re.compile(r".*")))
            continue
        words = [
            f"({NUMBER})"
            if re.fullmatch(NUMBER, word)
            else r"\S+"
            if line.startswith("!") and not _COLUMNS.fullmatch(word)
            else re.escape(word)
            for word in rest.replace("!", "! ").split()
        ]
        pattern = r"\s*" + r"\s+".join(words).replace(r"!\s+", r"!\s*") + r"\s*"
        patterns.append((head.rstrip(), re.compile(pattern, 0 if fixed_columns else re.IGNORECASE)))

    def canonical(content: bytes) -> str | None:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
        lines = re.split("\r\n?|\n", text)
        lines = [line for line in lines if line.strip() and line[0] != "#"]
        if not unordered:  # a line that occurs again holds nothing new
            lines = [line for k, line in enumerate(lines) if not k or line != lines[k - 1]]
        if unordered:
            comments = {line for line in lines if line[0] == "!"}
            lines = [line for line in lines if line not in comments] + sorted(comments)
        elif len(lines) != len(patterns):
            return None
        result = [""] * len(patterns)
        for index in sorted(range(len(patterns)), key=lambda k: patterns[k][1].pattern == ".*"):
            head, pattern = patterns[index]
            of_any = lines if unordered else [lines[index]]
            fitting = (
                x for x in of_any if x[: len(head)] == head and pattern.fullmatch(x[len(head) :])
            )
            line = next(fitting, None)
            if line is None and unordered and pattern.pattern == ".*":
                continue
            if line is None:
                return None
            if unordered:
                lines.remove(line)
            rest = line[len(head) :]
            result[index] = head + (
                " " * (fixed_columns - len(head)) + rest if rest.strip() else ""
            )
        left = unordered and any(line[0] != "!" for line in lines)
        return None if left else "\n".join(result) + "\n"

    return canonical
