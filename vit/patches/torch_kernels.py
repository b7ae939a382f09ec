"""Patches and settings of PyTorch."""

import gc
import sys

import torch
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook


def disable_cudnn_sdp_with_dropout(config) -> None:
    """Let attention with dropout go by other kernels than cuDNN's, for the whole process.

    On an H200 with torch 2.11 cuDNN's gives NaN for the gradient of a query whose products with all keys
    are far below zero,
    where the number of tokens is 64 more than a multiple of 128 (pytorch/pytorch#196678): ViT-Lite without
    a class token met
    it in step 3,491. Without dropout or mask another kernel runs, which does not.
    """
    if config.attention_probs_dropout_prob:
        torch.backends.cuda.enable_cudnn_sdp(False)


def eager_dropout() -> None:
    """Let compiled code drop by PyTorch's own kernels, which draw four numbers at a time; the compiler's
    draw one.

    On an H200 in bf16 compiled, ViT-S/16 with dropout trains on 9,683 images/s instead of 8,847. Compiled
    and eager steps
    drop the same, too.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True


def release_model_memory() -> None:
    """Let go of models that nothing else refers to any more.

    A later one's peak memory would have them in it.
    """
    from colossalai.zero.gemini.gemini_mgr import GeminiManager

    # an lru_cache on a method keeps the method's object, and with it the chunks
    GeminiManager._get_layout_info.cache_clear()
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()  # compiled code keeps its CUDA graphs' memory
    for _ in range(2):  # some of it is only free to go after the first
        gc.collect()


def early_ddp_buckets(
    ddp: torch.nn.parallel.DistributedDataParallel, optimizer: torch.optim.Optimizer
) -> None:
    """Let DDP order its gradient buckets anew before the optimizer's first step, not after it.

    DDP does so once, after it saw a backward pass, and holds two sets of buckets meanwhile. Before the
    optimizer
    has its states there is room for that; in the second forward pass it sets the peak of the whole run.
    """

    if ddp.process_group.size() == 1:
        # alone, there is nothing to reduce; and NCCL's records of its work would keep the old buckets alive
        ddp.register_comm_hook(None, noop_hook)

    def once(*_):
        ddp.reducer._rebuild_buckets()
        handle.remove()

    handle = optimizer.register_step_pre_hook(once)
