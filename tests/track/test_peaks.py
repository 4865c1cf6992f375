import pytest

from distllm.track.peaks import _PEAKS, peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),  # not 156, and not 624 with sparsity
        ("NVIDIA A100-PCIE-40GB", "fp16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", 80),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100S-PCIE-32GB", "fp16", 130),
        ("Tesla T4", "fp16", 65),
        ("AMD Instinct MI250X", "bf16", 191.5),  # one of the card's two devices
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_dense_peaks(name: str, dtype: str, tera: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "Intel(R) Xeon(R)",
        "NVIDIA GeForce RTX 4070",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "GRID A100-10C",
        "NVIDIA A10-24Q",
        "NVIDIA A1000",
        "NVIDIA H1000",
        "Quadro RTX 6000 with Max-Q Design",
    ],
)
def test_an_unknown_device_has_no_peak_and_is_never_taken_for_another(name: str) -> None:
    assert [peak_flops(name, dtype) for dtype in ("bf16", "fp16", "tf32", "fp32")] == [None] * 4


def test_a_format_that_the_device_lacks() -> None:
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_flops("Tesla V100-SXM2-16GB", "tf32") == peak_flops("Tesla V100-SXM2-16GB", "fp32") == 15.7e12
    with pytest.raises(ValueError):
        peak_flops("NVIDIA A100-SXM4-80GB", "int3")


def test_every_row_can_be_reached_and_has_plausible_ratios() -> None:
    for name, (bf16, fp16, tf32, fp32) in _PEAKS:
        assert peak_flops(f"NVIDIA {name}", "fp32") == fp32 * 1e12, name
        assert fp16 is not None and fp16 > fp32 and bf16 in (None, fp16), name
        if tf32 is not None:
            assert 0.45 <= tf32 / fp16 <= 0.52 and fp32 <= tf32, name
