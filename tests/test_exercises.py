import copy

import pytest
import torch
from torch import nn

from convnext_min import Block
from convnext_min.blocks import Bottleneck, ConvNeXtBlock
from convnext_min.exercises import attempt, expect, same, solved


class Renamed(Bottleneck):
    """The bottleneck with its branch written differently."""

    def forward(self, x):
        branch = nn.Sequential(self.conv1, self.norm1, self.act, self.conv2, self.norm2, self.act, self.conv3)
        return torch.relu(self.norm3(branch(x)) + self.shortcut(x))


def test_same_accepts_another_way_to_write_it_and_changes_neither(capsys):
    mine, reference = Renamed(32, 8), Bottleneck(32, 8)
    before = copy.deepcopy([mine.state_dict(), reference.state_dict()])
    same(mine, reference, (2, 32, 8, 8))
    assert capsys.readouterr().out.startswith(f"same: {sum(p.numel() for p in mine.parameters()):,} parameters")
    for state, old in zip([mine.state_dict(), reference.state_dict()], before):
        assert all(torch.equal(state[name], old[name]) for name in old)


def test_same_finds_a_difference_that_layer_scale_would_hide():
    class NoNorm(Block):
        def forward(self, x):
            branch = self.pwconv2(self.act(self.pwconv1(self.dwconv(x).permute(0, 2, 3, 1))))
            return x + (self.gamma * branch).permute(0, 3, 1, 2)

    with pytest.raises(AssertionError, match="outputs differ by up to"):
        same(NoNorm(8), Block(8), (2, 8, 8, 8))


def test_same_finds_a_difference_in_evaluation_mode_alone():
    class Frozen(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)

    with pytest.raises(AssertionError, match="in evaluation mode the outputs differ"):
        same(Frozen(4), nn.BatchNorm2d(4), (2, 4, 8, 8))


def test_same_names_the_first_tensor_that_does_not_fit():
    with pytest.raises(AssertionError, match=r"conv1.weight has shape \(4, 32, 1, 1\); conv1.weight has \(8, "):
        same(Bottleneck(32, 4), Bottleneck(32, 8), (2, 32, 8, 8))
    with pytest.raises(AssertionError, match=r"dwconv.weight has shape \(8, 1, 7, 7\); gamma has \(8,\)"):
        same(ConvNeXtBlock(8, 8), Block(8), (2, 8, 8, 8))
    with pytest.raises(AssertionError, match=r"1.weight of shape \(4, 4, 1, 1\) is missing from the reference"):
        same(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1)), (1, 3, 4, 4))


def test_same_compares_shapes_and_macs():
    with pytest.raises(AssertionError, match=r"shape \(1, 4, 2, 2\); it should be \(1, 4, 4, 4\)"):
        same(nn.Conv2d(3, 4, 1, 2), nn.Conv2d(3, 4, 1), (1, 3, 4, 4))

    class Twice(nn.Conv2d):
        def forward(self, x):
            return (super().forward(x) + super().forward(x)) / 2

    with pytest.raises(AssertionError, match="384 multiply-accumulates; the reference needs 192"):
        same(Twice(3, 4, 1), nn.Conv2d(3, 4, 1), (1, 3, 4, 4))


def test_same_refuses_a_starting_stub():
    with pytest.raises(AssertionError, match="a module is compared, got NoneType"):
        same(None, Block(8), (1, 8, 4, 4))


@pytest.mark.parametrize(
    "value, right, tolerance",
    [(3, 3, 0), ("ab", "ab", 0), (1.001, 1.0, 0.01), (1, 1.0, 0), (torch.ones(2) + 1e-4, torch.ones(2), 1e-3)],
)
def test_expect_accepts(value, right, tolerance):
    expect(value, right, "x", tolerance)


@pytest.mark.parametrize(
    "value, right, message",
    [
        (None, 3, "x: no answer yet"),
        (4, 3, "x: got 4, should be 3"),
        (1.1, 1.0, "x: got 1.1, should be 1.0"),
        (torch.zeros(3), torch.zeros(2), r"x: got \(3,\), should be a tensor of shape \(2,\)"),
        (5, torch.zeros(2), "x: got int, should be a tensor"),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), "x: differs by up to 0.5"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "x: differs by up to nan"),
    ],
)
def test_expect_explains(value, right, message):
    with pytest.raises(AssertionError, match=message):
        expect(value, right, "x", 0.01)


def test_expect_can_keep_the_answer_to_itself():
    with pytest.raises(AssertionError) as error:
        expect(4, 314, "x", reveal=False)
    assert "314" not in str(error.value)


def test_attempt_prints_and_never_raises(capsys):
    def check(answer):
        expect(answer, 3, "x")
        solved("three")

    for answer in (3, 4, None):
        attempt(check, answer)
    attempt(check, torch.zeros(2))  # comparing it raises a RuntimeError
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["correct: three", "not solved yet: x: got 4, should be 3", "not solved yet: x: no answer yet"]
    assert lines[3].startswith("not solved yet: ")
