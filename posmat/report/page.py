"""An executed notebook as one HTML file: nbconvert's body in a page that fetches nothing."""

from html import escape
from pathlib import Path

from posmat.measure.files import replacing

# Light and dark by the reader's own setting; lines of a readable length; wide tables scroll.
_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --quiet: #59636e;
  --line: #d1d9e0; --code: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --quiet: #9198a1;
  --line: #3d444d; --code: #151b23; --link: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 58rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
h1, h2 { line-height: 1.25; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.anchor-link { display: none; }
.prompt { display: none; }
pre, code { font: 0.85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { margin: 0; overflow-x: auto; }
.input_area { padding: 0.6rem 0.8rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--code); margin: 0.8rem 0 0.4rem; }
.output_area { padding: 0.2rem 0.8rem; overflow-x: auto; }
.output_png img { background: #fff; max-width: 100%; height: auto; border-radius: 4px; }
table { border-collapse: collapse; border: 0; font-size: 0.85rem;
  font-variant-numeric: tabular-nums; }
th, td { border: 0; border-bottom: 1px solid var(--line); padding: 0.25rem 0.6rem;
  text-align: right; white-space: nowrap; }
tbody th { text-align: left; font-weight: normal; }
"""


def write_page(executed: Path) -> Path:
    """Write `<stem>.html` beside an executed notebook, with its pictures inside."""
    import nbconvert  # takes most of a second to load
    import nbformat
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(executed, as_version=4)
    # Jupyter looks for templates where Python is; pip's --target puts them beside nbconvert.
    beside = [str(Path(nbconvert.__file__).parents[1] / "share/jupyter/nbconvert/templates")]
    exporter = nbconvert.HTMLExporter(
        template_name="basic",
        embed_images=True,
        extra_template_basedirs=beside,
        extra_template_paths=beside,
    )
    body, _ = exporter.from_notebook_node(notebook)
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    colours = (
        f"@media (prefers-color-scheme: light) {{ {light} }} "
        f"@media (prefers-color-scheme: dark) {{ {dark} }} "
        ".highlight, .highlight pre { background: none !important; }"
    )
    heading = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = escape(heading.splitlines()[0].lstrip("# "))
    # What scrolls must be reached with the keyboard too.
    body = body.replace("<pre>", '<pre tabindex="0">')
    page = executed.with_suffix(".html")
    with replacing(page) as temporary:
        temporary.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title} – posmat</title><style>{_CSS}{colours}</style></head>"
            f"<body><main>{body}</main></body></html>\n",
            encoding="utf-8",
        )
    return page
