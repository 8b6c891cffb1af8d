"""One HTML file with its pictures inside: what the reports of this project are written with."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { text-align: right; padding: .1rem .7rem; border-bottom: 1px solid #e4e4ea }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace }
figure { margin: 0 } img { max-width: 100% } summary { cursor: pointer } figcaption { color: #55555f; max-width: 60rem }
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
      title: plain text.
      body: HTML.
      style: CSS beside STYLE.

    Returns:
      HTML that needs no other file and no network.
    """
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}{style}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def escape(text: str) -> Html:
    """Plain text as HTML; what is HTML already stays."""
    return text if isinstance(text, Html) else Html(html.escape(text, quote=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] | None = None) -> Html:
    """A table of cells, plain text or Html.

    Args:
      head: of the columns.
      rows: of as many cells each.
      classes: CSS classes of each row.
    """
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for i, row in enumerate(rows):
        kind = f" class='{classes[i]}'" if classes and classes[i] else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return Html(f"<table>{''.join(lines)}</table>")


def figure(name: str, drawn: Figure, caption: str) -> Html:
    """A matplotlib figure with a heading and a caption."""
    return Html(
        f"<h2>{escape(name)}</h2><figure>{picture(drawn, name)}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def picture(drawn: Figure, name: str = "") -> Html:
    """A matplotlib figure."""
    data = io.BytesIO()
    drawn.savefig(data, format="png", dpi=110)
    return _image(data, name)


def photo(pixels: np.ndarray, name: str = "") -> Html:
    """uint8 [H, W, 3] as it is."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="png")
    return _image(data, name)


def _image(data: io.BytesIO, name: str) -> Html:
    content = base64.b64encode(data.getvalue()).decode()
    return Html(f"<img alt='{escape(name)}' src='data:image/png;base64,{content}'>")
