"""Stochastic depth whose masks are a pure function of the sample.

timm's `DropPath` draws one number per sample from the global generator, in the order of the batch: a sample's mask then
depends on its place in the batch, on the rank and on the micro-batch. Here the mask of a sample at a layer is a hash of
(the sample's key, the layer's index), so that any split of a batch over ranks and micro-batches drops the same paths.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

_UINT32 = 0xFFFFFFFF
_GOLDEN_RATIO = 0x9E3779B9  # 2**32 / golden ratio, odd: consecutive indices land far apart
# Both factors are odd and below 2**31, so that the product with a 32-bit number fits a signed 64-bit integer.
# This pair shows no avalanche bias above sampling noise (every input bit flips every output bit with probability 1/2).
_FACTOR_1 = 0x21F0AAAD
_FACTOR_2 = 0x7FEB352D


def hash_uint32(keys: Tensor, index: int | Tensor) -> Tensor:
    """Hash 32-bit keys and a counter to 32-bit numbers, the same on every device, eager or compiled.

    A xor-shift-multiply mixer on int64 tensors in which no intermediate result leaves [0, 2**63).

    Args:
        keys: any shape, int64, values in [0, 2**32).
        index: the counter, in [0, 2**31); different counters give independent numbers for the same key. A tensor of
            counters, int64, is broadcast against `keys`.

    Returns:
        int64 tensor of the shape of `keys` (and `index`), values in [0, 2**32).
    """
    x = (keys + ((index + 1) * _GOLDEN_RATIO & _UINT32)) & _UINT32
    x = x ^ (x >> 16)
    x = (x * _FACTOR_1) & _UINT32
    x = x ^ (x >> 15)
    x = (x * _FACTOR_2) & _UINT32
    return x ^ (x >> 15)


@register_notrace_function
def drop_path_scale(x: Tensor, drop_prob: float, sample_keys: Tensor | None, index: int) -> Tensor:
    """Per-sample factor of a residual branch: 0 where the path is dropped, else 1 / (1 - drop_prob).

    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382, scaled to keep the expectation as timm does.

    Args:
        x: the branch's input, (B, ...); it lends its batch size, dimensions and device.
        drop_prob: probability of dropping the path, in [0, 1).
        sample_keys: (B,) int64 keys in [0, 2**32), or None to draw from torch's generator as timm does.
        index: index of the drop path in the network; every residual branch has its own.

    Returns:
        (B, 1, ..., 1) tensor, float32 (float64 for a float64 x): in bfloat16 the factor would be off by up to 0.2 %.
    """
    keep_prob = 1.0 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if sample_keys is None:
        return x.new_empty(shape, dtype=dtype).bernoulli_(keep_prob).div_(keep_prob)
    # Integers are compared, not floats: the mask is the same under every precision.
    keep = hash_uint32(sample_keys, index) >= round(drop_prob * 2**32)
    return keep.to(dtype).div(keep_prob).view(shape)
