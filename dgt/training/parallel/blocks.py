"""What is done to the network's blocks before they are spread over ranks, whatever the engine."""

from __future__ import annotations

from typing import Any

import torch._dynamo
from torch import nn

from dgt.models import DenseNetwork, DGTBlock

GRAPHS = 64
"""Graphs that the blocks together may compile. All of them run the same code, and each kind of block has its own graph
(4 stages, with and without drop path and recomputation, training and evaluation, some sizes); torch's own limit of 8
would leave the rest uncompiled."""
GRAPHS_OF_DENSE_TASKS = 1024
"""The same of a dense network, whose training images come in some tens of sizes (data.detection.short_sides times the
ranges of data.detection.aspect_bounds), each with graphs of its own."""


def units(network: nn.Module) -> list[nn.Module]:
    """The modules that sharding engines gather one at a time: the blocks, and the heads of a dense network."""
    found: list[nn.Module] = [module for module in network.modules() if isinstance(module, DGTBlock)]
    return found + (list(network.heads()) if isinstance(network, DenseNetwork) else [])


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compiles all DG-Attention blocks in place, a dense network's for training only; `options` are torch.compile's."""
    config: Any = torch._dynamo.config
    dense = isinstance(network, DenseNetwork)
    graphs = GRAPHS_OF_DENSE_TASKS if dense else GRAPHS
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), graphs))
    for module in network.modules():
        if isinstance(module, DGTBlock):
            # A graph for each size: one for sizes that vary (a smaller last micro-batch) makes Inductor fail. Images
            # that dense tasks evaluate have too many sizes for that.
            module.compile(only_training=dense, **{"dynamic": False} | options)


def use_apex_layer_norm(network: nn.Module) -> None:
    """Replaces the blocks' LayerNorm by apex's FusedLayerNorm, with the same parameters under the same names."""
    from apex.normalization import FusedLayerNorm

    for block in [module for module in network.modules() if isinstance(module, DGTBlock)]:
        for name in ("norm1", "norm2"):
            norm = getattr(block, name)
            fused = FusedLayerNorm(norm.normalized_shape, eps=norm.eps)
            fused.weight, fused.bias = norm.weight, norm.bias
            setattr(block, name, fused)
