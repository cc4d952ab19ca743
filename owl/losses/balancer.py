"""Loss balancer: the weight of a term is its share of the gradient, whatever its scale."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from owl.distributed.reduction import mean_over_processes

SMALLEST_NORM = 1e-12


class GradientBalancer(nn.Module):
    """Combine the gradients of several losses towards a network's output by their shares.

    Défossez et al. 2022, "High Fidelity Neural Audio Compression", section 3.4, "Balancer". With g_i the gradient of
    loss i, <|g_i|> the exponential moving average of its norm for one sample, and weights w_i, the gradient is

        sum over i of scale * w_i / (sum of w) * g_i / <|g_i|>

    The averages are buffers, so that a resumed run continues exactly. Ranks average the norms.

    Args:
        names: Names of all losses, in any order.
        decay: Decay of the averages, which are corrected for their beginning.
        scale: Norm of the combined gradient of one sample, if all gradients agree.
    """

    norms: Tensor
    steps: Tensor

    def __init__(self, names: Sequence[str], decay: float = 0.999, scale: float = 1.0) -> None:
        super().__init__()
        self.names, self.decay, self.scale = sorted(names), decay, scale
        self.register_buffer("norms", torch.zeros(len(names)))
        self.register_buffer("steps", torch.zeros(len(names)))

    def forward(self, output: Tensor, losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
        """Compute the combined gradient, and update the averages of the losses that are given.

        Args:
            output: float[B, ...], a leaf or part of the graph of all losses.
            losses: Scalars by name.
            weights: Weight of each; one of weight 0 has no share.

        Returns:
            The gradient, of the shape of ``output``.
        """
        gradients = {}
        for name, loss in losses.items():
            if weights[name]:
                (gradients[name],) = torch.autograd.grad(loss, output, retain_graph=True)
        combined, total = torch.zeros_like(output), sum(weights[name] for name in gradients)
        if not gradients:
            return combined
        norms = torch.stack([gradient.flatten(1).norm(dim=1).float().mean() for gradient in gradients.values()])
        for (name, gradient), norm in zip(gradients.items(), mean_over_processes(norms), strict=True):
            place = self.names.index(name)
            self.steps[place] += 1
            self.norms[place] = self.decay * self.norms[place] + (1 - self.decay) * norm
            average = self.norms[place] / (1 - self.decay ** self.steps[place])
            combined += self.scale * weights[name] / total * gradient / average.clamp(min=SMALLEST_NORM)
        return combined
