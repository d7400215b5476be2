"""Muon for convolution kernels, AdamW for everything else."""

from collections import defaultdict

import torch

# Five steps of x -> a x + b x^3 + c x^5, which carry singular values from (0, 1] to near 1
# (https://leloykun.github.io/ponder/muon-opt-coeffs).
_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW whose parameters of more than two dimensions are moved by Muon (Jordan et al. 2024), with Nesterov's
    momentum and steps as long as AdamW's (Liu et al. 2025): 0.2 sqrt(max(rows, columns)) times the learning rate.

    Libraries do this in bfloat16, which on processors without it takes five times as long as the rest of an update.
    This is in float32.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for kernel in group["params"]:
                if kernel.ndim > 2 and kernel.grad is not None:
                    alike[kernel.shape].append(kernel)
            for kernels in alike.values():
                self._move(kernels, lr=group["lr"], decay=group["weight_decay"])
        super().step()  # it passes over what has no gradient left

    def _move(self, kernels: list[torch.nn.Parameter], *, lr: float, decay: float) -> None:
        momenta = []
        for kernel in kernels:
            state = self.state[kernel]
            if not state:
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(kernel))
            state["step"] += 1
            momenta.append(state["momentum"])
        gradients = [kernel.grad for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        steps = orthogonal(torch.stack(torch._foreach_lerp(gradients, momenta, _MOMENTUM)).flatten(2))
        torch._foreach_mul_(kernels, 1 - lr * decay)
        shape = kernels[0].shape
        torch._foreach_add_(kernels, [*steps.unflatten(2, shape[1:])], alpha=-0.2 * max(steps.shape[1:]) ** 0.5 * lr)
        for kernel in kernels:
            kernel.grad = None


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest (half-)orthogonal matrices of `matrices` (B, m, n), float32, roughly: singular values above a
    hundredth of the norm come to between 0.7 and 1.3.

    The steps are taken by the Gram matrix: q(X X') X with one polynomial q needs two products with the long side, where
    the iteration of X itself needs ten.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram = x @ x.mT
    identity, factor = torch.eye(len(gram[0]), device=x.device, dtype=x.dtype).expand_as(gram), None
    for number, (a, b, c) in enumerate(_COEFFICIENTS, start=1):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        factor = step if factor is None else step @ factor
        if number < len(_COEFFICIENTS):
            gram = step @ gram @ step
    x = factor @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
