"""What mkdocs is told beyond mkdocs.yml: notebooks become pages, and no page may load anything from another host."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
_ONLY_NAMED = {"canonical", "next", "prev", "alternate"}
"""Relations of a `<link>` that a browser does not fetch."""


def on_files(files: Any, config: Any) -> Any:
    """Add each notebook as a page, pictures beside it, and as a file to download."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        text, resources = MarkdownExporter().from_notebook_node(book)
        for name, content in resources["outputs"].items():
            kept = f"{path.stem}-{name}"
            text = text.replace(f"]({name})", f"]({kept})")
            files.append(File.generated(config, f"notebooks/{kept}", content=content))
        text = text.replace("](../docs/", "](../").replace(".ipynb)", ".md)")
        title, _, rest = text.lstrip().partition("\n")
        note = f"[The notebook itself]({path.name}) (`notebooks/{path.name}`); the tests run it."
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=f"{title}\n\n{note}\n{rest}"))
        files.append(File.generated(config, f"notebooks/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to notebooks, which hold in the repository, become links to their pages."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that loads something from elsewhere.

    Raises:
        PluginError: Names the page and the address.
    """
    foreign = _Loaded.of(output)
    if foreign:
        raise PluginError(f"{page.file.src_uri} loads {foreign[0]}; a page must hold all that it shows")
    return output


class _Loaded(HTMLParser):
    """Collects the addresses on other hosts that a browser would fetch to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @classmethod
    def of(cls, html: str) -> list[str]:
        parser = cls()
        parser.feed(html)
        return parser.found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        address = named.get(_LOADED.get(tag, "")) or ""
        if tag == "link" and (named.get("rel") or "") in _ONLY_NAMED:
            return
        if address.startswith(("http:", "https:", "//")):
            self.found.append(address)
