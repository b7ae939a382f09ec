"""Floating-point operations per image, peak performance of a device, and timing on it."""

import re
import time

# Dense (not sparse) peak in TFLOP/s from the vendor's data sheets: (16 bit, fp32 without TF32).
PEAK_TFLOPS = {
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "T4": (65, 8.1),
    "V100": (125, 15.7),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def training_flops(config, labels: int, every_token: bool = False) -> float:
    """Floating-point operations to train a ViT on one image: forward, and twice that backward.

    Counts matrix products (2 per multiply-add), not recomputation: gradient checkpointing adds no useful
    work, so it lowers the model FLOPs utilisation (Chowdhery et al., 2022, appendix B). A formula is used
    instead of torch.utils.flop_counter, which counts 0.2 % less for ViT-B/16: it leaves out the gradient of
    the pixels.

    Args:
        config: HuggingFace config of the model.
        labels: number of classes.
        every_token: the last layer computes all of its tokens, as other libraries do, not the class token
            alone (`class_token_alone` in vit/patches).
    """
    patch, hidden, mlp = config.patch_size, config.hidden_size, config.intermediate_size
    patches = (config.image_size // patch) ** 2
    tokens = patches + 1
    embed = 2 * patches * (3 * patch * patch) * hidden

    def layer(results: int) -> int:
        """Keys and values of all tokens; of each result its query, attention, output projection and MLP."""
        keys_and_values = 2 * tokens * hidden * (2 * hidden)
        attention = 2 * hidden * (2 * hidden) + 2 * (2 * tokens * hidden)
        return keys_and_values + results * (attention + 2 * hidden * (2 * mlp))

    last = layer(tokens if every_token else 1)
    return 3.0 * (embed + (config.num_hidden_layers - 1) * layer(tokens) + last + 2 * hidden * labels)


def device_peak_tflops(precision: str) -> tuple[float, str]:
    """Peak of one device. -> (TFLOP/s, where the number comes from)"""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, (half, single) in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return (single if precision == "fp32" else half), f"data sheet of {known}"
    return measured_tflops(precision), "measured matrix product"


def measured_tflops(precision: str) -> float:
    """TFLOP/s of a large product of random matrices on this device: the best of five."""
    import torch

    from vit.distributed import device

    on_gpu = torch.cuda.is_available()
    n = 8192 if on_gpu else 1024
    dtype = (
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        if on_gpu
        else torch.float32
    )
    a, b = torch.randn(2, n, n, device=device(), dtype=dtype)
    for _ in range(2):
        a @ b
    seconds = min(time_on_device(lambda: a @ b) for _ in range(5))
    return 2 * n**3 / seconds / 1e12


def time_on_device(work) -> float:
    """Seconds that the function ``work`` takes, by CUDA events on a GPU, otherwise by the clock."""
    import torch

    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
