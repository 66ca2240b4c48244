"""Check exercises, and compare the modules that a chapter writes with the package's.

Each `check_` function takes the reader's answer, raises an AssertionError that names the mistake, and prints one line
if the answer is correct. `attempt` runs a check in a notebook without stopping it. `same` compares two modules.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torchvision
from timm.models import swin_transformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_min import blocks
from convnext_min.convnext import Block, ConvNeXt, LayerNorm
from convnext_min.formats import FORMATS, OFFICIAL, tensor_names
from convnext_min.isotropic import ConvNeXtIsotropic
from convnext_min.measure import count_macs, count_parameters
from convnext_min.recipes import Recipe
from convnext_min.roadmap import REGIMES, STEPS, RoadNet, build
from convnext_min.train.optim import group_of

Outputs = Tensor | list[Tensor] | dict[str, Tensor]


def same(mine: nn.Module, reference: nn.Module, input_shape: tuple[int, int, int, int] = (2, 3, 64, 64)) -> None:
    """Assert that two modules compute the same function of a Tensor of shape `input_shape` (N, C, H, W), H = W.

    A module may return a tensor, or a list or dict of tensors, such as the levels of a pyramid. Works on copies.
    Parameters and buffers of `reference` are copied into `mine` in their order, whatever their names, so both must
    define their layers in the same order. Constant tensors (norms, biases, layer scale, running statistics) are
    randomized first: otherwise a layer scale of 1e-6 would hide its branch. Compares outputs in training and in
    evaluation mode, then the MACs. Raises AssertionError naming the first tensor whose shape differs, or the largest
    difference of the outputs.
    """
    if not isinstance(mine, nn.Module):
        raise AssertionError(f"expected a module, got {type(mine).__name__}")
    mine, reference = copy.deepcopy(mine), copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = list(mine.state_dict().items()), list(reference.state_dict().items())
    for (name, value), (right_name, right) in zip(ours, theirs):
        if value.shape != right.shape:
            raise AssertionError(
                f"yours: {name} has shape {tuple(value.shape)}; expected: {right_name} has shape {tuple(right.shape)}"
            )
        if right.is_floating_point() and (right == right.flatten()[0]).all():
            right.copy_(torch.empty(right.shape).uniform_(0.5, 1.5, generator=generator))
        value.copy_(right)
    if len(ours) != len(theirs):
        longer, problem = (ours, "yours also has") if len(ours) > len(theirs) else (theirs, "yours lacks")
        name, value = longer[min(len(ours), len(theirs))]
        raise AssertionError(f"{problem} {name} of shape {tuple(value.shape)}")
    x = torch.randn(input_shape, generator=generator)
    worst = 0.0
    for training in (True, False):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            got = mine.train(training)(x.clone())
            torch.manual_seed(0)
            right = reference.train(training)(x.clone())
        worst = max(worst, _difference(got, right, "training" if training else "evaluation"))
    _, chans, size, _ = input_shape
    macs, right_macs = count_macs(mine, size, chans), count_macs(reference, size, chans)
    if macs != right_macs:
        raise AssertionError(f"yours needs {macs:,} MACs at {size}×{size}; expected {right_macs:,}")
    costs = f"{count_parameters(mine):,} parameters, {macs:,} MACs at {size}×{size}"
    print(f"same: {costs}, outputs differ by at most {worst:.1e}")


def _difference(got: Outputs, right: Outputs, mode: str) -> float:
    """Return the largest difference of two modules' outputs. Raises AssertionError if it is no rounding error."""
    if not isinstance(right, Tensor):
        got, right = (list(levels.values()) if isinstance(levels, dict) else levels for levels in (got, right))
        if len(got) != len(right):
            raise AssertionError(f"yours returns {len(got)} tensors; expected {len(right)}")
        return max(_difference(*levels, mode) for levels in zip(got, right))
    if got.shape != right.shape:
        raise AssertionError(f"your output has shape {tuple(got.shape)}; expected {tuple(right.shape)}")
    difference = (got - right).abs().max().item()
    if not difference <= 1e-4 * right.abs().max().item():
        raise AssertionError(f"in {mode} mode your outputs differ from the expected ones by up to {difference:.3g}")
    return difference


def attempt(check: Callable[..., None], *answers) -> None:
    """Run an exercise's check and print the result, without raising, so that the notebook runs on."""
    try:
        check(*answers)
    except Exception as error:
        print(f"not solved yet: {error or type(error).__name__}")


def expect(value, right, what: str, tolerance: float = 0.0, reveal: bool = True) -> None:
    """Assert that `value` equals `right`: numbers and tensors within the relative `tolerance`, all else exactly.

    The message of the AssertionError names the value `what`; `reveal=False` leaves out the expected value.
    """
    if value is None:
        raise AssertionError(f"{what}: no answer yet")
    if isinstance(right, Tensor):
        if not isinstance(value, Tensor) or value.shape != right.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise AssertionError(f"{what}: yours is {got}, expected a tensor of shape {tuple(right.shape)}")
        difference = (value - right).abs().max().item()
        if not difference <= tolerance * right.abs().max().item():
            raise AssertionError(f"{what}: yours differs from the expected tensor by up to {difference:.3g}")
    else:
        number = isinstance(right, float) and isinstance(value, (int, float))
        if not (math.isclose(value, right, rel_tol=tolerance) if number else value == right):
            raise AssertionError(
                f"{what}: yours is {value}, " + (f"expected {right}" if reveal else "which is not correct")
            )


