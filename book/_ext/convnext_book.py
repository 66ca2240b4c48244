"""What this book adds to Jupyter Book: the `step-diff` directive, and one search bar instead of two."""

import pkgutil
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package of this very checkout

from convnext_min import STEPS
from convnext_min.diff import step_diff


def resolve(name: str) -> object:
    """A step of the road by its slug, or anything in the package by its dotted name."""
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


def drop_second_search_bar(app, config) -> None:
    """The theme draws a search bar across the top of every page beside the one in the sidebar."""
    config.html_theme_options["navbar_persistent"] = []


def setup(app) -> dict:
    app.add_directive("step-diff", StepDiffDirective)
    app.connect("config-inited", drop_second_search_bar)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
