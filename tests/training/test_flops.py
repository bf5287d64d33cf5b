from __future__ import annotations

import pytest

from dgt.training.flops import peak_flops


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA B200", "fp16", 2250e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.5e12),
        ("NVIDIA H100 NVL", "fp32", 60e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA B300 SXM6", "bf16", None),
    ],
)
def test_a_device_is_known_by_the_closest_name_or_not_at_all(device: str, precision: str, peak: float | None) -> None:
    assert peak_flops(device, precision) == peak
