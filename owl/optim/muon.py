"""Muon for matrices and AdamW for all other parameters."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from owl.distributed.sharding import full_tensor, shard_like
from owl.hardware import fast_dtype

# Newton-Schulz iteration of degree 5, coefficients of Keller Jordan, https://kellerjordan.github.io/posts/muon:
# five steps map every singular value above 0.002 of the Frobenius norm to about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2: with this factor the root mean square of an
# update is about that of AdamW, so both can use one learning rate.
RMS_OF_ADAMW = 0.2
TOGETHER = 1 << 22  # elements in a batch of matrices of one shape; larger matrices fill a device by themselves


class MuonAdamW(Optimizer):
    """Muon for every matrix, with convolution kernels reshaped to [out, in * kh * kw], and AdamW for other parameters.

    A matrix has more than one row and more than one column: biases, gains of norms and of weight normalisation
    (float[out, 1, 1, 1]) are updated by AdamW without weight decay. So are all parameters of a group whose option
    ``hidden`` is false, see `owl.optim.configuration.parameter_groups`.

    Args:
        params: Parameters, or parameter groups with their own ``lr``, ``weight_decay``, ...; each group is split into a
            Muon and an AdamW group.
        lr: Learning rate of AdamW.
        muon_ratio: Learning rate of Muon relative to ``lr``.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's addition to the denominator.
        weight_decay: Decoupled weight decay of matrices, multiplied by the learning rate.
        momentum: Muon's Nesterov momentum.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        muon_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "muon_ratio": muon_ratio,
            "betas": tuple(betas),  # YAML gives a list
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        given = list(params)
        groups = cast(list[dict[str, Any]], given if given and isinstance(given[0], dict) else [{"params": given}])
        split = []
        for group in groups:
            members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            options = defaults | group
            by_muon = [options.get("hidden", True) and is_matrix(p) for p in members]
            matrices = [p for p, muon in zip(members, by_muon, strict=True) if muon]
            others = [p for p, muon in zip(members, by_muon, strict=True) if not muon]
            if matrices:
                rate = options["lr"] * options["muon_ratio"]
                split.append(options | {"params": matrices, "algorithm": "muon", "lr": rate})
            if others:
                split.append(options | {"params": others, "algorithm": "adamw", "weight_decay": 0.0})
        super().__init__(split, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one step; parameters without a gradient are not changed.

        Returns:
            The closure's result, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                self._muon(group, params)
            else:
                self._adamw(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for batch in by_matrix_shape(params):
            gradients = []
            for parameter in batch:
                gradient = cast(Tensor, parameter.grad)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                nesterov = gradient.lerp(state["momentum"], group["momentum"])
                gradients.append(full_tensor(nesterov).flatten(1))
            updates = orthogonalise(torch.stack(gradients))
            scale = RMS_OF_ADAMW * math.sqrt(max(updates.shape[1:]))
            for parameter, update in zip(batch, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(shard_like(update.view(parameter.shape), parameter), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in params]
        adamw(
            params,
            [cast(Tensor, parameter.grad) for parameter in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a weight has more than one row and more than one column after merging all axes but the first."""
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1


def by_matrix_shape(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group weights by the shape of their matrix, at most `TOGETHER` elements in a group."""
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for parameter in params:
        by_shape.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
    for (rows, columns), same in by_shape.items():
        count = max(1, TOGETHER // (rows * columns))
        yield from (same[first : first + count] for first in range(0, len(same), count))


def orthogonalise(matrix: Tensor) -> Tensor:
    """Orthogonalise a matrix: approximate U V^T of its singular value decomposition.

    Runs in bfloat16 where that is fast, as in the original implementation: every step corrects the rounding errors of
    the previous one, and only the direction of the result matters. Elsewhere it runs in float32.

    Args:
        matrix: float[rows, columns], or float[B, rows, columns]: each separately, with the same result.

    Returns:
        The same shape and dtype; zero for a zero matrix. Singular values near zero stay small.
    """
    x = matrix if matrix.ndim == 3 else matrix[None]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the products below are of the shorter side
    norm = x.flatten(1).norm(dim=1).clamp(min=1e-30)
    x = (x / norm[:, None, None]).to(fast_dtype(x.device))
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype).view(matrix.shape)
