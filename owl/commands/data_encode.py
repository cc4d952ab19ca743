"""``python -m owl data encode``: from pictures to the latents that world models train on."""

import shlex
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from owl.data.encoder import encode_dataset
from owl.data.shards import INDEX_NAME, ShardIndex
from owl.errors import at_least
from owl.latents import load_encoder


def main(
    checkpoint: str,
    source: str,
    directory: str,
    *,
    name: str | None = None,
    keep: str | None = None,
    sample: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> None:
    """Encode every frame of a dataset, or its sound, with a trained autoencoder into a new dataset of latents.

    The network says which modalities it encodes: an image autoencoder rgb, others depth, flow, audio, or several
    together. The new dataset has the same episodes, splits and shards, and says in dataset.json which encoder made it
    and what mean and standard deviation each channel has. Pictures must have the size that the autoencoder was trained
    on, sound its rate. A GPU is used where there is one.

    Killed or out of disk space? Run the same command again: it keeps the shards that are complete.

    Args:
        checkpoint: A .ckpt file that fit wrote, or a folder that export wrote.
        source: The dataset to encode: a folder, or any fsspec URL.
        directory: Local folder for the new dataset; made where needed.
        name: What the latents are called; where left out by what they are of: rgb (alone or before others) gives
            latent, flow motion_latent, depth depth_latent, audio audio_latent.
        keep: Modalities to copy as they are, e.g. controls,rgb; controls where left out, if there are any.
        sample: Store a draw of each posterior rather than its mean.
        batch_size: Frames that are encoded together; sound is encoded an episode at a time.
        workers: Processes, each with the network; 0 encodes in this one.
    """
    at_least(0, workers=workers)
    is_complete = (Path(directory) / INDEX_NAME).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        encoder = load_encoder(checkpoint)
        info = encode_dataset(
            encoder,
            source,
            directory,
            name=name,
            keep=None if keep is None else [name.strip() for name in keep.split(",")],
            sample=sample,
            batch_size=batch_size,
            workers=workers,
        )
    frames = int(ShardIndex.load(directory).episode_frames.sum())
    latent = info.modalities[encoder.find_name(name)]
    shape = "x".join(map(str, latent["shape"])) + (f" at {latent['rate']:g} a second" if "rate" in latent else "")
    complete = "is complete already and was left as it is: it " if is_complete else ""
    print(f"{directory} {complete}holds {frames:,} frames, {', '.join(info.modalities)}, latents of {shape}")
    print(f"look at it: python -m owl data inspect {shlex.quote(directory)}")
