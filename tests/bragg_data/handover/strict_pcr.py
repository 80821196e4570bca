"""A strict reader of FullProf's .pcr files of several patterns, line by line as documented.

FullProf manual, appendix "Detailed description of input files": lines that begin with ! and empty
ones are comments; every other line has a place and a number of values.
"""

from dataclasses import dataclass, field


@dataclass
class Pcr:
    """The values of a .pcr, by pattern and phase."""

    jobs: list[list[int]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    formats: list[int] = field(default_factory=list)  # Ins
    absorptions: list[int] = field(default_factory=list)  # Iabscor
    ranges: list[list[float]] = field(default_factory=list)
    backgrounds: list[list[list[float]]] = field(default_factory=list)
    scatterers: dict[str, float] = field(default_factory=dict)
    positions: list[list[float]] = field(default_factory=list)
    phases: list[dict[str, object]] = field(default_factory=list)


class _Lines:
    def __init__(self, text: str) -> None:
        assert text.isascii()
        self._lines = [
            line for line in text.splitlines() if line.strip() and not line.startswith("!")
        ]

    def text(self) -> str:
        return self._lines.pop(0)

    def numbers(self, count: int) -> list[float]:
        """Return the numbers of a line, which has ``count``; a comment may follow behind !."""
        line = self.text()
        words = line.partition("!")[0].partition("ABS:")[0].split()
        assert len(words) == count, line
        return [float(word) for word in words]

    def integers(self, count: int) -> list[int]:
        values = self.numbers(count)
        assert all(value == int(value) for value in values)
        return [int(value) for value in values]

    def codes(self, count: int) -> None:
        assert self.numbers(count) == [0.0] * count

    @property
    def empty(self) -> bool:
        return not self._lines


def read_pcr(text: str) -> Pcr:
    """Return the values of a .pcr; an AssertionError or ValueError where a line is not its own."""
    lines, pcr = _Lines(text), Pcr()
    assert lines.text().startswith("COMM ")
    words = lines.text().partition("<-")[0].split()
    assert words[0] == "NPATT"
    n = int(words[1])
    assert words[2:] == ["1"] * n
    words = lines.text().split()
    assert words[0] == "W_PAT"
    assert abs(sum(map(float, words[1:])) - 1) < 0.01 * n
    n_phases, _, _, n_refined, *_ = lines.integers(7)
    assert n_refined == 0
    pcr.jobs = [lines.integers(14) for _ in range(n)]
    pcr.files = [lines.text().strip() for _ in range(n)]
    lines.integers(6)
    pcr.formats = [lines.integers(11)[7] for _ in range(n)]
    pcr.absorptions = [int(lines.numbers(3)[2]) for _ in range(n)]
    lines.numbers(6)
    pcr.ranges = [lines.numbers(3) for _ in range(n)]
    for job in pcr.jobs:
        assert job[0] == -1  # neutrons, time of flight
        assert job[3] == 0  # no excluded regions
        pcr.backgrounds.append([lines.numbers(3) for _ in range(job[2])])
        for _ in range(job[4]):
            name, length, imaginary, kind = lines.text().split()
            assert (float(imaginary), int(kind)) == (0.0, 0)
            pcr.scatterers[name] = float(length)
    assert lines.integers(1) == [0]
    pcr.positions = [lines.numbers(9) for _ in range(n)]
    pcr.phases = [_phase(lines, n) for _ in range(n_phases)]
    lines.numbers(3)
    assert lines.empty
    return pcr


def _phase(lines: _Lines, n: int) -> dict[str, object]:
    phase: dict[str, object] = {"name": lines.text().strip()}
    head = lines.numbers(10)
    assert head[1:7] == [0] * 6  # a structure, with a symbol
    phase["atz"] = head[7]
    assert lines.integers(n) == [1] * n
    axes = []
    for _ in range(n):
        assert lines.integers(5)[:2] == [0, 9]
        axes.append(lines.numbers(7)[:3])
    phase["axes"] = axes
    symbol, mark, _ = lines.text().partition("<--Space group symbol")
    assert mark
    phase["space_group"] = symbol.strip()
    atoms = []
    for _ in range(int(head[0])):
        label, kind, *values = lines.text().split()
        assert len(values) == 9
        atoms.append((label, kind, *map(float, values[:5])))
        lines.codes(5)
    phase["atoms"] = atoms
    phase["patterns"] = [_profile(lines) for _ in range(n)]
    return phase


def _profile(lines: _Lines) -> dict[str, object]:
    scale = lines.numbers(7)
    lines.codes(6)
    sigma = lines.numbers(8)
    lines.codes(7)
    gamma = lines.numbers(5)
    lines.codes(5)
    cell = lines.numbers(6)
    lines.codes(6)
    shape = lines.numbers(8)
    lines.codes(8)
    absorption = lines.numbers(4)
    assert absorption[1::2] == [0.0, 0.0]
    return {
        "scale": scale[0],
        "extinction": scale[1],
        "sigma": sigma[:4],
        "gamma": gamma[:3],
        "cell": cell,
        "shape": shape,
        "absorption": absorption[0],
    }
