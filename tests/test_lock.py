"""requirements.lock: the versions of constraints.txt, each with hashes, and no registry's host."""

import re

from tests.servers import ROOT


def test_the_lock_has_a_hash_for_each_pinned_package() -> None:
    """Otherwise run make lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if not line.startswith("#")]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert sorted(entry.split()[0] for entry in entries) == sorted(map(str.lower, pinned))
    assert all(re.fullmatch(r"\S+( --hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)
