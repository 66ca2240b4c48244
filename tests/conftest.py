"""Tests compute on the CPU, also where there is a GPU: some compare results bit for bit."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
