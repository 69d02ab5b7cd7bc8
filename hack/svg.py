"""Shapes and words in SVG, as text, and how wide a word will be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape, quoteattr

FONT = "Inter, Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
NARROW, WIDE = frozenset(" .,:;'|!()[]{}/ijlItfr-"), frozenset("mwMW%@")
Point = tuple[float, float]


def number(value: float) -> str:
    """With one decimal at most: a tenth of a pixel is not seen."""
    return f"{value:.1f}".removesuffix(".0")


def element(tag: str, body: str = "", /, **attributes: str | float) -> str:
    """`font_size=12` becomes `font-size="12"`."""
    given = "".join(f" {key.replace('_', '-')}={value_of(value)}" for key, value in attributes.items())
    return f"<{tag}{given}>{body}</{tag}>" if body else f"<{tag}{given}/>"


def value_of(value: str | float) -> str:
    return quoteattr(value if isinstance(value, str) else f"{value:.5g}")


def rect(x: float, y: float, width: float, height: float, **style: str | float) -> str:
    return element("rect", "", x=x, y=y, width=width, height=height, **style)


def text(x: float, y: float, words: str, size: float = 12, **style: str | float) -> str:
    return element("text", escape(words), x=x, y=y, font_size=size, **style)


def line(points: Iterable[Point], **style: str | float) -> str:
    return element("polyline", "", points=joined(points), fill="none", stroke_linejoin="round", **style)


def area(points: Iterable[Point], **style: str | float) -> str:
    return element("polygon", "", points=joined(points), stroke="none", **style)


def joined(points: Iterable[Point]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)


def group(x: float, y: float, parts: Iterable[str]) -> str:
    """The parts, with (x, y) as their origin."""
    return element("g", "\n".join(parts), transform=f"translate({number(x)},{number(y)})")


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A whole file; `title` is what a screen reader says."""
    whole = [element("title", escape(title)), rect(0, 0, width, height, fill="#f4f5f7"), *parts]
    return (
        element(
            "svg",
            "\n" + "\n".join(whole) + "\n",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {number(width)} {number(height)}",
            role="img",
            font_family=FONT,
        )
        + "\n"
    )


def text_width(words: str, size: float) -> float:
    """About as many pixels as the words take; a sans-serif's own widths are known to the viewer alone."""
    return size * sum(
        0.32 if c in NARROW else 0.88 if c in WIDE else 0.64 if c.isupper() else 0.56 for c in words
    )


def clipped(words: str, size: float, width: float) -> str:
    """Shortened with an ellipsis to fit."""
    if text_width(words, size) <= width:
        return words
    while words and text_width(words + "…", size) > width:
        words = words[:-1]
    return words.rstrip() + "…"