def solved(message: str) -> None:
    """Print the line that ends every exercise's check."""
    print(f"correct: {message}")


# 01 ResNet-50 and the recipe


def check_bottleneck_macs(answer) -> None:
    """Check exercise 1.1: MACs of a bottleneck, against PyTorch's counter."""
    for width, size in ((64, 56), (80, 20), (512, 7)):
        right = count_macs(blocks.Bottleneck(4 * width, width), size, 4 * width)
        expect(answer(width, size), right, f"bottleneck_macs({width}, {size})", reveal=False)
    solved("17 width² MACs per pixel: 4 for each 1×1 convolution and 9 for the 3×3")


def check_projection_share(answer) -> None:
    """Check exercise 1.2: the fraction of ResNet-50's MACs in its four projection shortcuts at 224 px."""
    with torch.device("meta"):
        model = build("resnet50")
    convs = [stage[0].shortcut[0] for stage in model.stages]
    macs = sum(conv.in_channels * conv.out_channels * (56 // 2**i) ** 2 for i, conv in enumerate(convs))
    expect(answer, macs / count_macs(model), "projection_share()", 1e-3, reveal=False)
    solved(f"the projections take {answer:.1%} of the MACs")


def check_learning_rate(answer) -> None:
    """Check exercise 1.3: linear warm-up and half a cosine, against the trainer's schedule."""
    paper = {"epochs": 300, "warmup": 20, "peak": 4e-3, "end": 1e-6}
    for setting in (paper, {"epochs": 90, "warmup": 5, "peak": 1e-3, "end": 1e-5}):
        epochs, peak = setting["epochs"], setting["peak"]
        recipe = Recipe(epochs, warmup=setting["warmup"] / epochs, base_lr=peak, min_lr=setting["end"])
        for epoch in (0, 2.5, setting["warmup"], 40, epochs // 2, epochs):
            right = recipe.lr_at(epoch / epochs)
            arguments = ", ".join(f"{name}={value:g}" for name, value in setting.items())
            expect(answer(epoch, **setting), right, f"learning_rate({epoch}, {arguments})", 1e-6)
    solved("your schedule equals the trainer's")


def check_drop_path_rates(answer) -> None:
    """Check exercise 1.4: stochastic depth grows over all blocks, against the rates of a built network."""
    for depths, rate in (((3, 3, 9, 3), 0.1), ((2, 2, 6, 2), 0.4)):
        built = RoadNet(replace(STEPS["resnet50"], depths=depths, width=4), drop_path_rate=rate)
        rates = answer(depths, rate)
        expect([len(stage) for stage in rates], list(depths), f"blocks in the stages of depths {depths}")
        for i, (stage, right) in enumerate(zip(rates, built.stages)):
            right = torch.tensor([block.drop_path.rate for block in right])
            expect(torch.tensor(stage), right, f"rates of stage {i + 1}, depths {depths}", 1e-4)
    solved("the rates grow from 0 at the first block of the network to the full rate at the last")


# 02 Macro design


def check_network_macs(answer) -> None:
    """Check exercise 2.1: MACs of a ResNet of any depths from measured parts, against PyTorch's counter."""
    for depths in ((3, 4, 6, 3), (3, 3, 9, 3), (2, 2, 2, 2), (1, 8, 5, 1)):
        with torch.device("meta"):
            right = count_macs(RoadNet(replace(STEPS["resnet50"], depths=depths)))
        expect(answer(depths), right, f"network_macs({depths})", reveal=False)
    solved("after the first block of a stage, every block costs the same in all stages")


def check_patchify_linear(answer) -> None:
    """Check exercise 2.2: the patchify stem without a convolution."""
    generator = torch.Generator().manual_seed(0)
    images, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 16, 24), (5, 3, 4, 4), (5,)))
    right = nn.functional.conv2d(images, weight, bias, stride=4)
    expect(answer(images, weight, bias), right, "patchify_linear(images, weight, bias)", 1e-4)
    solved("patches do not overlap, so one reshape and one matrix product are enough")


