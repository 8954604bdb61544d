"""How text and numbers are shown, in the terminal and on pages alike."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with line ends shown as ⏎ and every other unprintable character as �."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "�" for c in text)


def percent(value: float) -> str:
    """0.0667 is "6.7 %"; only 0 is "0 %"."""
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def number(value: float | None) -> str:
    """Four significant digits, with thousands separated; "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def lines(text: str) -> str:
    """Text whose line ends stay and whose other unprintable characters show."""
    return "\n".join(visible(line) for line in text.split("\n"))
