"""Frozen autoencoders whose latents are the target of a diffusion decoder."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl import models
from owl.errors import OwlError
from owl.nn.frozen import freeze, whole_state_dicts
from owl.trust import check

DIFFUSERS = ("AutoencoderTiny", "AutoencoderKL", "AutoencoderDC")
"""Supported classes of the package diffusers."""
DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class ProxyAutoencoder(nn.Module):
    """A frozen image autoencoder with standardised latents: the space in which a diffusion decoder generates.

    In the space of FLUX.1, an image of 3x360x640 is a latent of 16x45x80: 12 times fewer values, on a grid where a
    transformer needs 360 tokens of 5x2 positions.

    Checkpoints leave it out, like every frozen part (`owl.nn.frozen`). A network that is rebuilt from a checkpoint
    reads it again from ``config["path"]`` and checks that it is the same; exports contain it.

    Args:
        source: A path: a ``.ckpt`` file or an export of an autoencoder of OWL, or a folder that diffusers'
            ``save_pretrained`` wrote, with ``config.json`` and ``diffusion_pytorch_model.safetensors``, of one of the
            classes AutoencoderTiny, AutoencoderKL and AutoencoderDC (needs ``pip install 'owl-platform[diffusers]'``;
            nothing is downloaded). Or the ``config`` of another proxy: the same without weights, for a state dict.
        size: (height, width) of the images in pixels.

    Attributes:
        autoencoder: The network.
        mean: float[c], buffer: mean of each latent channel: diffusers' ``latents_mean`` or ``shift_factor``, or the
            statistics that an autoencoder of OWL measured in its last validation.
        std: float[c], buffer: standard deviation: diffusers' ``latents_std`` / ``scaling_factor``, or as above.
        size: (H, W).
        latent_size: (h, w).
        latent_channels: c.
        config: Plain values: the path, the fingerprint of the weights, the class and its arguments.

    Raises:
        OwlError: There is no autoencoder at the path (``proxy.missing``), it is of another class (``proxy.class``) or
            for images of another size (``proxy.size``), or its weights are damaged (``proxy.weights``).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str | dict[str, Any], size: tuple[int, int]) -> None:
        super().__init__()
        self.awaits_weights = isinstance(source, dict)
        if isinstance(source, dict):
            self.config = source
            autoencoder = _build(source["class_path"], source["init_args"])
        else:
            autoencoder = _read(source)
            class_path, arguments = _described(autoencoder)
            fingerprint = models.fingerprint(autoencoder)
            self.config = {
                "path": source,
                "fingerprint": fingerprint,
                "class_path": class_path,
                "init_args": arguments,
            }
        self.autoencoder: Any = autoencoder
        # diffusers returns objects with one of three names for the latent, unless tuples are requested
        self._plainly = {} if _is_owl(autoencoder) else {"return_dict": False}
        self.size = (size[0], size[1])
        self.latent_size = _geometry(autoencoder, self.size, self.config["path"])
        mean, std = _statistics(autoencoder)
        self.latent_channels = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_load_state_dict_pre_hook(_read_again)  # before the hook of freeze, which keeps what is there
        freeze(self)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encode images to standardised latents, without noise.

        Args:
            image: float[B, 3, *size] in [-1, 1].

        Returns:
            float[B, c, h, w] with about mean 0 and variance 1.

        Raises:
            OwlError: The images have another size.
        """
        if image.shape[1:] != (3, *self.size):
            raise OwlError(
                "network.input",
                f"the image is {list(image.shape)}, the proxy autoencoder expected [batch, 3, {self.size[0]}, "
                f"{self.size[1]}]; set the data's size to that",
            )
        self._check_weights()
        encoding = self.autoencoder.encode(image.to(self.mean.dtype), **self._plainly)
        encoding = encoding[0] if self._plainly else encoding
        latent = encoding if isinstance(encoding, Tensor) else encoding.mean
        standardised: Tensor = (latent - self.mean[:, None, None]) / self.std[:, None, None]
        return standardised.to(image.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode standardised latents. Gradients reach the latents.

        Args:
            latent: float[B, c, h, w].

        Returns:
            float[B, 3, *size], about in [-1, 1], not clipped.

        Raises:
            OwlError: The latents have another size.
        """
        if latent.shape[1:] != (self.latent_channels, *self.latent_size):
            raise OwlError(
                "network.input",
                f"the latent is {list(latent.shape)}, the proxy autoencoder expected [batch, {self.latent_channels}, "
                f"{self.latent_size[0]}, {self.latent_size[1]}]; use latents that it encoded",
            )
        self._check_weights()
        scaled = latent * self.std[:, None, None] + self.mean[:, None, None]
        decoded = self.autoencoder.decode(scaled.to(self.mean.dtype), **self._plainly)
        image: Tensor = decoded[0] if self._plainly else decoded
        return image.to(latent.dtype)

    def _check_weights(self) -> None:
        if self.awaits_weights:  # an error in the calling code: nothing may be trained towards a random network
            raise RuntimeError("a proxy that was built from its config has no weights before a state dict is loaded")


