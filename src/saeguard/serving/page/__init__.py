"""The page at `/`: its files, as they are sent. Plain HTML, CSS and JavaScript; nothing is built or fetched."""

from __future__ import annotations

from importlib.resources import files

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/chart.js": ("chart.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""File and media type by path."""


def content(name: str) -> bytes:
    """A file of the page."""
    return files(__name__).joinpath(name).read_bytes()
