"""Measure the source against the project's conventions: sizes, signatures, vocabulary.

``python -m tests.conventions [PATH...]`` lists what breaks them, below the given paths.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("bragg_data", "bragg_models", "catalog", "pipelines")

# Words for which the field has plainer ones; see the glossary in CONTRIBUTING.md.
NAME_WORDS = frozenset(
    [
        "told",
        "tell",
        "tells",
        "says",
        "found",
        "kept",
        "made",
        "given",
        "asked",
        "wanted",
        "one",
        "own",
        "others",
        "beside",
        "anew",
        "learnt",
        "whose",
        "nuisance",
        "glance",
        "settle",
        "crown",
        "crowned",
        "verdict",
        "verdicts",
        "sureness",
        "swollen",
        "overlay",
        "overlays",
        "lebail",
        "trials",
        "tried",
    ]
)
NAMES_ALLOWED = frozenset({"one_hot", "given", "__all__"})  # hypothesis.given
TEXT_WORDS = re.compile(
    r"\b(told|tells|anew|learnt|beside|nuisance|glance|settles?|crown(?:ed|s)?|verdicts?|sureness|"
    r"swollen|overlays?|lebail|by whom|so many|how sure)\b",
    re.IGNORECASE,
)
FILE_LINES = 400
COMMAND_LINES = 150
PARAMETERS = 6


class Breach(NamedTuple):
    """A place that breaks a convention."""

    kind: str
    path: str
    line: int
    text: str


def tracked(*suffixes: str) -> list[Path]:
    """Return the files of the repository, as git lists them, with one of the suffixes."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = (ROOT / name for name in listed.stdout.splitlines())
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def is_command(path: Path) -> bool:
    """Tell whether a file is a command: a module directly in pipelines/."""
    return path.parent == ROOT / "pipelines"


def breaches(paths: Sequence[Path]) -> Iterator[Breach]:
    """Yield all breaches in Python and text files."""
    for path in paths:
        name = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            yield from breaches_of_source(name, path, text)
        elif path.suffix in (".md", ".html", ".js"):
            yield from _words(name, enumerate(text.splitlines(), 1))


def breaches_of_source(name: str, path: Path, text: str) -> Iterator[Breach]:
    """Yield the breaches of a Python file."""
    lines = text.count("\n")
    if name.startswith(PACKAGES):
        limit = COMMAND_LINES if is_command(path) else FILE_LINES
        if lines > limit:
            yield Breach("length", name, lines, f"{lines} lines, at most {limit}")
        yield from _signatures(name, path, ast.parse(text))
        for number, line in enumerate(text.splitlines(), 1):
            if "dict[str, Any]" in line:
                yield Breach("dict[str, Any]", name, number, line.strip())
    for number, line in enumerate(text.splitlines(), 1):
        if "fmt: skip" in line and path != Path(__file__):
            yield Breach("fmt: skip", name, number, line.strip())
    if path == Path(__file__):
        return
    deprecated = {n for n, line in enumerate(text.splitlines(), 1) if "deprecated" in line}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        number = token.start[0]
        if number in deprecated:
            continue
        if token.type == tokenize.NAME and token.string.endswith("NotFoundError"):
            continue  # of Python and of libraries
        if token.type == tokenize.NAME and token.string not in NAMES_ALLOWED:
            words = set(re.split(r"_|(?<=[a-z])(?=[A-Z])", token.string.strip("_")))
            if {word.lower() for word in words} & NAME_WORDS:
                yield Breach("name", name, number, token.string)
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from _words(name, enumerate(token.string.splitlines(), number))


def _words(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Breach]:
    for number, line in lines:
        if "deprecated" in line:  # an alias that an older campaign file or script may still use
            continue
        for match in TEXT_WORDS.finditer(line):
            yield Breach("word", name, number, f"{match[0]}: {line.strip()[:80]}")


def _signatures(name: str, path: Path, tree: ast.Module) -> Iterator[Breach]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        options = is_command(path) and ("command" in decorators or node.name == "main")
        if "kernel" in decorators or options:
            continue
        arguments = node.args
        names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len([n for n in names if n not in ("self", "cls")])
        if count > PARAMETERS:
            yield Breach("parameters", name, node.lineno, f"{node.name} takes {count}")


def main() -> int:
    """Print the breaches below the given paths, and how many there are of each kind."""
    below = [Path(p).resolve() for p in sys.argv[1:]] or [ROOT]
    paths = [
        path
        for path in tracked(".py", ".md", ".html", ".js")
        if any(path == b or b in path.parents for b in below)
    ]
    found = list(breaches(paths))
    for breach in found:
        print(f"{breach.path}:{breach.line}: {breach.kind}: {breach.text}")
    counts = {k: sum(b.kind == k for b in found) for k in sorted({b.kind for b in found})}
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
