"""The source keeps the project's conventions; ``python -m tests.conventions`` lists breaches."""

from collections import Counter

import pytest

from tests.conventions import ROOT, breaches, breaches_of_source, tracked

ALLOWED = {
    "parameters": 8,  # of the exact evaluator and the simulator: the physics has as many
    "dict[str, Any]": 18,  # at JSON edges
    "fmt: skip": 20,  # signatures of compiled functions
}


@pytest.fixture(scope="module")
def counts() -> Counter[str]:
    return Counter(b.kind for b in breaches(tracked(".py", ".md", ".html", ".js")))


@pytest.mark.parametrize("kind", ["length", "name", "word", *ALLOWED])
def test_no_convention_is_broken(counts, kind):
    assert counts[kind] <= ALLOWED.get(kind, 0)


def test_breaches_are_noticed():
    name = "bragg_data/example.py"
    words = "to" + "ld", "be" + "side"  # which must not stand here themselves
    text = f"def f(a, b, c, d, e, f, g):\n    {words[0]} = a  # {words[1]}\n    return {words[0]}\n"
    kinds = Counter(b.kind for b in breaches_of_source(name, ROOT / name, text + "\n" * 400))
    assert kinds == {"length": 1, "parameters": 1, "name": 2, "word": 1}
