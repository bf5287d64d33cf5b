"""The Dynamic Group Transformer backbone, its variants, and how to build them by name."""

from dgt.models.architecture import Architecture
from dgt.models.blocks import IRFFN, DGAttention, DGTBlock
from dgt.models.build import ModelConfig, build_model, freeze
from dgt.models.checkpointing import CHECKPOINT_MODES
from dgt.models.dense import DenseNetwork
from dgt.models.dgt import (
    DGT,
    DGTStage,
    dgt_base,
    dgt_base_384,
    dgt_nano,
    dgt_small,
    dgt_tiny,
)
from dgt.models.drop_path import drop_path_scale, hash_uint32
from dgt.models.macs import StageGrouping

__all__ = [
    "CHECKPOINT_MODES",
    "DGT",
    "IRFFN",
    "Architecture",
    "DGAttention",
    "DGTBlock",
    "DGTStage",
    "DenseNetwork",
    "ModelConfig",
    "StageGrouping",
    "build_model",
    "dgt_base",
    "dgt_base_384",
    "dgt_nano",
    "dgt_small",
    "dgt_tiny",
    "drop_path_scale",
    "freeze",
    "hash_uint32",
]
