"""Print the whole book, built as a single page, to one PDF with an installed Chromium: `make pdf`."""

import sys
import tempfile
from pathlib import Path

from browser import NAMES, Browser, find_chromium

BUILD = Path(__file__).parents[1] / "_build"
SINGLE = BUILD / "singlehtml"
PDF = BUILD / "convnext-book.pdf"
FOOTER = """<div style="width: 100%; text-align: center; font: 8pt sans-serif"><span class="pageNumber"></span></div>"""


def move_up(folder: Path) -> Path:
    """Write the page book/index.html as whole.html, one folder up, from where its pictures and styles are linked."""
    page = folder / "book" / "index.html"
    if not page.is_file():
        sys.exit(f"there is no {page}: run `make pdf`, which builds it")
    moved = folder / "whole.html"
    html = page.read_text(encoding="utf-8").replace('href="book/index.html#', 'href="#')
    moved.write_text(html, encoding="utf-8")
    return moved


def main() -> None:
    program = find_chromium()
    if program is None:
        sys.exit(f"the book is printed by Chromium or Chrome, and none of {', '.join(NAMES)} is installed")
    page = move_up(SINGLE)
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        browser.open(page.as_uri(), width=1280)
        PDF.write_bytes(browser.pdf(FOOTER))
    print(f"The book is in {PDF}")


if __name__ == "__main__":
    main()
