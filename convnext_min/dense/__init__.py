"""Detection and segmentation with the backbones of this package: section 4 of the paper, Tables 3, 4 and 7.

`features` has the backbone and the feature pyramid; `mask_rcnn`, `cascade` and `upernet` have the heads. `flops` counts
their cost at the paper's image sizes, and `datasets` reads the images. `train` and `predict` are command lines.
"""

from convnext_min.extras import require

require(__name__, "train", "dense")
