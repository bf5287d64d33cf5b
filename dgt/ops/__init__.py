"""DG-Attention as functions of tensors: no modules, no configuration, nothing but torch."""

from dgt.ops.dg_attention import BACKENDS, dg_attention, is_dense
from dgt.ops.routing import assign_groups, select_keys

__all__ = ["BACKENDS", "assign_groups", "dg_attention", "is_dense", "select_keys"]
