"""Tables and figures of the paper's results (`convnext_min.paper`), beside our own counts where there are any."""

import re

import torch
from matplotlib.figure import Figure

from convnext_min import isotropic, paper
from convnext_min.book.style import BLUE, GREY, ORANGE, Table, figure, table
from convnext_min.measure import count_macs, count_parameters
from convnext_min.paper import Classifier

HALVES = {"1K": paper.TABLE1, "22K": paper.TABLE1_22K}  # what the models of Table 1 were trained on


def _a100(model: str, resolution: int) -> float | None:
    """Return the images per second of a ConvNeXt or Swin on an A100 (Table 12), or None if the table has none."""
    family, _, size = model.partition("-")
    for row in paper.TABLE12:
        if (row.size, row.resolution) == (size, resolution):
            return {"ConvNeXt": row.convnext, "Swin": row.swin}.get(family)
    return None


def imagenet_results(*families: str) -> Table:
    """Show Table 1 with the A100 column of Table 12: all models, or those whose names begin with one of `families`.

    "22K" are models that were pre-trained on ImageNet-22K and fine-tuned on ImageNet-1K.
    """

    def speed(value: float | None) -> str:
        return "" if value is None else f"{value:,.1f}"

    rows = [
        (
            row.model,
            half,
            row.resolution,
            row.params,
            f"{row.gmacs:.1f}",
            speed(row.images_per_second),
            speed(_a100(row.model, row.resolution)),
            f"{row.top1:.1f}",
        )
        for half, part in HALVES.items()
        for row in part
        if not families or row.model.startswith(families)
    ]
    return table(("model", "data", "pixels", "params (M)", "GMACs", "V100 img/s", "A100 img/s", "top-1 (%)"), rows)


def _plot(ax, rows: list[Classifier], label: str, color: str, marker: str) -> None:
    ax.plot([row.gmacs for row in rows], [row.top1 for row in rows], marker, color=color, markersize=6, label=label)


def imagenet_trade_off() -> Figure:
    """Draw top-1 over GMACs for the models of Table 1: trained on ImageNet-1K alone, and pre-trained on 22K."""
    fig, axes = figure(3.3, 2, sharey=True, sharex=True)
    for ax, (half, part) in zip(axes, HALVES.items()):
        families = {"ConvNeXt": ([], BLUE, "o"), "Swin": ([], ORANGE, "D"), "others": ([], GREY, "x")}
        for row in part:
            family = row.model.partition("-")[0]
            families.get(family, families["others"])[0].append(row)
        for label, (rows, color, marker) in families.items():
            _plot(ax, rows, label, color, marker)
        ax.set_xscale("log")
        ax.set_xticks([5, 20, 100, 500], ["5", "20", "100", "500"])
        ax.minorticks_off()
        ax.set_title(f"ImageNet-{half}")
        ax.set_xlabel("GMACs")
    axes[0].set_ylabel("ImageNet-1K top-1 (%)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def isotropic_results() -> Table:
    """Show Table 2, with the parameters and MACs of the package's isotropic ConvNeXt beside those of the paper."""
    rows = []
    for row in paper.TABLE2:
        params, gmacs = f"{row.params}", f"{row.gmacs:.1f}"
        if size := re.match(r"ConvNeXt-(\w)", row.model):
            name = {"S": "small", "B": "base", "L": "large"}[size[1]]
            with torch.device("meta"):
                model = getattr(isotropic, f"convnext_isotropic_{name}")()
            params += f" ({count_parameters(model) / 1e6:.1f})"
            gmacs += f" ({count_macs(model) / 1e9:.2f})"
        rows.append((row.model, params, gmacs, f"{row.images_per_second:,.1f}", f"{row.memory:.1f}", f"{row.top1:.1f}"))
    return table(("model", "params (M)", "GMACs", "V100 img/s", "memory (GB)", "top-1 (%)"), rows)
