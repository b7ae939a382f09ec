"""AdamW for Gemini without a compiler.

Gemini demands one of Colossal-AI's own Adam classes, and those compile CUDA and AVX kernels at first use
(about a minute, and an nvcc that matches torch). torch ships the same fused kernel for CPU and GPU; this class
puts it behind the interface that Gemini calls.
"""

import torch


class GeminiAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on fp32 master weights whose gradients are fp16 or bf16.

    Parameters may lie on the CPU (offloaded) and on the GPU side by side.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: Gemini's `auto` placement budgets with it

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None, div_scale: float = -1) -> None:
        """One update. ``div_scale`` divides the gradients (loss scale x clipping factor); -1 means 1."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                # one tensor at a time, so that only one gradient at a time is held in fp32
                grad = param.grad.float()
                if div_scale > 0:
                    grad.div_(div_scale)
                state["step"] += 1
                torch._fused_adamw_(
                    [param.data], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                    amsgrad=False, maximize=False,
                )  # fmt: skip
