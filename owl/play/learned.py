"""A learned world: the streaming engine, started from windows of a dataset of latents."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from owl import models
from owl.comparison.decoders import load_decoders, run_folder
from owl.data.shards import DatasetInfo
from owl.errors import OwlError
from owl.hardware import DTYPES, default_device, device_name, multiplies_bfloat16
from owl.latents import check_decoder
from owl.nn.placement import placement
from owl.pixels import to_float
from owl.play.meters import TRUE_FRAMES, Reference
from owl.play.world import Description, Picture, Settings, SoundFormat, World
from owl.rollout.engine import Engine, Snapshot
from owl.rollout.episodes import Episodes, as_bytes, check_dataset
from owl.rollout.generate import Schedule
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.loading import load_world_model, named_decoder, need_data, other_decoder, parts_of

Precision = Literal["bf16", "fp32"]
STARTS = 12
"""Start scenes, evenly spaced over the split."""
FULL = 0.95
"""Quantile of an axis' movements in the data that a fully deflected stick reaches."""


@dataclass(frozen=True)
class Sources:
    """Where a learned world comes from.

    Attributes:
        checkpoint: Run folder, checkpoint or export of the world model.
        data: Dataset of latents with the start scenes; None: those of a shared world, or the dataset of training.
        decoders: Run folders, checkpoints or exports of decoders; empty: those of a shared world, or the autoencoder
            named in the dataset.
        audio_decoder: The same for the sound of a world model that generates it.
        sound: Whether the sound is heard.
        split: Split of the start scenes.
        context: Frames of a start scene.
        stride: Stored frames from one frame of the model to the next; None: that of training.
        precision: Of the network; None: the faster one.
        compile: Whether to compile the network in the background.
        inverse_dynamics: Run folder, checkpoint or export of the inverse dynamics model that reads the controls from
            the frames; None: that of a shared world, if it has one.
    """

    checkpoint: str
    data: str | None = None
    decoders: tuple[str, ...] = ()
    audio_decoder: str | None = None
    sound: bool = True
    split: str = "test"
    context: int = 8
    stride: int | None = None
    precision: Precision | None = None
    compile: bool = False
    inverse_dynamics: str | None = None


class LearnedState:
    """State of a learned world: the engine's, and the settings."""

    def __init__(self, engine: Snapshot, settings: Settings) -> None:
        self.engine, self.settings = engine, settings


