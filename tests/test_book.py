"""Checks of the built pages, _build/html: run `make book` first. Some need an installed Chromium or Chrome."""

import json
import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
PAGES = sorted(path for path in HTML.rglob("*.html") if "_static" not in path.parts)
LOADED_LINKS = {"stylesheet", "preload", "modulepreload", "icon", "preconnect", "dns-prefetch", "manifest"}
REMOTE = re.compile(r"^(https?:)?//")


WRITTEN = [path for path in PAGES if "_modules" not in path.parts and path != HTML / "index.html"]
CHAPTERS = [path for path in WRITTEN if path.parent.name == "notebooks"]
sys.path.append(str(ROOT / "book"))

import pdf  # noqa: E402
from browser import NAMES, Browser, find_chromium  # noqa: E402


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


@cache
def anchors(path: Path) -> set[str]:
    return {tag[key] for tag in soup(path).find_all(True) for key in ("id", "name") if tag.has_attr(key)}


def name(path: Path) -> str:
    return str(path.relative_to(HTML))


def test_the_book_is_built():
    assert PAGES, f"there are no pages in {HTML}: run `make book`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_loads_nothing_remote(page):
    loaded = [tag["src"] for tag in soup(page).find_all(src=True)]
    loaded += [part.split()[0] for tag in soup(page).find_all(srcset=True) for part in tag["srcset"].split(",")]
    loaded += [tag["href"] for tag in soup(page).find_all("link", href=True) if LOADED_LINKS & set(tag["rel"])]
    loaded += [tag["data"] for tag in soup(page).find_all("object", data=True)]
    assert [address for address in loaded if REMOTE.match(address)] == []
    inline = "".join(tag.text for tag in soup(page).find_all("script", src=False))
    assert re.findall(r"https?://[^\s\"']+\.(?:m?js|css)\b", inline) == []


@pytest.mark.parametrize("sheet", sorted(HTML.rglob("*.css")), ids=name)
def test_a_style_sheet_loads_nothing_remote(sheet):
    assert re.findall(r"(?:url\(\s*|@import\s+)[\"']?(?:https?:)?//[^)\"']+", sheet.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_image_has_alt_text(page):
    for image in soup(page).find_all("img"):
        alt = image.get("alt", "").strip()
        assert alt and "_images/" not in alt, f"{image.get('src')} has alt={alt!r}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_internal_links_lead_somewhere(page):
    missing = []
    for tag in soup(page).select("a[href], link[href], [src]"):
        address = tag.get("href") or tag["src"]
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        fragment = unquote(parts.fragment) if tag.name == "a" else ""
        if not target.is_file() or (fragment and fragment not in anchors(target)):
            missing.append(address)
    assert missing == []


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_colab_button(notebook):
    repository = CONFIG["repository"]
    address = repository["url"].replace("https://github.com/", "https://colab.research.google.com/github/")
    page = HTML / "notebooks" / f"{notebook.stem}.html"
    assert page.is_file(), f"{notebook.name} is not in _toc.yml"
    links = {tag["href"] for tag in soup(page).find_all("a", href=True) if "colab.research" in tag["href"]}
    assert links == {f"{address}/blob/{repository['branch']}/notebooks/{notebook.name}"}


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_plain_markdown_became_numbered_figures_and_internal_links(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    article = soup(HTML / "notebooks" / f"{notebook.stem}.html").select_one("article")
    captions = [caption.get_text(" ", strip=True) for caption in article.select("figure figcaption")]
    assert len(captions) == prose.count("*Figure:") and all(re.match(r"Fig\. \d+ ", text) for text in captions)
    assert not any(text.startswith("Figure:") for text in (tag.get_text() for tag in article.select("p > em")))
    for name in re.findall(r"\]\([\w.]*#(fig-[\w-]+)\)", prose):
        references = {tag.get_text() for tag in article.select(f'a[href$="#{name}"]:not(.headerlink)')}
        assert references and all(re.fullmatch(r"Fig\. \d+", text) for text in references), name
    site = CONFIG["html"]["baseurl"]
    assert [tag["href"] for tag in article.select("a[href]") if tag["href"].startswith(site)] == []


def test_the_bibliography_has_readable_labels():
    labels = [tag.get_text() for tag in soup(HTML / "book" / "bibliography.html").select(".citation .label")]
    entries = (ROOT / "book" / "references.bib").read_text().count("\n@") + 1
    assert len(labels) == entries and "[He et al., 2016a]" in labels


def test_mathematics_is_drawn_by_the_local_script():
    assert (HTML / CONFIG["sphinx"]["config"]["html_static_path"][0].replace("book/", "") / "mathjax").is_dir()
    for page in PAGES:
        if soup(page).select(".math"):
            scripts = [tag["src"] for tag in soup(page).find_all("script", src=True)]
            assert any("_static/mathjax/tex-svg.js" in script for script in scripts), name(page)


def test_one_search_bar():
    for page in PAGES:
        buttons = soup(page).select(".search-button-field")
        assert len(buttons) <= 1, name(page)


def test_the_reference_covers_every_module():
    page = (ROOT / "book" / "api.md").read_text()
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "convnext_min").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in files if path.name != "__main__"}
    assert set(re.findall(r"automodule:: ([\w.]+)$", page, re.MULTILINE)) == modules - {"convnext_min"}


