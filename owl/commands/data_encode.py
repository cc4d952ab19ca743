"""``python -m owl data encode``: encode a dataset into latents for training world models."""

from pathlib import Path
from typing import Any

from owl.cli.datasets import print_dataset, printed_warnings
from owl.data.encoding import encode_dataset, find_names
from owl.data.shards import INDEX_NAME
from owl.errors import at_least
from owl.latents import load_encoder


def main(
    checkpoints: list[str],
    source: str,
    directory: str,
    *,
    name: str | None = None,
    keep: str | None = None,
    sample: bool = False,
    batch_size: int = 64,
    motion_stride: int = 1,
    depth_delay: float = 0.0,
    workers: int = 0,
) -> None:
    """Encode the frames and the sound of a dataset with trained autoencoders into a new dataset of latents.

    A network declares the modalities that it encodes: rgb for an image autoencoder, others depth, flow, audio, or
    several together. With several networks, each frame gets a latent of each. The new dataset has the same episodes,
    splits and shards, and dataset.json contains the encoders and the mean and standard deviation of each channel.
    Pictures must have the size that the autoencoder was trained on, and sound its sample rate. A GPU is used if there
    is one.

    After an interruption or a full disk, run the same command again: complete shards are kept.

    Args:
        checkpoints: The networks' checkpoints: .ckpt files written by fit, or folders written by export.
        source: The dataset to encode: a folder, or any fsspec URL.
        directory: Local folder for the new dataset; created if missing.
        name: Names of the latents, separated by commas; default: latent for rgb (alone or before others),
            motion_latent for flow, depth_latent for depth, audio_latent for audio. With the name motion_latent or
            depth_latent, an autoencoder of rgb encodes the picture of the flow or of the depth.
        keep: Modalities to copy unchanged, e.g. controls,rgb; default: controls, if there are any.
        sample: Store a sample of each posterior instead of its mean.
        batch_size: Frames per batch; sound is encoded one episode at a time.
        motion_stride: Frames over which the pictures of flow lead back: the stride of the world model.
        depth_delay: Seconds by which the pictures of depth are earlier. They are warped by the pose of the camera to
            what it sees now, and black where that was not seen.
        workers: Processes, each with a copy of the networks; 0 encodes in this process.
    """
    at_least(0, workers=workers)
    is_complete = (Path(directory) / INDEX_NAME).exists()
    with printed_warnings():
        encoders = [load_encoder(checkpoint) for checkpoint in checkpoints]
        names = None if name is None else [word.strip() for word in name.split(",")]
        info = encode_dataset(
            encoders,
            source,
            directory,
            names=names,
            keep=None if keep is None else [word.strip() for word in keep.split(",")],
            sample=sample,
            batch_size=batch_size,
            motion_stride=motion_stride,
            depth_delay=depth_delay,
            workers=workers,
        )
    shapes = " and ".join(shape_of(info.modalities[latents]) for latents in find_names(encoders, names))
    print_dataset(directory, f", {', '.join(info.modalities)}, latents of {shapes}", is_complete)


def shape_of(latent: dict[str, Any]) -> str:
    """Format the shape of a latent, for example "4x12x20"."""
    return "x".join(map(str, latent["shape"])) + (f" at {latent['rate']:g} a second" if "rate" in latent else "")
