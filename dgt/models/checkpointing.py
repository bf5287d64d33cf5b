"""What activation checkpointing keeps and what it computes again.

Grouping and selection are never computed again: they are discontinuous, so that a recomputation which differs by one
rounding could attend to other keys than the forward pass did. They are one operator with small int32 outputs, saved in
every mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

CHECKPOINT_MODES = ("full", "selective")

_aten = torch.ops.aten
# Results worth their memory: matrix products and attention cost arithmetic, everything else in a block
# (norms, activations, depth-wise convolutions, gathers) costs only bandwidth. Batched products are not in the list:
# they are attention scores where no fused kernel exists, and those must not be kept.
_COMPUTE_BOUND = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def _full_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.dgt.route.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _selective_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _COMPUTE_BOUND or getattr(op, "namespace", "") == "dgt":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS = {
    "full": partial(create_selective_checkpoint_contexts, _full_policy),
    "selective": partial(create_selective_checkpoint_contexts, _selective_policy),
}


def checkpoint_contexts(mode: str) -> Callable[[], tuple[Any, Any]]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` for a mode.

    Args:
        mode: "full" saves the routing only; "selective" also matrix products and attention results.

    Raises:
        ValueError: for any other mode.
    """
    if mode not in _CONTEXTS:
        raise ValueError(f"unknown activation checkpointing mode {mode!r}; choose one of {', '.join(CHECKPOINT_MODES)}")
    return _CONTEXTS[mode]
