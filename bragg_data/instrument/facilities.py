"""Neutron sources and their time-of-flight diffractometers, by the names that files contain."""

import re
from typing import NamedTuple


class Diffractometer(NamedTuple):
    """A diffractometer and its neutron source; empty where a file does not name it."""

    name: str
    facility: str


UNNAMED = Diffractometer("", "")


def _key(name: str) -> str:
    return re.sub(r"\W", "", name).lower()


_INSTRUMENTS = {
    "SNS": ("NOMAD", "POWGEN", "VULCAN", "SNAP"),
    "ISIS": ("WISH", "GEM", "POLARIS", "ENGIN-X", "HRPD", "INES", "PEARL", "SANDALS", "NIMROD"),
    "Lujan": ("HIPD", "HIPPO", "NPDF", "SMARTS"),
    "IPNS": ("SEPD", "GPPD"),
    "J-PARC": ("iMATERIA", "SuperHRPD", "TAKUMI", "PLANET", "SPICA", "NOVA"),
}
_SOURCES = {
    "SNS": r"SNS|Spallation Neutron Source",
    "ISIS": r"ISIS",
    "Lujan": r"LANSCE|Lujan|Los Alamos",
    "IPNS": r"IPNS|Intense Pulsed Neutron Source",
    "J-PARC": r"J-?PARC",
}
# These count in any text, words as they are written here; others only as the name of an instrument
# or of its file.
_COINED = ("POWGEN", "ENGIN-X", "HIPD", "SEPD", "iMATERIA", "SuperHRPD")
_WORDS = ("NOMAD", "VULCAN", "POLARIS", "HIPPO")
_NAMES = {
    _key(name): Diffractometer(name, facility)
    for facility, names in _INSTRUMENTS.items()
    for name in names
}
_ANYWHERE = re.compile(rf"(?<![A-Za-z])(?:(?i:{'|'.join(_COINED)})|{'|'.join(_WORDS)})(?![A-Za-z])")
_FIELD = re.compile(
    r"(?:instrument parameter file|IPARM file)\s*:\s*(?:[^\n]{0,200}[\\/])?([A-Za-z0-9-]{2,16})"
    r"|\b(?:instrument(?: name)?|beam ?line|diffractometer)(?:[ \t]*[:=][ \t]*|[ \t]+)"
    r"['\"]?([A-Za-z][\w-]+)"
    r"|^INS\s+\d+\s*INAME\s+(\S+)",
    re.IGNORECASE | re.MULTILINE,
)


def diffractometer_named(text: str) -> Diffractometer:
    """Return the diffractometer and source that a header, or a text file, names.

    A field for it, or the name of an instrument file, counts more than names anywhere in the text.
    Empty where there is none, or several contradict each other.
    """
    fields = [_key("".join(match)) for match in _FIELD.findall(text)]
    named = {_NAMES[key] for key in fields if key in _NAMES}
    if not named:
        named = {_NAMES[_key(match)] for match in _ANYWHERE.findall(text)}
    sources = {
        source
        for source, names in _SOURCES.items()
        if re.search(rf"(?<![A-Za-z])(?:{names})(?![A-Za-z])", text)
    }
    facilities = {d.facility for d in named} or sources
    return Diffractometer(
        named.pop().name if len(named) == 1 else "",
        facilities.pop() if len(facilities) == 1 else "",
    )


def diffractometer_of_file(name: str, text: str) -> Diffractometer:
    """Return the diffractometer that a file's text names, or its own name: GEM_2017.instprm."""
    named = diffractometer_named(text)
    word = re.match(r"[A-Za-z-]+", name)
    return named if named.name or not word else _NAMES.get(_key(word[0]), named)
