"""Self-contained folders of a world model and everything that plays it, which `python -m owl export --decoder` writes.

A folder runs on another machine without the dataset and the runs that it comes from:

    world.yaml                    the names of the decoders, see `SharedWorld`; written last
    model.safetensors, config.yaml, provenance.yaml    the world model, as in every export
    decoders/NAME/                decoders of the video, exports as well; so are the optional folders
    audio_decoder/, motion_decoder/, inverse_dynamics/
    scenes/                       the start scenes, a dataset of latents and controls
    README.md, LICENSE, starts.png, evaluation/    the model card and what it shows
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from owl.atomic import atomic_write
from owl.errors import OwlError

FILE, FORMAT, VERSION = "world.yaml", "owl-world", 1
PARTS = ("audio_decoder", "motion_decoder", "inverse_dynamics")


@dataclass(frozen=True)
class SharedWorld:
    """A folder of a world model and everything that plays it.

    Attributes:
        folder: The folder.
        decoders: Names of the decoders of the video.
    """

    folder: Path
    decoders: tuple[str, ...]

    @classmethod
    def find(cls, path: str | Path) -> "SharedWorld | None":
        """Read the folder of a world; None for a checkpoint, a run folder and the export of a single network.

        Raises:
            OwlError: The folder's world.yaml is damaged, or of another version.
        """
        file = Path(path) / FILE
        if not file.is_file():
            return None
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
            if (found := (content["format"], content["version"])) != (FORMAT, VERSION):
                raise OwlError(
                    "world.version",
                    f"{file} is {found[0]} version {found[1]}, this code reads {FORMAT} version {VERSION}; use the "
                    "release of owl that wrote it",
                )
            world = cls(Path(path), tuple(map(str, content["decoders"])))
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise OwlError(
                "world.damaged", f"{file} does not describe a world ({error!r}); export the world again"
            ) from error
        if not world.decoders or any(Path(name).name != name for name in world.decoders):
            raise OwlError(
                "world.damaged",
                f"{file} has the decoders {', '.join(world.decoders) or 'none'}, expected names of folders in "
                f"{world.folder / 'decoders'}; export the world again",
            )
        return world

    def save(self) -> None:
        """Write world.yaml, atomically."""
        content = {"format": FORMAT, "version": VERSION, "decoders": list(self.decoders)}
        atomic_write(self.folder / FILE, yaml.safe_dump(content, sort_keys=False))

    @property
    def scenes(self) -> str:
        """The dataset of the start scenes."""
        return str(self.folder / "scenes")

    def decoder(self, name: str) -> str:
        """Return the folder of a decoder of the video."""
        return str(self.folder / "decoders" / name)

    def part(self, name: str) -> str | None:
        """Return the folder of one of `PARTS`, None if the world has none."""
        folder = self.folder / name
        return str(folder) if folder.is_dir() else None
