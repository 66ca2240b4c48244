"""One way to seed all random number generators: from a tuple of integers, such as (seed, epoch, image number)."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, on the CPU and on all GPUs, with a hash of `key`."""
    torch.manual_seed(_seed_cpu(*key))


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and PyTorch with a hash of `key`; restore their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    _seed_cpu(*key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _seed_cpu(*key: int) -> int:
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed
