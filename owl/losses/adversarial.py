"""Adversarial losses: that of R3GAN, with exact gradient penalties, hinge and least squares.

`OBJECTIVES` names the pairs of losses. That of R3GAN:

Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline", section 2. With the discriminator D,
true images x and generated ones G, of which those with the same index in the batch are compared:

    L_G = E[softplus(-(D(G) - D(x)))]
    L_D = E[softplus(-(D(x) - D(G)))] + gamma / 2 * (R1 + R2)
    R1 = E[|grad D(x)|^2],   R2 = E[|grad D(G)|^2]

In a training step (the discriminators of `owl.models.discriminators` make the two sides):

    real_side, fake_side = discriminator.sides(real, fake.detach())
    real_logits, r1 = logits_and_penalty(discriminator, real_side)
    fake_logits, r2 = logits_and_penalty(discriminator, fake_side)
    loss = discriminator_loss(real_logits, fake_logits) + gamma / 2 * (r1 + r2)

To penalise every n-th step only (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", section
3.1), multiply gamma by n there, and call the discriminator itself in the steps between, which may use autocast.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from owl.errors import OwlError

ADAPTIVE_EPSILON, ADAPTIVE_LIMIT = 1e-4, 1e4  # as in the code of VQGAN


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The relativistic loss of the discriminator, without its penalties: L_D above.

    Args:
        real_logits: float[B] or, for a discriminator of patches, float[B, h, w]; D at true images.
        fake_logits: The same shape; D at the generated images of the same index.

    Returns:
        float[], log 2 for equal logits; a constant added to D does not change it.

    Raises:
        OwlError: The shapes differ.
    """
    _check_pairs(real_logits, fake_logits)
    return F.softplus(-(real_logits - fake_logits)).mean()


def generator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """The relativistic loss of the generator: L_G above.

    Args:
        fake_logits: float[B] or float[B, h, w]; D at generated images.
        real_logits: The same shape; D at the true images of the same index.

    Returns:
        float[], log 2 for equal logits.

    Raises:
        OwlError: The shapes differ.
    """
    _check_pairs(fake_logits, real_logits)
    return F.softplus(-(fake_logits - real_logits)).mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G))] (Lim and Ye 2017, "Geometric GAN").

    Args:
        real_logits: float[B, ...]; D at true samples.
        fake_logits: float[B, ...]; D at generated ones.
    """
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_generator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """-E[D(G)], for the arguments of `generator_loss`; the true samples do not matter."""
    return -fake_logits.mean()


def least_squares_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[(D(x) - 1)^2] + E[D(G)^2] (Mao et al. 2017, "Least Squares Generative Adversarial Networks").

    Args:
        real_logits: float[B, ...]; D at true samples.
        fake_logits: float[B, ...]; D at generated ones.
    """
    return (real_logits - 1).square().mean() + fake_logits.square().mean()


def least_squares_generator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """E[(D(G) - 1)^2], for the arguments of `generator_loss`; the true samples do not matter."""
    return (fake_logits - 1).square().mean()


class Objective(NamedTuple):
    """The losses of both sides.

    Attributes:
        discriminator: Called with the logits of true and of generated samples.
        generator: Called with the logits of generated and of true samples.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


ObjectiveName = Literal["relativistic", "hinge", "lsgan"]
OBJECTIVES: dict[ObjectiveName, Objective] = {
    "relativistic": Objective(discriminator_loss, generator_loss),
    "hinge": Objective(hinge_discriminator_loss, hinge_generator_loss),
    "lsgan": Objective(least_squares_discriminator_loss, least_squares_generator_loss),
}


def logits_and_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits and their gradient penalty: R1 for true images, R2 for generated ones.

    The gradient is the derivative itself, not estimated from noise, so its own gradient with respect to the weights
    is a second derivative (a "double backward"). It is computed in at least float32, whatever autocast says.

    Args:
        discriminator: Maps images to logits float[B] or float[B, h, w], independently of each other (no batch norm).
        images: float[B, ...]; no gradient reaches what made them.

    Returns:
        The logits, and float[]: the squared norm of the gradient over all elements of an image, averaged over the
        batch. With logits of patches it is divided by the number of patches: where these do not overlap, that is the
        average over patches of each one's own penalty, as the loss is the average of their losses.
    """
    precision = torch.promote_types(images.dtype, torch.float32)
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        images = images.detach().to(precision).requires_grad_()
        # a view, because networks that are given a leaf cannot be watched by torch's counter of operators
        logits = discriminator(images.view_as(images))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    patches = logits.numel() // len(logits)
    return logits, gradient.square().flatten(1).sum(1).mean() / patches


def annealed(start: float, end: float, progress: float) -> float:
    """Cosine from one value to another, as R3GAN anneals gamma, learning rates and Adam's second beta.

    There gamma falls to a tenth, for example from 150 to 15 for images of 256 pixels, and the second beta rises from
    0.9 to 0.99.

    Args:
        start: Value at progress 0.
        end: Value from progress 1 on.
        progress: Completed share of the training.
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Iterable[Tensor]) -> Tensor:
    """The weight at which both losses have gradients of equal norm at the generator's last layer.

    Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis" (VQGAN), equation 7:
    |grad L_rec| / (|grad L_G| + 1e-4), at most 1e4.

    Args:
        reconstruction_loss: float[]; its graph is kept.
        adversarial_loss: float[]; its graph is kept.
        last_layer: The parameters of the generator's last layer; both of a weight-normalised weight.

    Returns:
        float[], without gradient.
    """
    parameters = list(last_layer)
    reconstruction, adversarial = (
        get_total_norm(torch.autograd.grad(loss, parameters, retain_graph=True))
        for loss in (reconstruction_loss, adversarial_loss)
    )
    return (reconstruction / (adversarial + ADAPTIVE_EPSILON)).clamp(max=ADAPTIVE_LIMIT)


def _check_pairs(left: Tensor, right: Tensor) -> None:
    """Reject logits that torch would broadcast, such as a batch of one."""
    if left.shape != right.shape:
        raise OwlError(
            "adversarial.shape",
            f"the adversarial loss got logits of {list(left.shape)} and {list(right.shape)}, expected equal shapes; "
            "give the discriminator as many generated images as true ones",
        )
