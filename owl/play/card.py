"""Files of a shared world for its readers: the model card, the picture of the start scenes, the licence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn

from owl import models
from owl.errors import OwlError
from owl.latents import encoder_of
from owl.models.world_model import WorldTransformer
from owl.play.world import Description
from owl.rollout.report import headline, value_table
from owl.version import code_version
from owl.viz.pictures import BACKGROUND, GAP, png, tile_row, tile_size

ROW = 4
"""Start scenes in a row of the picture."""


@dataclass(frozen=True)
class Facts:
    """The content of a model card.

    Attributes:
        name: Name of the folder.
        description: The world as it is played.
        networks: By folder; "" is the world model.
        origin: Of the world model, see `owl.rollout.loading.origin_of`.
        own_license: Whether the licence is OWL's own.
        measured: Metrics of `python -m owl rollout`, empty if it was not run.
        training: Metrics of the training.
    """

    name: str
    description: Description
    networks: dict[str, nn.Module]
    origin: dict[str, Any]
    own_license: bool
    measured: dict[str, float]
    training: dict[str, float]


def card(facts: Facts) -> str:
    """Return the text of README.md, with the header that hubs of models read."""
    header: dict[str, Any] = {"license": "apache-2.0" if facts.own_license else "other", "license_link": "LICENSE"}
    header |= {"library_name": "owl", "tags": ["world-model", "video-generation"]}
    description, origin = facts.description, facts.origin
    height, width = description.size
    network = facts.networks[""]
    assert isinstance(network, WorldTransformer)
    settings = ", ".join(f"{key} {value}" for key, value in asdict(network.sampling).items())
    controls = ", ".join([*description.buttons, *description.axes])
    rows = [
        f"| {part or 'world model'} | {type(network).__name__} | {sum(p.numel() for p in network.parameters()):,} | "
        f"`{models.fingerprint(network)}` |"
        for part, network in facts.networks.items()
    ]
    if facts.measured:
        numbers = (
            "[The report](evaluation/report.md) has all numbers, their meaning, and the command that repeats them."
            f"\n\n![True frames above generated ones](evaluation/strip.png)\n\n{value_table(headline(facts.measured))}"
        )
    else:
        numbers = (
            "Not measured. Run `python -m owl rollout` on this checkpoint before `export` to show its results here."
        )
    dataset = origin.get("dataset") or {}
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {facts.name}",
        "![The start scenes](starts.png)",
        f"A world model that you play: pictures of {height} x {width} pixels (height x width), {description.fps:g} per "
        f"second, from the controls {controls}.",
        "## Play",
        "Install OWL (`pip install .` in its repository), then run in the folder that contains this one:",
        f"    python -m owl play {facts.name}\n    python -m owl rollout {facts.name}",
        f"It is played with {settings}, unless options say otherwise. The weights are in the safetensors format, and "
        "loading them runs no code of this folder.",
        "## Measurements",
        numbers,
        "## Networks",
        "\n".join(["| folder | class | parameters | fingerprint |", "| --- | --- | ---: | --- |", *rows]),
        f"The latents are of the encoder `{encoder_of(network, 'video')}`.",
        "## Training",
        f"{origin.get('global_step')} steps of `{origin.get('recipe')}` by OWL {origin.get('code_version')}, on the "
        f"dataset {dataset.get('path')} (`{dataset.get('identity')}`) with a stride of {origin.get('stride')}.",
        *([value_table(facts.training)] if facts.training else []),
        "## Licence",
        f"See [LICENSE](LICENSE). This folder was written by OWL {code_version()}.",
    ]
    return "\n\n".join(sections) + "\n"


def sheet(pictures: Sequence[np.ndarray]) -> bytes:
    """Arrange pictures uint8[H, W, 3] in rows, as PNG."""
    size = tile_size(*pictures[0].shape[:2])
    rows = [tile_row(np.stack(pictures[first : first + ROW]), size) for first in range(0, len(pictures), ROW)]
    height, width = rows[0].shape[:2]
    drawn = np.full((len(rows) * (height + GAP) - GAP, width, 3), BACKGROUND, np.uint8)
    for number, row in enumerate(rows):
        drawn[number * (height + GAP) :][:height, : row.shape[1]] = row
    return png(drawn)


def licence(path: str | None) -> str:
    """Return the text of a licence file, or of OWL's own licence.

    Raises:
        OwlError: There is no such file, or it is no text.
    """
    if path is None:
        # a checkout also has an egg-info folder, which has no licence
        found = (each.read_text("licenses/LICENSE") for each in metadata.distributions(name="owl-platform"))
        text = next(filter(None, found), "")
    else:
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OwlError(
                "export.license", f"the licence {path} cannot be read ({error}); give a text file with --license"
            ) from error
    if not text:
        raise OwlError("export.license", f"the licence {path or 'of OWL'} is empty; give a text file with --license")
    return text
