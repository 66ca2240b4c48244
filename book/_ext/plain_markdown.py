"""Notebooks hold plain Markdown, which Colab, JupyterLab and GitHub show as it is; here the book makes more of it.

- A cell `*Figure: ...*` after a cell that draws becomes the caption of a numbered figure.
- A link `[the figure below](#fig-name)`, or `(chapter.ipynb#fig-name)`, becomes a reference with the figure's number.
- A link to the book's public address becomes a link inside the book that is built, and is checked.
"""

import json
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)

CAPTION = re.compile(r"\*Figure: (\S.*)\*", re.DOTALL)


def attach_captions(notebook: dict) -> dict:
    """Move each caption cell into the metadata of the code cell before it, where MyST-NB looks for it.

    Raises ValueError if a caption does not follow a code cell or is not one paragraph.
    """
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown" and source.startswith("*Figure:"):
            match = CAPTION.fullmatch(source)
            if match is None or "\n\n" in source or not cells or cells[-1]["cell_type"] != "code":
                raise ValueError(f"a caption is one paragraph, *Figure: ...*, after a code cell, not {source!r}")
            cells[-1]["metadata"].setdefault("mystnb", {}).setdefault("figure", {})["caption"] = match[1]
        else:
            cells.append(cell)
    return {**notebook, "cells": cells}


def read_captions(app, docname: str, source: list[str]) -> None:
    """Attach the captions of a notebook before MyST-NB parses it."""
    if app.env.doc2path(docname).endswith(".ipynb"):
        try:
            source[0] = json.dumps(attach_captions(json.loads(source[0])))
        except ValueError as error:
            logger.warning("%s", error, location=docname)


class FigureNumbers(SphinxTransform):
    """Replace the text of a link to a figure by the figure's number, as the role `numref` does."""

    default_priority = 500  # before MyST looks for headings of that name

    def apply(self, **kwargs) -> None:
        for node in list(self.document.findall(nodes.reference)):  # [...](#fig-name)
            if node.get("id_link") and node["refuri"].startswith("#fig-"):
                node.replace_self(self.number(node["refuri"].removeprefix("#"), node))
        for node in list(self.document.findall(addnodes.pending_xref)):  # [...](chapter.ipynb#fig-name)
            if node["reftype"] == "myst" and str(node.get("reftargetid")).startswith("fig-"):
                node.replace_self(self.number(node["reftargetid"], node))

    def number(self, name: str, link: nodes.Element) -> addnodes.pending_xref:
        """Return a reference that Sphinx replaces by the number of the figure."""
        text = nodes.inline("", "", *link.children)
        target = {"refdomain": "std", "reftype": "numref", "reftarget": name, "refexplicit": False}
        return addnodes.pending_xref("", text, **target, refdoc=self.env.docname, refwarn=True)


class InternalLinks(SphinxPostTransform):
    """Replace the book's public address in links by relative ones, and warn if nothing is there."""

    default_priority = 500

    def run(self, **kwargs) -> None:
        base = self.config.html_baseurl
        for node in self.document.findall(nodes.reference):
            if node.get("refuri", "").startswith(base):
                page, _, anchor = node["refuri"].removeprefix(base).partition("#")
                self.redirect(node, page.removesuffix(".html") or self.config.root_doc, anchor)

    def redirect(self, node: nodes.reference, docname: str, anchor: str) -> None:
        """Let `node` lead to a document of this build, and to a place in it."""
        if docname not in self.env.found_docs:
            logger.warning("the book has no page %s", docname, location=node)
        elif anchor.startswith("term-") and anchor not in self.terms():
            logger.warning("the glossary has no entry with the address %s", anchor, location=node)
        else:
            address = self.app.builder.get_relative_uri(self.env.docname, docname)
            node["refuri"] = f"{address}#{anchor}" if anchor else address
            node["internal"] = True

    def terms(self) -> set[str]:
        """Return the anchors of all entries of the glossary."""
        objects = self.env.get_domain("std").get_objects()
        return {anchor for _, _, kind, _, anchor, _ in objects if kind == "term"}


def setup(app) -> dict:
    app.connect("source-read", read_captions)
    app.add_transform(FigureNumbers)
    app.add_post_transform(InternalLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
