"""Draw the figures of the pages and the README into the folder of this file: `make figures`."""

from pathlib import Path

from convnext_min.book import figures, road_figures

FIGURES = {
    "road_resnet50.svg": lambda: figures.road("resnet50"),
    "road_resnet200.svg": lambda: figures.road("resnet200"),
    "road_small.svg": road_figures.gains,
}


SOCIAL = "../_static/road.png"  # what a link to the book shows on other sites


def draw(folder: Path) -> None:
    """Write every figure into `folder`; the same code and versions give identical files."""
    for name, figure in FIGURES.items():
        figure().savefig(folder / name, metadata={"Date": None})


def draw_social(path: Path) -> None:
    """Write the road as a picture of 1200 by 630 pixels, the size that other sites ask for."""
    fig = figures.road("resnet50")
    fig.set_size_inches(8, 4.2)
    fig.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(__file__).parent
    draw(folder)
    draw_social(folder / SOCIAL)
