import pytest

from convnext_min import STEPS, blocks
from convnext_min.book.diff import step_diff


def test_a_block_differs_in_the_line_that_changes():
    lines = step_diff(blocks.Bottleneck, blocks.DepthwiseBottleneck).lines
    removed = [line for line in lines if line.startswith("-")]
    added = [line for line in lines if line.startswith("+")]
    assert len(removed) == len(added) == 2  # the name of the class and one convolution
    assert removed[1].replace("bias=False", "groups=width, bias=False")[1:] == added[1][1:]


def test_docstrings_are_left_out():
    lines = step_diff(blocks.Bottleneck, blocks.ConvNeXtBlock, context=100).lines
    assert not any('"""' in line for line in lines)
    assert lines[:2] == ["-class Bottleneck(nn.Module):", "-    expansion = 4"]  # nor does a blank line stay behind


def test_a_class_that_is_a_docstring_alone_can_be_shown():
    class Described(blocks.ConvNeXtBlock):
        """Compute the same."""

    lines = step_diff(blocks.ConvNeXtBlock, Described, context=0).lines
    assert lines[-1] == "+class Described(blocks.ConvNeXtBlock):"


def test_designs_differ_in_their_fields():
    lines = step_diff(STEPS["resnet50"], STEPS["stage_ratio"]).lines
    assert lines == ["-depths = (3, 4, 6, 3)", "+depths = (3, 3, 9, 3)", " width = 64"]
    assert "+act = GELU" in step_diff(STEPS["kernel7"], STEPS["gelu"]).lines


def test_text_and_html_show_the_same_lines():
    diff = step_diff(blocks.MovedUpBlock, blocks.FewerActivationsBlock)
    assert repr(diff).splitlines() == diff.lines
    assert diff._repr_html_().count("<span") == len(diff.lines)


def test_html_escapes_the_code():
    assert (
        "def forward(self, x: Tensor) -&gt; Tensor"
        in step_diff(blocks.FewerNormsBlock, blocks.ConvNeXtBlock)._repr_html_()
    )


def test_no_difference_is_an_error():
    with pytest.raises(ValueError, match="nothing to show"):
        step_diff(blocks.Bottleneck, blocks.Bottleneck)
