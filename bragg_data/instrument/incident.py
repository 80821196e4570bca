"""The incident spectrum that an instrument file of GSAS states."""

from dataclasses import dataclass

import numpy as np

from bragg_data.arrays import Array


@dataclass(frozen=True)
class IncidentSpectrum:
    """Incident intensity over the time of flight, refined on a vanadium run.

    ``kind`` is GSAS's function, 1 (exponentials of powers of the time), 2 (a Maxwell term and
    exponentials) or 4 (a Maxwell term and Chebyshev polynomials of 2/T − 1); ``coefficients`` are
    its twelve. GSAS Technical Manual, incident spectrum functions; GSASIIpwd.calcIncident.
    """

    kind: int
    coefficients: tuple[float, ...]

    def __call__(self, tof: Array) -> Array:
        """Return the spectrum at times in µs (n,), in any unit; 1 where it is not positive."""
        time, p = np.asarray(tof) / 1000, self.coefficients
        spectrum = np.full_like(time, p[0])
        if self.kind == 1:
            first = 1
        else:
            spectrum += p[1] * np.exp(-p[2] / time**2) / time**5
            first = 3
        if self.kind == 4:
            x = 2 / time - 1
            spectrum += np.polynomial.chebyshev.chebval(x, [0.0, *p[3:12]])
        else:
            for k in range(first, 11, 2):
                spectrum += p[k] * np.exp(-p[k + 1] * time ** ((k + 1) / 2))
        return np.where(spectrum > 0, spectrum, 1.0)


def incident_spectrum(kind: int, coefficients: tuple[float, ...]) -> IncidentSpectrum | None:
    """Return a spectrum from GSAS's ITYP and ICOFF; None for a kind that is none of these."""
    if kind not in (1, 2, 4) or len(coefficients) < 12 or not any(coefficients):
        return None
    return IncidentSpectrum(kind, coefficients[:12])
