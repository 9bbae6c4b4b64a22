"""Draw the same random numbers of torch again, such as dropout masks, in a second pass over a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The state of torch's random numbers, on the CPU and all GPUs, when it was created."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Set the state."""
        torch.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again in the block; the numbers after it do not depend on it."""
        now = RandomState()
        self.restore()
        try:
            yield
        finally:
            now.restore()
