"""Files that are no profiles, and may be taken for files of columns: refused by what they are."""

import re
from pathlib import Path

from bragg_data.instrument import fullprof, gsas_iparm
from bragg_data.measurement.readers.common import ProfileError

_HEAD = 1 << 16  # characters that show what a file is
_INSTPRM = re.compile(r"^#GSAS-II instrument parameter|^Type:\s*P[NX][TC]", re.MULTILINE)
_REFLECTIONS = re.compile(r"^[#!'\" \t]*h[\s,;]+k[\s,;]+l\b", re.MULTILINE | re.IGNORECASE)


def refuse_other_kinds(text: str, path: Path) -> None:
    """Raise a ProfileError if a text is an instrument file or a list of reflections."""
    head = text[:_HEAD]
    if gsas_iparm.recognised(head) or fullprof.recognised(head) or _INSTPRM.search(head):
        raise ProfileError(f"{path} is an instrument file, no profile: give it with --instrument.")
    if _REFLECTIONS.search(head):
        raise ProfileError(
            f"{path} is a list of reflections (h, k, l), not a profile: give the measured points."
        )
