"""Parts of the report's page: style sheet, tables, figures and the frame around them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

Column = tuple[str, bool, Callable[[Mapping[str, Any]], str]]
"""(heading, whether right-aligned, record -> HTML of the cell)."""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2328; line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans",
  sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 80px; }
main.wide { max-width: 1280px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 10px; padding-top: 14px; border-top: 1px solid #e5e7eb; }
h3 { font-size: 15.5px; margin: 26px 0 6px; }
p { margin: 8px 0; max-width: 76ch; }
.quiet { color: #57606a; }
.warn { background: #fff7e6; border-left: 4px solid #E69F00; padding: 10px 14px; margin: 18px 0; }
nav { margin: 18px 0 0; font-size: 14.5px; }
nav a { margin-right: 18px; color: #0072B2; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14.5px; margin: 14px 0; width: 100%;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #57606a; font-size: 13px; vertical-align: bottom;
  border-bottom: 1.5px solid #1f2328; padding: 6px 12px 6px 0; }
td { padding: 6px 12px 6px 0; border-bottom: 1px solid #eceef1; vertical-align: top; }
th.r, td.r { text-align: right; padding-right: 16px; }
td.r { white-space: nowrap; }
tr.total td { border-top: 1.5px solid #1f2328; border-bottom: 0; font-weight: 600; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: 13px; }
pre { background: #f6f8fa; padding: 14px; overflow-x: auto; border-radius: 6px; line-height: 1.45; }
figure { margin: 14px 0 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif !important; }
figcaption { color: #57606a; font-size: 14px; max-width: 84ch; margin-top: 4px; }
.bar { display: inline-block; height: 9px; background: #0072B2; border-radius: 1px; }
details { margin: 12px 0; }
summary { cursor: pointer; color: #0072B2; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 22px; font-size: 14.5px; }
dt { color: #57606a; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { figure, tr { break-inside: avoid; } nav { display: none; } }
"""


def safe(value: Any) -> str:
    """Returns a value as escaped text."""
    return escape(str(value))


def code(value: Any) -> str:
    """Returns a value as escaped text in the type of code."""
    return f"<code>{safe(value)}</code>"


def quiet(html: str) -> str:
    """Returns a paragraph of explanation."""
    return f'<p class="quiet">{html}</p>'


def figure(svg: str | None, caption: str) -> str:
    """Returns an SVG with its caption (HTML), or nothing without an SVG."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


def column_table(
    columns: Sequence[Column],
    records: Iterable[Mapping[str, Any]],
    *,
    total: Sequence[str] | None = None,
) -> str:
    """Returns an HTML table; `total` holds the cells (HTML) of a last row."""

    def cells(tag: str, texts: Iterable[str]) -> str:
        right = [' class="r"' if r else "" for _, r, _ in columns]
        return "".join(f"<{tag}{c}>{t}</{tag}>" for c, t in zip(right, texts, strict=True))

    body = "".join(f"<tr>{cells('td', [to(r) for *_, to in columns])}</tr>\n" for r in records)
    if total is not None:
        body += f'<tr class="total">{cells("td", total)}</tr>\n'
    head = cells("th", [escape(heading) for heading, *_ in columns])
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def cell(value: Any) -> str:
    """Returns a value of any kind as the text of a cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return escape(", ".join(f"{k} {cell(v)}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return escape(", ".join(str(item) for item in value))
    return safe(value)


def record_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a column for each key that any of the records has."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    # JSON files have their keys sorted; what a record is about comes first.
    first = ("stage", "net", "model", "engine", "batch", "batch_size")
    keys.sort(key=lambda key: first.index(key) if key in first else len(first))
    numeric = {k: all(isinstance(r.get(k, 0), int | float | None) for r in records) for k in keys}
    columns: list[Column] = [
        (key.replace("_", " "), numeric[key], lambda r, key=key: cell(r.get(key))) for key in keys
    ]
    return column_table(columns, records)


def as_records(value: Any, name: str) -> list[Mapping[str, Any]]:
    """Returns [{...}] or {name: {...} or number} as records."""
    if isinstance(value, Mapping):
        return [
            {name: key, **(item if isinstance(item, Mapping) else {"value": item})}
            for key, item in value.items()
        ]
    return [item for item in value or [] if isinstance(item, Mapping)]


def document(
    title: str,
    subtitle: str,
    warning: str,
    parts: Sequence[tuple[str, str, str]],
    *,
    wide: bool = False,
) -> str:
    """Returns the whole document; parts are (anchor, heading, HTML), subtitle and warning HTML."""
    main = '<main class="wide">' if wide else "<main>"
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in parts)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{escape(name)}</h2>\n{text}</section>'
        for anchor, name, text in parts
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n<body>{main}\n"
        f'<h1>{escape(title)}</h1>\n<p class="quiet">{subtitle}</p>\n'
        f"{warning}<nav>{links}</nav>\n{body}\n</main></body></html>\n"
    )
