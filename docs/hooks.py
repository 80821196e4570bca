"""Pages that are generated from the code when the documentation is built.

A line ``<!-- generate: NAME ARGUMENT… -->`` in a page is replaced by Markdown made from the code:
the commands and their options, the modules and their first lines, the schema of the campaign file.
"""

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("bragg_data", "bragg_models", "catalog", "pipelines")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the markers of a page by what they generate; called by MkDocs."""
    return re.sub(r"<!-- generate: (\S+)((?: \S+)*) -->", _generated, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Write formulas as MathML, which browsers show by themselves, and RST roles as code."""
    html = re.sub(r"<p>\s*\.\. math::\s*(.*?)</p>", _display_formula, html, flags=re.DOTALL)
    html = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _formula, html, flags=re.DOTALL
    )
    html = re.sub(r":math:<code>(.*?)</code>", lambda role: _mathml(role[1], "inline"), html)
    return re.sub(
        r":(?:class|func|mod|meth|data|attr):<code>~?(.*?)</code>", r"<code>\1</code>", html
    )


def _display_formula(paragraph: re.Match[str]) -> str:
    return f"<p>{_mathml(paragraph[1], 'block')}</p>"


def _formula(element: re.Match[str]) -> str:
    return _mathml(element[2], "inline" if element[1] == "span" else "block")


def _mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return convert(unescape(re.sub(r"<.*?>", "", latex)).strip(), display=display)


def _generated(marker: re.Match[str]) -> str:
    return "\n".join(GENERATORS[marker[1]](*marker[2].split()))


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def modules(package: str) -> Iterator[str]:
    """Yield a table of a package's modules, folder by folder, with the first lines of each."""
    yield "| module | what it does |\n| --- | --- |"
    root = ROOT / package
    for path in sorted(root.rglob("*.py"), key=lambda p: (p.parent != root, p.parent, p.name)):
        name = path.relative_to(ROOT)
        if path.name == "__init__.py":
            if path.parent != root:
                yield f"| **`{name.parent}/`** | **{_first_line(path)}** |"
        elif path.name != "__main__.py":
            yield f"| `{name}` | {_first_line(path)} |"


def commands() -> Iterator[str]:
    """Yield the reference of all commands: usage, arguments, options with defaults."""
    import typer.main

    from pipelines.__main__ import commands as first_lines

    for stem, first_line in first_lines().items():
        app = importlib.import_module(f"pipelines.{stem}").app
        name = stem.replace("_", "-")
        yield from _command(f"bragg {name}", typer.main.get_command(app), first_line)


def _command(name: str, command: Any, first_line: str, level: int = 2) -> Iterator[str]:
    """Yield usage and options of a command (a ``typer.core`` object) and of its subcommands."""
    yield f"\n{'#' * level} `{name}`\n\n{first_line}\n"
    help_text = (command.help or "").split("\f")[0].strip()
    if help_text and help_text.rstrip(".") != first_line.rstrip("."):
        yield f"{help_text}\n"
    for key, subcommand in getattr(command, "commands", {}).items():
        yield from _command(f"{name} {key}", subcommand, "", level + 1)
    if hasattr(command, "commands"):
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([name, *(_metavar(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    yield f"```\n{usage}\n```\n"
    rows = [_row(p) for p in [*arguments, *options] if not getattr(p, "hidden", False)]
    if rows:
        yield "| option | default | meaning |\n| --- | --- | --- |"
        yield from rows
        yield ""


def _metavar(argument: Any) -> str:
    label = argument.metavar or f"{argument.name.upper()}{'...' if argument.nargs == -1 else ''}"
    return label if argument.required or label.startswith("[") else f"[{label}]"


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        label = f"`{_metavar(parameter)}`"
    else:
        label = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    plain = default is None or callable(default) or parameter.required or default in (False, (), [])
    shown = "" if plain else f"`{default}`"
    meaning = (parameter.help or "").replace("\n", " ").replace("|", "\\|")
    if panel := getattr(parameter, "rich_help_panel", None):
        meaning = f"{panel}: {meaning}"
    return f"| {label} | {shown} | {meaning} |"


GENERATORS: dict[str, Callable[..., Iterator[str]]] = {"modules": modules, "commands": commands}
