"""Standards for calibrations: certified or published cells, and their structures."""

from typing import NamedTuple

from bragg_data.crystallography.structure import Phase, phase_on_orthogonal_axes

_DIAMOND = "F d -3 m:2", "{0}1 {0} 0.125 0.125 0.125 {1}"
_LAB6 = "P m -3 m", "La1 La 0 0 0 0.005\nB1 11B 0.1993 0.5 0.5 0.004"
_FLUORITE = "F m -3 m", "Ce1 Ce 0 0 0 0.0035\nO1 O 0.25 0.25 0.25 0.006"


class Standard(NamedTuple):
    """A cubic standard; its structure, or None where a CIF has to be given."""

    a: float  # Å, near room temperature
    su: float  # Å
    origin: str
    space_group: str | None = None
    atoms: str = ""

    def phase(self, name: str) -> Phase | None:
        """Return the structure, in the certified cell."""
        if self.space_group is None:
            return None
        return phase_on_orthogonal_axes(name, self.space_group, (self.a,) * 3, self.atoms)


STANDARDS = {
    "si640e": Standard(
        5.431179, 8e-6, "NIST SRM 640e", _DIAMOND[0], _DIAMOND[1].format("Si", 0.006)
    ),
    "lab6_660b": Standard(4.15689, 8e-6, "NIST SRM 660b (11B)", *_LAB6),
    "ceo2_674b": Standard(5.4113, 1e-4, "NIST SRM 674b", *_FLUORITE),
    "nac": Standard(10.251218, 2e-6, "Na2Ca3Al2F14, published"),
    "diamond": Standard(3.56713, 1e-4, "published", _DIAMOND[0], _DIAMOND[1].format("C", 0.002)),
}
