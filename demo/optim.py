"""Optimiser parts of `demo/train.py`: Muon for weight matrices, an average of weights, the rate schedule."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, iterations: int = 4) -> Tensor:
    """Newton-Schulz iteration: moves each matrix of a stack (N, rows, columns) towards its polar factor.

    Quintic coefficients as in Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). Runs in float32,
    which is faster than bfloat16 at these sizes on CPUs without matrix units.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        s = x @ x.mT
        x = a * x + torch.baddbmm(s, s, s, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalised. Weights of equal shape are stacked, so that many
    small blocks take few calls.

    A convolution weight counts as a matrix (out, in * kh * kw), a fused qkv weight (3D, D) as three of (D, D).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.flatten(1).shape].append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                parts = 3 if rows == 3 * columns else 1
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]).flatten(1))  # Nesterov
                stack = torch.stack(updates).view(-1, rows // parts, columns)
                scale = group["lr"] * max(1.0, rows / parts / columns) ** 0.5
                for p, u in zip(params, orthogonalise(stack).view(len(params), rows, columns), strict=True):
                    p.sub_(u.view_as(p), alpha=scale)


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.steps = 0
        self.values = {k: v.detach().clone() for k, v in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Updates the average. Early steps have more weight, so that the initial weights soon stop to matter."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in module.named_parameters():
            self.values[k].lerp_(v, 1 - decay)


def rate(progress: float, warmup: float = 0.01, constant: float = 0.5, last: float = 0.02) -> float:
    """Learning-rate factor at `progress` in [0, 1]: short warm-up, then constant, then linear decay to `last`."""
    if progress < warmup:
        return progress / warmup
    if progress < constant:
        return 1.0
    return 1.0 - (1.0 - last) * (progress - constant) / (1.0 - constant)