def check_shift_error(answer) -> None:
    """Check exercise 2.3: the relative change of a stem's output, beyond the shift itself, when the image shifts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    for slug in ("resnet50", "patchify"):
        stem = build(slug, width_multiplier=0.25).stem.eval()
        for shift in (1, 2, 4):
            with torch.no_grad():
                before, after = stem(images).roll(shift // 4, -1), stem(images.roll(shift, -1))
            right = ((after - before).abs().mean() / before.abs().mean()).item()
            value = answer(stem, images, shift)
            if not isinstance(value, (int, float)) or not math.isclose(value, right, rel_tol=1e-3, abs_tol=1e-6):
                asked = f"shift_error of the {slug} stem at {shift} px"
                problem = "no answer yet" if value is None else f"yours is {value}, which is not correct"
                raise AssertionError(f"{asked}: {problem}")
    solved("the patchify stem follows a shift exactly if the shift is a whole number of patches, and only then")


# Attention and the Swin block


def check_window_attention_macs(answer) -> None:
    """Check exercise A.1: MACs of window attention with its linear layers, counted on timm's layer."""
    for dim, size, window in ((96, 14, 7), (32, 28, 7), (64, 16, 4)):
        layer = swin_transformer.WindowAttention(dim, num_heads=2, window_size=window)
        windows = torch.zeros((size // window) ** 2, window**2, dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(windows)
        right = counter.get_total_flops() // 2
        expect(answer(dim, size, window), right, f"window_attention_macs({dim}, {size}, {window})", reveal=False)
    solved("more heads have fewer channels each, so the number of heads cancels")


def check_window_of(answer) -> None:
    """Check exercise A.2: the pixels that an output of a Swin block sees, against the gradients of timm's block."""
    for size, window, shift in ((14, 7, 0), (14, 7, 3), (12, 4, 2)):
        block = swin_transformer.SwinTransformerBlock(
            8, (size, size), num_heads=2, window_size=window, shift_size=shift
        )
        for row, column in ((0, 0), (2, 7), (5, size - 1), (size - 3, 3), (size - 1, size - 1)):
            x = torch.rand(1, size, size, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            block(x)[0, row, column].square().sum().backward()
            influence = x.grad[0].abs().sum(-1)
            rows, columns = (influence > 1e-12 * influence.max()).nonzero().T
            top, left = int(rows.min()), int(columns.min())
            right = (top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1)
            expect(
                answer(row, column, size, window, shift),
                right,
                f"window_of({row}, {column}, {size}, {window}, {shift})",
            )
    solved("a window of the partition, not the pixels around the output")


def check_merging_kernel(answer) -> None:
    """Check exercise A.3: patch merging without its norm as a 2x2 convolution of stride 2, against timm's layer."""
    generator = torch.Generator().manual_seed(0)
    for chans in (3, 8):
        merging = swin_transformer.PatchMerging(chans, norm_layer=nn.Identity)
        x = torch.randn(2, chans, 6, 10, generator=generator)
        with torch.no_grad():
            kernel = answer(merging.reduction.weight)
            shape = tuple(kernel.shape) if isinstance(kernel, Tensor) else None
            expect(shape, (2 * chans, chans, 2, 2), "shape of the kernel")
            right = merging(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            expect(nn.functional.conv2d(x, kernel, stride=2), right, "output of the convolution", 1e-4)
    solved("patch merging is a LayerNorm over 4C values and a 2×2 convolution of stride 2")


# 03 ResNeXt-ify


def check_grouped_macs(answer) -> None:
    """Check exercise 3.1: MACs of a grouped convolution, against PyTorch's counter."""
    for case in ((64, 64, 56, 3, 1), (96, 96, 14, 3, 96), (32, 48, 7, 5, 8)):
        in_chans, out_chans, size, kernel_size, groups = case
        conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, groups=groups)
        expect(answer(*case), count_macs(conv, size, in_chans), f"grouped_macs{case}", reveal=False)
    solved("your formula equals the counter's result, from one group to one group per channel")


def check_resnext_block(answer) -> None:
    """Check exercise 3.2: ResNeXt-50's (32x4d) block, against torchvision's."""
    same(answer, torchvision.models.resnet.Bottleneck(256, 64, groups=32, base_width=4), (2, 256, 14, 14))
    solved("ResNeXt's block lies between ResNet's and this chapter's")


def check_fold_separable(answer) -> None:
    """Check exercise 3.3: the dense weight that equals a depthwise and then a pointwise convolution."""
    generator = torch.Generator().manual_seed(0)
    for chans, out_chans, k in ((4, 6, 3), (5, 2, 7)):
        x, depthwise, pointwise = (
            torch.randn(shape, generator=generator)
            for shape in ((2, chans, 9, 9), (chans, 1, k, k), (out_chans, chans, 1, 1))
        )
        weight = answer(depthwise, pointwise)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        expect(shape, (out_chans, chans, k, k), "shape of the folded weight")
        conv2d = nn.functional.conv2d
        right = conv2d(conv2d(x, depthwise, padding=k // 2, groups=chans), pointwise)
        expect(conv2d(x, weight, padding=k // 2), right, "output of the folded convolution", 1e-4)
    solved("C (k² + D - 1) of the D C k² weights are free: k² + D per channel, minus one scale that both factors share")


def check_widest(answer) -> None:
    """Check exercise 3.4: the largest base width, a multiple of 4, of a depthwise network within a number of MACs."""
    for macs in (1_000_000_000, 4_500_000_000):
        width, asked = answer(macs), f"widest({macs:,})"
        if width is None:
            raise AssertionError(f"{asked}: no answer yet")
        if not isinstance(width, int) or width < 4 or width % 4 != 0:
            raise AssertionError(f"{asked}: yours is {width}, expected a positive multiple of 4")
        with torch.device("meta"):
            own, next_wider = (count_macs(RoadNet(replace(STEPS["depthwise"], width=w))) for w in (width, width + 4))
        if own > macs:
            raise AssertionError(f"{asked}: yours is {width}, which needs {own:,} MACs")
        if next_wider <= macs:
            raise AssertionError(f"{asked}: yours is {width}, but {width + 4} is within the MACs as well")
    solved("the network stays within the MACs, and 4 more channels would exceed them")


# 04 Inverted bottleneck


def check_shortcut_macs(answer) -> None:
    """Check exercise 4.1: MACs of all projection shortcuts of a design at 224 px, against the built layers."""
    for slug in ("patchify", "width", "inverted"):
        with torch.device("meta"):
            model = build(slug)
        right = 0
        for i, stage in enumerate(model.stages):
            if not isinstance(stage[0].shortcut, nn.Identity):
                conv = stage[0].shortcut[0]
                right += conv.in_channels * conv.out_channels * (56 // 2**i) ** 2
        width, expansion = STEPS[slug].width, STEPS[slug].block.expansion
        expect(answer(width, expansion), right, f"shortcut_macs({width}, {expansion})", reveal=False)
    solved("inverted, the projections between the stages cost a sixteenth, and the first stage has none")


def check_mobilenet_block(answer) -> None:
    """Check exercise 4.2: MobileNetV2's inverted residual, against torchvision's."""
    same(answer, torchvision.models.mobilenetv2.InvertedResidual(24, 24, stride=1, expand_ratio=4), (2, 24, 14, 14))
    solved("no activation after the sum, and ReLU6 instead of ReLU")


def check_lossless_relu(answer) -> None:
    """Check exercise 4.3: two matrices around a ReLU that together are the identity."""
    generator = torch.Generator().manual_seed(0)
    for chans in (3, 16):
        matrices = answer(chans)
        expect(None if matrices is None else True, True, f"lossless_relu({chans})")
        if not isinstance(matrices, tuple) or len(matrices) != 2:
            raise AssertionError(f"expected a pair (expand, reduce), yours is a {type(matrices).__name__}")
        expand, reduce = matrices
        expect(tuple(expand.shape), (2 * chans, chans), "shape of expand")
        expect(tuple(reduce.shape), (chans, 2 * chans), "shape of reduce")
        x = torch.randn(chans, 50, generator=generator)
        expect(reduce @ (expand @ x).relu(), x, "reduce @ relu(expand @ x)", 1e-4)
    solved("with twice the channels a ReLU need not lose anything")


# 05 Large kernels


def check_dilated_block(answer) -> None:
    """Check exercise 5.1: the reach of a 7x7 kernel at the cost of a 3x3 one."""
    for stride in (1, 2):
        block, right = answer(8, 8 * stride, stride), blocks.MovedUpBlock(8, 8 * stride, stride)
        image = torch.zeros(1, 8, 28, 28, requires_grad=True)
        out = block.dwconv(image)
        expect(tuple(out.shape), (1, 8, 28 // stride, 28 // stride), f"shape after dwconv with stride {stride}")
        out[..., 14 // stride, 14 // stride].sum().backward()
        rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        expect(int(rows[-1] - rows[0]) + 1, 7, f"positions that dwconv reaches with stride {stride}")
        expect(count_macs(block, 28, 8), count_macs(right, 28, 8), f"MACs with stride {stride}")
    solved("nine taps, three positions apart, reach as far as a 7×7 kernel")


def check_stack_of_threes(answer) -> None:
    """Check exercise 5.2: the 3x3 convolutions that reach as far as one k x k: their number and share of its MACs."""
    for kernel_size in (3, 5, 7, 11):
        layers, fraction = answer(kernel_size)
        expect(layers, (kernel_size - 1) // 2, f"layers for kernel size {kernel_size}", reveal=False)
        right = layers * 9 / kernel_size**2
        expect(fraction, right, f"fraction of the MACs for kernel size {kernel_size}", 1e-3, reveal=False)
    solved("fewer MACs, but more layers")


def check_depthwise_macs_of_design(answer) -> None:
    """Check exercise 5.3: MACs of all depthwise convolutions of a design at 224 px, against PyTorch's counter."""
    for regime, steps in REGIMES.items():
        with torch.device("meta"):
            small, large = (count_macs(RoadNet(steps[slug])) for slug in ("move_up", "kernel11"))
        one_tap = (large - small) // (11**2 - 3**2)
        for slug in ("move_up", "kernel7", "kernel11"):
            right = one_tap * steps[slug].kernel_size ** 2
            expect(answer(steps[slug]), right, f"MACs of the depthwise convolutions of {slug}, {regime}", reveal=False)
    solved("it equals PyTorch's count in both regimes")


# 06 Micro design


def check_layer_norm(answer) -> None:
    """Check exercise 6.1: LayerNorm over the channels of (N, C, H, W), by hand."""
    generator = torch.Generator().manual_seed(0)
    for chans, spread in ((96, 1.0), (4, 1.0), (4, 1e-3)):
        norm = LayerNorm(chans)
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        x = 3 + spread * torch.randn(2, chans, 5, 5, generator=generator)
        with torch.no_grad():
            y, right = answer(x, norm.weight, norm.bias), norm(x)
        expect(y, right, f"{chans} channels with a standard deviation of {spread:g}", 1e-3)
    solved("it normalizes each pixel over its channels")


def check_fold_batch_norm(answer) -> None:
    """Check exercise 6.2: a convolution that equals a convolution followed by a BatchNorm in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for conv in (nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False), nn.Conv2d(8, 16, 1, stride=2, bias=False)):
        norm = nn.BatchNorm2d(conv.out_channels).eval()
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data.uniform_(0.5, 1.5, generator=generator)
        x = torch.randn(2, 8, 14, 14, generator=generator)
        with torch.no_grad():
            folded = answer(conv, norm)
            if not isinstance(folded, nn.Conv2d):
                raise AssertionError(f"expected one nn.Conv2d, yours is a {type(folded).__name__}")
            y, right = folded(x), norm(conv(x))
        k = conv.kernel_size[0]
        expect(y, right, f"output of the folded {k}×{k} convolution", 1e-4)
    solved("in evaluation mode the convolution does the work of the BatchNorm as well")


def check_separate_downsampling_macs(answer) -> None:
    """Check exercise 6.3: the MACs that separate downsampling adds at 224 px, against PyTorch's counter."""
    for regime, steps in REGIMES.items():
        with torch.device("meta"):
            before, after = (count_macs(RoadNet(steps[slug])) for slug in ("layer_norm", "convnext"))
        value = answer(steps["convnext"])
        expect(value, after - before, f"additional MACs in the {regime} regime", reveal=False)
    solved("it equals PyTorch's count in both regimes")


# 07 ConvNeXt


def check_stages(answer) -> None:
    """Check exercise 7.1: a ConvNeXt built from a flat list of layers, with downsampling where it belongs."""
    for depths, dims in (((1, 2, 3, 1), (8, 16, 32, 64)), ((2, 1, 1, 1), (8, 8, 16, 16))):
        reference = ConvNeXt(depths=depths, dims=dims, num_classes=5)
        parts = [part for pair in zip(reference.downsample_layers, reference.stages) for part in pair]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), reference.norm, reference.head)
        print(f"depths {depths}, dims {dims}:", end=" ")
        same(answer(depths, dims, 5), nn.Sequential(*parts, *head))
    solved("a stem and three downsampling layers, for any dims")


def check_drop_path(answer) -> None:
    """Check exercise 7.2: stochastic depth as a function of (x, rate, training)."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for shape, rate in (((4000, 2, 3, 3), 0.25), ((4000, 5), 0.5)):
            x = torch.rand(shape, generator=generator) + 0.5
            expect(answer(x, rate, False), x, "drop_path in evaluation")
            expect(answer(x, 0.0, True), x, "drop_path with rate 0")
            factors = (answer(x, rate, True) / x).flatten(1)
            if not torch.allclose(factors, factors[:, :1], atol=1e-5):
                raise AssertionError("yours drops parts of a sample; expected: a sample is kept or dropped as a whole")
            dropped = (factors[:, 0] == 0).double().mean().item()
            if abs(dropped - rate) > 0.05:
                raise AssertionError(
                    f"samples of one batch dropped with rate {rate}: yours {dropped:.0%}, expected about {rate:.0%}"
                )
            if abs(factors.mean().item() - 1) > 0.05:
                raise AssertionError(
                    f"mean factor with rate {rate}: yours is {factors.mean():.2f}, expected 1 (divide by 1 - rate)"
                )
    solved("one draw per sample, and the mean over draws equals the input")


def check_convnext_parameters(answer) -> None:
    """Check exercise 7.3: the parameters of any ConvNeXt by arithmetic, against the built network."""
    for depths, dims, classes in (
        ((3, 3, 9, 3), (96, 192, 384, 768), 1000),
        ((2, 2, 6, 2), (40, 80, 160, 320), 10),
        ((1, 4, 2, 3), (8, 24, 16, 40), 7),
    ):
        with torch.device("meta"):
            right = count_parameters(ConvNeXt(depths=depths, dims=dims, num_classes=classes))
        expect(answer(depths, dims, classes), right, f"parameters of {depths}, {dims}, {classes} classes", reveal=False)
    solved("every weight and every bias is counted")


def check_folded_layer_scale(answer) -> None:
    """Check exercise 7.4: a block without layer scale that computes the same function."""
    torch.manual_seed(0)
    block, x = Block(8), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-1, 1)
        right = block(x)
        folded = answer(block)
        expect(None if folded is None else True, True, "fold_layer_scale(block)")
        if not isinstance(folded, Block) or folded.gamma is not None:
            raise AssertionError(
                f"expected a Block whose gamma is None, yours is a {type(folded).__name__}"
                + (" with gamma" if isinstance(folded, Block) else "")
            )
        expect(block(x), right, "output of the given block after folding")
        expect(folded(x), right, "output of the folded block", 1e-4)
    solved("layer scale costs nothing once training is over")


# 08 Training on Imagenette


def check_times_the_rule(answer) -> None:
    """Check exercise 8.1: a learning rate as a multiple of the paper's rule for the same batch size."""
    for rate, batch in ((4e-2, 1024), (2e-3, 64), (4e-3, 4096), (1e-4, 512)):
        right = rate / Recipe(batch_size=batch).lr
        expect(answer(rate, batch), right, f"times_the_rule({rate:g}, {batch})", 1e-6, reveal=False)
    solved(
        "the issue has 40 times the rule's learning rate, this chapter's plain recipe 32 times, in far fewer iterations"
    )


def check_decay_for(answer) -> None:
    """Check exercise 8.2: the EMA decay that leaves a share of the initial weights after given iterations."""
    for iterations, share in ((665, 0.01), (2700, 0.01), (93_600, 0.0001), (10, 0.5)):
        right = share ** (1 / iterations)
        expect(answer(iterations, share), right, f"decay_for({iterations}, {share})", 1e-9, reveal=False)
    solved("a longer run allows a slower average")


def check_timed_run(answer) -> None:
    """Check exercise 8.3: the epochs of a timed run with growing images, and the share of its images that are small."""
    for seconds, until, speeds, images in ((160, 0.6, (500, 290), 9469), (600, 0.25, (1000, 250), 5000)):
        small, large = seconds * until * speeds[0], seconds * (1 - until) * speeds[1]
        pair = answer(seconds, until, speeds, images)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise AssertionError(f"the answer is a pair (epochs, part), got {pair}")
        asked = f"of timed_run({seconds}, {until}, {speeds}, {images})"
        expect(pair[0], (small + large) / images, f"epochs {asked}", 1e-6, reveal=False)
        expect(pair[1], small / (small + large), f"part {asked}", 1e-6, reveal=False)
    solved("small images are processed faster, so their share of the iterations is larger than their share of the time")


def check_stubborn(answer) -> None:
    """Check exercise 8.4: the images for which all runs make the same wrong prediction."""
    generator = np.random.default_rng(0)
    for runs, images in ((2, 50), (4, 2000)):
        labels = generator.integers(10, size=images).astype(np.uint16)
        predictions = generator.integers(10, size=(runs, images)).astype(np.uint16)
        agreed = generator.random(images) < 0.4
        predictions[:, agreed] = predictions[0, agreed]
        numbers = answer(predictions, labels)
        expect(None if numbers is None else True, True, "stubborn_in_one_way(predictions, labels)")
        right = [i for i in range(images) if len({*predictions[:, i]}) == 1 and predictions[0, i] != labels[i]]
        got = sorted(int(number) for number in numbers)
        if got != right:
            extra, missed = set(got) - set(right), set(right) - set(got)
            found = f"{len(extra)} of those returned are not stubborn, and {len(missed)} stubborn ones are missing"
            raise AssertionError(f"{images} images, {runs} runs: {found}")
    solved("these images are wrong in the same way in every run")


# 09 Recipe or architecture?


def check_effects(answer) -> None:
    """Check exercise 9.1: the effects of recipe and network, and their interaction, from four accuracies."""
    for cells in ([[76.13, 78.82], [75.0, 82.0]], [[50.0, 40.0], [70.0, 80.0]], [[60.5, 65.0], [60.5, 65.0]]):
        (a, b), (c, d) = cells
        right = {"recipe": (b - a + d - c) / 2, "network": (c - a + d - b) / 2, "interaction": (d - c) - (b - a)}
        given = answer(np.array(cells))
        if not isinstance(given, tuple) or len(given) != 3:
            raise AssertionError(f"the answer is a triple (recipe, network, interaction), got {given}")
        for (name, value), got in zip(right.items(), given):
            expect(None if got is None else float(got), value, f"{name} of {cells}", 1e-6, reveal=False)
    solved("with an interaction of zero, recipe and network could be chosen separately")


def check_bootstrap(answer) -> None:
    """Check exercise 9.2: differences of top-1 between paired runs, with seeds and images drawn again."""
    rng = np.random.default_rng(0)
    before = rng.random((3, 1000)) < 0.6
    agreeing = before ^ (rng.random(before.shape) < 0.05)
    scattered = rng.random((3, 1000)) < np.array([[0.4], [0.6], [0.8]])
    for name, after, missing in (("runs that agree", agreeing, "images"), ("seeds apart", scattered, "seeds")):
        drawn = answer(before, after, 2000, np.random.default_rng(1))
        if np.shape(drawn) != (2000,):
            got = None if drawn is None else np.shape(drawn)
            raise AssertionError(f"{name}: expected 2000 draws, got {got}")
        gaps, middle, spread = 100 * (after.astype(float) - before), np.mean(drawn), np.std(drawn)
        if abs(middle - gaps.mean()) > 1:
            raise AssertionError(f"{name}: the draws are {middle:.2f} on average, the difference {gaps.mean():.2f}")
        by_seed = gaps.mean(1).std() / len(gaps) ** 0.5  # the spread from drawing seeds alone
        by_image = gaps.mean(0).std() / gaps.shape[1] ** 0.5  # and from drawing images alone
        if spread > 1.35 * (by_seed**2 + 2 * by_image**2) ** 0.5:
            raise AssertionError(
                f"{name}: the draws spread by {spread:.2f}, too much: are the images the same for both?"
            )
        if spread < 0.8 * {"images": by_image, "seeds": by_seed}[missing]:
            raise AssertionError(f"{name}: the draws spread by {spread:.2f}, too little: are {missing} drawn, too?")
    solved("the interval includes the spread of seeds and of images, and pairs stay together")


def check_seeds_needed(answer) -> None:
    """Check exercise 9.3: the smallest number of seeds for which a gap is two standard errors of a difference."""
    for gap, std in ((0.5, 0.07), (0.15, 0.18), (1.0, 1.0), (0.06, 0.09)):
        right = next(n for n in itertools.count(1) if gap >= 2 * std * math.sqrt(2 / n))
        expect(answer(gap, std), right, f"seeds_needed({gap}, {std})", reveal=False)
    solved("half the gap needs four times the seeds")


# 10 When does ConvNeXt win?


def check_epochs_for(answer) -> None:
    """Check exercise 10.1: the fewest epochs over a set of images that give at least a number of whole batches."""
    for images, batch, iterations in ((946, 64, 1323), (2841, 64, 1323), (9469, 64, 1323), (640, 64, 100), (64, 64, 7)):
        right = next(epochs for epochs in itertools.count(1) if epochs * (images // batch) >= iterations)
        expect(answer(images, batch, iterations), right, f"epochs_for({images}, {batch}, {iterations})", reveal=False)
    solved("as many iterations as with all images, and each image is seen many times more often")


def check_crossing(answer) -> None:
    """Check exercise 10.2: where a gap between two networks turns positive, on a logarithmic axis; None if nowhere."""
    for numbers, gaps in (
        ([100, 1000, 10_000], [-5.0, -1.0, 3.0]),
        ([100, 400, 1600], [-3.0, 1.0, 2.0]),
        ([100, 1000], [-4.0, -1.0]),
        ([100, 1000, 10_000], [-1.0, -2.0, 6.0]),
        ([100, 1000], [1.0, 2.0]),
    ):
        pairs = zip(itertools.pairwise(numbers), itertools.pairwise(gaps))
        turns = [(n, g) for n, g in pairs if g[0] < 0 <= g[1]]
        asked, got = f"crossing({numbers}, {gaps})", answer(numbers, gaps)
        if not turns:
            if got is not None:
                raise AssertionError(f"{asked}: got {got}, but the gap does not turn positive there: return None")
            continue
        (low, high), (below, above) = turns[0]
        right = math.exp(math.log(low) + (math.log(high) - math.log(low)) * -below / (above - below))
        expect(None if got is None else float(got), right, asked, 1e-6, reveal=False)
    solved("at this number of images neither network is ahead, if straight lines between the points are right")


def check_power_law(answer) -> None:
    """Check exercise 10.3: the error predicted for a third number of images by a power law through two."""
    for a, b, numbers in ((5.0, 0.35, (946, 2841, 9469)), (2.0, 0.1, (100, 500, 100_000)), (1.0, 0.5, (10, 20, 5))):
        *known, wanted = numbers
        errors = [a * n**-b for n in known]
        got = answer(known, errors, wanted)
        asked = f"power_law({known}, {[round(error, 3) for error in errors]}, {wanted})"
        expect(None if got is None else float(got), a * wanted**-b, asked, 1e-6, reveal=False)
    solved("a power law is a straight line on two logarithmic axes")


# 11 The full ImageNet recipe


def check_accumulation(answer) -> None:
    """Check exercise 11.1: micro-batch size and accumulation steps for a process's share of the effective batch."""
    for batch, processes, memory in ((4096, 8, 128), (4096, 8, 100), (4096, 1, 48), (600, 4, 40), (64, 2, 500)):
        share = batch // processes
        micro_batch = max(part for part in range(1, min(memory, share) + 1) if share % part == 0)
        right = (micro_batch, share // micro_batch)
        expect(answer(batch, processes, memory), right, f"accumulation({batch}, {processes}, {memory})", reveal=False)
    solved("as few parts as the memory allows, and the batch size is the recipe's")


def check_epochs_to_forget(answer) -> None:
    """Check exercise 11.2: the epochs until an EMA with constant decay has forgotten the initial weights."""
    for decay, iterations, share in ((0.9999, 312, 0.01), (0.9999, 147, 0.01), (0.999, 10, 0.5), (0.99, 1000, 0.01)):
        right = next(epochs for epochs in itertools.count(1) if decay ** (epochs * iterations) < share)
        expect(
            answer(decay, iterations, share), right, f"epochs_to_forget({decay}, {iterations}, {share})", reveal=False
        )
    solved("this takes half of the paper's run; a shorter run needs a faster average")


def check_layer_group(answer) -> None:
    """Check exercise 11.3: the group of a block in layer-wise learning-rate decay."""
    for depths in ((3, 3, 27, 3), (3, 3, 9, 3), (2, 2, 8, 2)):
        for stage, depth in enumerate(depths):
            for block in range(depth):
                right = group_of(f"stages.{stage}.{block}.gamma", depths)
                expect(answer(stage, block, depths), right, f"layer_group({stage}, {block}, {depths})", reveal=False)
    solved("12 groups between stem and classifier in the larger models, 6 in ConvNeXt-T")


# 12 Pretrained weights and fine-tuning


def check_timm_key(answer) -> None:
    """Check exercise 12.1: timm's name of each tensor of a ConvNeXt, from the official name."""
    for depths in ((1, 1, 2, 1), (3, 3, 9, 3)):
        for key, right in zip(tensor_names(OFFICIAL, depths), tensor_names(FORMATS["timm"], depths)):
            expect(answer(key), right, f"timm_key({key!r})", reveal=False)
    solved("the same tensors under other names, so a checkpoint of one library is one of the other")


def check_kept_classes(answer) -> None:
    """Check exercise 12.2: a copy of a network whose classifier has only some of the classes, in a given order."""
    torch.manual_seed(0)
    model, images = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=7).eval(), torch.randn(2, 3, 32, 32)
    model.head.weight.data.normal_()
    model.head.bias.data.normal_()
    with torch.no_grad():
        before = model(images)
        for classes in ([5, 0, 2], [6]):
            kept = answer(model, classes)
            if kept is None or kept is model:
                raise AssertionError("the answer is a new network, and the given one stays as it is")
            expect(
                kept(images), before[:, classes], f"the logits of keep_classes(model, {classes})", 1e-5, reveal=False
            )
            expect(kept.head.out_features, len(classes), "head.out_features")
        expect(model(images), before, "the logits of the given network")
    solved("a classifier for fewer classes of the same task needs no training")


def check_grey_stem(answer) -> None:
    """Check exercise 12.3: a stem's weight for images of one channel, from the weight for three."""
    weight, grey = torch.randn(8, 3, 4, 4), torch.randn(2, 1, 16, 16)
    right = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight, stride=4)
    got = answer(weight)
    expect(None if got is None else tuple(got.shape), (8, 1, 4, 4), "the shape of grey_stem(weight)")
    expect(nn.functional.conv2d(grey, got, stride=4), right, "the response to a grey image", 1e-5)
    solved("a grey image gives what its three equal channels gave")


# 13 ConvNeXt without a pyramid


def check_isotropic_parameters(answer) -> None:
    """Check exercise 13.1: the parameters of an isotropic ConvNeXt without layer scale."""
    for depth, dim, patch_size, classes in ((18, 384, 16, 1000), (1, 8, 4, 3), (9, 96, 8, 10)):
        with torch.device("meta"):
            model = ConvNeXtIsotropic(depth=depth, dim=dim, patch_size=patch_size, num_classes=classes)
        asked = f"isotropic_parameters({depth}, {dim}, {patch_size}, {classes})"
        expect(answer(depth, dim, patch_size, classes), count_parameters(model), asked, reveal=False)
    solved("with all biases and norms")


def check_attention_crossover(answer) -> None:
    """Check exercise 13.2: the image side from which attention's products take more MACs than the linear layers."""
    for dim, patch_size in ((384, 16), (96, 8), (768, 16), (6, 4)):
        sides = (side for side in itertools.count(1) if 2 * side**4 * dim > 12 * side**2 * dim**2)
        right = next(sides) * patch_size
        expect(answer(dim, patch_size), right, f"attention_crossover({dim}, {patch_size})", reveal=False)
    solved("from more than 6C vectors on; at 224 pixels a ViT has far fewer")


def check_blocks_to_see_all(answer) -> None:
    """Check exercise 13.3: the depthwise convolutions until each vector of a grid depends on every other."""
    for side, kernel_size in ((14, 7), (12, 7), (7, 3), (14, 5), (1, 7)):
        right = next(n for n in itertools.count() if n * (kernel_size // 2) >= side - 1)
        expect(answer(side, kernel_size), right, f"blocks_to_see_all({side}, {kernel_size})", reveal=False)
    solved("the receptive field covers the image after a few blocks, but distant vectors count less")
