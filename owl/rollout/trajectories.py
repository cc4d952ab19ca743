"""Trajectories of a teacher, cached as shards: where its flow leads from noise to each frame of a dataset."""

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from owl import models
from owl.data.jobs import Frames, Made, ShardJob, local_folder, run
from owl.data.modalities import Trajectory
from owl.data.reader import ShardReader, read_members
from owl.data.shards import DatasetInfo
from owl.data.source import Source
from owl.errors import OwlError, at_least
from owl.hardware import default_device
from owl.latents import check_encoder, check_latents, in_windows
from owl.models.sampling import Sampling
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.rollout.clips import clip_inputs, draw, flat
from owl.rollout.generate import Context, Schedule, denoise
from owl.rollout.loading import check_causal, load_source
from owl.seeds import derived_seed

MODALITY = "trajectory"


@torch.no_grad()
def follow(
    network: WorldTransformer, latents: Streams, controls: Controls, schedule: Schedule, noise: Streams
) -> Iterator[list[Streams]]:
    """Denoise each frame of clips after the true frames before it.

    Args:
        network: The causal teacher.
        latents: Standardised latents of the clips, "video" float[B, F, c, h, w], ...
        controls: Controls of these frames.
        schedule: Denoising schedule, of a sampler that needs no fresh noise.
        noise: Normal noise, shaped like the latents.

    Yields:
        For each frame: its noise, and the frame after each denoising step, "video" float32[B, 1, c, h, w], ...
    """
    cache = network.new_cache(len(controls.buttons), schedule.copies, device=controls.buttons.device)
    before: Context | None = None
    for frame in range(controls.buttons.shape[1]):
        own = controls.at(slice(frame, frame + 1))
        begin, true = ({name: x[:, frame : frame + 1] for name, x in streams.items()} for streams in (noise, latents))
        yield [begin, *denoise(network, cache, own, schedule, [begin], pending=before)]
        before = Context(true, own)


def standardization(network: WorldTransformer) -> dict[str, Any]:
    """Return shape, mean and std of each generated stream, which define standardised latents."""
    return {
        name: {
            "shape": list(stream.shape),
            **{part: getattr(network, f"{name}_{part}").tolist() for part in ("mean", "std")},
        }
        for name, stream in network.generated.items()
    }