def _read_again(proxy: ProxyAutoencoder, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Complete a checkpoint's state dict, which lacks the proxy, with the weights at its path."""
    if proxy.awaits_weights and not any(name.startswith(prefix) for name in state_dict):
        source = proxy.config["path"]
        again = ProxyAutoencoder(source, proxy.size)
        found, expected = again.config["fingerprint"], proxy.config["fingerprint"]
        if found != expected:
            raise OwlError(
                "proxy.changed",
                f"the proxy autoencoder at {source} has the fingerprint {found}, the decoder was trained with "
                f"{expected}; put that one back there, or use an export of the decoder, which contains it",
            )
        with whole_state_dicts():
            state_dict.update(again.state_dict(prefix=prefix))
    proxy.awaits_weights = False


def _read(path: str) -> nn.Module:
    """Load an autoencoder with its weights, in float32."""
    folder = Path(path)
    if path.endswith(models.CHECKPOINT_SUFFIX) or (folder / models.CONFIG).is_file():
        return _checked(models.load(path), path).float()
    return _read_diffusers(folder).float()


def _checked(network: nn.Module, path: str) -> nn.Module:
    """Check that a network of OWL is an autoencoder of pictures."""
    needed = ("encode", "decode", "size", "latent_size", "latent_mean", "latent_std", "config")
    if getattr(network, "modalities", None) != {"rgb": 3} or not all(hasattr(network, name) for name in needed):
        raise OwlError(
            "proxy.class",
            f"{path} holds a {type(network).__qualname__}, expected an autoencoder of pictures with 3 channels; give "
            "the checkpoint of one",
        )
    return network


def _read_diffusers(folder: Path) -> nn.Module:
    missing = [file for file in (DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS) if not (folder / file).is_file()]
    if missing:
        raise OwlError(
            "proxy.missing",
            f"there is no {folder / missing[0]}, a proxy autoencoder is a checkpoint (.ckpt) or an export of OWL, or a "
            f"folder of diffusers with {DIFFUSERS_CONFIG} and {DIFFUSERS_WEIGHTS}; correct the path in proxy",
        )
    try:
        config = json.loads((folder / DIFFUSERS_CONFIG).read_bytes())
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise OwlError(
            "proxy.class",
            f"{folder / DIFFUSERS_CONFIG} describes no network ({error}), expected one that diffusers wrote; copy the "
            "folder again",
        ) from error
    kind = _diffusers_class(name, str(folder))
    if config.get("in_channels", 3) != 3:
        raise OwlError(
            "proxy.class",
            f"the {name} of {folder} has in_channels {config['in_channels']}, expected 3; give an autoencoder of "
            "pictures",
        )
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        with _quiet():  # its own loader, since folders of several ages differ in the names of their weights
            autoencoder, report = kind.from_pretrained(str(folder), output_loading_info=True, **options)
        wrong = [str(item) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for item in report[key]]
        if wrong:
            raise ValueError(f"{len(wrong)} missing, unknown or misshapen tensors such as {wrong[0]}")
    except Exception as error:  # diffusers raises many types
        reason = " ".join(str(error).split())
        raise OwlError(
            "proxy.weights",
            f"{folder / DIFFUSERS_WEIGHTS} does not hold the weights of the {name} that {DIFFUSERS_CONFIG} describes "
            f"({reason}); copy the folder again",
        ) from error
    return autoencoder


def _build(class_path: str, arguments: dict[str, Any]) -> nn.Module:
    """Build an autoencoder without its weights."""
    if "." not in class_path:
        with _quiet():
            return _diffusers_class(class_path, "the export").from_config(arguments)
    check(class_path, "the description of a proxy autoencoder")
    module, _, name = class_path.rpartition(".")
    network: nn.Module = getattr(importlib.import_module(module), name)(**arguments)
    return network


def _diffusers_class(name: Any, path: str) -> Any:
    if name not in DIFFUSERS:
        raise OwlError(
            "proxy.class",
            f"{path} holds the class {name}, a proxy autoencoder is one of {', '.join(DIFFUSERS)}; give the folder of "
            "one, in a pipeline the subfolder vae",
        )
    try:
        import diffusers
    except ImportError as error:
        raise OwlError(
            "proxy.package", f"{path} needs diffusers ({error}); run pip install 'owl-platform[diffusers]'"
        ) from error
    with _quiet():
        return getattr(diffusers, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers, which warns of other packages and of arguments that it adds to config.json itself."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_owl(autoencoder: nn.Module) -> bool:
    """Return whether an autoencoder is one of OWL, or of the user, rather than of diffusers."""
    return not type(autoencoder).__module__.startswith("diffusers.")


def _described(autoencoder: Any) -> tuple[str, dict[str, Any]]:
    """Return the class path, for a class of diffusers its name without dots, and the arguments as plain values."""
    kind = type(autoencoder)
    if _is_owl(autoencoder):
        return f"{kind.__module__}.{kind.__qualname__}", autoencoder.config
    arguments: dict[str, Any] = json.loads(autoencoder.to_json_string())
    return kind.__qualname__, {name: value for name, value in arguments.items() if not name.startswith("_")}


def _geometry(autoencoder: Any, size: tuple[int, int], path: str) -> tuple[int, int]:
    """Return (h, w) of the latents of images of a size."""
    if _is_owl(autoencoder):
        if tuple(autoencoder.size) != size:
            raise OwlError(
                "proxy.size",
                f"the proxy autoencoder of {path} is for images of {autoencoder.size[0]}x{autoencoder.size[1]} (height "
                f"x width), the decoder's are {size[0]}x{size[1]}; give one that was trained on this size",
            )
        height, width = autoencoder.latent_size
        return height, width
    # every stage but one halves the grid
    stages = autoencoder.config.get("encoder_block_out_channels") or autoencoder.config["block_out_channels"]
    factor = 2 ** (len(stages) - 1)
    if size[0] % factor or size[1] % factor:
        raise OwlError(
            "proxy.size",
            f"the proxy autoencoder of {path} takes images with sides that are multiples of {factor}, the decoder's "
            f"are {size[0]}x{size[1]} (height x width); give one with fewer stages, or footage of another size",
        )
    return size[0] // factor, size[1] // factor


def _statistics(autoencoder: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent channel, float[c] each."""
    if _is_owl(autoencoder):
        return autoencoder.latent_mean.clone(), autoencoder.latent_std.clone()
    config = autoencoder.config
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * config["latent_channels"]
    std = config.get("latents_std") or [1.0] * config["latent_channels"]
    return torch.tensor(mean), torch.tensor(std) / config["scaling_factor"]