class LearnedWorld(World):
    """A world model and its decoders.

    Args:
        sources: Where they come from.
        given: Values of the first settings, see `Settings`; where left out or None, those of the world model, and the
            first decoder.

    Raises:
        OwlError: A file is missing or damaged, the parts do not match, or the dataset of training is unknown.
    """

    def __init__(self, sources: Sources, **given: Any) -> None:
        device = default_device()
        path = models.find_checkpoint(sources.checkpoint)
        network, content = load_world_model(path)
        parts = parts_of(path, content)
        data = need_data(sources.data or parts.data, path)
        info = DatasetInfo.load(data)
        check_dataset(network, info, data)
        runs = sources.decoders or parts.decoders or (named_decoder(info, data),)
        # the same names whatever the folder is
        paths = [str(Path(models.find_checkpoint(run)).resolve()) for run in runs]
        self.decoders = load_decoders(paths)
        first = next(iter(self.decoders))
        audio_path = sources.audio_decoder or parts.others["audio_decoder"]
        audio = other_decoder(network, "audio", info, data, audio_path) if sources.sound else None
        heard: dict[str, nn.Module] = {} if audio is None else {"audio": audio}
        precision = sources.precision or ("bf16" if multiplies_bfloat16(device) else "fp32")
        self.settings = Settings(**asdict(network.sampling), decoder=first).override(**given)
        self._check(self.settings)
        self.engine = Engine(
            network,
            {"video": self.decoders[self.settings.decoder]} | heard,
            **vars(Schedule.of(self.settings)),
            dtype=DTYPES[precision],
            compile=sources.compile,
            device=device,
        )
        for decoder in self.decoders.values():
            check_decoder(network, "video", decoder)
            decoder.to(device)
        stride = sources.stride or parts.stride
        decoder = self.decoders[first]
        reader: InverseDynamicsReader | None = None
        if (reader_path := sources.inverse_dynamics or parts.others["inverse_dynamics"]) is not None:
            reader = InverseDynamicsReader.load(reader_path, network, stride)
            reader.network.to(device)
        self.references = [Reference(self.true_frames, reader, device)]
        self.episodes = Episodes(data, info, sources.split, network, decoder, stride, sources.context, device)
        self.scenes = {name: x for name, x in self.episodes.windows(STARTS).items() if name != "window"}
        last = {name: values[:, -1:] for name, values in self.scenes.items()}
        starts = self.episodes.pictures(last)[:, 0].movedim(1, -1).numpy()
        height, width = starts.shape[1:3]
        origin = asdict(replace(sources, inverse_dynamics=None)) | {  # frames do not depend on it
            "kind": "world model",
            "checkpoint": str(Path(path).resolve()),
            "data": data if "://" in data else str(Path(data).resolve()),
            "decoders": paths,
            "audio_decoder": sources.audio_decoder
            and str(Path(models.find_checkpoint(sources.audio_decoder)).resolve()),
            "stride": stride,
            "precision": precision,
            "fingerprints": [models.fingerprint(part) for part in (network, *self.decoders.values(), *heard.values())],
            "dataset": info.modalities["latent"]["encoder"]["fingerprint"],
            "settings": asdict(self.settings),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for decoder in (*self.decoders.values(), *heard.values()):  # the same output, faster; after the fingerprints
            if hasattr(decoder, "fold_weight_norm"):
                decoder.fold_weight_norm()  # type: ignore[operator]
        self.description = Description(
            kind="world model",
            name=run_folder(path).resolve().name,
            device=device_name(device),
            buttons=network.buttons,
            axes=dict(zip(network.axes, self._full_axes(), strict=True)),
            fps=self.episodes.fps,
            size=(height, width),
            starts=list(starts),
            decoders=list(self.decoders),
            origin=origin,
            sound=None if audio is None else SoundFormat(int(audio.sample_rate), int(audio.channels)),  # type: ignore[arg-type]
        )

    def true_frames(self) -> tuple[Tensor, Tensor]:
        """Return frames of the split, evenly spaced, as the first decoder shows them; see `Reference`."""
        windows = self.episodes.windows(TRUE_FRAMES)
        latents = self.episodes.latents(windows, slice(-1, None))
        names = [self.episodes.dataset.describe(window)["episode"] for window in windows["window"].tolist()]
        return self.episodes.decode(latents["video"])[:, 0], torch.tensor([names.index(name) for name in names])

    def reset(self, start: int, seed: int) -> Picture:
        """Start after the last frame of a start scene."""
        self.check_start(start, seed)
        scene = {name: values[start : start + 1] for name, values in self.scenes.items()}
        self.episodes.start(self.engine, scene, scene["buttons"].shape[1], seed)
        return Picture(self.episodes.decode(self.episodes.latents(scene)["video"])[0, -1].movedim(0, -1).numpy())

    @torch.no_grad()
    def add_start(self, rgb: np.ndarray) -> None:
        """Add a scene that stands still: its frames are the picture, and all else is idle or average."""
        autoencoder = next((decoder for decoder in self.decoders.values() if hasattr(decoder, "encode")), None)
        if autoencoder is None:
            raise OwlError(
                "play.picture",
                f"{', '.join(self.decoders)} cannot encode a picture, expected an autoencoder; give it with --decoder",
            )
        device, dtype = placement(autoencoder)
        picture = torch.from_numpy(rgb).movedim(-1, 0)[None]
        posterior = autoencoder.encode(to_float(picture).to(device, dtype))  # type: ignore[operator]
        latent = posterior.mean.float().cpu()
        network = self.engine.network
        known = {network.latent_modalities["video"]: latent, "rgb": picture}
        for name, modality in network.latent_modalities.items():
            if name != "video":
                average = {name: torch.zeros(1, *network.streams[name].shape, device=self.engine.device)}
                known[modality] = network.restore(average)[name].cpu()
        scenes = {}
        for name, values in self.scenes.items():
            new = known.get(name, torch.zeros(1, *values.shape[2:]))[:, None].expand(1, *values.shape[1:])
            scenes[name] = torch.cat([values, new.to(values.dtype)])
        self.scenes = scenes
        self.description.starts.append(rgb)

    def remove_start(self) -> None:
        """Remove the scene, too."""
        super().remove_start()
        self.scenes = {name: values[:-1] for name, values in self.scenes.items()}

    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Generate a frame."""
        pressed, moved = (torch.from_numpy(values.astype(np.float32))[None] for values in (buttons, axes))
        frame = self.engine.step(pressed, moved)
        rgb = as_bytes(frame.decoded["video"])[0].movedim(0, -1).contiguous().numpy()
        hear = partial(_sound, frame.decoded) if "audio" in frame.decoded else None
        return Picture(rgb, frame.seconds, hear)

    def change(self, settings: Settings) -> None:
        """Use other settings from the next frame on."""
        self._check(settings)
        self.engine.change(Schedule.of(settings))
        self.engine.decoders["video"] = self.decoders[settings.decoder]
        self.settings = settings

    def snapshot(self) -> LearnedState:
        """Copy the engine's state."""
        return LearnedState(self.engine.snapshot(), self.settings)

    def restore(self, snapshot: LearnedState) -> None:
        """Return to a state of the engine."""
        self.change(snapshot.settings)
        self.engine.restore(snapshot.engine)

    def snapshot_bytes(self) -> int:
        """Return the size of the cache."""
        return sum(tensor.nbytes for tensor in self.engine.cache.tensors())

    def _check(self, settings: Settings) -> None:
        if settings.decoder not in self.decoders:
            raise OwlError(
                "play.decoder",
                f"there is no decoder {settings.decoder}, expected one of {', '.join(self.decoders)}; choose another",
            )

    def _full_axes(self) -> list[float]:
        moved = self.scenes["axes"].abs().flatten(0, 1).double()
        return [float(full) or 1.0 for full in moved.quantile(FULL, 0)] if moved.numel() else []


def _sound(decoded: Mapping[str, Tensor]) -> np.ndarray:
    return decoded["audio"][0].clamp(-1, 1).cpu().numpy()


def load_world(path: str, **settings: Any) -> LearnedWorld:
    """Load a world model as `python -m owl play PATH` does.

    Args:
        path: Run folder, checkpoint or export; the folder of a shared world needs nothing else.
        settings: Values of the first settings, see `LearnedWorld`.

    Raises:
        OwlError: See `LearnedWorld`.
    """
    return LearnedWorld(Sources(path), **settings)
