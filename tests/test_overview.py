import io

import torch
from matplotlib.patches import Rectangle

from convnext_min import convnext_atto, convnext_tiny
from convnext_min.book import overview
from convnext_min.measure import count_macs, count_parameters
from convnext_min.roadmap import STEPS


def test_the_parts_of_a_network_have_its_shapes_and_add_up_to_its_cost():
    model = convnext_tiny()
    names, shapes, macs, parameters = zip(*overview.network_parts(model, 224))
    assert names[:3] == ("stem", "stage 1: 3 blocks", "downsampling 1") and names[5] == "stage 3: 9 blocks"
    assert shapes[1::2] == ((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7))
    assert sum(macs) == count_macs(model) and macs[-1] == 768 * 1000
    assert sum(parameters) == count_parameters(model)
    assert next(model.parameters()).device.type == "cpu"  # the model itself stays


def test_all_blocks_of_the_road_are_drawn_and_marked():
    fig = overview.draw_road_blocks()
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert [title for title in overview.BLOCKS.values() if title not in texts] == []
    assert texts.count("attention") == 1 and texts.count("d7×7") == 5 and "3×3 → 64" in texts
    assert set(overview.BLOCKS) <= set(STEPS)
    changed = [box for box in fig.axes[0].patches if isinstance(box, Rectangle) and box.get_linewidth() > 2]
    assert len(changed) == 1 + 3 + 3 + 2 + 1 + 1 + 1  # depthwise to LayerNorm; GELU: those that stay


def test_the_whole_network_is_drawn_the_same_way_twice_with_or_without_weights():
    images = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = convnext_atto()
        file = io.StringIO()
        overview.draw_convnext(model, 64).savefig(file, format="svg", metadata={"Date": None})
        images.append(file.getvalue())
    assert images[0] == images[1]
