"""Patches of PyTorch, and releasing what its caches and Colossal-AI's keep."""

from __future__ import annotations

import gc
import sys

import torch

from vit.patches import patch


@patch
def safe_attention_kernels(config) -> None:
    """Compute attention by other kernels than cuDNN's where those give NaN, in the whole process.

    Why: where the number of tokens is 64 more than a multiple of 128, cuDNN's gradient is NaN for queries
    whose products with all keys are far below zero: ViT-Lite without a class token met it in step 3,491 with
    attention dropout (H200), and between steps 1,899 and 3,565 of three runs without (H100; torch 2.11). Of
    the other kernels the memory-efficient one is the faster for 64 tokens: 0.28 ms forward and backward for
    512 images of 4 heads on an H100, FlashAttention 0.47. Library: pytorch/pytorch#196678. Can go when that
    is fixed in the oldest torch in use.
    """
    tokens = (config.image_size // config.patch_size) ** 2 + (config.model_type == "vit")  # class token
    if config.attention_probs_dropout_prob or tokens % 128 == 64:
        torch.backends.cuda.enable_cudnn_sdp(False)
    if tokens == 64:
        torch.backends.cuda.enable_flash_sdp(False)


@patch
def eager_dropout() -> None:
    """Let compiled code drop out by PyTorch's own kernels, so that compiled and eager steps drop the same.

    Why: they draw four random numbers at a time, the compiler's draw one. ViT-S/16 with dropout, compiled,
    bf16, on an H200: 9,683 images/s instead of 8,847 (torch 2.11). Library: torch/_inductor/config.py,
    fallback_random. Can go when a row shows no gain.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True


@patch
def no_ddp_on_one_rank(model: torch.nn.Module) -> None:
    """Take DistributedDataParallel out of a model of a plugin, where there is nothing to reduce.

    Why: it copies each gradient into the buckets of its reduction, and keeps these. ViT-B/16 at batch 8 as a
    CUDA graph (H100): 5.8 ms with it, 5.3 ms without (results/benchmark_peers/steps.jsonl).
    Library: torch/nn/parallel/distributed.py; booster/plugin/torch_ddp_plugin.py, TorchDDPModel, and
    hybrid_parallel_plugin.py, HybridParallelModule, colossalai 0.5.0. Can go when they leave it out.
    """
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule
    from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPModel

    for wrapper in model.modules():
        ddp = wrapper.module if isinstance(wrapper, (TorchDDPModel, HybridParallelModule)) else None
        if isinstance(ddp, torch.nn.parallel.DistributedDataParallel) and ddp.process_group.size() == 1:
            if isinstance(wrapper, HybridParallelModule):
                wrapper.module, wrapper.use_ddp = ddp.module, False
            else:  # its `unwrap` expects one module around the model
                wrapper.module = NotParallel(ddp.module)


class NotParallel(torch.nn.Module):
    """In the place of DistributedDataParallel: the model, under the same name."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def release_model_memory() -> None:
    """Free models that nothing else refers to; the next one's peak memory would include them otherwise."""
    from colossalai.zero.gemini.gemini_mgr import GeminiManager

    # an lru_cache on a method keeps the method's object, and with it the chunks
    GeminiManager._get_layout_info.cache_clear()
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()  # compiled code keeps its CUDA graphs' memory
    for _ in range(2):  # some of it is only free to go after the first
        gc.collect()
