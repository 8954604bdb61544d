"""Pages are made from templates in this folder, and written whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from saeguard.errors import GuardrailError


def filled(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A template of this folder, with the page's style as `css`. What it names and is not given is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    folder = files("saeguard.report")
    css = Markup((folder / "page.css").read_text("utf-8"))
    return environment.from_string((folder / template).read_text("utf-8")).render(css=css, **values)


def written(text: str, path: str | Path, what: str, error: type[GuardrailError]) -> Path:
    """Write a page or Markdown, and the folder it stands in. Raises `error` where that cannot be done."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")
    except OSError as found:
        raise error(f"cannot write {what} {target}: {found}") from found
    return target
