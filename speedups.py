"""Time and memory that the libraries spend for nothing, saved without changing a result (but for rounding).

To see whether one can go: delete it and compare the rows of `bash run_benchmark.sh`.
"""

import gc
import sys
from types import MethodType

import torch
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.func import functional_call


def use_larger_products(model: torch.nn.Module) -> None:
    """Let a transformers ViT make its patch embeddings, and each layer's queries, keys and values, by one
    matrix product.

    In place, with the same parameters. On an H200 in bf16 a step of ViT-B/16 takes a fifth less at batch 8,
    and an eighth less
    compiled at 256, as does one of ViT-S/16 at 1,024.
    """
    from transformers.models.ijepa.modeling_ijepa import IJepaPatchEmbeddings, IJepaSelfAttention
    from transformers.models.vit.modeling_vit import ViTPatchEmbeddings, ViTSelfAttention

    for module in model.modules():
        if isinstance(module, (ViTPatchEmbeddings, IJepaPatchEmbeddings)):
            module.forward = MethodType(_embed_patches, module)
        elif isinstance(module, (ViTSelfAttention, IJepaSelfAttention)):
            module.forward = MethodType(_attend, module)


def _embed_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
    # transformers/models/vit/modeling_vit.py, ViTPatchEmbeddings.forward, whose convolution has no fast
    # kernel in 16 bit
    _, channels, *size = pixel_values.shape
    height, width = self.patch_size
    usual = (
        channels == self.num_channels
        and size == list(self.image_size)
        and size[0] % height == size[1] % width == 0
    )
    if interpolate_pos_encoding or not usual:
        return type(self).forward(self, pixel_values, interpolate_pos_encoding)
    pixels = pixel_values.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    weight = self.projection.weight.clone()  # gemini may take back what it lent for one operation
    return F.linear(patches, weight.flatten(1), self.projection.bias)


def _attend(
    self, hidden_states: torch.Tensor, head_mask=None, output_attentions: bool = False
) -> tuple[torch.Tensor]:
    # transformers/models/vit/modeling_vit.py, ViTSelfAttention.forward: three products, and copies of
    # their results
    if head_mask is not None or output_attentions:
        return type(self).forward(self, hidden_states, head_mask, output_attentions)
    parts = (self.query, self.key, self.value)
    weight = torch.cat([part.weight for part in parts])
    bias = None if self.query.bias is None else torch.cat([part.bias for part in parts])
    if isinstance(self.query, torch.nn.Linear):
        joined = F.linear(hidden_states, weight, bias)
    # tensor parallelism's, of this process's heads; backward it sums over the processes: once now, not
    # three times
    else:
        joined = functional_call(self.query, {"weight": weight, "bias": bias}, hidden_states)
    query, key, value = (
        joined.unflatten(2, (3, self.num_attention_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    context = F.scaled_dot_product_attention(
        query, key, value, dropout_p=self.dropout_prob if self.training else 0.0
    )
    return (context.transpose(1, 2).flatten(2),)


def use_eager_dropout() -> None:
    """Let compiled code drop by PyTorch's own kernels, which draw four numbers at a time; the compiler's
    draw one.

    On an H200 in bf16 compiled, ViT-S/16 with dropout trains on 9,683 images/s instead of 8,847. Compiled
    and eager steps
    drop the same, too.
    """
    import torch._inductor.config as inductor

    inductor.fallback_random = True


def remove_waits(optimizer, clips: bool) -> None:
    """Take out waits of the CPU for the GPU. Patches this optimizer (what Booster returned); others are
    left as they are.

    Each wait reads something from the device for every parameter in every step (about 150 times for ViT-B),
    and the
    GPU idles meanwhile.

    Args:
        clips: whether gradients are clipped; the gradient norm is only needed then.
    """
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    if isinstance(optimizer, LowLevelZeroOptimizer):
        if not clips:
            # zero/low_level/low_level_optim.py, step: computes the norm in any case
            optimizer._compute_grad_norm = lambda *args, **kwargs: 0.0
        mixin = optimizer.mixed_precision_mixin
        if hasattr(mixin, "check_local_overflow"):
            # zero/low_level/low_level_optim.py, check_local_overflow: one wait per gradient
            def zero_gradients():
                for store in mixin.pg_to_grad_store.values():
                    for group in range(mixin.num_working_param_groups):
                        yield from (
                            grad for grad in store.get_working_grads_by_group_id(group) if grad is not None
                        )

            mixin.check_local_overflow = lambda: not all_finite(list(zero_gradients()))
        start_fewer_kernels(optimizer)
        return
    mixin = getattr(optimizer, "mixed_precision", None)
    if hasattr(mixin, "check_local_overflow"):
        # amp/naive_amp/mixed_precision_optimizer.py, check_local_overflow: one wait per gradient
        mixin.check_local_overflow = lambda: (
            not all_finite([p.grad for p in mixin.params if p.grad is not None])
        )


def start_fewer_kernels(optimizer) -> None:
    """Let a LowLevelZeroOptimizer scale gradients and spread new weights by a few kernels, not by three for
    each parameter.
    """
    import colossalai.zero.low_level.low_level_optim as library

    def unscale_and_clip(gradients: list[torch.Tensor], norm: float) -> None:
        # zero/low_level/low_level_optim.py, _unscale_and_clip_grads
        scale = (
            optimizer.mixed_precision_mixin.get_grad_div_scale()
            if optimizer.mixed_precision_mixin is not None
            else 1.0
        )
        limit = optimizer._clip_grad_norm
        if limit > 0:
            scale *= max(1.0, (norm / scale + 1e-6) / limit)
        if scale != 1 and gradients:
            torch._foreach_mul_([gradient.data for gradient in gradients], 1 / scale)

    optimizer._unscale_and_clip_grads = unscale_and_clip
    if library.TensorBucket.__module__ != __name__:
        library.TensorBucket = _bucket_of_few_kernels(library)  # each step makes new ones by this name


def _bucket_of_few_kernels(library):
    class TensorBucket(library.TensorBucket):
        def all_gather(self, group=None, fp8_communication: bool = False) -> None:
            # zero/low_level/bookkeeping/tensor_bucket.py, all_gather
            whole = [self._write_back_pairs[part].data for part in self._bucket]
            if fp8_communication or not all(weight.is_contiguous() for weight in whole):
                return super().all_gather(group, fp8_communication)
            mine = self.flatten()
            world = library.get_nd_world_size(group)
            gathered = mine.new_empty(world * mine.numel())
            library.all_gather_into_flat_tensor_nd(gathered, mine, group=group)
            targets, sources, offset = [], [], 0
            for part, weight in zip(self._bucket, whole):
                # each process has an equal part of the weight; the last ones may end in padding
                pieces = weight.view(-1).split(part.numel())
                targets += pieces
                sources += [
                    gathered[rank * mine.numel() + offset :][: piece.numel()]
                    for rank, piece in enumerate(pieces)
                ]
                offset += part.numel()
            torch._foreach_copy_(targets, sources)
            self.empty()

    return TensorBucket


def forget_models() -> None:
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


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN: one kernel over all tensors, one wait.

    (torch's GradScaler uses the same.)
    """
    if not tensors:
        return True
    found = torch.zeros(1, device=tensors[0].device)
    unscaled = torch.ones(1, device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, unscaled)
    return not found.item()


def rebuild_buckets_early(
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
