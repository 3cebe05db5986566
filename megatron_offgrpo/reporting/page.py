"""The pieces of a self-contained HTML page."""

from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { --ink: #1c2430; --soft: #4a5565; --line: #dde2e9; --paper: #ffffff; --tint: #f5f7fa; --good: #0b6e4f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; }
h2 { font-size: 19px; margin: 38px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; max-width: 80ch; }
.verdict { font-size: 17px; max-width: 72ch; }
.soft { color: var(--soft); }
.notice { background: #fff6e5; border-left: 4px solid #c8791b; padding: 8px 14px; margin: 14px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 4px; }
.tile { background: var(--tint); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px 18px; }
svg { width: 100%; height: auto; display: block; }
figure { margin: 0; }
figure.wide { max-width: 820px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
td.number, th.number { text-align: right; }
code, pre, .mono { font: 13px/1.45 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.example { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 10px 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 8px; }
.pair > div { background: var(--tint); border-radius: 6px; padding: 8px 12px; white-space: pre-wrap;
              overflow-wrap: anywhere; }
.right { color: #0b6e4f; font-weight: 600; }
.wrong { color: #b3372f; font-weight: 600; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
@media print { details { display: block; } }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A headed section; empty where all its parts are."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Figures in large type: (value, what it is)."""
    cells = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in items)
    return f'<div class="tiles">{cells}</div>' if items else ""


def figure(svg: str, caption: str, *, wide: bool = False) -> str:
    """A plot with a text for readers that do not see it; empty where there is no plot."""
    if not svg:
        return ""
    css = ' class="wide"' if wide else ""
    return f'<figure{css} role="img" aria-label="{escape(caption)}">{svg}</figure>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, number_columns: Sequence[int] = ()) -> str:
    """A table of plain texts."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{escape(value)}</{tag}>'
            if column in number_columns
            else f"<{tag}>{escape(value)}</{tag}>"
            for column, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if any(header) else ""
    return f"<table>{head}<tbody>{body}</tbody></table>" if body else ""


def details(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""
