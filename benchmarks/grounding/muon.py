"""The Muon optimizer: momentum whose step is made orthogonal, for matrices."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Muon(Optimizer):
    """Matrices of equal shape are stepped together, so that small ones cost little."""

    def __init__(self, groups: Iterable[dict], momentum: float = 0.95) -> None:
        """groups: as PyTorch's optimizers take them, each with "params" and "lr"."""
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody hands it a closure
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._step_together(matrices, group["lr"], group["momentum"])

    def _step_together(self, matrices: list[nn.Parameter], lr: float, momentum: float) -> None:
        looking_ahead = []
        for matrix in matrices:
            average = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            assert matrix.grad is not None, "a step follows a backward pass"
            average.lerp_(matrix.grad, 1 - momentum)
            looking_ahead.append(matrix.grad.lerp(average, momentum))
        rows, columns = matrices[0].shape
        step = orthogonal(torch.stack(looking_ahead)) * max(1.0, rows / columns) ** 0.5
        for matrix, change in zip(matrices, step, strict=True):
            matrix.sub_(change, alpha=lr)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrices with singular values about 1, by Newton-Schulz iteration. [n, rows, columns] both ways."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
