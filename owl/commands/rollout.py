"""``python -m owl rollout``: evaluate the rollouts of a world model and write a report, pictures and videos."""

from pathlib import Path
from typing import Any, Literal

import torch

from owl import models
from owl.callbacks.report import print_table
from owl.comparison.decoders import load_decoders
from owl.comparison.evaluation import Evaluation, Precision, Settings
from owl.data.shards import DatasetInfo
from owl.errors import OwlError, at_least
from owl.flow_matching import noise_levels
from owl.hardware import DTYPES, cost_of_bfloat16, fast_dtype, multiplies_bfloat16
from owl.rollout.checks import check_decoder
from owl.rollout.engine import Engine
from owl.rollout.episodes import Episodes, check_dataset
from owl.rollout.evaluation import InverseDynamicsReader
from owl.rollout.generate import Sampler
from owl.rollout.loading import load_world_model, named_decoder, need_data, other_decoder, parts_of
from owl.rollout.report import headline
from owl.rollout.shared import PARTS, SharedWorld, settings_of


def main(
    checkpoint: str,
    *,
    data: str | None = None,
    out: str | None = None,
    decoder: list[str] = [],  # noqa: B006  (never changed)
    audio_decoder: str | None = None,
    motion_decoder: str | None = None,
    inverse_dynamics: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    frames: int = 1000,
    clips: int = 16,
    horizon: int = 32,
    context: int = 8,
    side_by_side: int = 4,
    steps: int | None = None,
    shift: float | None = None,
    sampler: Sampler | None = None,
    context_noise: float | None = None,
    guidance: float | None = None,
    inner_guidance: float = 0.0,
    stride: int | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    seed: int = 0,
) -> None:
    """Evaluate the rollouts of a world model under the controls of recorded episodes and write a report.

    Short rollouts are compared with the true frames, long rollouts with the distribution of true frames. The folder
    gets report.md, metrics.json, pictures and videos. A GPU is used if available.

    The folder of a shared world, which `export --decoder` writes, has its own scenes and decoders, and tells how it is
    played; options that are given come first.

    Args:
        checkpoint: A .ckpt file of the recipe owl.recipes.world_model.WorldModel, or a folder written by export.
        data: Dataset of latents of the autoencoder with which the world model was trained: a folder, or any fsspec URL;
            where left out, the dataset on which it was trained.
        out: Folder for the results; by default "rollout" in the run folder.
        decoder: Run folder, checkpoint or export of the autoencoder, or of a decoder trained on its latents; by default
            the autoencoder named in the dataset, or a shared world's first decoder. If several are given, the first
            decodes the rollouts, and a page compares all of them on generated latents.
        audio_decoder: The same for the sound of a world model that generates it.
        motion_decoder: The same for the motion of a world model that generates it, to compare it with the frames.
        inverse_dynamics: Checkpoint of the recipe owl.recipes.inverse_dynamics.InverseDynamics, trained with the world
            model's stride, to measure whether the controls are followed.
        split: Split of the episodes.
        frames: Length of the long rollouts.
        clips: Number of short rollouts.
        horizon: Length of the short rollouts.
        context: Number of given frames before a rollout.
        side_by_side: Number of long rollouts.
        steps: Evaluations of the network per frame, 4 where left out.
        shift: Shift of their noise levels towards noise, of few-step students as they were trained; 1, even levels,
            where left out.
        sampler: adams_bashforth (where left out), euler, or consistency for few-step students.
        context_noise: Noise level at which generated frames become context, 0 where left out.
        guidance: Weight of classifier-free guidance on the controls; 1, none, where left out.
        inner_guidance: Weight of inner guidance by streams that training hides, such as motion; 0 is none.
        stride: Stored frames from one frame of the world model to the next; where left out, as it was trained.
        precision: bf16, fp32, fp8_weight_only or fp8_dynamic (linear layers' weights or whole products are float8);
            where left out, bf16 if the device multiplies that fast, else fp32.
        compile: Run the network through torch.compile: a minute's wait at the first time, then faster.
        seed: Seed of all noise.
    """
    counts: dict[str, Any] = {"frames": frames, "clips": clips, "horizon": horizon, "context": context}
    at_least(1, **counts, side_by_side=side_by_side, steps=steps, stride=stride)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, content = load_world_model(checkpoint)
    parts = parts_of(checkpoint, content)
    del content  # with the states of optimisers
    data = need_data(data or parts.data, checkpoint)
    info = DatasetInfo.load(data)
    check_dataset(network, info, data)
    paths = decoder or list(parts.decoders[:1]) or [named_decoder(info, data)]
    decoders = load_decoders(paths)
    audio_decoder, motion_decoder, inverse_dynamics = (
        path or parts.others[name]
        for path, name in zip((audio_decoder, motion_decoder, inverse_dynamics), PARTS, strict=True)
    )
    given = {"audio": audio_decoder, "motion": motion_decoder}
    others = {name: other_decoder(network, name, info, data, path) for name, path in given.items()}
    if len(decoders) > 1 and "rgb" not in info.modalities:
        raise OwlError(
            "dataset.modalities",
            f"{data} has no rgb, with which {len(decoders)} decoders could be compared; encode it with --keep "
            "controls,rgb, or give one decoder",
        )
    sampling = settings_of(
        SharedWorld.find(checkpoint),
        steps=steps,
        shift=shift,
        sampler=sampler,
        context_noise=context_noise,
        guidance=guidance,
    )
    settings = Settings(
        checkpoint=checkpoint,
        data=data,
        split=split,
        decoder=paths,
        audio_decoder=audio_decoder,
        motion_decoder=motion_decoder,
        inverse_dynamics=inverse_dynamics,
        **counts,
        side_by_side=side_by_side,
        **sampling,
        inner_guidance=inner_guidance,
        stride=stride or parts.stride,
        precision=precision or ("bf16" if multiplies_bfloat16(device) else "fp32"),
        compile=compile,
        seed=seed,
    )
    if precision == "bf16" and (cost := cost_of_bfloat16(device)) is not None:
        print(f"{cost}; --precision fp32 is faster", flush=True)
    reader = InverseDynamicsReader.load(inverse_dynamics, network, settings.stride) if inverse_dynamics else None
    engine = Engine(
        network,
        {"video": next(iter(decoders.values()))} | ({} if others["audio"] is None else {"audio": others["audio"]}),
        noise_levels=noise_levels(settings.steps, settings.shift),
        sampler=settings.sampler,
        context_noise=settings.context_noise,
        guidance=settings.guidance,
        inner_guidance=inner_guidance,
        dtype=DTYPES.get(settings.precision) or fast_dtype(device),
        quantization=settings.precision if settings.precision in ("fp8_weight_only", "fp8_dynamic") else None,
        compile=compile,
        device=device,
    )
    video, audio = (engine.decoders.get(name) for name in ("video", "audio"))
    assert video is not None
    length = context + horizon
    episodes = Episodes(data, info, split, network, video, settings.stride, length, device, sound_decoder=audio)
    for other in decoders.values():
        check_decoder(network, "video", other)
        other.to(device)
    folder = Path(out) if out else default_folder(checkpoint)
    metrics = Evaluation(settings, engine, decoders, others["motion"], episodes, reader, folder).run()
    print_table(f"{checkpoint} on the {split} split of {data}", headline(metrics))
    print(f"Report: {folder / 'report.md'}")


def default_folder(checkpoint: str) -> Path:
    """Return the folder "rollout" in the run folder of a checkpoint, or in the folder of an export."""
    path = Path(checkpoint)
    if path.suffix != models.CHECKPOINT_SUFFIX:
        return path / "rollout"
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent) / "rollout"
