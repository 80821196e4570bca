"""How the report's pages are rendered: templates, filters and colours."""

from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.cli.style import SYMBOLS, with_uncertainty
from pipelines.report import charts

DIRECTORY = Path(__file__).parent


def new_environment() -> Environment:
    """Return an environment with the pages' templates and common filters."""
    environment = Environment(
        loader=FileSystemLoader(DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    formats = (charts.fixed, charts.probability, charts.significant, charts.space_group)
    environment.filters |= {function.__name__: function for function in formats}
    environment.filters |= {
        "symbol": lambda name: Markup(f'<i class="symbol">{SYMBOLS[name]}</i>'),
        "miller": charts.miller,
        "px": "{:.1f}".format,
        "tick": charts.tick_label,
        "minus": lambda text: text.replace("-", "−"),
        "with_uncertainty": lambda p: with_uncertainty(p.value, p.uncertainty),
    }
    return environment


def both_shades(color: str) -> tuple[str, str]:
    """Return a colour for white pages, and mixed with white until it is bright on a dark one."""
    rgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    for white in np.linspace(0, 1, 21):
        mixed = rgb + (1 - rgb) * white
        linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
        if linear @ (0.2126, 0.7152, 0.0722) > 0.28:
            break
    return color, "#" + "".join(f"{round(255 * v):02x}" for v in mixed)
