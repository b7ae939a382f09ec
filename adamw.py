"""AdamW for Gemini without a compiler.

Gemini demands one of Colossal-AI's own Adam classes, and those compile CUDA and AVX kernels at first use
(about a minute, and an nvcc that matches torch). torch ships the same fused kernel for CPU and GPU; this
class
puts it behind the interface that Gemini calls.
"""

import torch


class GeminiAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on fp32 master weights whose gradients are fp16 or bf16.

    Parameters may lie on the CPU (offloaded) and on the GPU side by side.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: Gemini's `auto` placement budgets with it

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None, div_scale: float = -1) -> None:
        """One update. ``div_scale`` divides the gradients (loss scale x clipping factor); -1 means 1."""
        for group in self.param_groups:
            for params in _batched([param for param in group["params"] if param.grad is not None]):
                states = [self._state(param) for param in params]
                torch._foreach_add_([state["step"] for state in states], 1)
                scale = torch.tensor(float(div_scale), device=params[0].device) if div_scale > 0 else None
                torch._fused_adamw_(
                    [param.data for param in params],
                    [param.grad.float() for param in params],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale,
                )

    def _state(self, param: torch.Tensor) -> dict:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def _batched(params: list[torch.Tensor], elements: int = 2**23):
    """Split into lists on one device of about ``elements`` each.

    Few kernels, and few gradients in fp32 at a time.
    """
    batch, size = [], 0
    for param in params:
        if batch and (size + param.numel() > elements or param.device != batch[0].device):
            yield batch
            batch, size = [], 0
        batch.append(param)
        size += param.numel()
    if batch:
        yield batch
