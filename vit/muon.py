"""Muon: an optimizer that trains the matrices inside a model's layers in fewer steps than AdamW."""

import torch

MOMENTUM = 0.95
# A step's root mean square: about that of AdamW's, whose learning rates and weight decays fit then, too.
SIZE_OF_ADAMW = 0.2
# x -> ax + bx^3 + cx^5 moves a number between 0 and 1 near 1 in five applications; of Jordan et al.
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the groups with ``muon=True``, AdamW for the others.

    A matrix moves along its momentum with all singular values brought near 1, so that no direction is left
    behind, and by steps as large as AdamW's (Liu et al., 2025, arXiv:2502.16982). It holds one state, AdamW
    two. Each rank must have the whole matrices. (torch has a Muon since 2.9, which cannot be recorded as a
    CUDA graph and has no AdamW for biases, embeddings and the classifier.)

    Args:
        groups: parameter groups; those with ``muon=True`` hold matrices only.
    """

    param_groups: list[dict]

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, lr=lr, fused=True)
        self._step_supports_amp_scaling = False  # a loss scaler divides gradients and skips steps itself

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                for params in same_shapes([param for param in group["params"] if param.grad is not None]):
                    self._update_matrices(params, group)
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step()
        self.param_groups = groups

    def _update_matrices(self, params: list[torch.Tensor], group: dict) -> None:
        """Update matrices of one shape, (rows, columns)."""
        gradients = [param.grad for param in params]
        for param in params:
            if not self.state[param]:  # AdamW asks every state that it loads for its step
                self.state[param] = {"step": torch.zeros(()), "momentum": torch.zeros_like(param)}
        momenta = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's form
        steps = orthogonal(torch.stack(ahead)) * (SIZE_OF_ADAMW * max(params[0].shape) ** 0.5)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(params, list((steps * group["lr"]).unbind()))


def same_shapes(params: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """``params`` in lists of one shape, for a few large products instead of many small ones."""
    lists: dict[torch.Size, list[torch.Tensor]] = {}
    for param in params:
        lists.setdefault(param.shape, []).append(param)
    return list(lists.values())


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Bring singular values near 1 without a decomposition: 0.01 to 1 of the norm to about 0.7 to 1.2.

    (n, rows, columns) -> the same, in fp32. By Newton and Schulz's iteration in bf16, which a GPU computes in
    a fraction of a millisecond; in fp32 on the CPU.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # the smaller of both products
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(ITERATIONS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).float()
