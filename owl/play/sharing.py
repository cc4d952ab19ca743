"""Write the folder of a shared world (`owl.rollout.shared`): networks, start scenes, licence and model card."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from owl import models
from owl.atomic import atomic_write
from owl.comparison.decoders import load_decoders, run_folder
from owl.data.scan import write_index
from owl.data.shards import DatasetInfo, ShardWriter
from owl.data.source import SampleReader, Source
from owl.data.windows import WindowDataset
from owl.errors import OwlError
from owl.latents import modality_of
from owl.models.world_model import WorldTransformer
from owl.play.card import Facts, card, licence, sheet
from owl.play.learned import LearnedWorld, Sources
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.loading import (
    PROVENANCE,
    load_world_model,
    named_decoder,
    need_data,
    origin_of,
    other_decoder,
    parts_of,
)
from owl.rollout.onnx_export import DECODER, STEP
from owl.rollout.report import MEASURED
from owl.rollout.shared import FILE, PARTS, SharedWorld
from owl.spacing import evenly_spaced

EVALUATION = "evaluation"
"""Folder of the results of `python -m owl rollout` before the export; `rollout` itself writes to another one."""


@dataclass(frozen=True)
class Contents:
    """What goes into the folder of a shared world.

    Attributes:
        checkpoint: Checkpoint of the world model.
        decoders: Run folders, checkpoints or exports of decoders of the video.
        others: The same for each of `owl.rollout.shared.PARTS`; None: that of the dataset, where the model needs it.
        data: Dataset of the start scenes; None: that of training.
        split: Split of the start scenes.
        scenes: Number of start scenes.
        frames: Frames of a start scene.
        sampling: Values of `owl.models.sampling.Sampling` other than those of the checkpoint.
        license: File with the licence; None: OWL's own.
        fold: Whether to fold the weight normalisation of decoders.
    """

    checkpoint: str
    decoders: Sequence[str]
    others: dict[str, str | None]
    data: str | None
    split: str
    scenes: int
    frames: int
    sampling: dict[str, Any]
    license: str | None
    fold: bool


def share(contents: Contents, directory: str | Path) -> None:
    """Write the folder of a shared world; world.yaml, which makes it one, is written last.

    Args:
        contents: What goes into it.
        directory: Local folder; files of an earlier export are replaced.

    Raises:
        OwlError: A file is missing or damaged, the parts do not match, or the directory is that of the source.
    """
    network, content = load_world_model(contents.checkpoint)
    network.sampling = network.sampling.override(**contents.sampling)
    parts = parts_of(contents.checkpoint, content)
    data = need_data(contents.data or parts.data, contents.checkpoint)
    folder = Path(directory)
    if not {folder.resolve(), (folder / "scenes").resolve()}.isdisjoint(
        Path(path).resolve() for path in (contents.checkpoint, data)
    ):
        raise OwlError(
            "export.directory", f"{directory} is what is exported, expected another folder; choose another directory"
        )
    text = licence(contents.license)
    decoders = dict(zip(load_decoders(list(contents.decoders)), contents.decoders, strict=True))
    if unfit := [name for name in decoders if Path(name).name != name]:
        raise OwlError(
            "export.decoders", f"two decoders are named as {unfit[0]}, expected different names; rename its folder"
        )
    others = find_others(contents, network, data, parts.stride)
    origin = origin_of(contents.checkpoint, content)
    networks: dict[str, tuple[nn.Module, dict[str, Any]]] = {"": (network, origin)}
    for name, path in {**{f"decoders/{name}": path for name, path in decoders.items()}, **others}.items():
        part, stored = models.load_with_content(file := models.find_checkpoint(path))
        if contents.fold and hasattr(part, "fold_weight_norm"):
            part.fold_weight_norm()  # type: ignore[operator]
        networks[name] = part, origin_of(file, stored)

    if (folder / FILE).is_file():  # of an earlier export
        (folder / FILE).unlink()
        for name in (*PARTS, "decoders", "scenes", EVALUATION):
            shutil.rmtree(folder / name, ignore_errors=True)
    world = SharedWorld(folder, tuple(decoders))
    for name, (part, provenance) in networks.items():
        write_network(part, provenance, folder / name)
    write_scenes(world, network, data, contents, parts.stride)
    atomic_write(folder / "LICENSE", text)

    sources = Sources(str(folder), world.scenes, tuple(map(world.decoder, world.decoders)), stride=parts.stride)
    played = LearnedWorld(sources)
    description = played.description
    played.close()
    atomic_write(folder / "starts.png", sheet(description.starts))
    facts = Facts(
        name=folder.resolve().name,
        description=description,
        networks={name: part for name, (part, _) in networks.items()},
        origin=origin,
        own_license=contents.license is None,
        measured=copy_evaluation(run_folder(contents.checkpoint) / "rollout", network, folder / EVALUATION),
        training=(content or {}).get("owl", {}).get("metrics") or {},
    )
    atomic_write(folder / "README.md", card(facts))
    world.save()


def find_others(contents: Contents, network: WorldTransformer, data: str, stride: int) -> dict[str, str]:
    """Return the paths of the other networks that the world needs or was given, after checking them."""
    info = DatasetInfo.load(data)
    found = {}
    for name in ("audio", "motion"):
        path = contents.others[f"{name}_decoder"]
        if path is None and name in network.generated:
            path = named_decoder(info, data, modality_of(network, name), f"--{name}_decoder")
        if other_decoder(network, name, info, data, path) is not None and path is not None:
            found[f"{name}_decoder"] = path
    if (path := contents.others["inverse_dynamics"]) is not None:
        InverseDynamicsReader.load(path, network, stride)
        found["inverse_dynamics"] = path
    return found


def write_network(network: nn.Module, origin: dict[str, Any], folder: Path) -> None:
    """Write the export of one network with its provenance.yaml, see `owl.rollout.loading.origin_of`."""
    for graph in (DECODER, STEP):
        (folder / graph).unlink(missing_ok=True)  # of the weights of an earlier export
    models.save(network, folder)
    atomic_write(folder / PROVENANCE, yaml.safe_dump(origin, sort_keys=False))


def write_scenes(world: SharedWorld, network: WorldTransformer, data: str, contents: Contents, stride: int) -> None:
    """Copy evenly spaced windows of a dataset of latents as the episodes of a small one, its split "test"."""
    modalities = [*network.latent_modalities.values(), "controls"]
    hop = max(1, (contents.frames - 1) * stride)
    windows = WindowDataset(data, contents.split, modalities, length=contents.frames, stride=stride, hop=hop)
    chosen = evenly_spaced(len(windows), contents.scenes)
    source = Source.open(data, (), modalities)
    position = {str(name): number for number, name in enumerate(source.index.episodes)}
    described = source.derive("scenes", {name: source.info.modalities[name] for name in source.kept})
    names = [f"scene-{number:03d}" for number in range(len(chosen))]
    info = replace(described, splits={"train": [], "validation": [], "test": names})
    info.save(world.scenes)
    reader = SampleReader(source)
    with ShardWriter(world.scenes, 0) as writer:
        for name, window in zip(names, chosen, strict=True):
            place = windows.describe(window)
            first, final = place["frames"]
            _, frames, wrong = reader.read(position[place["episode"]], first, final + 1)
            if wrong is not None:
                raise OwlError("windows.damaged", f"{data}: {wrong}; make the dataset again, or give another --split")
            for number, members in enumerate(frames):
                writer.write(name, number, members)
    write_index(world.scenes)


def copy_evaluation(source: Path, network: WorldTransformer, folder: Path) -> dict[str, float]:
    """Copy what `python -m owl rollout` wrote for the run, and return its metrics, empty if it was not measured.

    Results of another checkpoint of the run are not copied.
    """
    if not (source / "metrics.json").is_file():
        return {}
    try:
        measured = yaml.safe_load((source / MEASURED).read_text("utf-8"))["fingerprint"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        measured = "unknown"
    if measured != (fingerprint := models.fingerprint(network)):
        print(f"The results in {source} are of the world model {measured}, this one is {fingerprint}: left out")
        return {}
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".md", ".png", ".mp4"):
            atomic_write(folder / file.name, file.read_bytes())
    metrics: dict[str, float] = json.loads((source / "metrics.json").read_text("utf-8"))
    return metrics
