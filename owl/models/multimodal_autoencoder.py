"""Autoencoder of pictures with depth and optical flow: one latent for four or seven channels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from owl.errors import OwlError
from owl.models.image_autoencoder import Decoder, Encoder, Norm, check_arguments, check_image, check_latent, span
from owl.nn.convolution import FoldableNetwork
from owl.nn.posterior import Posterior
from owl.pixels import UNKNOWN, DepthScale, flow_scale, flow_to_picture, picture_to_flow

CHANNELS = {"rgb": 3, "depth": 1, "flow": 3}
"""Channels of the picture of each modality."""
IN_WINDOWS = {"rgb": 3, "depth": 1, "flow": 2}
"""Channels of each modality in windows of a dataset."""


class MultimodalAutoencoder(FoldableNetwork):
    """Picture, depth and optical flow -> one Gaussian latent -> picture, depth and optical flow.

    Architecture and latent are those of `owl.models.image_autoencoder.ImageAutoencoder`, with more channels: one for
    the logarithm of distance and three for the colours of optical flow (`owl.pixels`). A modality can be left out when
    encoding, and be unknown in some pixels; the decoder always returns all of them. `decode` returns the picture only,
    as every decoder does, so rollouts and comparisons can use this network like an image autoencoder.

    Args:
        modalities: "rgb", then "depth", "flow" or both.
        size: (height, width) of the pictures in pixels.
        latent_size: (height, width) of the latent in positions.
        latent_channels: Channels of the latent, a divisor of the last width.
        widths: Channels of each stage, finest first; four times each is a multiple of the next.
        blocks: Residual blocks of each stage of the encoder, finest first.
        decoder_blocks: The same for the decoder, also finest first; default: as in the encoder.
        patch: Side in pixels of the patch of one position.
        group_size: Channels per group of the 3x3 convolutions in the blocks; None: dense.
        norm: As in `ImageAutoencoder`.
        middle_block: As in `ImageAutoencoder`.
        checkpoint: Whether training recomputes the blocks' activations in the backward pass to save memory.
        depth_scale: (step, offset, inverse) of the dataset's depth (`owl.pixels.DepthScale`). None: read from the
            dataset by `read_scales`.
        flow_scale: Scale of the dataset's flow (`owl.pixels.flow_to_picture`). None: as above.

    Attributes:
        encoder: float[B, channels, H, W] -> (mean float[B, c, h, w], logvar float[B, 1, h, w]).
        decoder: float[B, c, h, w] -> float[B, channels, H, W].
        channels: Channels of all modalities together.
        places: The channels of each modality, as a slice.
        modalities: Channels of each modality that ``encode`` takes, as in windows.
        losses: Names of the bottleneck's losses, each a method of the result of `encode`.
        latent_mean: float[c], buffer: mean of each latent channel in the last validation; zeros until measured.
        latent_std: float[c], buffer: its standard deviation; ones until measured.
        config: The arguments above as plain values, with the scales of the dataset.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    losses: ClassVar[tuple[str, ...]] = ("kl",)
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        modalities: Sequence[str] = ("rgb", "depth", "flow"),
        size: tuple[int, int] = (96, 160),
        latent_size: tuple[int, int] = (12, 20),
        latent_channels: int = 8,
        widths: list[int] = [64, 128, 256],  # noqa: B006  (never changed; a list is what YAML gives)
        blocks: list[int] = [1, 2, 2],  # noqa: B006
        decoder_blocks: list[int] | None = None,
        patch: int = 2,
        group_size: int | None = None,
        norm: Norm = "weight",
        middle_block: bool = False,
        checkpoint: bool = False,
        depth_scale: tuple[float, float, bool] | None = None,
        flow_scale: float | None = None,
    ) -> None:
        super().__init__()
        if list(modalities) not in (["rgb", "depth"], ["rgb", "flow"], ["rgb", "depth", "flow"]):
            raise OwlError(
                "network.arguments",
                f"modalities is {list(modalities)}, expected [rgb, depth], [rgb, flow] or [rgb, depth, flow]; correct "
                "it, or use owl.models.image_autoencoder.ImageAutoencoder for rgb alone",
            )
        decoder_blocks = blocks if decoder_blocks is None else decoder_blocks
        self.channels = sum(CHANNELS[name] for name in modalities)
        check_arguments(
            self.channels, size, latent_size, latent_channels, widths, blocks, decoder_blocks, patch, group_size, norm
        )
        self.config: dict[str, Any] = {
            "modalities": list(modalities),
            "size": list(size),
            "latent_size": list(latent_size),
            "latent_channels": latent_channels,
            "widths": list(widths),
            "blocks": list(blocks),
            "decoder_blocks": list(decoder_blocks),
            "patch": patch,
            "group_size": group_size,
            "norm": norm,
            "middle_block": middle_block,
            "checkpoint": checkpoint,
            "depth_scale": None if depth_scale is None else list(depth_scale),
            "flow_scale": flow_scale,
        }
        self.modalities = {name: IN_WINDOWS[name] for name in modalities}
        self.places: dict[str, slice] = {}
        for name in modalities:
            first = sum(CHANNELS[before] for before in self.places)
            self.places[name] = slice(first, first + CHANNELS[name])
        self.size = (size[0], size[1])
        self.latent_size = (latent_size[0], latent_size[1])
        self.latent_channels = latent_channels
        grid = span(self.latent_size, widths, patch)
        shared = (self.channels, self.size, grid, latent_channels, widths)
        self.encoder = Encoder(*shared, blocks, patch, group_size, norm, middle_block, checkpoint)
        self.decoder = Decoder(*shared, decoder_blocks, patch, group_size, norm, middle_block, checkpoint)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @property
    def tsr(self) -> float:
        """Tensor-size reduction: elements of the pictures per element of the latent."""
        picture = self.channels * self.size[0] * self.size[1]
        return picture / (self.latent_channels * self.latent_size[0] * self.latent_size[1])

    @property
    def depth_scale(self) -> DepthScale:
        """Distances of the levels of depth.

        Raises:
            OwlError: No dataset was read yet.
        """
        return DepthScale(*self._scale("depth"))

    @property
    def flow_scale(self) -> float:
        """Full saturation of flow, as a part of the diagonal.

        Raises:
            OwlError: No dataset was read yet.
        """
        return float(self._scale("flow"))

    def _scale(self, name: str) -> Any:
        scale = self.config[f"{name}_scale"]
        if scale is None:
            raise OwlError(
                "network.scale",
                f"the network has no {name}_scale yet, expected that of a dataset; call read_scales with the "
                f"modalities of dataset.json, or set {name}_scale",
            )
        return scale

    def read_scales(self, modalities: Mapping[str, Mapping[str, Any]], url: str) -> None:
        """Take over the depth range and the flow scale of a dataset, which checkpoints and exports store in ``config``.

        Args:
            modalities: As in dataset.json.
            url: The dataset, for messages.

        Raises:
            OwlError: The dataset lacks a modality or its scale, or the network was trained with another scale.
        """
        for name in self.places:
            if name not in modalities:
                raise OwlError(
                    "dataset.modalities",
                    f"{url} has no {name}, the network needs {', '.join(self.places)}, the dataset has "
                    f"{', '.join(modalities)}; record with --{name}, or add it with `python -m owl data annotate`",
                )
        found: dict[str, Any] = {}
        if "depth" in self.places:
            scale = DepthScale.of(modalities["depth"], url)
            found["depth_scale"] = [scale.step, scale.offset, scale.inverse]
        if "flow" in self.places:
            found["flow_scale"] = flow_scale(modalities["flow"], url)
        self.take_scales(found, url)

    def take_scales(self, scales: Mapping[str, Any], source: str) -> None:
        """Take over scales, or check that they are those of this network if it has some.

        Args:
            scales: ``depth_scale`` and ``flow_scale``, as in ``config``.
            source: Where they are from, for messages.

        Raises:
            OwlError: They differ.
        """
        for name in ("depth_scale", "flow_scale"):
            own, other = self.config[name], scales.get(name)
            if None not in (own, other) and own != other:
                raise OwlError(
                    "network.scale",
                    f"{source} has {name} {other}, the network has {own}, expected the same; use data with the scale "
                    "that the network was trained with, or train a new one under another --name",
                )
            self.config[name] = other if own is None else own

    def picture(self, rgb: Tensor, *others: Tensor | None) -> Tensor:
        """Convert modalities to what the encoder takes and the decoder is trained towards.

        Args:
            rgb: float[B, 3, H, W] in [-1, 1].
            others: The other modalities in the order of ``modalities``, as in windows: depth float[B, 1, H, W] in
                [0, 1], flow float[B, 2, h, w] in pixels. None, or omitted: unknown.

        Returns:
            float[B, channels, H, W] in [-1, 1], and `owl.pixels.UNKNOWN` where nothing was measured.

        Raises:
            OwlError: A modality has another shape.
        """
        check_image(rgb, CHANNELS["rgb"], *self.size)
        given = dict(zip(self.places, (rgb, *others), strict=False))
        shown = []
        for name, place in self.places.items():
            part = given.get(name)
            if part is None:
                part = rgb.new_full((len(rgb), place.stop - place.start, *self.size), UNKNOWN)
            elif name == "depth":
                check_image(part, IN_WINDOWS[name], *self.size)
                part = self.depth_scale.to_picture(part)
            elif name == "flow":
                if part.ndim != 4 or part.shape[1] != IN_WINDOWS[name]:
                    raise OwlError(
                        "network.input",
                        f"the flow is {list(part.shape)}, expected [batch, 2, height, width]; give it as in windows of "
                        "a dataset",
                    )
                part = flow_to_picture(part, self.flow_scale, self.size)
            shown.append(part)
        return torch.cat(shown, 1).contiguous(memory_format=torch.channels_last)

    def rgb_only(self, picture: Tensor) -> Tensor:
        """Return a copy of pictures float[B, channels, H, W] in which everything but the rgb is unknown."""
        shown = picture.clone()
        shown[:, self.places["rgb"].stop :] = UNKNOWN
        return shown

    def values(self, picture: Tensor) -> dict[str, Tensor]:
        """Convert pictures, such as decoded ones, to values.

        Args:
            picture: float[B, channels, H, W].

        Returns:
            ``rgb``: float[B, 3, H, W]; ``depth``: float[B, 1, H, W], distances in the dataset's unit; ``flow``:
            float[B, 2, H, W], pixels.
        """
        found = {name: picture[:, place] for name, place in self.places.items()}
        if "depth" in found:
            found["depth"] = self.depth_scale.from_picture(found["depth"])
        if "flow" in found:
            found["flow"] = picture_to_flow(found["flow"], self.flow_scale)
        return found

    def encode(self, rgb: Tensor, *others: Tensor | None) -> Posterior:
        """Encode modalities; those that are None or omitted are unknown.

        Args:
            rgb: As in `picture`.
            others: As in `picture`.

        Returns:
            The posterior over float[B, latent_channels, h, w].

        Raises:
            OwlError: A modality has another shape.
        """
        return self.encode_picture(self.picture(rgb, *others))

    def encode_picture(self, picture: Tensor) -> Posterior:
        """Encode the result of `picture`, float[B, channels, H, W], also under autocast in its dtype."""
        mean, logvar = self.encoder(picture)
        return Posterior(mean.to(picture.dtype), logvar.to(picture.dtype))

    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (not standardised) to rgb, float[B, 3, H, W], trained towards [-1, 1] but not clipped."""
        return self.decode_picture(latent)[:, self.places["rgb"]]

    def decode_picture(self, latent: Tensor) -> Tensor:
        """Decode latents (not standardised) to all modalities.

        Args:
            latent: float[B, latent_channels, h, w].

        Returns:
            float[B, channels, H, W], trained towards [-1, 1] but not clipped; see `values`.

        Raises:
            OwlError: The latent has other channels or another size.
        """
        check_latent(latent, self.latent_channels, *self.latent_size)
        picture: Tensor = self.decoder(latent)
        return picture.to(latent.dtype)

    def forward(self, picture: Tensor, sample: bool) -> tuple[Tensor, Posterior]:
        """Reconstruct pictures.

        Args:
            picture: float[B, channels, H, W], as `picture` returns it.
            sample: Whether to decode a sample of the posterior (training) instead of its mean.

        Returns:
            The reconstruction, float[B, channels, H, W], and the posterior.
        """
        posterior = self.encode_picture(picture)
        return self.decode_picture(posterior.sample() if sample else posterior.mean), posterior

    @torch.no_grad()
    def widen(self, source: nn.Module, path: str) -> None:
        """Copy the weights of a trained autoencoder with fewer modalities, in place.

        The encoder's weights for the new modalities are zero, so that latents and rgb are those of the source,
        whatever the new modalities are. The decoder's weights for them stay as they were initialised.

        Args:
            source: An `ImageAutoencoder` of rgb, or a network of this class with the first of this one's modalities,
                and otherwise the same arguments.
            path: Where it is from, for messages.

        Raises:
            OwlError: The arguments differ.
        """
        described: dict[str, Any] = dict(getattr(source, "config", {}))
        modalities = described.pop("modalities", ["rgb"] if described.pop("channels", None) == 3 else [])
        ignored = ("modalities", "checkpoint", "depth_scale", "flow_scale")
        differing = [
            name for name, value in self.config.items() if name not in ignored and described.get(name) != value
        ]
        if not modalities or list(self.places)[: len(modalities)] != modalities:
            differing.append("modalities")
        if differing:
            raise OwlError(
                "recipe.start",
                f"the network of {path}, a {type(source).__qualname__}, differs from the one to be trained in "
                f"{', '.join(differing)}; give start the checkpoint of an autoencoder with the same arguments and "
                f"the first of {', '.join(self.places)}",
            )
        self.take_scales(described, path)
        own = self.state_dict()
        for name, weights in source.state_dict().items():
            if name.startswith("encoder.stem."):
                own[name].zero_()
            own[name][tuple(slice(length) for length in weights.shape)] = weights