def write_trajectories(
    teacher: str,
    source: str,
    directory: str | Path,
    *,
    points: int = 4,
    shift: float = 5.0,
    steps: int = 32,
    guidance: float = 1.0,
    hop: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> DatasetInfo:
    """Write a dataset of clips with trajectories, or finish one that was interrupted (`owl.data.jobs.run`).

    A clip has the length and stride of the clips that the teacher was trained on, and becomes an episode with copies of
    the latents and controls that the teacher needs. A clip with a damaged member is left out, with a warning.

    Args:
        teacher: Checkpoint or export of a causal world model.
        source: Dataset of latents, any fsspec URL.
        directory: Local folder for the new dataset.
        points: Noise levels at which points are stored beside x0: the student's denoising steps.
        shift: Shift of noise levels towards noise (`owl.flow_matching.shifted`).
        steps: Denoising steps of the teacher, a multiple of ``points``.
        guidance: Weight w of the teacher's guidance on controls, null + w (conditional - null); 1: none.
        hop: Stored frames from the start of one clip to the start of the next. None: clips follow one another.
        seed: Seed of the noise.
        batch_size: Clips that are denoised together.

    Returns:
        The description of the finished dataset.

    Raises:
        OwlError: As `run`; or an argument is out of range, the teacher is not causal or does not state its clips, the
            dataset does not fit the teacher or has no clip of this length for training, or the teacher generates NaN.
    """
    root = local_folder(directory)
    at_least(1, points=points, steps=steps, batch_size=batch_size)
    at_least(0, seed=seed)
    if hop is not None:
        at_least(1, hop=hop)
    if steps % points:
        raise OwlError(
            "arguments.wrong-value",
            f"steps is {steps}, expected a multiple of {points}, so that the teacher passes the points; change steps",
        )
    loaded = load_source(teacher)
    check_causal(loaded, "teacher")
    if loaded.length is None or loaded.stride is None:
        raise OwlError(
            "recipe.teacher",
            f"the teacher {teacher} does not state length and stride of the clips that it was trained on; give its "
            "checkpoint, or export that again",
        )
    network = loaded.network.eval()
    original = Source.open(source, (), [*network.latent_modalities.values(), "controls"])
    described = in_windows(original.info.modalities, loaded.stride)
    check_latents(network, described, source)
    check_encoder(network, described, source)
    sampling = Sampling(steps, shift, guidance=guidance)
    job = _TrajectoryJob(
        network, teacher, original, sampling, points, loaded.length, loaded.stride, hop, seed, batch_size
    )
    if not job.info.splits["train"]:
        raise OwlError(
            "dataset.empty-split",
            f"no training episode of {source} has the {job.span} frames of a clip ({loaded.length} frames with stride "
            f"{loaded.stride}), expected at least one; give longer episodes",
        )
    return run(job, root)


class _Place(NamedTuple):
    """Where a clip is in the source: position of its episode in the index, first frame, and the clip's own name."""

    episode: int
    first: int
    name: str


class _Clip(NamedTuple):
    """A clip: name, members of each stored frame, and the windows that start at each of the first ``stride`` frames."""

    name: str
    members: list[dict[str, bytes]]
    windows: list[dict[str, Tensor]]


class _TrajectoryJob(ShardJob):
    """Clips of a dataset of latents, with trajectories, in shards of the same numbers."""

    doing, kinds = "following", ("trajectories",)

    def __init__(
        self,
        network: WorldTransformer,
        teacher: str,
        original: Source,
        sampling: Sampling,
        points: int,
        length: int,
        stride: int,
        hop: int | None,
        seed: int,
        batch_size: int,
    ) -> None:
        self._network, self._original, self._schedule = network, original, Schedule.of(sampling)
        self._length, self._stride, self._seed, self._batch_size = length, stride, seed, batch_size
        self.span = length * stride
        self._every = sampling.steps // points
        hop = hop or self.span
        info, index = original.info, original.index
        clips = [self._clips_of(episode, hop) for episode in range(len(index.episodes))]
        self._of_shards = {
            number: found
            for number in index.shards.tolist()
            if (found := [clip for episode in index.episodes_of(number) for clip in clips[episode]])
        }
        self.shards = {number: len(found) * self.span for number, found in self._of_shards.items()}
        position = {str(name): episode for episode, name in enumerate(index.episodes)}
        splits = {
            split: [clip.name for name in names if name in position for clip in clips[position[name]]]
            for split, names in info.splits.items()
        }
        described = {
            "extension": Trajectory.extension,
            "encoding": "npy float16[points, features]",
            "shape": [points + 1, sum(prod(stream.shape) for stream in network.generated.values())],
            "noise_levels": list(self._schedule.noise_levels[:: self._every]),
            "shift": sampling.shift,
            "length": length,
            "stride": stride,
            "hop": hop,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "seed": seed,
            "streams": standardization(network),
            "teacher": {"fingerprint": models.fingerprint(network), "checkpoint": teacher},
        }
        kept = {name: info.modalities[name] for name in original.kept}
        self.info = replace(original.derive("trajectories", kept | {MODALITY: described}), splits=splits)

    def _clips_of(self, episode: int, hop: int) -> list[_Place]:
        index = self._original.index
        starts = range(0, int(index.episode_frames[episode]) - self.span + 1, hop)
        return [_Place(episode, first, f"{index.episodes[episode]}-{first:06d}") for first in starts]

    def settings(self, info: DatasetInfo) -> dict[str, Any]:
        described = info.modalities[MODALITY]
        return {
            "source": Made(info.source["identity"], info.source["path"]),
            "teacher": Made(described["teacher"]["fingerprint"], described["teacher"]["checkpoint"]),
            **{
                key: described[key]
                for key in ("noise_levels", "shift", "steps", "length", "stride", "hop", "guidance", "seed")
            },
        }

    def frames(self, number: int) -> Frames:
        reader = ShardReader(self._original.url, None, "")
        whole = (clip for clip in (self._read(reader, place) for place in self._of_shards[number]) if clip is not None)
        while together := list(islice(whole, self._batch_size)):
            for clip, trajectories in zip(together, self._follow(together), strict=True):
                for copied, points in zip(clip.members, trajectories, strict=True):
                    yield clip.name, copied | {Trajectory.extension: Trajectory.encode(points)}

    def _read(self, reader: ShardReader, place: _Place) -> _Clip | None:
        """Read and decode a clip; None, with a warning, if a member is damaged or absent."""
        index, modalities = self._original.index, self._original.info.modalities
        extensions = [modalities[name]["extension"] for name in self._original.kept]
        frames = range(place.first, place.first + self.span)
        members, wrong = read_members(reader, index, place.episode, frames, extensions)
        if wrong is None:
            try:
                return _Clip(place.name, members, [self._window(members, first) for first in range(self._stride)])
            except KeyError as absent:
                wrong = f"a frame of clip {place.name} has no {absent.args[0]}"
            except ValueError as error:
                wrong = f"a frame of clip {place.name} is damaged ({error})"
        warnings.warn(f"{self._original.url}: {wrong}; clip {place.name} is left out", stacklevel=2)
        return None

    def _window(self, members: list[dict[str, bytes]], first: int) -> dict[str, Tensor]:
        """Decode the window of a clip that starts at one of its first ``stride`` frames, as from the new dataset."""
        sample: dict[str, Tensor] = {}
        for name in self._original.kept:
            modality = self._original.modality(name, self._length, self._stride)
            frames = modality.frames(first, first + (self._length - 1) * self._stride)
            extension = self._original.info.modalities[name]["extension"]
            tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in modality.shapes().items()}
            decoded = (modality.decode(members[frame][extension]) for frame in frames)
            arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            modality.assemble(decoded, modality.sampling.draw(None, 1), arrays, first - frames.start)
            sample |= tensors
        return sample

    def _follow(self, clips: list[_Clip]) -> list[np.ndarray]:
        """Return the points of each stored frame of clips, float16[stored frames, points, features] each."""
        device = default_device()
        network = self._network.to(device)
        windows = [(clip.name, first, sample) for clip in clips for first, sample in enumerate(clip.windows)]
        keys = windows[0][2]
        batch = {key: torch.stack([sample[key] for _, _, sample in windows]).to(device) for key in keys}
        latents, controls, _ = clip_inputs(network, batch)
        # the noise depends on the clip only, not on where an interrupted run continues
        seeds = [derived_seed(self._seed, zlib.crc32(name.encode()), first) for name, first, _ in windows]
        noise = draw([torch.Generator(device).manual_seed(seed) for seed in seeds], latents)
        states = follow(network, latents, controls, self._schedule, noise)
        points = torch.stack([torch.cat([flat(x) for x in frame[:: self._every]], 1) for frame in states], 1)
        stored = points.half().cpu()
        if not stored.isfinite().all():
            raise OwlError(
                "latents.non-finite",
                f"the teacher generates latents after {clips[0].name} that are not finite in float16; use a checkpoint "
                "of a run that did not diverge, or less --guidance",
            )
        return list(rearrange(stored, "(c s) f p n -> c (f s) p n", s=self._stride).numpy())
