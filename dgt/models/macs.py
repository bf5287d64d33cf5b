"""Analytic multiply-accumulates of the backbone, and where it groups.

Counted: convolutions, linear layers, attention, clustering (T times G distances per query, and one addition per query
to its centroid's sum), selection (G scores per key). Not counted: norms, activations, biases, softmax, sorting and the
padding of tiles.
One multiply-accumulate is two floating-point operations.
"""

from typing import NamedTuple

from dgt.models.architecture import Architecture
from dgt.ops import is_dense


class StageGrouping(NamedTuple):
    """How one stage attends at a given input size."""

    tokens: int
    """Sequence length L."""
    num_groups: int
    """Groups per head, at most L."""
    top_k: int
    """Keys per group, at most L."""
    mode: str
    """"grouped", or "dense" where k >= L or a single group make DG-Attention ordinary attention."""


def stage_resolutions(num_stages: int, height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of every stage's feature map: strides 4, 8, 16, 32, rounded up at each halving."""

    def half(size: int) -> int:
        return (size + 1) // 2

    sizes = [(half(half(height)), half(half(width)))]
    while len(sizes) < num_stages:
        sizes.append((half(sizes[-1][0]), half(sizes[-1][1])))
    return sizes


def stage_groupings(arch: Architecture, height: int, width: int) -> list[StageGrouping]:
    """Per stage: tokens, groups, keys per group, and whether grouping is at work; sizes in pixels."""
    groupings = []
    for stage, (h, w) in enumerate(stage_resolutions(len(arch.depths), height, width)):
        tokens = h * w
        groups, top_k = (min(number, tokens) for number in arch.groups_and_keys(stage, tokens))
        mode = "dense" if is_dense(tokens, groups, top_k) else "grouped"
        groupings.append(StageGrouping(tokens, groups, top_k, mode))
    return groupings


def attention_macs(grouping: StageGrouping, dim: int, num_iters: int) -> int:
    """Multiply-accumulates of one image's attention without its projections; dim = heads x head dimension."""
    tokens, groups, top_k, mode = grouping
    if mode == "dense":
        return 2 * tokens * tokens * dim
    clustering = num_iters * (groups + 1) * tokens * dim
    selection = groups * tokens * dim
    return clustering + selection + 2 * tokens * top_k * dim


def backbone_macs(arch: Architecture, in_chans: int, num_classes: int, height: int, width: int) -> int:
    """Multiply-accumulates of one forward pass of one image of height x width pixels, classifier included."""
    sizes = stage_resolutions(len(arch.depths), height, width)
    stem_dim = arch.embed_dims[0] // 2
    stem_pixels = ((height + 1) // 2) * ((width + 1) // 2)
    total = 9 * in_chans * stem_dim * stem_pixels
    previous = stem_dim
    for (h, w), grouping, dim, depth in zip(
        sizes, stage_groupings(arch, height, width), arch.embed_dims, arch.depths, strict=True
    ):
        hidden = int(dim * arch.mlp_ratio)
        per_token = 9 * dim + 4 * dim * dim + 2 * dim * hidden + 9 * hidden
        block = per_token * h * w + attention_macs(grouping, dim, arch.num_iters)
        total += 9 * previous * dim * h * w + depth * block
        previous = dim
    return total + previous * num_classes
