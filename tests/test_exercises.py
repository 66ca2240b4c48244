import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from convnext_min import Block
from convnext_min.blocks import Bottleneck, ConvNeXtBlock, MovedUpBlock
from convnext_min.book import exercises
from convnext_min.book.exercises import attempt, expect, same, solved


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

    with pytest.raises(AssertionError, match="outputs differ from the expected ones by up to"):
        same(NoNorm(8), Block(8), (2, 8, 8, 8))


def test_same_finds_a_difference_in_evaluation_mode_alone():
    class Frozen(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)

    with pytest.raises(AssertionError, match="in evaluation mode your outputs differ"):
        same(Frozen(4), nn.BatchNorm2d(4), (2, 4, 8, 8))


def test_same_names_the_first_tensor_that_does_not_fit():
    with pytest.raises(
        AssertionError, match=r"yours: conv1.weight has shape \(4, 32, 1, 1\); expected: conv1.weight has shape \(8, "
    ):
        same(Bottleneck(32, 4), Bottleneck(32, 8), (2, 32, 8, 8))
    with pytest.raises(
        AssertionError, match=r"yours: dwconv.weight has shape \(8, 1, 7, 7\); expected: gamma has shape \(8,\)"
    ):
        same(ConvNeXtBlock(8, 8), Block(8), (2, 8, 8, 8))
    with pytest.raises(AssertionError, match=r"yours also has 1.weight of shape \(4, 4, 1, 1\)"):
        same(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1)), (1, 3, 4, 4))


def test_same_compares_shapes_and_macs():
    with pytest.raises(AssertionError, match=r"shape \(1, 4, 2, 2\); expected \(1, 4, 4, 4\)"):
        same(nn.Conv2d(3, 4, 1, 2), nn.Conv2d(3, 4, 1), (1, 3, 4, 4))

    class Twice(nn.Conv2d):
        def forward(self, x):
            return (super().forward(x) + super().forward(x)) / 2

    with pytest.raises(AssertionError, match="yours needs 384 MACs at 4×4; expected 192"):
        same(Twice(3, 4, 1), nn.Conv2d(3, 4, 1), (1, 3, 4, 4))


class Levels(nn.Module):
    def __init__(self, kind, number=2):
        super().__init__()
        self.conv, self.kind, self.number = nn.Conv2d(3, 4, 1), kind, number

    def forward(self, x):
        levels = [self.conv(x) * (i + 1) for i in range(self.number)]
        return dict(enumerate(levels)) if self.kind is dict else levels


def test_same_compares_every_level_of_a_pyramid(capsys):
    same(Levels(list), Levels(dict), (1, 3, 4, 4))
    assert capsys.readouterr().out.startswith("same: 16 parameters")
    with pytest.raises(AssertionError, match="yours returns 1 tensors; expected 2"):
        same(Levels(list, 1), Levels(dict), (1, 3, 4, 4))
    wrong = Levels(list)
    wrong.forward = lambda x: [wrong.conv(x), 3 * wrong.conv(x)]
    with pytest.raises(AssertionError, match="in training mode your outputs differ"):
        same(wrong, Levels(dict), (1, 3, 4, 4))


def test_same_refuses_a_starting_stub():
    with pytest.raises(AssertionError, match="expected a module, got NoneType"):
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
        (4, 3, "x: yours is 4, expected 3"),
        (1.1, 1.0, "x: yours is 1.1, expected 1.0"),
        (torch.zeros(3), torch.zeros(2), r"x: yours is \(3,\), expected a tensor of shape \(2,\)"),
        (5, torch.zeros(2), "x: yours is int, expected a tensor"),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), "x: yours differs from the expected tensor by up to 0.5"),
        (
            torch.tensor([1.0, float("nan")]),
            torch.tensor([1.0, 2.0]),
            "x: yours differs from the expected tensor by up to nan",
        ),
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
    assert lines[:3] == [
        "correct: three",
        "not solved yet: x: yours is 4, expected 3",
        "not solved yet: x: no answer yet",
    ]
    assert lines[3].startswith("not solved yet: ")


# Answers that are nearly right. That checks accept the solutions and reject the stubs: test_chapters.


