"""Run notebooks and keep their outputs, at the budget of the committed outputs: `make notebooks`.

With `--results`, run only cells with the tag "results", which show nothing but files of book/results: `make results`,
after an experiment has made more runs. The outputs of all other cells stay. Solutions never keep an output: it would
give away what a reader is asked to compute.
"""

import argparse
import ast
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ENVIRONMENT = {
    "CONVNEXT_MIN_BUDGET": "quick",
    "TQDM_DISABLE": "1",  # pages show no progress bars
    "PYTHONWARNINGS": "ignore:IProgress",  # nor the warning that tqdm lacks widgets
}
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Run the notebook at `path` in its folder and write it back with its outputs. Raises if a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    run(notebook, path.parent)
    clear_progress_bars(notebook)
    clear_solutions(notebook)
    notebook.metadata = METADATA
    nbformat.write(notebook, path)


def execute_results(path: Path) -> None:
    """Run only the cells with the tag "results", which may use imports and functions of other cells."""
    notebook, short = (nbformat.read(path, as_version=4) for _ in range(2))
    pairs = list(zip(code_cells(notebook), code_cells(short)))
    for _, cell in pairs:
        if not is_of_results(cell):
            cell.source = definitions(cell.source)
    if any(is_of_results(cell) for _, cell in pairs):
        run(short, path.parent)
        clear_progress_bars(short)
        for kept, cell in pairs:
            if is_of_results(cell):
                kept.outputs = cell.outputs
                for output in kept.outputs:  # keep the counts of the run that made the other cells
                    if "execution_count" in output:
                        output.execution_count = kept.execution_count
        nbformat.write(notebook, path)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute `notebook` in place, in a new kernel whose working directory is `folder`."""
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | ENVIRONMENT)


def clear_progress_bars(notebook: nbformat.NotebookNode) -> None:
    """Remove the progress bars that tqdm draws as widgets where ipywidgets is installed."""
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]


def clear_solutions(notebook: nbformat.NotebookNode) -> None:
    """Remove the outputs of all cells with the tag "solution"."""
    for cell in code_cells(notebook):
        if "solution" in cell.metadata.get("tags", ()):
            cell.outputs = []


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_of_results(cell: nbformat.NotebookNode) -> bool:
    return "results" in cell.metadata.get("tags", ())


def definitions(source: str) -> str:
    """Return the source of a cell's imports and functions, without magics and the statements that do the work."""
    source = re.sub(r"(?m)^\s*%[a-z].*$", "", source)
    kept = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    return ast.unparse(ast.Module(kept, []))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--results", action="store_true", help='only cells with the tag "results"')
    args = parser.parse_args()
    for path in args.notebooks:
        print(f"Running {path}", flush=True)
        (execute_results if args.results else execute)(path)
