"""Checks the built site: no page loads anything from elsewhere, and every page and anchor that is linked to is there.

mkdocs checks the links of pages in Markdown. This looks at what a browser is given, links of the navigation, of the
API reference and of the pages of results included.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, by tag and attribute; a link that a reader may follow is none of it.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("object", "data")}
FETCHED_LINKS = {"stylesheet", "preload", "preconnect", "dns-prefetch", "icon", "manifest", "modulepreload"}


class Page(HTMLParser):
    """What one page loads and links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the attributes of one tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        self.loads += [value for name, value in values.items() if (tag, name) in LOADED]
        if tag == "link" and FETCHED_LINKS & set(values.get("rel", "").split()):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


def faults(site: Path) -> list[str]:
    """Return one line for each fault of the site in ``site``."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: no pages"]
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        if path.name == "404.html":  # served at any address, so its links are absolute ones
            continue
        for target in page.loads:
            if urlsplit(target).scheme not in ("", "data") or urlsplit(target).netloc:
                found.append(f"{where}: loads {target[:100]} from elsewhere")
        for target in {*page.loads, *page.links}:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_relative_to(site.resolve()):
                found.append(f"{where}: {target} leaves the site")
            elif not file.is_file():
                found.append(f"{where}: {target} is not there")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                found.append(f"{where}: {target} has no such anchor")
    for sheet in sorted(site.rglob("*.css")):
        if "url(http" in sheet.read_text(encoding="utf-8") or "url(//" in sheet.read_text(encoding="utf-8"):
            found.append(f"{sheet.relative_to(site)}: loads from elsewhere")
    return found


if __name__ == "__main__":
    told = faults(Path(sys.argv[1]))
    print("\n".join(told) if told else "the site loads nothing from elsewhere, and its links lead somewhere")
    sys.exit(1 if told else 0)
