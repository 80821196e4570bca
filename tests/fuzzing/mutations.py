"""Damage of text files as it happens: on the way, in editors, in spreadsheets, by cut and paste."""

import random
import re
from collections.abc import Callable

_NUMBER = re.compile(rb"\d+\.?\d*|\.\d+")
_WORD = re.compile(rb"[^\s,;:]+")
_UNITS = (b"us", b"ms", b"s", b"d", b"Q", b"deg", b"tof", b"TOF", b"Angstrom", b"\xc2\xb5s", b"K")
_STRANGE = (b"nan", b"inf", b"-", b"?", b".", b"*" * 8, b"0", b"-1", b"1e9", b"1_0", b"", b"1.2.3")
_INSERTED = b"0123456789.,-+eE*;:#!\"'()?_ \t\n\r\x0c\x1axBN\xe9\xb5"


def _span(content: bytes, rng: random.Random, longest: int) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.randint(1, longest))


def _match(content: bytes, rng: random.Random, pattern: re.Pattern[bytes]) -> tuple[int, int]:
    matches = list(pattern.finditer(content))
    return rng.choice(matches).span() if matches else (0, 0)


def _delete(content: bytes, rng: random.Random) -> bytes:
    a, b = _span(content, rng, rng.choice([1, 1, 2, 12, 200]))
    return content[:a] + content[b:]


def _duplicate(content: bytes, rng: random.Random) -> bytes:
    a, b = _span(content, rng, rng.choice([1, 1, 2, 12, 200]))
    return content[:b] + content[a:b] + content[b:]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([rng.choice(_INSERTED)]) + content[at:]


def _digit(content: bytes, rng: random.Random) -> bytes:
    a, b = _match(content, rng, re.compile(rb"\d"))
    return content[:a] + b"%d" % rng.randrange(10) + content[b:]


def _lines(change: Callable[[list[bytes], random.Random], None]) -> "_Mutation":
    def mutation(content: bytes, rng: random.Random) -> bytes:
        lines = content.splitlines(keepends=True)
        change(lines, rng)
        return b"".join(lines)

    return mutation


def _delete_lines(lines: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(lines))
    del lines[at : at + rng.choice([1, 1, 1, 3, 10])]


def _duplicate_lines(lines: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(lines))
    lines[at:at] = lines[at : at + rng.choice([1, 1, 1, 3, 10])]


def _swap_lines(lines: list[bytes], rng: random.Random) -> None:
    a = rng.randrange(len(lines))
    b = rng.choice([(a + 1) % len(lines), rng.randrange(len(lines))])
    lines[a], lines[b] = lines[b], lines[a]


def _swap_words(lines: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(lines))
    words = list(_WORD.finditer(lines[at]))
    if len(words) > 1:
        k = rng.randrange(len(words) - 1)
        (a, b), (c, d) = words[k].span(), words[k + 1].span()
        line = lines[at]
        lines[at] = line[:a] + line[c:d] + line[b:c] + line[a:b] + line[d:]


def _separators(content: bytes, rng: random.Random) -> bytes:
    old = rng.choice([rb"[ \t]+", rb",", rb";", rb" "])
    new = rng.choice([b"\t", b",", b";", b", ", b"; ", b" ", b"  ", b""])
    return re.sub(old, new, content, count=rng.choice([0, 0, 1, 5]))


def _decimal_commas(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return re.sub(rb"(\d)\.(\d)", rb"\1,\2", content)
    at = rng.randrange(len(content))
    return content[:at] + re.sub(rb"(\d)\.(\d)", rb"\1,\2", content[at:], count=1)


def _encoding(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("latin-1")
    return rng.choice(
        [
            lambda: b"\xef\xbb\xbf" + content,
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-16-be"),
            lambda: content.replace(b"\n", b"\r\n"),
            lambda: content.replace(b"\n", b"\r"),
            lambda: content.replace(b" ", b"\xa0", rng.choice([-1, 1])),
            lambda: content.replace(b" ", b"\xc2\xa0", rng.choice([-1, 1])),
            lambda: content.replace(b"-", "−".encode(), rng.choice([-1, 1])),
            lambda: content.replace(b"\n", "\n# Å µ\n".encode(), 1),
        ]
    )()


def _header(content: bytes, rng: random.Random) -> bytes:
    """Damage one of the words that begin with a letter: names, keywords, units."""
    a, b = _match(content, rng, re.compile(rb"[A-Za-z_#][^\s,;:]*"))
    word = content[a:b]
    k = rng.randrange(max(len(word), 1))
    options = [word[:k] + word[k + 1 :], word.swapcase(), b"", word + b"x", b"_" + word]
    return content[:a] + rng.choice(options) + content[b:]


def _unit(content: bytes, rng: random.Random) -> bytes:
    a, b = _match(content, rng, re.compile(rb"(?<![A-Za-z])[A-Za-z\xb5]{1,8}(?![A-Za-z])"))
    return content[:a] + rng.choice(_UNITS) + content[b:]


def _strange_number(content: bytes, rng: random.Random) -> bytes:
    a, b = _match(content, rng, _NUMBER)
    return content[:a] + rng.choice(_STRANGE) + content[b:]


def _sign(content: bytes, rng: random.Random) -> bytes:
    a, _ = _match(content, rng, _NUMBER)
    return (
        content[: a - 1] + content[a:]
        if content[a - 1 : a] in b"-+"
        else (content[:a] + b"-" + content[a:])
    )


_Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: dict[str, _Mutation] = {
    "delete characters": _delete,
    "duplicate characters": _duplicate,
    "insert a character": _insert,
    "flip a bit": _flip,
    "change a digit": _digit,
    "change a sign": _sign,
    "strange number": _strange_number,
    "truncate": _truncate,
    "delete lines": _lines(_delete_lines),
    "duplicate lines": _lines(_duplicate_lines),
    "swap lines": _lines(_swap_lines),
    "swap words": _lines(_swap_words),
    "change separators": _separators,
    "decimal commas": _decimal_commas,
    "encoding": _encoding,
    "damage a word": _header,
    "exchange a unit": _unit,
}


def mutated(content: bytes, rng: random.Random) -> tuple[bytes, tuple[str, ...]]:
    """Return a file with one to three mutations, and their names."""
    names = tuple(rng.choice(list(MUTATIONS)) for _ in range(rng.choice([1, 1, 1, 2, 2, 3])))
    for name in names:
        if content:
            content = MUTATIONS[name](content, rng)
    return content, names
