"""Draw the figures of the pages and the README into the folder of this file: `make figures`."""

from pathlib import Path

from convnext_min.book import figures, result_figures

FIGURES = {
    "road_resnet50.svg": lambda: figures.road("resnet50"),
    "road_resnet200.svg": lambda: figures.road("resnet200"),
    "road_small.svg": result_figures.road_gains,
}


def draw(folder: Path) -> None:
    """Write every figure into `folder`; the same code and versions give identical files."""
    for name, figure in FIGURES.items():
        figure().savefig(folder / name, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).parent)