def test_the_architecture_page_lists_every_file_with_a_sentence():
    lines = [item.get_text(" ", strip=True) for item in soup(HTML / "book" / "architecture.html").select("li")]
    for path in (ROOT / "convnext_min").rglob("*.py"):
        if not path.stem.startswith("__"):
            assert any(re.match(rf"{re.escape(path.name)} ?: ?\S+ \S+", line) for line in lines), path.name


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_a_page_fits_its_window_and_works_without_a_network(browser, page, width):
    browser.open(page.as_uri(), width)
    assert browser.sideways() == []
    assert browser.remote_requests() == []
    assert browser.errors() == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_a_page_is_accessible(browser, page):
    browser.open(page.as_uri(), 1280)
    assert browser.violations() == []


@pytest.mark.parametrize("page", CHAPTERS, ids=name)
def test_80_characters_of_code_fit_the_column(browser, page):
    browser.open(page.as_uri(), 1280)
    browser.evaluate("document.querySelectorAll('article details').forEach(fold => fold.open = true)")
    cut = """[...document.querySelectorAll("article .cell_input pre")].filter(pre => pre.scrollWidth > pre.clientWidth)
        .map(pre => pre.textContent).filter(text => text.split("\\n").every(line => line.length <= 80))"""
    assert browser.evaluate(cut) == []


@pytest.mark.parametrize("page", CHAPTERS, ids=name)
def test_nothing_is_cut_on_paper(browser, page):
    browser.open(page.as_uri(), 680)
    browser.evaluate("dispatchEvent(new Event('beforeprint')), 0")
    browser.call("Emulation.setEmulatedMedia", media="print")
    boxes = "pre, figure, .text_html, .pst-scrollable-table-container"
    scrolling = f"""[...document.querySelectorAll("article :is({boxes})")]
        .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.outerHTML.slice(0, 200))"""
    assert browser.evaluate(scrolling) == []
    browser.call("Emulation.setEmulatedMedia", media="")


def test_printing_from_dark_mode_is_light_and_opens_solutions(browser):
    state = """[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor,
        document.querySelectorAll(".tag_solution details:not([open])").length]"""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.open((HTML / "notebooks" / "01_resnet50_and_the_recipe.html").as_uri(), 1280)
    before = browser.evaluate(state)
    browser.evaluate("dispatchEvent(new Event('beforeprint')), 0")
    assert browser.evaluate(state) == ["light", "rgb(255, 255, 255)", 0]
    browser.evaluate("dispatchEvent(new Event('afterprint')), 0")
    assert browser.evaluate(state) == before and before[0] == "dark" and before[2] > 0
    browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_browser_finds_what_is_wrong_with_a_page(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("""<html><body><article><p style="width: 2000px">wide</p><img src="http://127.0.0.1:9/a.png">
        <script>undefined.value</script></article></body></html>""")
    browser.open(page.as_uri(), 1280)
    assert any("wide" in element for element in browser.sideways())
    assert browser.remote_requests() == ["http://127.0.0.1:9/a.png"]
    assert any("TypeError" in message for message in browser.errors())
    assert {"image-alt", "html-has-lang"} <= {rule for rule, _ in browser.violations()}


def test_a_page_is_printed_to_pdf(browser):
    browser.open((HTML / "book" / "how_to_read.html").as_uri(), 1280)
    printed = browser.pdf(pdf.FOOTER)
    assert printed.startswith(b"%PDF") and b"/Outlines" in printed and b"/StructTreeRoot" in printed


def test_the_single_page_of_the_pdf_moves_to_where_its_pictures_are(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*index\.html: run `make pdf`"):
        pdf.move_up(tmp_path)
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "index.html").write_text('<a href="book/index.html#stem"><img src="_images/a.svg">')
    assert pdf.move_up(tmp_path).read_text() == '<a href="#stem"><img src="_images/a.svg">'
    assert pdf.move_up(tmp_path).parent == tmp_path
