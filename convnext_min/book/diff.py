"""The diff of one step of the road: the difference between two pieces of the package's code."""

import ast
import difflib
import html
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from functools import partial


class StepDiff:
    """A diff: lines starting with "-" (only in the old), "+" (only in the new), " " (in both) or "⋯" (lines left out).

    A notebook shows it in colour, `print` as plain text.
    """

    def __init__(self, lines: list[str]):
        self.lines = lines

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        # Translucent, so that the text keeps its contrast on a white and on a dark page.
        colours = {"-": "rgba(248, 81, 73, 0.22)", "+": "rgba(63, 185, 80, 0.22)", "⋯": "rgba(128, 128, 128, 0.12)"}
        rows = "".join(
            f'<span style="display: block; background: {colours.get(line[0], "none")}">{html.escape(line)}</span>'
            for line in self.lines
        )
        return (
            '<pre class="step-diff" style="overflow-x: auto; line-height: 1.45">'
            f'<code style="display: block; width: max-content; min-width: 100%">{rows}</code></pre>'
        )


def step_diff(old: object, new: object, context: int = 1) -> StepDiff:
    """Return the diff of two classes or functions (by their source), or of two designs (by their fields).

    Docstrings are left out, so only differences in the code appear. `context` is the number of unchanged
    lines kept around each change. Raises ValueError if there is no difference.
    """
    before, after = _lines(old), _lines(new)
    changes = list(difflib.unified_diff(before, after, n=context, lineterm=""))[3:]  # without the two names and "@@"
    if not changes:
        raise ValueError(f"{old!r} and {new!r} have the same code: nothing to show")
    return StepDiff(["⋯" if line.startswith("@@") else line for line in changes])


def _lines(thing: object) -> list[str]:
    if is_dataclass(thing) and not isinstance(thing, type):
        return [f"{field.name} = {_value(getattr(thing, field.name))}" for field in fields(thing)]
    source = textwrap.dedent(inspect.getsource(thing))
    lines = source.splitlines()
    drop = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            drop.update(range(docstring.lineno - 1, docstring.end_lineno))
            behind = lines[docstring.end_lineno :]  # starts with the blank line that sets the docstring off
            if behind and not behind[0].strip():
                drop.add(docstring.end_lineno)
    return [line for i, line in enumerate(lines) if i not in drop]


def _value(value: object) -> str:
    if isinstance(value, partial):
        keywords = "".join(f", {key}={val!r}" for key, val in value.keywords.items())
        return f"partial({value.func.__name__}{keywords})"
    return getattr(value, "__name__", repr(value))
