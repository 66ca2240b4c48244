"""Images for training and evaluation: sources, batches, and checks of a data set.

Small data is held in memory as an `ImageSet` and served by `Batches`. `disk` reads larger data from folders, tar shards
or Hugging Face datasets while the network trains.
"""

from convnext_min.extras import require

require(__name__, "train")

from convnext_min.data.batches import MEAN, STD, Batches, normalize, random_crops
from convnext_min.data.files import DECODE_ERRORS, decode
from convnext_min.data.imagenette import WNIDS, image_folder, imagenette
from convnext_min.data.images import Data, ImageSet, hold_out, select_classes, subsample
from convnext_min.data.seeding import seed_all, seeded
from convnext_min.data.synthetic import synthetic_images

__all__ = [
    "DECODE_ERRORS",
    "MEAN",
    "STD",
    "WNIDS",
    "Batches",
    "Data",
    "ImageSet",
    "decode",
    "hold_out",
    "image_folder",
    "imagenette",
    "normalize",
    "random_crops",
    "seed_all",
    "seeded",
    "select_classes",
    "subsample",
    "synthetic_images",
]
