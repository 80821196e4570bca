"""Numbers, Miller indices and space groups in HTML, as crystallographers write them."""

import re
from collections.abc import Iterable

import numpy as np
from markupsafe import Markup

_THIN = "\u202f"  # between a number and its unit, and between thousands


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Format a number with ``digits`` decimals, a minus sign and spaces between thousands."""
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace(",", _THIN)
    return text.replace("-", "−")


def significant(value: float, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits, without an exponent."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return fixed(value, max(digits - 1 - int(np.floor(np.log10(abs(value)))), 0))


def probability(value: float) -> str:
    """Format a probability; none is shown as 0 or 1."""
    if value > 0.9995:
        return f">{_THIN}0.999"
    return f"<{_THIN}0.001" if value < 0.0005 else f"{value:.3f}"


def miller(hkl: Iterable[int]) -> str:
    """Format Miller indices, negative ones with a bar above."""
    return "\u2009".join("".join(f"{c}\u0305" for c in str(-n)) if n < 0 else str(n) for n in hkl)


def space_group(symbol: str) -> Markup:
    """Format a Hermann-Mauguin symbol: italic letters, bars above, screw axes' indices below."""
    written = ""
    for part in re.findall(r"-\d|[2346][1-5](?=/|\s|:|$)|[A-Za-z]|\d|/", symbol.split(":")[0]):
        if part[0] == "-":
            written += f'<span class="bar">{part[1]}</span>'
        elif len(part) == 2:
            written += f"{part[0]}<sub>{part[1]}</sub>"
        else:
            written += f"<i>{part}</i>" if part.isalpha() else part
    return Markup(written)
