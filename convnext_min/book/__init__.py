"""Support for the chapters and pages: exercises, diffs, figures, and the committed results."""

from convnext_min.extras import require

require(__name__, "train", "book")
