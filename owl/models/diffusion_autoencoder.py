"""Diffusion autoencoder: an encoder and a diffusion transformer that decodes its latents, trained together."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from owl.models.diffusion_decoder import DiTDecoder
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_encoder import ImageEncoder
from owl.nn.posterior import Posterior


class DiffusionAutoencoder(DiTDecoder):
    """Image -> latent -> image, where the decoder is a rectified flow (DiTo, Chen et al. 2025).

    Every latent is normalised to mean 0 and variance 1 over (C, H, W), without learned scale, so that no divergence is
    needed to bound it.

    Args:
        encoder: Arguments of `owl.models.image_encoder.ImageEncoder` apart from the geometry.
        decoder: Arguments of `owl.models.diffusion_decoder.DiTDecoder`.

    Attributes:
        encoder: float[B, channels, H, W] -> (mean float[B, c, h, w], logvar, which is not used). Its weights identify
            the latents.
        modalities: Channels of each modality that ``encode`` takes.
    """

    def __init__(self, encoder: dict[str, Any], **decoder: Any) -> None:
        super().__init__(**decoder)
        half = ImageEncoder(self.channels, self.size, self.latent_size, self.latent_channels, **encoder)
        half.encoder.logvar.requires_grad_(False)  # it has no gradient, for which DDP would wait
        self.encoder = half.encoder
        self.modalities = half.modalities
        self.config["encoder"] = encoder

    @classmethod
    def of(cls, decoder: DiTDecoder, autoencoder: ImageAutoencoder) -> "DiffusionAutoencoder":
        """Return a new network with the shapes of a decoder and of an autoencoder's encoder, but not their weights."""
        names = ("widths", "blocks", "patch", "group_size", "norm", "middle_block", "checkpoint")
        proxy = None if decoder.proxy is None else decoder.proxy.config["path"]  # from which it has its weights
        return cls({name: autoencoder.config[name] for name in names}, **decoder.config | {"proxy": proxy})

    def encode(self, image: Tensor) -> Posterior:
        """Encode images.

        Args:
            image: float[B, channels, H, W] in [-1, 1].

        Returns:
            The normalised latents as ``mean``, in the dtype of ``image``; the log-variance is that of the encoder.
        """
        mean, logvar = self.encoder(image)
        return Posterior(F.layer_norm(mean.float(), mean.shape[1:]).to(image.dtype), logvar.to(image.dtype))
