"""Trained networks as encoders of the frames or the sound of datasets."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl.data.modalities import MODALITIES
from owl.data.modalities.base import Clock
from owl.data.modalities.latents import AudioLatent, Latent
from owl.data.source import Source
from owl.errors import OwlError
from owl.nn.placement import placement
from owl.pixels import to_float


@dataclass(frozen=True)
class FrameEncoder:
    """A network that encodes frames or sound, and its entry in the description of a dataset.

    The network's class declares its inputs and outputs:

    - ``modalities``: the channels of each modality, in the order of ``encode``'s arguments, such as ``{"rgb": 3}``.
    - ``encode``: maps one tensor per modality to a posterior (`owl.nn.posterior.Posterior`). Tensors are as in windows,
      except for pictures, which are in [-1, 1]: rgb float[B, 3, H, W] in [-1, 1], depth float[B, 1, H, W] in [0, 1],
      flow float[B, 2, h, w] in pixels, audio float[1, channels, samples] in [-1, 1]. B consecutive frames give a mean
      of [B, latent_channels, *latent_size]; the sound of a whole episode gives [1, latent_channels, tokens].
    - ``latent_channels``; for frames ``latent_size`` (h, w) and ``size``, the required (H, W) of the first modality;
      for sound ``sample_rate`` and ``hop``, the number of samples per token.
    - ``read_scales``, if it depends on the range of the dataset's depth or the scale of its flow, which the method
      checks (`owl.models.multimodal_autoencoder.MultimodalAutoencoder`).

    Attributes:
        network: The network.
        fingerprint: Hash of the weights, which identifies the encoder; for one that imitates another, that of the
            other.
        class_path: Class path of the network.
        checkpoint: Path from which the network was loaded.
        distilled: Hash of its own weights if it imitates another encoder, else None.
    """

    network: Any
    fingerprint: str
    class_path: str
    checkpoint: str
    distilled: str | None = None

    @property
    def identity(self) -> dict[str, str]:
        """The entry of the encoder in ``dataset.json``."""
        entry = {"fingerprint": self.fingerprint, "class_path": self.class_path, "checkpoint": self.checkpoint}
        return entry if self.distilled is None else entry | {"distilled": self.distilled}

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the first modality of the encoded frames."""
        height, width = self.network.size
        return height, width

    @property
    def latent_shape(self) -> list[int]:
        """[c, h, w] of a frame's latent."""
        return [self.network.latent_channels, *self.network.latent_size]

    @property
    def is_of_sound(self) -> bool:
        """Whether its latents are tokens with a separate rate rather than one grid per frame."""
        return "audio" in self.network.modalities

    def find_name(self, name: str | None) -> str:
        """Return the name of its latents in a dataset, by default ``latent``, ``audio_latent``, ``motion_latent`` ...

        Raises:
            OwlError: There are no latents with this name, or they are of the other kind (sound or frames).
        """
        name = name or MODALITIES[next(iter(self.network.modalities))].latent
        latents = {known: kind for known, kind in MODALITIES.items() if issubclass(kind, Latent)}
        fitting = [known for known, kind in latents.items() if issubclass(kind, AudioLatent) == self.is_of_sound]
        if name not in fitting:
            raise OwlError(
                "arguments.wrong-value",
                f"latents of {', '.join(self.network.modalities)} cannot be named {name}, expected "
                f"{' or '.join(fitting)}; set --name to one of these",
            )
        return name

    def clock(self, fps: float) -> Clock:
        """Return the clock of sound tokens relative to frames."""
        return Clock(self.network.sample_rate / self.network.hop, fps)

    def layout(self, source: Source) -> dict[str, Any]:
        """Return the description of the latents for dataset.json.

        Raises:
            OwlError: The channels, the size, the rate or the scales of the dataset differ from those of the network.
        """
        network, url = self.network, source.url
        if hasattr(network, "read_scales"):
            network.read_scales(source.info.modalities, url)
        if self.is_of_sound:
            layout = self.layout_of_sound(source.info.modalities["audio"], source.info.fps, url)
            if "rate" in layout:
                clock = self.clock(source.info.fps)
                rates = " or ".join(f"{fps:g}" for fps in clock.whole_fps())
                warnings.warn(
                    f"frames of {url} have {clock.least(1)} or {clock.most(1)} tokens each ({clock.rate:g} tokens at "
                    f"{source.info.fps:g} frames a second), but a world model needs the same number in every frame; "
                    f"for that, import or record at {rates} frames a second, or use another hop",
                    stacklevel=2,
                )
            return layout
        shapes = {name: next(iter(source.modality(name, 1).shapes().values()))[0] for name in source.taken}
        for name in network.modalities:
            self._check_channels(name, shapes[name][1], url)
        size = shapes[source.taken[0]][2:]
        if size != self.size:
            stored, expected = ("x".join(map(str, sides)) for sides in (size, self.size))
            raise OwlError(
                "dataset.size",
                f"the {source.taken[0]} of {url} is {stored} (height x width), the encoder of "
                f"{self.checkpoint} takes {expected}; use footage of that size or an encoder that was trained on this "
                "one",
            )
        return {"encoding": "npy float16[c, h, w]", "shape": self.latent_shape}

    def layout_of_sound(self, audio: Mapping[str, Any], fps: float, url: str) -> dict[str, Any]:
        """Return the description of the latents of sound.

        Args:
            audio: Description of the sound in dataset.json.
            fps: Frames per second of the dataset.
            url: The dataset's folder, for messages.

        Raises:
            OwlError: The network expects other channels or another sample rate.
        """
        self._check_channels("audio", audio["channels"], url)
        if audio["sample_rate"] != self.network.sample_rate:
            raise OwlError(
                "network.input",
                f"audio of {url} has {audio['sample_rate']} samples a second, the encoder of {self.checkpoint} takes "
                f"{self.network.sample_rate}; use another dataset or encoder",
            )
        clock = self.clock(fps)
        if clock.least(1) == clock.most(1):
            return {"encoding": "npy float16[k, c]", "shape": [clock.least(1), self.network.latent_channels]}
        return {"encoding": "npy float16[tokens, c]", "shape": [self.network.latent_channels], "rate": clock.rate}

    def _check_channels(self, name: str, found: int, url: str) -> None:
        expected = self.network.modalities[name]
        if found != expected:
            raise OwlError(
                "network.input",
                f"{name} of {url} has {found} channels, the encoder of {self.checkpoint} takes {expected}; use another "
                "dataset or encoder",
            )

    @torch.inference_mode()
    def encode(self, sample: dict[str, Tensor], noise: torch.Generator | None) -> np.ndarray:
        """Encode consecutive frames of an episode.

        Args:
            sample: The network's modalities, as in a window.
            noise: Generator for sampling the posteriors; None uses their means.

        Returns:
            float16[B, c, h, w], or for sound float16[tokens, c].
        """
        device = placement(self.network).device
        inputs = []
        for tensor in sample.values():
            on_device = (tensor[None] if self.is_of_sound else tensor).to(device, non_blocking=True)
            if on_device.ndim == 4:
                on_device = on_device.contiguous(memory_format=torch.channels_last)
            inputs.append(to_float(on_device) if tensor.dtype == torch.uint8 else on_device)
        posterior = self.network.encode(*inputs)
        latent = posterior.mean if noise is None else posterior.sample(noise)
        latent = latent[0].T if self.is_of_sound else latent
        return latent.half().contiguous().cpu().numpy()
