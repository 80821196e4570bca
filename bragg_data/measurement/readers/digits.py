"""Numbers that are written otherwise than the rest of their column: digits were lost or added."""

from collections import Counter
from collections.abc import Sequence

_FEW = 50  # a share of 1 / this many numbers, at least one, may be odd: more are a way of writing
_LIKE = 3  # others with as many digits before the point, with which a number is compared


def warnings_of_digits(rows: Sequence[Sequence[str]]) -> list[str]:
    """Warn of single numbers with other digits behind the point than the rest of their columns.

    ``rows`` are the words of each. Zeros are left out, and so are columns with exponents, or whose
    digits behind the point vary. Where numbers are rounded to the same length, more digits before
    the point leave fewer behind it: a number is compared with those that have as many before it.
    """
    for number, column in enumerate(zip(*rows, strict=True), start=1):
        if (
            len({len(word.partition(".")[2]) for word in column}) == 1
            or "e" in "".join(column).lower()
        ):
            continue
        words = [word for word in column if word.strip("+-0.")]
        if len(words) == 1 and len(column) > _FEW:
            return [f"In column {number} only {words[0][:30]!r} is not zero: is its row damaged?"]
        parts = [word.lstrip("+-").partition(".") for word in words]
        forms = [(len(before), len(decimals)) for before, _, decimals in parts]
        counts, behind = Counter(forms), Counter(decimals for _, decimals in forms)
        ((usual, most),) = behind.most_common(1) or [(0, 0)]
        if not 0 < len(words) - most <= max(1, len(words) // _FEW):
            continue
        for word, (before, decimals) in zip(words, forms, strict=True):
            if decimals != usual and counts[before, usual] >= _LIKE:
                return [
                    f"The number {word[:30]!r} in column {number} has {decimals} digits behind the "
                    f"point, and the others have {usual}: digits may be missing or doubled."
                ]
    return []