class Unpadded(MovedUpBlock):
    def __init__(self, in_chans, width, stride=1):
        super().__init__(in_chans, width, stride)
        self.dwconv = nn.Conv2d(in_chans, in_chans, 3, stride, 1, dilation=3, groups=in_chans, bias=False)


def norm_over(dims, unbiased=False, eps_inside=True):
    def layer_norm(x, weight, bias, eps=1e-6):
        x = x - x.mean(dims, keepdim=True)
        variance = x.var(dims, unbiased=unbiased, keepdim=True)
        scale = (variance + eps).sqrt() if eps_inside else variance.sqrt() + eps**0.5
        return x / scale * weight[:, None, None] + bias[:, None, None]

    return layer_norm


def fold_without_mean(conv, norm):
    folded = copy.deepcopy(conv)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded.weight.data = conv.weight * factor[:, None, None, None]
    folded.bias = nn.Parameter(norm.bias.clone())
    return folded


def drop_without_rescaling(x, rate, training):
    return x * (torch.rand(x.shape[0], *[1] * (x.ndim - 1)) >= rate) if training else x


def drop_values(x, rate, training):
    return nn.functional.dropout(x, rate, training)


def drop_batch(x, rate, training):
    return x * (torch.rand(()) >= rate) / (1 - rate) if training else x


def fold_in_place(block):
    with torch.no_grad():
        block.pwconv2.weight.mul_(block.gamma[:, None])
        block.pwconv2.bias.mul_(block.gamma)
    block.gamma = None
    return block


def fold_weight_alone(block):
    folded = copy.deepcopy(block)
    folded.pwconv2.weight.mul_(block.gamma[:, None])
    folded.gamma = None
    return folded


