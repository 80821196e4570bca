"""Growth of a data set: which further cells joined it, as a seeded draw and a choice among it."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from bragg_data.arrays import Indices

ATTRIBUTE = "growth"  # of a data set: a JSON list of its growths, the first one first


@dataclass(frozen=True)
class Growth:
    """Samples that joined a data set, of which an earlier tag has the first ones.

    The cells derive from the campaign file: candidates are drawn from its ranges with the seed, and
    some of them were chosen.
    """

    parent: str  # the earlier tag
    parent_content_hash: str
    parent_samples: int
    where: str  # by which rule they were chosen: random, uncertain, wrong or measured
    model: str  # the model that rated the candidates: its address and run; empty if none
    profiles: str  # SHA-256 of the measured profiles that attracted them; empty if none
    seed: int
    candidates: int  # that were drawn
    chosen: str  # which of them: a bit for each, deflated, in base64

    @property
    def rows(self) -> Indices:
        """The candidates that were chosen, in increasing order, shape (n,)."""
        bits = np.frombuffer(zlib.decompress(base64.b64decode(self.chosen)), np.uint8)
        return np.flatnonzero(np.unpackbits(bits))

    @property
    def draw(self) -> Mapping[str, int | str]:
        """What the cells depend on, next to the campaign file."""
        names = ("parent_samples", "seed", "candidates", "chosen")
        return {name: getattr(self, name) for name in names}

    @property
    def facts(self) -> Mapping[str, str]:
        """What a reader wants to know of it."""
        facts = {"grown from": self.parent, "where": self.where, "model": self.model}
        facts |= {"samples": f"{len(self.rows):,} of {self.candidates:,}", "seed": str(self.seed)}
        return {name: value for name, value in facts.items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return a growth from its JSON values."""
        return cls(**values)


def chosen_text(rows: Indices, candidates: int) -> str:
    """Return the text of :attr:`Growth.chosen`."""
    bits = np.zeros(candidates, np.bool_)
    bits[rows] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode("ascii")


def growths_of(text: str) -> tuple[Growth, ...]:
    """Return the growths of the text of an attribute, which is empty where there are none."""
    return tuple(Growth.from_json(values) for values in json.loads(text or "[]"))


def growth_text(growths: tuple[Growth, ...]) -> str:
    """Return the text of the attribute."""
    return json.dumps([asdict(growth) for growth in growths]) if growths else ""


def drawn_content_hash(content_hash: str, growth: str) -> str:
    """Return the content hash of the data set before its first growth: the test samples are its.

    Of a data set's own hash and the text of its growths.
    """
    growths = growths_of(growth)
    return growths[0].parent_content_hash if growths else content_hash
