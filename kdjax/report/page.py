"""Templates filled into pages that need nothing beside themselves."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdjax import console


def fill(template: str, **values: Any) -> str:
    """Return the filled template; whatever is not our own markup is made visible and escaped."""
    environment = Environment(
        loader=PackageLoader("kdjax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else console.visible(value),
    )
    return environment.get_template(template).render(values)
