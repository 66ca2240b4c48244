"""Write the line under a notebook's title: minutes to read, what to read first, a link to Colab: `make heads`.

python book/head.py notebooks/*.ipynb                                               # bring the minutes up to date
python book/head.py --needs "[chapter 3](03_resnextify.ipynb)" notebooks/NAME.ipynb  # what to read first
"""

import argparse
import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORDS, LINES = 200, 15  # of prose and of code, read in a minute
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
HEAD = re.compile(r"^(?P<minutes>\d+) minutes to read · needs (?P<needs>.+) · \[!\[Open in Colab\].*$", re.MULTILINE)


def minutes(notebook: dict) -> int:
    """Return the time to read the prose and the code that is not folded, in minutes, a multiple of five."""
    words = lines = 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"\]\([^)]*\)", "]", HEAD.sub("", source)).split())
        elif not FOLDED & set(cell["metadata"].get("tags", ())):
            lines += sum(bool(line.strip()) for line in source.splitlines())
    return max(5, 5 * round((words / WORDS + lines / LINES) / 5))


def head(name: str, notebook: dict, needs: str) -> str:
    """Return the line for the notebook `name`, without its suffix."""
    repository = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    address = repository["url"].replace("https://github.com/", "https://colab.research.google.com/github/")
    address += f"/blob/{repository['branch']}/notebooks/{name}.ipynb"
    badge = f"[![Open in Colab](../book/figures/colab.svg)]({address})"
    return f"{minutes(notebook)} minutes to read · needs {needs} · {badge}"


def write_head(path: Path, needs: str | None = None) -> None:
    """Write the line into the first cell, below the title.

    Raises ValueError if there is no such line yet and `needs` is not given.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    title, _, rest = "".join(notebook["cells"][0]["source"]).partition("\n\n")
    old = HEAD.match(rest)
    if old:
        rest = rest[old.end() :].lstrip("\n")
    elif needs is None:
        raise ValueError(f"{path.name} has no line under its title yet: give --needs, what to read before it")
    source = f"{title}\n\n{head(path.stem, notebook, needs or old['needs'])}\n\n{rest}"
    notebook["cells"][0]["source"] = source.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--needs", metavar="MARKDOWN", help="what to read first; without it, what is written stays")
    args = parser.parse_args()
    for path in args.notebooks:
        try:
            write_head(path, args.needs)
        except ValueError as error:
            parser.error(str(error))
