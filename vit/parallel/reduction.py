"""How the ranks of ZeRO 1 average their gradients.

`reduce_during_backward` in vit/patches/colossalai_zero.py puts it into Colossal-AI's optimizer.
"""

import torch
import torch.distributed as dist
from torch import nn


class GradientReduction:
    """Averages gradients over the ranks in buckets, each as soon as it is full, on a stream of its own.

    Args:
        optimizer: a `LowLevelZeroOptimizer` of stage 1.
        group: its data-parallel ranks.
    """

    BUCKET = 2**23  # elements; a layer of ViT-B has 7 million

    def __init__(self, optimizer, group):
        self.group, self.world = group, dist.get_world_size(group)
        self.store = optimizer.pg_to_grad_store[group]
        # parameter -> number of its group
        self.groups = {param: i for i, params in optimizer._working_param_groups.items() for param in params}
        self.paddings = {param: optimizer.get_param_padding_size(param) for param in self.groups}
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.bucket: list[tuple[nn.Parameter, torch.Tensor]] = []
        # parameters of a bucket, this rank's part of the mean of each, and all gradients, whose memory must
        # live until the stream has used it
        self.sent: list[tuple[tuple, tuple, torch.Tensor]] = []

    def add(self, param: nn.Parameter) -> None:
        """Put a gradient into the bucket. In the same order on all ranks."""
        gradient, param.grad = param.grad.flatten(), None
        if padding := self.paddings[param]:
            gradient = nn.functional.pad(gradient, (0, padding))
        self.bucket.append((param, gradient.view(self.world, -1)))
        if sum(gradient.numel() for _, gradient in self.bucket) >= self.BUCKET:
            self.send()

    def send(self) -> None:
        """Start the reduction of the bucket."""
        params, gradients = zip(*self.bucket)
        self.bucket = []
        whole = torch.cat(gradients, dim=1)  # a row for each rank
        mine = torch.empty_like(whole[0])
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            whole /= self.world
            dist.reduce_scatter_tensor(mine, whole.view(-1), group=self.group)
        parts = mine.split([gradient.shape[1] for gradient in gradients])
        self.sent.append((params, parts, whole))

    def finish(self) -> None:
        """Reduce what is left, and hand the parts to the optimizer."""
        for param in self.groups:
            if param.grad is not None:  # of earlier micro-batches alone
                self.add(param)
        if self.bucket:
            self.send()
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
        for params, parts, _ in self.sent:
            for param, part in zip(params, parts):
                self.keep(param, part)
        self.sent = []

    def keep(self, param: nn.Parameter, part: torch.Tensor) -> None:
        """Leave this rank's part of a gradient where the optimizer looks for it."""
        of_group = self.store._grads_of_params.setdefault(self.groups[param], {})
        parts = of_group.setdefault(id(param), [None] * self.world)
        rank = self.store.local_rank
        parts[rank] = part if parts[rank] is None else parts[rank].add_(part)
