"""Training runs that answer a question, and a speed benchmark against other implementations."""

from convnext_min.extras import require

require(__name__, "train", "weights")
