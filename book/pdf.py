"""Print the whole book, built as a single page, to one PDF with an installed Chromium: `make pdf`."""

import sys
import tempfile
from pathlib import Path

from browser import NAMES, Browser, find_chromium

BUILD = Path(__file__).parents[1] / "_build"
PAGE = BUILD / "singlehtml" / "book" / "index.html"
PDF = BUILD / "convnext-book.pdf"
FOOTER = """<div style="width: 100%; text-align: center; font: 8pt sans-serif"><span class="pageNumber"></span></div>"""


def main() -> None:
    program = find_chromium()
    if program is None:
        sys.exit(f"the book is printed by Chromium or Chrome, and none of {', '.join(NAMES)} is installed")
    if not PAGE.is_file():
        sys.exit(f"there is no {PAGE}: run `make pdf`, which builds it")
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        browser.open(PAGE.as_uri(), width=1280)
        PDF.write_bytes(browser.pdf(FOOTER))
    print(f"The book is in {PDF}")


if __name__ == "__main__":
    main()
