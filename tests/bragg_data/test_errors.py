"""Reasons that are taken from the errors of other libraries."""

import pytest

from bragg_data.errors import first_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("disk full", "disk full"),
        ("\n  No such table: runs.\n[SQL: SELECT 1]\n", "No such table: runs"),
        ("", "RuntimeError"),
        (" \n\t\n", "RuntimeError"),
        (".", "RuntimeError"),
    ],
)
def test_first_line_of_any_message(message: str, expected: str) -> None:
    assert first_line(RuntimeError(message)) == expected


def test_an_error_without_message_is_named_by_its_class() -> None:
    assert first_line(KeyError()) == "KeyError"
    assert first_line(AssertionError()) == "AssertionError"
