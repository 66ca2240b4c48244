"""Directives added to Jupyter Book (`step-diff`, `road-table`, `package-tree`), and features that are removed."""

import ast
import pkgutil
import re
import sys
from pathlib import Path

import sphinx_thebe
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package of this very checkout

from convnext_min import STEPS
from convnext_min.book.diff import step_diff
from convnext_min.measure import road_table
from convnext_min.roadmap import REGIMES

ROOT = Path(__file__).parents[2]


def resolve(name: str) -> object:
    """Return a step of the road by its slug, or anything in the package by its dotted name."""
    return STEPS[name] if name in STEPS else pkgutil.resolve_name(name)


class StepDiffDirective(SphinxDirective):
    """The difference between two objects of the package, old and new, as a highlighted diff.

        ```{step-diff} convnext_min.blocks.Bottleneck convnext_min.blocks.DepthwiseBottleneck
        ```

    Two slugs (`resnet50 stage_ratio`) show what changes in the design.
    """

    required_arguments = 2
    option_spec = {"context": directives.nonnegative_int}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        try:
            old, new = (resolve(name) for name in self.arguments)
            diff = step_diff(old, new, self.options.get("context", 1))
        except (ImportError, AttributeError, ValueError) as error:
            raise self.error(f"step-diff {' '.join(self.arguments)}: {error}") from error
        block = nodes.literal_block(repr(diff), repr(diff), language="diff", classes=["step-diff"])
        self.set_source_info(block)
        return [block]


class RoadTable(SphinxDirective):
    """A table of all steps of the road in a regime: MACs of our models, the paper's MACs and accuracy.

    ```{road-table} resnet50
    ```
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        regime = self.arguments[0]
        if regime not in REGIMES:
            raise self.error(f"unknown regime {regime!r}; valid: {', '.join(REGIMES)}")
        lines = ["| step | GMACs here | GMACs paper | params (M) | top-1 paper (%) |", "|:--|--:|--:|--:|--:|"]
        for row in road_table(regime):
            measured, params = f"{row['gmacs']:.3f}", f"{row['params'] / 1e6:.2f}"
            cells = row["label"], measured, f"{row['paper_gmacs']:.2f}", params, f"{row['paper_top1']:.2f}"
            lines.append(f"| {' | '.join(cells)} |")
        container = nodes.container(classes=["road-table"])
        self.state.nested_parse(StringList(lines, "road-table"), self.content_offset, container)
        return [container]


def package_tree() -> list[str]:
    """Return lines of Markdown: each folder of the package and its files, with the first sentence of each docstring."""
    root, lines = ROOT / "convnext_min", []
    for folder in (root, *sorted(path.parent for path in root.glob("*/__init__.py"))):
        lines += ["", f"**`{folder.relative_to(ROOT)}/`**" + (f": {summary(folder)}" if folder != root else ""), ""]
        lines += [f"- `{path.name}`: {summary(path)}" for path in sorted(folder.glob("*.py")) if path.stem[:2] != "__"]
    return lines


def summary(path: Path) -> str:
    """Return the first sentence of the docstring of a module, or of a folder's `__init__`."""
    source = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.`])\s(?=[A-Z`])", first)[0]


class PackageTree(SphinxDirective):
    """Every file of the package with the first sentence of its docstring, folder by folder."""

    def run(self) -> list[nodes.Node]:
        container = nodes.container(classes=["package-tree"])
        self.state.nested_parse(StringList(package_tree(), "package-tree"), self.content_offset, container)
        return [container]


def drop_second_search_bar(app, config) -> None:
    """Remove the theme's search bar at the top of every page; the sidebar already has one."""
    config.html_theme_options["navbar_persistent"] = []


def drop_thebe(app) -> None:
    """Remove Thebe's remote script from every page: no page runs its code on a remote kernel."""
    unwanted = (sphinx_thebe.init_thebe_core, sphinx_thebe.update_thebe_context)
    for listeners in app.events.listeners.values():
        listeners[:] = [listener for listener in listeners if listener.handler not in unwanted]


def setup(app) -> dict:
    drop_thebe(app)
    app.add_directive("step-diff", StepDiffDirective)
    app.add_directive("road-table", RoadTable)
    app.add_directive("package-tree", PackageTree)
    app.connect("config-inited", drop_second_search_bar)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
