"""The experiments of the book, each a list of `Trial`s; `convnext_min.experiments.run` trains them."""

from dataclasses import dataclass
from typing import ClassVar

from convnext_min.roadmap import STEPS
from convnext_min.train.models import ISOTROPIC


@dataclass(frozen=True)
class Trial:
    """One row of a summary: a model, a recipe, the settings that differ from it, and other options of the trainer."""

    trainer: ClassVar[str] = "convnext_min.train"  # the module that trains it
    metrics: ClassVar[tuple[str, ...]] = ("top1",)  # of its summary.json

    name: str
    model: str
    recipe: str
    settings: tuple[str, ...] = ()  # "key=value"
    arguments: tuple[str, ...] = ()

    def options(self, seed: int) -> list[str]:
        """Return the options of `convnext_min.train` that repeat the run, except the folders of data and output."""
        options = ["--recipe", self.recipe, "--model", self.model, "--seed", str(seed), *self.arguments]
        return [*options, "--set", *self.settings] if self.settings else options


@dataclass(frozen=True)
class DenseTrial:
    """One row of a summary about detection or segmentation: a network on a task, and the folder of its backbone."""

    trainer: ClassVar[str] = "convnext_min.dense.train"

    name: str
    task: str
    head: str
    backbone: str
    settings: tuple[str, ...] = ()  # "key=value"
    pretrained: str = ""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the scores in the summary.json of a run; the first is the one to compare."""
        return ("mask_ap", "mask_ap50", "box_ap", "box_ap50") if "rcnn" in self.head else ("miou",)

    def options(self, seed: int) -> list[str]:
        """Return the options of `convnext_min.dense.train` that repeat the run, except folders of data and output."""
        options = ["--task", self.task, "--head", self.head, "--backbone", self.backbone, "--seed", str(seed)]
        options += ["--pretrained", self.pretrained] if self.pretrained else []
        return [*options, "--set", *self.settings] if self.settings else options


HOLDOUT = ("--holdout",)  # evaluate on a tenth of the training images: choices must not see the validation images

# ---- Small data: which changes make the plain recipe better?

_THREE = ("stem=overlapping", "init=fan_in", "layer_scale_init=0.2")
_FOUR = (*_THREE, "optimizer=muon")
SMALL_DATA_CHANGES = {
    "plain": (),
    "layer scale 0.2": ("layer_scale_init=0.2",),
    "fan-in init": ("init=fan_in",),
    "overlapping stem": ("stem=overlapping",),
    "stem, init, layer scale": _THREE,
    "stem, init, layer scale, Muon": _FOUR,
    "these four, learning rate / 2": (*_FOUR, "base_lr=1e-3"),
    "these four, learning rate x 2": (*_FOUR, "base_lr=4e-3"),
    "these four, learning rate x 4": (*_FOUR, "base_lr=8e-3"),
    "these four, learning rate x 8": (*_FOUR, "base_lr=1.6e-2"),
    "these four, learning rate x 16": (*_FOUR, "base_lr=3.2e-2"),
    "Muon, learning rate x 8": ("optimizer=muon", "base_lr=1.6e-2"),
    "these four, batch 128": (*_FOUR, "batch_size=128"),
    "these four, CutMix": (*_FOUR, "cutmix=1.0"),
    "these four, weight decay x 4": (*_FOUR, "weight_decay=0.2"),
    "learning rate / 2": ("base_lr=1e-3",),
    "learning rate x 2": ("base_lr=4e-3",),
    "steps instead of the cosine": ("schedule=steps",),
    "gradient clipping": ("clip_grad=1.0",),
    "Muon": ("optimizer=muon",),
    "batch 32": ("batch_size=32",),
    "batch 128": ("batch_size=128",),
    "no average of weights": ("ema_decay=0.0",),
    "64 px throughout": ("progressive=()", "resolution=64"),
    "96 px throughout": ("progressive=()",),
    "crops of 8% and more": ("crop_scale=(0.08, 1.0)",),
    "crops of 60% and more": ("crop_scale=(0.6, 1.0)",),
    "CutMix": ("cutmix=1.0",),
    "Mixup": ("mixup=0.2",),
    "half the width, 8 epochs": ("dims=(20, 40, 80, 160)", "epochs=8"),
    "half the depth, 8 epochs": ("depths=(1, 1, 3, 1)", "epochs=8"),
    "learning rate x 40": ("base_lr=0.08",),  # the symptom of the official repository's issue 39
    "average longer than the run": ("ema_horizon=None",),
}

# ---- Few iterations: the recipe for three minutes without bfloat16, as on most laptops, and how it came about

_SLOW = ("amp=fp32", "optimizer=muon")  # without Nesterov momentum, which the recipe got later
_LARGER = ("progressive=((0.6, 64),)", "resolution=96", "eval_resolution=96")
_SMALLER_BATCH = ("batch_size=64", "base_lr=1.6e-2")
SLOW_PROCESSOR_CHANGES = {
    "64 px, then 96 px; batches of 64": (*_LARGER, *_SMALLER_BATCH),
    "48 px, then 64 px; batches of 64": _SMALLER_BATCH,
    "48 px, then 64 px; batches of 128": (),
}
THREE_MINUTES_CHANGES = {
    "the recipe": (),
    "64 px, then 80 px": ("progressive=((0.6, 64),)", "resolution=80", "eval_resolution=80"),
    "half the depth": ("depths=(1, 1, 3, 1)",),
    "half the width": ("dims=(20, 40, 80, 160)",),
    "no label smoothing": ("label_smoothing=0.0",),
    "no average of weights": ("ema_decay=0.0",),
    "crops of 60% and more": ("crop_scale=(0.6, 1.0)",),
}

# ---- Parts of the paper's recipe, each added to or removed from the plain one

PAPER_RECIPE_CHANGES = {
    "plain": (),
    "no layer scale": ("layer_scale_init=0.0",),
    "layer scale 0.2": ("layer_scale_init=0.2",),
    "stochastic depth 0.1": ("drop_path=0.1",),
    "no average of weights": ("ema_decay=0.0",),
    "average with decay 0.9999 throughout": ("ema_horizon=None",),
    "no label smoothing": ("label_smoothing=0.0",),
    "Mixup": ("mixup=0.8",),
    "CutMix": ("cutmix=1.0",),
    "random erasing": ("erasing=0.25",),
}

# ---- The road: its initial weights, its learning rates, and its ends with the classic recipe

ENDS = ("resnet50", "convnext")
LAST_STEPS = ("fewer_acts", "fewer_norms", "layer_norm", "convnext")
ROAD_LRS = (1e-3, 2e-3, 4e-3, 8e-3)
CLASSIC_LRS = (0.025, 0.1, 0.4)
INITS = {"truncated normal 0.02": "paper", "fan-in": "fan_in"}  # "road" has PyTorch's default weights

NETWORKS = {
    "resnet50": ("resnet50", ()),
    "convnext": ("convnext", ()),
    "convnext, fan-in init": ("convnext", ("init=fan_in",)),
}
CONDITIONS = {  # a part of the images with as many iterations as all of them; a longer run; larger images
    "10% of the images": ("fraction=0.1", "epochs=90"),
    "30% of the images": ("fraction=0.3", "epochs=30"),
    "all images": (),
    "three times the epochs": ("epochs=27",),
    "128 px": ("resolution=128", "eval_resolution=128"),
}

# ---- The road's networks with the recipe for small data: Muon, and 64 px before 96 px

SMALL_RECIPE = ("optimizer=muon", "progressive=((0.6, 64),)")
SMALL_RECIPE_STEPS = ("resnet50", "fewer_acts", "convnext")
SMALL_RECIPE_LRS = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


# ---- Without a pyramid: isotropic ConvNeXt and ViT; both start from truncated normal weights of 0.02

ISOTROPIC_LRS = (5e-4, 1e-3, 2e-3, 4e-3)


def _isotropic_at_lrs(settings: tuple[str, ...] = (), arguments: tuple[str, ...] = ()) -> list[Trial]:
    """Return a trial for each of the two networks and each learning rate."""
    plain = ("init=paper", "width_multiplier=1.0", "resolution=64", "eval_resolution=64", *settings)
    return [
        Trial(f"{name}, {lr:g}", f"isotropic:{name}", "road", (*plain, f"base_lr={lr}"), arguments)
        for name in ISOTROPIC
        for lr in ISOTROPIC_LRS
    ]


# ---- Detection and segmentation: what does a backbone bring that has seen Imagenette, and which head?

BACKBONES = "book/results/backbone"  # the commands are for the repository's folder
CONVNEXT = ("convnext_atto", (), f"{BACKBONES}/convnext_atto")
RESNET = ("road:resnet50", ("width_multiplier=0.375",), f"{BACKBONES}/road-resnet50")
DENSE_EPOCHS = {"mask_rcnn": 64, "cascade_mask_rcnn": 34, "upernet": 220, "fcn": 450}  # 45 to 55 minutes on two cores


def _dense(task: str, head: str, network: tuple[str, tuple, str], pretrained: bool = True) -> DenseTrial:
    """Return the trial of a head on a backbone (name, settings, folder), from the weights in the folder or new ones."""
    backbone, settings, folder = network
    name = f"{head}, {backbone}, {'pretrained' if pretrained else 'from scratch'}"
    epochs = DENSE_EPOCHS[head]
    settings = (*settings, f"epochs={epochs}", f"evaluate_every={epochs // 4}")
    return DenseTrial(name, task, head, backbone, settings, folder if pretrained else "")


def _at_lrs(
    steps, lrs, settings: tuple[str, ...] = (), arguments: tuple[str, ...] = (), recipe: str = "road"
) -> list[Trial]:
    """Return a trial for each step of the road and each learning rate."""
    return [
        Trial(f"{step}, {lr:g}", f"road:{step}", recipe, (*settings, f"base_lr={lr}"), arguments)
        for step in steps
        for lr in lrs
    ]


EXPERIMENTS = {
    "nuclei": [
        *(_dense("nuclei", "mask_rcnn", network, start) for network in (CONVNEXT, RESNET) for start in (True, False)),
        _dense("nuclei", "cascade_mask_rcnn", CONVNEXT),
    ],
    "camvid": [
        *(_dense("camvid", "upernet", network, start) for network in (CONVNEXT, RESNET) for start in (True, False)),
        _dense("camvid", "fcn", CONVNEXT),
    ],
    "small_data_ablation": [
        Trial(name, "convnext_atto", "imagenette", changes, HOLDOUT) for name, changes in SMALL_DATA_CHANGES.items()
    ],
    # With --workers equal to the number of cores, each run has one core for its three minutes.
    "slow_processor": [
        Trial(name, "convnext_atto", "imagenette-3min", (*_SLOW, *changes), HOLDOUT)
        for name, changes in SLOW_PROCESSOR_CHANGES.items()
    ],
    "three_minutes": [  # the same, from the recipe that resulted
        Trial(name, "convnext_atto", "imagenette-3min", (*_SLOW, *changes), HOLDOUT)
        for name, changes in THREE_MINUTES_CHANGES.items()
    ],
    "paper_recipe_ablation": [
        Trial(name, "convnext_atto", "imagenette", changes) for name, changes in PAPER_RECIPE_CHANGES.items()
    ],
    "road": [Trial(step, f"road:{step}", "road") for step in STEPS],
    "road_init": [
        Trial(f"{step}, {name}", f"road:{step}", "road", (f"init={init}",))
        for step in ("resnet50", *LAST_STEPS)
        for name, init in INITS.items()
    ],
    "road_lr": _at_lrs(STEPS, ROAD_LRS, ("epochs=5",), HOLDOUT),
    "road_tuned": _at_lrs(STEPS, ROAD_LRS),  # `--trials` takes each step at the best rate of road_lr
    "road_tuned_fan_in": _at_lrs(LAST_STEPS, ROAD_LRS, ("init=fan_in",)),  # the same, with both changes at once
    "road_width": [
        Trial(f"{step}, {name}", f"road:{step}", "road", ("width_multiplier=0.5", *changes))
        for step in ENDS
        for name, changes in (("one rule", ()), ("truncated normal 0.02", ("init=paper",)))
    ],
    # Does GELU gain because units of ReLU die at the road's rate, 4e-3? Then it gains less at lower rates.
    "gelu_and_lr": _at_lrs(("kernel7", "gelu"), (1e-3, 2e-3, 8e-3)),
    "classic_lr": _at_lrs(ENDS, CLASSIC_LRS, ("epochs=5",), HOLDOUT, "road-classic"),
    # The other half of the comparison, with the small-run recipe, is in "road".
    "recipe_by_architecture": [Trial(f"{end}, road-classic", f"road:{end}", "road-classic") for end in ENDS],
    "small_recipe_lr": _at_lrs(SMALL_RECIPE_STEPS, SMALL_RECIPE_LRS, (*SMALL_RECIPE, "epochs=5"), HOLDOUT),
    # `--trials` takes each network at the best rate of small_recipe_lr.
    "small_recipe_by_architecture": _at_lrs(SMALL_RECIPE_STEPS, SMALL_RECIPE_LRS, (*SMALL_RECIPE, "epochs=20")),
    "isotropic_lr": _isotropic_at_lrs(("epochs=1",), HOLDOUT),
    "isotropic": _isotropic_at_lrs(("epochs=3",)),  # `--trials` takes each network at the best rate of isotropic_lr
    "data_and_length": [
        Trial(f"{network}, {name}", f"road:{step}", "road", (*own, *changes))
        for name, changes in CONDITIONS.items()
        for network, (step, own) in NETWORKS.items()
    ],
}
