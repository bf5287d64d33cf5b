"""How many floating-point operations a second a GPU can do at most, by the precision that it computes in."""

from __future__ import annotations

HALF, TF32, FP32 = "half", "tf32", "fp32"

PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {HALF: 2500e12, TF32: 1250e12, FP32: 80e12}),
    ("B200", {HALF: 2250e12, TF32: 1125e12, FP32: 75e12}),
    ("H200 NVL", {HALF: 835.5e12, TF32: 417.5e12, FP32: 60e12}),
    ("H200", {HALF: 989e12, TF32: 494.5e12, FP32: 67e12}),
    ("H100 PCIe", {HALF: 756e12, TF32: 378e12, FP32: 51e12}),
    ("H100 NVL", {HALF: 835.5e12, TF32: 417.5e12, FP32: 60e12}),
    ("H100", {HALF: 989e12, TF32: 494.5e12, FP32: 67e12}),
    ("A100", {HALF: 312e12, TF32: 156e12, FP32: 19.5e12}),
    ("L40S", {HALF: 362e12, TF32: 183e12, FP32: 91.6e12}),
)
"""By a part of the name that CUDA gives a device, the first that fits: dense operations per second (half of what the
sheets say "with sparsity"), from NVIDIA's data sheets of these products; without a word more, the SXM form."""


def peak_flops(device: str, precision: str) -> float | None:
    """The most that the device can do in `engine.precision`; None for a device that is not in the table.

    float16 and bfloat16 are equally fast. fp32 means float32 without tensor cores.
    """
    kind = HALF if precision in ("bf16", "fp16") else precision
    return next((peaks.get(kind) for part, peaks in PEAK_FLOPS if part in device), None)
