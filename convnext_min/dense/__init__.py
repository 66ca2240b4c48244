"""Detection and segmentation with the backbones of this package: section 4 of the paper, Tables 3, 4 and 7.

`features` has the backbone and the pyramid, `mask_rcnn`, `cascade` and `upernet` the heads, `flops` what they cost at
the paper's sizes, `datasets` the images, `train` and `predict` the command lines.
"""

from convnext_min.extras import require

require(__name__, "train", "dense")
