"""Memory for batches, used again and again.

Fresh memory is dear: the kernel zeroes each page when it is first touched. For a batch of 256 images of 224 px, fresh
from torch, that is 17 ms of CPU time of 60 in a loader that resizes ready pixels. NumPy asks for huge pages, which save
as much where the system grants them; memory that is used again does not depend on that.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch


class Buffers:
    """Gives out uint8 tensors whose memory comes back when the last tensor over it dies, and not before.

    So a consumer may keep a batch, or a view of it, as long as it likes. Where there is a GPU the memory is pinned and
    torch recycles it itself, once the copies that were queued from it are done. Nothing here takes a lock: a consumer
    may let go of a batch in any thread, in a finalizer, and after a fork.
    """

    def __init__(self, kept: int) -> None:
        """At most `kept` pieces of memory are held while nobody uses them."""
        self._kept = kept
        self._bytes = 0
        self._free: deque[np.ndarray] = deque(maxlen=kept)
        self._pin = torch.cuda.is_available()

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A uint8 tensor of this shape with undefined content.

        It may be a part of larger memory; memory that is too small is let go.
        """
        if self._pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        if size > self._bytes:
            self._bytes, self._free = size, deque(maxlen=self._kept)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._bytes, np.uint8)
        lent = memory[:size]  # an object of its own, which the tensor keeps alive and whose death is noticed
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape)
