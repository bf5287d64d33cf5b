"""Build a model by name from a small typed configuration."""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

ATTENTION = ("num_groups", "top_k", "num_iters", "group_growth", "key_growth")
"""Options of DG-Attention, which no other network has."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network to train."""

    name: str = "dgt_tiny"
    """A model name known to timm; `dgt_nano`, `dgt_tiny`, `dgt_small`, `dgt_base`, `dgt_base_384` are ours."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier blocks rise to it linearly from zero."""
    num_groups: int | None = None
    """Query groups per head (DGT models only); None keeps the variant's own."""
    top_k: int | None = None
    """Keys that each group attends to (DGT models only); None keeps the variant's own."""
    num_iters: int | None = None
    """k-means iterations (DGT models only); None keeps the variant's own."""
    group_growth: float | None = None
    """Exponent p with which groups grow for maps of more tokens L than the stage has at 224 pixels, L0: num_groups
    (L / L0)^p, up to 256 (DGT models only); None keeps the variant's own, 0 = as many for all sizes."""
    key_growth: float | None = None
    """The same for top_k, without a bound (DGT models only)."""
    freeze: tuple[str, ...] = ()
    """What does not learn: modules or parameters by name ("stem", "stages.0"), with wildcards ("stages.*.norm?.*"), or
    "backbone", all but the classifier or the heads of a dense task."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: must lie in [0, 1), got {self.drop_path_rate}")
        for name in ("num_groups", "top_k", "num_iters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        for name in ("group_growth", "key_growth"):
            exponent = getattr(self, name)
            if exponent is not None and not 0 <= exponent <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], got {exponent}")


def build_model(config: ModelConfig, num_classes: int, in_chans: int = 3) -> nn.Module:
    """Create the model that `config` names; any timm model works.

    Args:
        config: the model's part of the configuration.
        num_classes: outputs of the classifier, 0 for none.
        in_chans: channels of the input image.

    Everything learns; `freeze` is for whoever has built the whole network.

    Raises:
        ValueError: unknown model name, or DGT options on a model that is not a DGT.
    """
    arch_name = config.name.split(".")[0]
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(arch_name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists the known ones"
        raise ValueError(f"unknown model {config.name!r}{hint}")
    options: dict[str, Any] = {key: value for key in ATTENTION if (value := getattr(config, key)) is not None}
    if options and not timm.models.is_model_in_modules(arch_name, ["dgt"]):
        raise ValueError(
            f"model {config.name!r} is not a Dynamic Group Transformer and has no {', '.join(options)}; "
            "leave these options out, or choose a dgt_* model"
        )
    if config.drop_path_rate:  # some timm models know no such option, and need not for 0
        options["drop_path_rate"] = config.drop_path_rate
    return timm.create_model(config.name, num_classes=num_classes, in_chans=in_chans, **options)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Lets the parameters that `patterns` name (see `ModelConfig.freeze`) need no gradient.

    Raises ValueError for a pattern that names none.
    """
    names = [name for name, _ in model.named_parameters()]
    head = f"{getattr(model, 'pretrained_cfg', {}).get('classifier')}."
    for pattern in patterns:
        if pattern == "backbone" and not hasattr(model, "backbone"):
            frozen = [name for name in names if not name.startswith(head)]
        else:
            frozen = [n for n in names if n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)]
        if not frozen:
            known = [name for name, _ in model.named_modules()] + names
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise ValueError(f"freeze: {pattern!r} names no parameter; the nearest name is {near[0]!r}")
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
