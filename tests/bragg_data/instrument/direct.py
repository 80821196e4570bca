"""Profile functions of GSAS and FullProf by summation on a grid, from their manuals' formulas.

Pulse and resolution are convolved numerically; nothing of the project is used. Times in µs, d in Å.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve

Array = NDArray[np.float64]
Peak = tuple[Array, Array]  # times from the position, and density

_STEPS = 60  # of the grid in the resolution's width


def mixed(variance: float, lorentz: float) -> tuple[float, float]:
    """Full width and Lorentzian share of Thompson, Cox & Hastings (1987), from σ² and Γ."""
    gauss = np.sqrt(8 * np.log(2) * variance)
    terms = (1, 2.69269, 2.42843, 4.47163, 0.07842, 1)
    width = sum(c * gauss ** (5 - k) * lorentz**k for k, c in enumerate(terms)) ** 0.2
    ratio = lorentz / width
    return width, 1.36603 * ratio - 0.47719 * ratio**2 + 0.11116 * ratio**3


def convolved(
    cumulated: Callable[[Array], Array],
    extent: tuple[float, float],
    widths: tuple[float, float],
    cumulated_of_line: Callable[[Array], Array] | None = None,
) -> Peak:
    """A pulse, given by its integral and extent, with a pseudo-Voigt of variance and Γ.

    The Lorentzian part may have another pulse.
    """
    width, share = mixed(*widths)
    low, high = extent[0] - 8 * width, extent[1] + 8 * width
    step = min(width / _STEPS, (high - low) / 4000)
    n = int((high - low) / step) + 1
    t = low + step * np.arange(n)
    x = step * np.arange(-n + 1, n)
    sigma = width / np.sqrt(8 * np.log(2))
    gauss = np.exp(-((x / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
    line = 2 / (np.pi * width) / (1 + (2 * x / width) ** 2)
    parts = ((share, line, cumulated_of_line or cumulated), (1 - share, gauss, cumulated))
    return t, sum(
        part * fftconvolve(of(t + step / 2) - of(t - step / 2), y, mode="valid")
        for part, y, of in parts
    )


def exponentials(
    rates: tuple[float, float], widths: tuple[float, float], *, as_program: bool = False
) -> Peak:
    """GSAS's functions 1 and 3 to 5, FullProf's 9 and 10, of rise and decay, variance and Γ.

    GSAS and GSAS-II compute the Lorentzian part with both exponentials after the position.
    """
    rise, decay = rates

    def pulse(t: Array) -> Array:
        before = decay / (rise + decay) * np.exp(rise * np.minimum(t, 0))
        after = 1 - rise / (rise + decay) * np.exp(-decay * np.maximum(t, 0))
        return np.where(t < 0, before, after)

    def mirrored(t: Array) -> Array:
        late = np.maximum(t, 0)
        return 1 - (decay * np.exp(-rise * late) + rise * np.exp(-decay * late)) / (rise + decay)

    slowest = 20 / min(rates) if as_program else 20 / decay
    return convolved(pulse, (-20 / rise, slowest), widths, mirrored if as_program else None)


def moderator(fast: float, slow: float, share: float, widths: tuple[float, float]) -> Peak:
    """GSAS's function 2 and FullProf's 13, of decay rates and the share of slow neutrons."""
    s = np.linspace(0, 25 / min(fast, slow), 200_001)
    x = (fast - slow) * s
    tail = np.exp(-slow * s) - np.exp(-fast * s) * (1 + x + x * x / 2)
    pulse = (1 - share) * (fast * s) ** 2 * np.exp(-fast * s)
    pulse = fast / 2 * (pulse + 2 * share * fast**2 * slow / (fast - slow) ** 3 * tail)
    total = np.concatenate([[0], np.cumsum((pulse[1:] + pulse[:-1]) / 2) * s[1]])
    return convolved(lambda t: np.interp(t, s, total, left=0), (0.0, s[-1]), widths)


def width_and_maximum(t: Array, y: Array) -> tuple[float, float]:
    """Full width at half maximum, and the position of the maximum (parabola of three points)."""
    top = int(y.argmax())
    half = y[top] / 2
    left = np.interp(half, y[: top + 1], t[: top + 1])
    right = np.interp(-half, -y[top:], t[top:])
    a, b, c = y[top - 1 : top + 2]
    return right - left, t[top] + (t[1] - t[0]) * (a - c) / (2 * (a - 2 * b + c))
