"""Pages that need no other file, readable on a desktop and on a phone: tables, figures and pairs as HTML."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #ddd; --accent: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 52rem; color: var(--ink); background: #fff;
       font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
p.lead { margin: .4rem 0 1.5rem; color: var(--soft); }
figure { margin: 1rem 0; }
img { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
table.pairs td { text-align: left; overflow-wrap: anywhere; }
table.pairs td:first-child { width: 12rem; color: var(--soft); }
.scroll td:not(:first-child) { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
small { color: var(--soft); white-space: nowrap; }
pre { padding: .7rem 1rem; overflow-x: auto; background: #f5f5f5; border-left: 3px solid var(--accent); }
.scroll table.prose th, .scroll table.prose td { text-align: left; white-space: normal; vertical-align: top; }
h3 { margin: 1.8rem 0 .4rem; font-size: 1.02rem; }
b.pass { color: #00734f; } b.warning { color: #8a6100; } b.fail { color: #b00020; }
code { overflow-wrap: anywhere; }
@media (max-width: 30rem) {
  body { padding-top: 1rem; }
  table { font-size: .85rem; }
  table.pairs td:first-child { width: 8rem; }
}
"""


def page(title: str, body: str) -> str:
    """Return a whole page; the body is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>{body}</body>
</html>
"""


def figure(image: bytes, caption: str) -> str:
    """Return a picture, PNG or GIF, inside the page, with a caption in plain text."""
    kind = "gif" if image.startswith(b"GIF8") else "png"
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are already HTML, under a head of plain text; wide ones scroll."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>'


def prose(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as `table` does, for cells of text: left-aligned, and broken into lines."""
    return table(head, rows).replace("<table>", '<table class="prose">', 1)


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and plain values as a table of two columns."""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(_plain(v))}</td></tr>" for k, v in values.items())
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lift nested values to the top level."""
    lifted: dict[str, Any] = {}
    for key, value in values.items():
        lifted.update(value if isinstance(value, dict) else {key: value})
    return lifted


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
