"""What a device can do at most: floating-point operations a second, by device and number format.

All figures are dense (data sheets like to print the double, for 2:4 sparsity) and for products that add up in fp32, as
training needs. A device that is not here has no peak, and a run on it has no MFU: a guess would be a wrong figure.
"""

from __future__ import annotations

import re

TERA = 1e12

_FOREIGN = re.compile(r"LAPTOP|MAX|MIG|GRID|D|\d+[ABCQ]")
"""Words of a slice, a vGPU profile (A100-10C), a laptop or an export part that shares the name of a faster device."""

# words of the device name -> TFLOP/s (bf16, fp16, tf32, fp32). None: the device has no such unit. The first row whose
# words are all in the name counts, so a variant stands before its family.
_PEAKS: tuple[tuple[str, tuple[float | None, float | None, float | None, float | None]], ...] = (
    # Blackwell: NVIDIA "HGX B200 / GB200 NVL72" specifications, per GPU: 4.5 / 5 PFLOPS sparse in 16 bits,
    # TF32 2.2 / 2.5 sparse, FP32 75 / 80. B300 and GB300 data sheets: the same in these formats.
    ("GB200", (2500, 2500, 1250, 80)),
    ("GB300", (2500, 2500, 1250, 80)),
    ("B200", (2250, 2250, 1100, 75)),
    ("B300", (2250, 2250, 1100, 75)),
    # Hopper: "NVIDIA H100 Tensor Core GPU" data sheet: SXM 1,979 sparse, NVL 1,671, PCIe 1,513 (2022 edition).
    ("H100 NVL", (835.5, 835.5, 417.5, 60)),
    ("H100 PCIE", (756.5, 756.5, 378, 51)),
    ("H100", (989.5, 989.5, 494.5, 67)),
    # "NVIDIA H200 Tensor Core GPU" data sheet; "GH200 Grace Hopper Superchip" data sheet.
    ("H200 NVL", (835.5, 835.5, 417.5, 60)),
    ("H200", (989.5, 989.5, 494.5, 67)),
    ("GH200", (989.5, 989.5, 494.5, 67)),
    # Export parts: H800 computes like H100, A800 like A100; H20 data sheet: 148 in 16 bits.
    ("H800 PCIE", (756.5, 756.5, 378, 51)),
    ("H800", (989.5, 989.5, 494.5, 67)),
    ("H20", (148, 148, 74, 44)),
    # Ampere: "NVIDIA A100 Tensor Core GPU" data sheet (SXM and PCIe alike); A30, A10, A40, RTX A6000 data sheets.
    ("A100", (312, 312, 156, 19.5)),
    ("A800", (312, 312, 156, 19.5)),
    ("A30", (165, 165, 82, 10.3)),
    ("A40", (149.7, 149.7, 74.8, 37.4)),
    ("A10", (125, 125, 62.5, 31.2)),
    ("A10G", (70, 70, 35, 35)),
    ("RTX A6000", (154.8, 154.8, 77.4, 38.7)),
    # Ada: L4, L40 and L40S data sheets.
    ("L4", (121, 121, 60, 30.3)),
    ("L40", (181, 181, 90.5, 90.5)),
    ("L40S", (362, 362, 183, 91.6)),
    # GeForce: architecture whitepapers (GA102, AD102, Blackwell), the row "with FP32 accumulate".
    ("RTX 3090 TI", (80, 80, 40, 40)),
    ("RTX 3090", (71, 71, 35.6, 35.6)),
    ("RTX 4090", (165.2, 165.2, 82.6, 82.6)),
    ("RTX 5090", (209.5, 209.5, 104.8, 104.8)),
    # Volta and Turing: "Tesla V100" and "V100S" data sheets, "Tesla T4" data sheet. No bf16 and no TF32 units.
    ("V100S", (None, 130, None, 16.4)),
    ("V100 PCIE", (None, 112, None, 14)),
    ("V100", (None, 125, None, 15.7)),
    ("T4", (None, 65, None, 8.1)),
    # AMD Instinct data sheets, the "matrix" rows. An MI250 or MI250X is two devices to torch: half of the card each.
    # MI355X and MI350X have no TF32 unit.
    ("MI355X", (2516.6, 2516.6, None, 157.3)),
    ("MI350X", (2306.9, 2306.9, None, 144.2)),
    ("MI325X", (1307.4, 1307.4, 653.7, 163.4)),
    ("MI300X", (1307.4, 1307.4, 653.7, 163.4)),
    ("MI300A", (980.6, 980.6, 490.3, 122.6)),
    ("MI250X", (191.5, 191.5, None, 47.9)),
    ("MI250", (181, 181, None, 45.3)),
    ("MI210", (181, 181, None, 45.3)),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The dense peak of one device, as torch counts devices.

    Args:
        device_name: what `torch.cuda.get_device_name()` says; `cpu` has no peak.
        dtype: the format of the matrix products: bf16, fp16, fp32, or tf32 for fp32 with TF32 switched on (on a device
            without TF32 units that is fp32).

    Returns:
        Floating-point operations a second; None for a device or a format that the table does not have.
    """
    column = ("bf16", "fp16", "tf32", "fp32").index(dtype)
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    if any(_FOREIGN.fullmatch(word) for word in words):
        return None
    for name, peaks in _PEAKS:
        if words.issuperset(name.split()):
            peak = peaks[3] if dtype == "tf32" and peaks[column] is None else peaks[column]
            return None if peak is None else peak * TERA
    return None
