"""A small causal model of latents, as a regulariser that makes them predictable."""

import torch
from torch import Tensor, nn

from owl.errors import OwlError

WIDTH, HEADS, LAYERS = 128, 4, 2


class CausalPrior(nn.Module):
    """A transformer of two layers that predicts each latent of a sequence from those before it.

    Causally regularised tokenisation (Ramanujan et al. 2024, "When Worse is Better: Navigating the
    Compression-Generation Tradeoff in Visual Tokenization"): the squared error of the prediction is a loss of the
    encoder too, so that a generative model finds the latents easier to predict. The encoder can also lower it by
    shrinking the latents, which the error relative to their variance shows.

    Args:
        channels: c, channels of the latents.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(channels, WIDTH), nn.Linear(WIDTH, channels)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, latent: Tensor) -> Tensor:
        """Predict latent k + 1 from the latents 0 to k: float[B, c, N] -> float[B, c, N]."""
        mask = nn.Transformer.generate_square_subsequent_mask(latent.shape[-1], latent.device, latent.dtype)
        predicted: Tensor = self.last(self.layers(self.first(latent.transpose(1, 2)), mask, is_causal=True))
        return predicted.transpose(1, 2)

    def error(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean squared error of the predictions, and the same relative to the variance of the latents.

        Args:
            latent: float[B, c, N], N at least 2; it gets gradients as input and as target.

        Returns:
            Two scalars, the second without gradient.

        Raises:
            OwlError: There is only one latent.
        """
        if latent.shape[-1] < 2:
            raise OwlError(
                "network.input",
                f"the prior got sequences of {latent.shape[-1]} latent, expected at least 2; train on longer segments, "
                "or set model.init_args.weights.prior to 0",
            )
        error = (self(latent)[..., :-1] - latent[..., 1:]).square().mean()
        return error, error.detach() / torch.var(latent.detach(), dim=(0, 2), correction=0).mean()
