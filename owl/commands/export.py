"""``python -m owl export``: convert a checkpoint to a network, or to a shared world, for use elsewhere."""

from pathlib import Path
from typing import Literal

from owl import models
from owl.cli.arguments import changed
from owl.errors import OwlError, at_least
from owl.models.sampling import Sampler
from owl.play.learned import STARTS, Sources
from owl.play.sharing import Contents, share, write_network
from owl.rollout.loading import origin_of
from owl.rollout.onnx_export import export_onnx
from owl.rollout.shared import FILE, SharedWorld


def main(
    checkpoint: str,
    directory: str,
    *,
    fold: bool = False,
    onnx: bool = False,
    decoder: list[str] = [],  # noqa: B006  (never changed)
    audio_decoder: str | None = None,
    motion_decoder: str | None = None,
    inverse_dynamics: str | None = None,
    data: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    scenes: int = STARTS,
    frames: int = 40,
    steps: int | None = None,
    shift: float | None = None,
    sampler: Sampler | None = None,
    context_noise: float | None = None,
    guidance: float | None = None,
    license: str | None = None,
) -> None:
    """Convert a checkpoint to model.safetensors + config.yaml, for owl.models.load(DIRECTORY).

    With EMA, the averaged weights are exported, which validation measured. provenance.yaml names the recipe, the code
    version and the dataset. If the recipe exports several networks, each is written to a folder of its name in
    DIRECTORY.

    With --decoder, the checkpoint is of a world model, and DIRECTORY is a shared world, which `play` and `rollout` run
    on any machine with OWL: it also has the decoders, start scenes, a licence, and a model card with the results of
    `rollout` that are in the run folder.

    Args:
        checkpoint: Run folder, or a .ckpt file written by fit, e.g. runs/quickstart/checkpoints/last.ckpt.
        directory: Output folder; files of an earlier export are replaced.
        fold: Fold weight normalisation into the weights: the same outputs, faster, for inference only.
        onnx: Also write decoder.onnx of a decoder and step.onnx of a world model (one denoising step of a frame), after
            comparing them with PyTorch in onnxruntime.
        decoder: Run folders, checkpoints or exports of the autoencoder or of decoders trained on its latents, among
            which the page of `play` can choose.
        audio_decoder: The same for the sound of a world model that generates it; by default the autoencoder named in
            the dataset.
        motion_decoder: The same for the motion.
        inverse_dynamics: Checkpoint or export of the inverse dynamics model with which `rollout` measures whether the
            controls are followed.
        data: Dataset of latents with the start scenes; by default the one that the world model was trained on.
        split: Split of the start scenes.
        scenes: Number of start scenes.
        frames: Frames of the world model in a start scene; `rollout` needs those of its context and horizon.
        steps: How the world is played unless options of `play` say otherwise: evaluations of the network per frame.
            This and the next four options are by default those that the checkpoint stores.
        shift: Shift of their noise levels.
        sampler: adams_bashforth, euler or consistency.
        context_noise: Noise level at which generated frames become context.
        guidance: Weight of classifier-free guidance on the controls.
        license: Text file with the licence of the world; by default OWL's own, Apache 2.0.
    """
    checkpoint = models.find_checkpoint(checkpoint)
    sampling = {
        "steps": steps,
        "shift": shift,
        "sampler": sampler,
        "context_noise": context_noise,
        "guidance": guidance,
    }
    others = {
        "audio_decoder": audio_decoder,
        "motion_decoder": motion_decoder,
        "inverse_dynamics": inverse_dynamics,
    }
    sharing = {**others, "data": data, "split": split, "scenes": scenes, "frames": frames, **sampling}
    if decoder:
        at_least(1, scenes=scenes)
        at_least(Sources("").context, frames=frames)  # that of `play`
        contents = Contents(
            checkpoint, decoder, others, data, split, scenes, frames, sampling, license=license, fold=fold
        )
        share(contents, directory)
        print(f"Exported a world to {directory}; play it with: python -m owl play {directory}")
        world = SharedWorld.find(directory)
        assert world is not None
        write_onnx([Path(directory), *(Path(world.decoder(name)) for name in world.decoders)] if onnx else [])
        return
    if given := changed(main, sharing | {"license": license}):
        raise OwlError(
            "export.world",
            f"--{given[0]} is for a world that is shared with its decoder; add --decoder or leave it out",
        )
    networks, content = models.rebuild_all(checkpoint)
    if fold:
        for network in networks.values():
            if not hasattr(network, "fold_weight_norm"):
                raise OwlError(
                    "export.fold", f"{type(network).__name__} has no weight normalisation to fold; omit --fold"
                )
            network.fold_weight_norm()  # type: ignore[operator]
    folders = {name: Path(directory) if len(networks) == 1 else Path(directory) / name for name in networks}
    for name, network in networks.items():
        folder = folders[name]
        (folder / FILE).unlink(missing_ok=True)  # of a world that was shared in this folder
        write_network(network, origin_of(checkpoint, content), folder)
        print(f'Exported to {folder}; use it with: network = owl.models.load("{folder}")')
    write_onnx(list(folders.values()) if onnx else [])


def write_onnx(folders: list[Path]) -> None:
    """Write the ONNX file of each export beside its weights, and print how it compares with PyTorch."""
    for folder in folders:
        path, comparison = export_onnx(models.load(folder).float(), folder)
        print(f"{path}: {comparison}")
