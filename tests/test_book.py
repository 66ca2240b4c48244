"""Checks of the built pages, _build/html: run `make book` first."""

import json
import re
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