@pytest.mark.parametrize(
    "check, answer, message",
    [
        ("dilated_block", lambda *args: MovedUpBlock(*args, kernel_size=7), "MACs with stride 1"),
        ("lossless_relu", lambda chans: torch.eye(chans), r"a pair \(expand, reduce\), yours is a Tensor"),
        ("lossless_relu", lambda chans: None, "no answer yet"),
        ("dilated_block", Unpadded, "shape after dwconv"),
        ("stack_of_threes", lambda k: (k // 3, k // 3 * 9 / k**2), "layers for kernel size 5"),
        (
            "depthwise_macs_of_design",
            lambda design: 56**2 * design.width * design.kernel_size**2,
            "which is not correct",
        ),
        ("layer_norm", norm_over((1, 2, 3)), "96 channels .* yours differs"),
        ("layer_norm", norm_over(1, unbiased=True), "channels .* yours differs"),
        ("layer_norm", norm_over(1, eps_inside=False), "channels .* yours differs"),
        ("fold_batch_norm", fold_without_mean, "output of the folded 7×7 convolution: yours differs"),
        ("fold_batch_norm", nn.Sequential, "one nn.Conv2d, yours is a Sequential"),
        ("separate_downsampling_macs", lambda design: 0, "resnet50 regime: yours is 0"),
        ("drop_path", drop_without_rescaling, "rate 0.25: yours is 0.75, expected 1"),
        ("drop_path", drop_values, "yours drops parts of a sample"),
        ("drop_path", drop_batch, "one batch dropped with rate 0.25: yours .*, expected about 25%"),
        ("convnext_parameters", lambda depths, dims, classes: 28_581_000, "which is not correct"),
        ("folded_layer_scale", lambda block: None, "no answer yet"),
        ("folded_layer_scale", copy.deepcopy, "gamma is None, yours is a Block with gamma"),
        ("folded_layer_scale", fold_in_place, "output of the given block"),
        ("folded_layer_scale", fold_weight_alone, "output of the folded block"),
    ],
)
def test_checks_of_chapters_4_to_7_see_what_is_wrong(check, answer, message):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=message):
        getattr(exercises, f"check_{check}")(answer)


def harmonic(seconds, until, speeds, images):
    return seconds / (until / speeds[0] + (1 - until) / speeds[1]) / images, until


def wrong_in_all(answers, labels):
    return (answers != labels).all(0).nonzero()[0]


@pytest.mark.parametrize(
    "check, answer, message",
    [
        ("times_the_rule", lambda rate, batch: rate / 4e-3, r"times_the_rule\(0.04, 1024\): yours is 10"),
        ("times_the_rule", lambda rate, batch: 4e-3 * batch / 4096 / rate, "which is not correct"),
        ("decay_for", lambda steps, share: 1 - 1 / steps, r"decay_for\(665, 0.01\)"),
        ("decay_for", lambda steps, share: 1 - share ** (1 / steps), r"decay_for\(665, 0.01\)"),
        ("timed_run", harmonic, "epochs of timed_run"),
        ("timed_run", lambda seconds, until, speeds, images: 3.0, r"a pair \(epochs, part\), got 3.0"),
        ("stubborn", wrong_in_all, "50 images, 2 runs: [1-9][0-9]* of those returned are not stubborn, and 0 "),
        ("stubborn", lambda answers, labels: [], "and [1-9][0-9]* stubborn ones are missing"),
    ],
)
def test_checks_of_chapter_8_see_what_is_wrong(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        getattr(exercises, f"check_{check}")(answer)


def test_the_check_of_stubborn_images_takes_any_sequence_of_numbers():
    def numbers(answers, labels):
        return {int(i) for i in np.flatnonzero((answers == answers[0]).all(0) & (answers[0] != labels))}

    exercises.check_stubborn(numbers)


def drawn_apart(before, after, draws, rng):
    def means(right):
        return right[:, rng.integers(right.shape[1], size=right.shape[1])][rng.integers(len(right), size=3)].mean()

    return np.array([100 * (means(after) - means(before)) for _ in range(draws)])


def without_seeds(before, after, draws, rng):
    gaps = (100 * (after.astype(float) - before)).mean(0)
    return gaps[rng.integers(len(gaps), size=(draws, len(gaps)))].mean(1)


def without_images(before, after, draws, rng):
    gaps = (100 * (after.astype(float) - before)).mean(1)
    return gaps[rng.integers(len(gaps), size=(draws, len(gaps)))].mean(1)


@pytest.mark.parametrize(
    "check, answer, message",
    [
        ("effects", lambda cells: (1.0, 2.0), r"a triple \(recipe, network, interaction\), got \(1.0, 2.0\)"),
        ("effects", lambda cells: (cells[0, 1] - cells[0, 0], 0, 0), "recipe of .*which is not correct"),
        (
            "effects",
            lambda c: (np.diff(c).mean(), np.diff(c, axis=0).mean(), 0),
            "interaction of .*which is not correct",
        ),
        ("bootstrap", lambda before, after, draws, rng: None, "expected 2000 draws, got None"),
        ("bootstrap", lambda before, after, draws, rng: np.zeros(draws) - 5, "on average"),
        ("bootstrap", drawn_apart, "runs that agree: .* too much"),
        ("bootstrap", without_seeds, "seeds apart: .* too little: are seeds drawn"),
        ("bootstrap", without_images, "runs that agree: .* too little: are images drawn"),
        ("seeds_needed", lambda gap, std: round(8 * (std / gap) ** 2), "which is not correct"),
    ],
)
def test_checks_of_chapter_9_see_what_is_wrong(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        getattr(exercises, f"check_{check}")(answer)


def crossing_on_a_linear_axis(numbers, gaps):
    for (low, high), (below, above) in zip(itertools.pairwise(numbers), itertools.pairwise(gaps)):
        if below < 0 <= above:
            return low + (high - low) * -below / (above - below)


@pytest.mark.parametrize(
    "check, answer, message",
    [
        (
            "epochs_for",
            lambda images, batch, steps: steps * batch // images,
            r"epochs_for\(946, 64, 1323\): .*not correct",
        ),
        ("epochs_for", lambda images, batch, steps: -(-steps * batch // images), "which is not correct"),
        ("crossing", lambda numbers, gaps: None, r"crossing\(\[100, 1000, 10000\], .*: no answer yet"),
        ("crossing", crossing_on_a_linear_axis, "which is not correct"),
        ("crossing", lambda numbers, gaps: np.exp(np.interp(0, gaps, np.log(numbers))), "does not turn positive"),
        ("power_law", lambda numbers, errors, wanted: np.interp(wanted, numbers, errors), "which is not correct"),
    ],
)
def test_checks_of_chapter_10_see_what_is_wrong(check, answer, message):
    with pytest.raises(AssertionError, match=message):
        getattr(exercises, f"check_{check}")(answer)
