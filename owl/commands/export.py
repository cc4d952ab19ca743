"""``python -m owl export``: convert a checkpoint to a network for use elsewhere."""

from pathlib import Path

import yaml

from owl import models
from owl.atomic import atomic_write
from owl.errors import OwlError


def main(checkpoint: str, directory: str, fold: bool = False) -> None:
    """Convert a checkpoint to model.safetensors + config.yaml, for owl.models.load(DIRECTORY).

    With EMA, the averaged weights are exported, which validation measured. provenance.yaml names the recipe, the code
    version and the dataset. If the recipe exports several networks, each is written to a folder of its name in
    DIRECTORY.

    Args:
        checkpoint: A .ckpt file written by fit, e.g. runs/quickstart/checkpoints/last.ckpt.
        directory: Output folder; files of an earlier export are replaced.
        fold: Fold weight normalisation into the weights: the same outputs, faster, for inference only.
    """
    networks, content = models.rebuild_all(checkpoint)
    if fold:
        for network in networks.values():
            if not hasattr(network, "fold_weight_norm"):
                raise OwlError(
                    "export.fold", f"{type(network).__name__} has no weight normalisation to fold; omit --fold"
                )
            network.fold_weight_norm()  # type: ignore[operator]
    provenance = {
        "checkpoint": str(checkpoint),
        "global_step": content["global_step"],
        **{key: content["owl"][key] for key in ("recipe", "code_version", "dataset")},
    }
    for name, network in networks.items():
        folder = Path(directory) if len(networks) == 1 else Path(directory) / name
        models.save(network, folder)
        atomic_write(folder / "provenance.yaml", yaml.safe_dump(provenance, sort_keys=False))
        print(f'Exported to {folder}; use it with: network = owl.models.load("{folder}")')
