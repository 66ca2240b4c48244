# DRAFT, never executed: sections for convnext_min/exercises.py, between "# 02 Macro design" and "# 05 Large kernels".
# Needs `import torchvision` there.

# 03 ResNeXt-ify


def check_grouped_macs(answer) -> None:
    """Exercise 3.1: MACs of a grouped convolution, held to PyTorch's counter."""
    for case in ((64, 64, 56, 3, 1), (96, 96, 14, 3, 96), (32, 48, 7, 5, 8)):
        in_chans, out_chans, size, kernel_size, groups = case
        conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, groups=groups)
        expect(answer(*case), count_macs(conv, size, in_chans), f"grouped_macs{case}", reveal=False)
    solved("the counter's figure, from one group to one a channel")


def check_resnext_block(answer) -> None:
    """Exercise 3.2: ResNeXt-50's (32x4d) block, held to torchvision's."""
    same(answer, torchvision.models.resnet.Bottleneck(256, 64, groups=32, base_width=4), (2, 256, 14, 14))
    solved("ResNeXt's block is between ResNet's and this chapter's")


def check_fold_separable(answer) -> None:
    """Exercise 3.3: the dense weight that equals a depthwise and then a pointwise convolution."""
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
    solved("C k^2 + D C numbers make all D C k^2, but for one scale a channel that counts twice")


def check_widest(answer) -> None:
    """Exercise 3.4: the largest base width, a multiple of 4, of a depthwise network within a number of MACs."""
    for macs in (1_000_000_000, 4_500_000_000):
        width = answer(macs)
        expect(isinstance(width, int) and width >= 4 and width % 4 == 0, True, f"widest({macs:,}) is a multiple of 4")
        with torch.device("meta"):
            costs = [count_macs(RoadNet(replace(STEPS["depthwise"], width=w))) for w in (width, width + 4)]
        expect(costs[0] <= macs, True, f"width {width} stays within {macs:,} MACs")
        expect(costs[1] > macs, True, f"no larger width than {width} stays within {macs:,} MACs")
    solved("within the MACs, and 4 channels more would not be")


# 04 Inverted bottleneck


def check_shortcut_macs(answer) -> None:
    """Exercise 4.1: MACs of all projection shortcuts of a design at 224 px, held to the built layers."""
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
    solved("sixteen times less where four times narrower, and none in the first stage")


def check_mobilenet_block(answer) -> None:
    """Exercise 4.2: MobileNetV2's inverted residual, held to torchvision's."""
    same(answer, torchvision.models.mobilenetv2.InvertedResidual(24, 24, stride=1, expand_ratio=4), (2, 24, 14, 14))
    solved("one activation less, and ReLU6 for ReLU")


def check_lossless_relu(answer) -> None:
    """Exercise 4.3: two matrices around a ReLU that together are the identity."""
    generator = torch.Generator().manual_seed(0)
    for chans in (3, 16):
        matrices = answer(chans)
        expect(isinstance(matrices, tuple) and len(matrices) == 2, True, "the answer is a pair (expand, reduce)")
        expand, reduce = matrices
        expect(tuple(expand.shape), (2 * chans, chans), "shape of expand")
        expect(tuple(reduce.shape), (chans, 2 * chans), "shape of reduce")
        x = torch.randn(chans, 50, generator=generator)
        expect(reduce @ (expand @ x).relu(), x, "reduce @ relu(expand @ x)", 1e-4)
    solved("with twice the channels a ReLU need not lose anything")
