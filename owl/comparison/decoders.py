"""Load decoders of the same latents, decode with them, and time them."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from owl import models
from owl.errors import OwlError
from owl.latents import UNKNOWN, encoder_of
from owl.models.image_decoder import decode_clips
from owl.nn.placement import placement
from owl.rollout.episodes import DECODED_TOGETHER, load_decoder

MOST_TURNS, LEAST_TURNS, PATIENCE = 50, 5, 10.0
"""Maximum and minimum number of frames that each decoder is timed on, and seconds after which timing ends."""


def run_folder(run: str) -> Path:
    """Return the folder of a run, of a checkpoint's run, or of an export."""
    path = Path(run)
    if path.suffix != models.CHECKPOINT_SUFFIX:
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent / path.stem


def run_names(runs: list[str]) -> list[str]:
    """Return the names of the runs' folders, or the runs themselves where two are named the same."""
    names = [run_folder(run).name for run in runs]
    return [name if names.count(name) == 1 else run for name, run in zip(names, runs, strict=True)]


def load_decoders(runs: list[str]) -> dict[str, nn.Module]:
    """Load decoders of the same latents.

    Args:
        runs: Run folders, checkpoints or exports, of autoencoders or of decoders that were trained on their latents.

    Returns:
        The networks, named as their run folders, or by ``runs`` where two are named the same.

    Raises:
        OwlError: A file is missing or damaged, contains another kind of network, or two decode latents of different
            encoders.
    """
    names = run_names(runs)
    decoders: dict[str, nn.Module] = {}
    for name, run in zip(names, runs, strict=True):
        if name in decoders:
            raise OwlError("compare.repeated", f"{run} was given twice, expected different decoders; give it once")
        decoders[name] = load_decoder(models.find_checkpoint(run))
    first, expected = runs[0], encoder_of(next(iter(decoders.values())))
    for run, decoder in zip(runs, decoders.values(), strict=True):
        if (found := encoder_of(decoder)) != expected or found == UNKNOWN:
            raise OwlError(
                "latents.encoder",
                f"{run} decodes latents of encoder {found}, {first} latents of encoder {expected}; compare decoders "
                "that were trained on the same encoder",
            )
    return decoders


@torch.no_grad()
def decode(decoder: nn.Module, latent: Tensor) -> Tensor:
    """Decode latents float[T, c, h, w] to float32[T, 3, H, W], clipped to [-1, 1], on the decoder's device."""
    device, dtype = placement(decoder)
    return decode_clips(decoder, latent[None].to(device, dtype), DECODED_TOGETHER)[0].float().clamp(-1, 1)


def decode_all(decoders: dict[str, nn.Module], latent: Tensor) -> dict[str, Tensor]:
    """Decode latents float[T, c, h, w] with each decoder, see `decode`."""
    return {name: decode(decoder, latent) for name, decoder in decoders.items()}


def check_sizes(decoders: dict[str, nn.Module], true: Tensor, latent: Tensor) -> None:
    """Check that every decoder delivers pictures of the true frames' size.

    Args:
        decoders: By name.
        true: uint8[T, 3, H, W].
        latent: float[T, c, h, w].

    Raises:
        OwlError: One does not.
    """
    expected = tuple(true.shape[1:])
    for name, decoder in decoders.items():
        found = tuple(decode(decoder, latent[:1]).shape[1:])
        if found != expected:
            raise OwlError(
                "compare.size",
                f"{name} decodes to {'x'.join(map(str, found))}, the frames are {'x'.join(map(str, expected))}; give a "
                "dataset of that size, or compare decoders of one size",
            )


@torch.no_grad()
def measure_speed(decoders: dict[str, nn.Module], latent: Tensor) -> dict[str, dict[str, float]]:
    """Time the decoders in turns, a frame each, and use the shortest time of each.

    On a CPU one thread decodes, and its CPU time counts, in which other programs have no part: on a busy machine,
    threads that wait for each other can take a hundred times as long.

    Args:
        decoders: By name.
        latent: float[N, c, h, w], decoded one after another.

    Returns:
        By name: ``frames_per_second``, on a CPU of one core, and ``speed``, relative to the first decoder.
    """
    seconds = dict.fromkeys(decoders, float("inf"))
    before: dict[str, tuple[Tensor, ...]] = dict.fromkeys(decoders, ())
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(MOST_TURNS):
            for name, decoder in decoders.items():
                device, dtype = placement(decoder)
                frame = latent[turn % len(latent)][None].to(device, dtype)
                clock = time.thread_time if device.type == "cpu" else time.perf_counter
                start = clock()
                decoded = decoder.decode(frame, *before[name])  # type: ignore[operator]
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name] = min(seconds[name], clock() - start)
                if getattr(decoder, "previous", False):
                    before[name] = (decoded,)
            if turn + 1 >= LEAST_TURNS and time.perf_counter() - begin > PATIENCE:
                break
    finally:
        torch.set_num_threads(threads)
    first = next(iter(seconds.values()))
    return {name: {"frames_per_second": 1 / least, "speed": first / least} for name, least in seconds.items()}


def count_parameters(decoder: nn.Module) -> int:
    """Count the parameters of a decoder, of an autoencoder only those of its ``decoder``."""
    part = getattr(decoder, "decoder", decoder) if hasattr(decoder, "encoder") else decoder
    return sum(p.numel() for p in part.parameters())
