"""Score identity distillation (SiD): a loss whose gradient also flows through what teacher and critic predict.

Zhou et al. 2024, "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for
One-Step Generation", equation 23, for predictions of x0 and with the normaliser of DMD, as Huang et al. 2025, "Self
Forcing", use it for rollouts. With a generated sample x, noised to x_t, and the predictions of its x0 by the frozen
teacher, x_real, and by a critic that is trained on generated samples, x_fake:

    L = mean [(x_real - x_fake) ((x_real - x) - alpha (x_real - x_fake))] / sg(mean |x - x_real|)
"""

from torch import Tensor

from owl.losses.distribution_matching import normaliser


def sid_loss(clean: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """Compute L. Each sample is normalised on its own, and each stream of latents by a call of its own.

    Args:
        clean: float[B, ...], x.
        real: The same shape, x_real: the teacher's x0, with guidance if there is any, as a function of x.
        fake: The same shape, x_fake: the critic's x0, likewise.
        alpha: Weight of the term that vanishes with the difference of both, about 1.

    Returns:
        float[]; it can be negative.
    """
    difference = real - fake
    return (difference * ((real - clean) - alpha * difference) / normaliser(clean, real)).mean()
