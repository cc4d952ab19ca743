"""``python -m owl rollout``: evaluate the rollouts of a world model and write a report, pictures and videos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from owl import models
from owl.callbacks.report import print_table
from owl.comparison.decoders import load_decoders, run_folder, run_names
from owl.comparison.evaluation import Evaluation, Precision, Settings
from owl.comparison.scripted import ScriptedEvaluation
from owl.comparison.world_models import write_page
from owl.data.shards import DatasetInfo
from owl.errors import OwlError, at_least
from owl.hardware import DTYPES, cost_of_bfloat16, default_device, fast_dtype, multiplies_bfloat16
from owl.models.sampling import Sampler
from owl.models.world_model import WorldTransformer
from owl.rollout.checks import check_decoder
from owl.rollout.engine import Engine
from owl.rollout.episodes import Episodes, check_dataset
from owl.rollout.generate import Schedule
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from owl.rollout.loading import Parts, load_world_model, named_decoder, need_data, other_decoder, parts_of
from owl.rollout.report import headline
from owl.rollout.scripts import load_scripts


def main(
    checkpoints: list[str],
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
    steps: list[int] = [],  # noqa: B006
    shift: list[float] = [],  # noqa: B006
    sampler: list[Sampler] = [],  # noqa: B006
    context_noise: float | None = None,
    guidance: list[float] = [],  # noqa: B006
    inner_guidance: float = 0.0,
    starts: int = 4,
    scripts: str | None = None,
    game: bool = True,
    stride: int | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    seed: int = 0,
) -> None:
    """Evaluate the rollouts of a world model under the controls of recorded episodes and write a report.

    Short rollouts are compared with the true frames, long rollouts with the distribution of true frames. Scripted
    controls, such as a turn by 90 degrees, show whether and how soon each control is followed, and whether the world is
    the same after a loop. The folder gets report.md, metrics.json, pictures, videos, and measured.yaml, which names
    the checkpoint that was measured. With several world models, each gets a folder of its own, and a page shows them
    side by side, with the same controls and seeds. A GPU is used if available.

    The folder of a shared world, which `export --decoder` writes, has its own scenes and decoders.

    Args:
        checkpoints: Run folders of world models, .ckpt files, or folders written by export. Several checkpoints are
            compared.
        data: Dataset of latents of the autoencoder with which the world model was trained: a folder, or any fsspec URL;
            where left out, the dataset on which the first one was trained.
        out: Folder for the results; by default "rollout" in the run folder, or "rollouts" in the first one of several.
        decoder: Run folder, checkpoint or export of the autoencoder, or of a decoder trained on its latents; by default
            the autoencoder named in the dataset, or a shared world's first decoder. If several are given, the first
            decodes the rollouts, and a page compares all of them on generated latents.
        audio_decoder: The same for the sound of a world model that generates it.
        motion_decoder: The same for the motion of a world model that generates it, to compare it with the frames.
        inverse_dynamics: Run folder, checkpoint or export of the recipe
            owl.recipes.inverse_dynamics.InverseDynamics, trained with the world model's stride, to measure whether the
            controls are followed.
        split: Split of the episodes.
        frames: Length of the long rollouts.
        clips: Number of short rollouts.
        horizon: Length of the short rollouts.
        context: Number of given frames before a rollout.
        side_by_side: Number of long rollouts.
        steps: Evaluations of the network per frame. For several world models one number, or one for each. This and the
            next four options are by default those that each checkpoint stores.
        shift: Shift of their noise levels towards noise; 1: even levels. One for all, or one for each.
        sampler: adams_bashforth, euler, or consistency for few-step students. One for all, or one for each.
        context_noise: Noise level at which generated frames become context.
        guidance: Weight of classifier-free guidance on the controls; 1: none. One for all, or one for each.
        inner_guidance: Weight of inner guidance by streams that training hides, such as motion; 0 is none.
        starts: Number of starts from which each script of controls is played; 0: none.
        scripts: YAML file of scripts; by default those of owl/rollout/scripts.yaml, for the controls of the game.
        game: Play the scripts in the real game too, if the dataset was recorded from it; a second for each rollout.
        stride: Stored frames from one frame of the world model to the next; where left out, as it was trained.
        precision: bf16, fp32, fp8_weight_only or fp8_dynamic (linear layers' weights or whole products are float8);
            where left out, bf16 if the device multiplies that fast, else fp32.
        compile: Run the network through torch.compile: a minute's wait at the first time, then faster.
        seed: Seed of all noise.
    """
    counts: dict[str, Any] = {"frames": frames, "clips": clips, "horizon": horizon, "context": context}
    at_least(1, **counts, side_by_side=side_by_side, stride=stride)
    at_least(0, starts=starts)
    for number in steps:
        at_least(1, steps=number)
    device = default_device()
    checkpoints = [models.find_checkpoint(path) for path in checkpoints]
    if repeated := [path for path in checkpoints if checkpoints.count(path) > 1]:
        raise OwlError(
            "compare.repeated", f"{repeated[0]} was given twice, expected different world models; give it once"
        )
    networks, parts = zip(*map(load_network, checkpoints), strict=True)
    strides = {path: stride or own.stride for path, own in zip(checkpoints, parts, strict=True)}
    if len(set(strides.values())) > 1:
        listed = ", ".join(f"{path} {own}" for path, own in strides.items())
        raise OwlError(
            "network.stride", f"the world models were trained with different strides ({listed}); compare those of one"
        )
    data = need_data(data or parts[0].data, checkpoints[0])
    info = DatasetInfo.load(data)
    sampling: dict[str, list[Any]] = {"steps": steps, "shift": shift, "sampler": sampler, "guidance": guidance}
    each = {name: for_each(name, values, checkpoints) for name, values in sampling.items()}
    settings = []
    for number, (checkpoint, network, own) in enumerate(zip(checkpoints, networks, parts, strict=True)):
        check_dataset(network, info, data)
        wanted = {name: values[number] for name, values in each.items()}
        settings.append(
            Settings(
                checkpoint=checkpoint,
                data=data,
                split=split,
                decoder=decoder or list(own.decoders[:1]) or [named_decoder(info, data)],
                audio_decoder=audio_decoder or own.others["audio_decoder"],
                motion_decoder=motion_decoder or own.others["motion_decoder"],
                inverse_dynamics=inverse_dynamics or own.others["inverse_dynamics"],
                **counts,
                side_by_side=side_by_side,
                sampling=network.sampling.override(context_noise=context_noise, **wanted),
                inner_guidance=inner_guidance,
                starts=starts,
                scripts=scripts,
                game=game,
                stride=strides[checkpoint],
                precision=precision or ("bf16" if multiplies_bfloat16(device) else "fp32"),
                compile=compile,
                seed=seed,
            )
        )
    if precision == "bf16" and (cost := cost_of_bfloat16(device)) is not None:
        print(f"{cost}; --precision fp32 is faster", flush=True)
    name = "rollouts" if len(checkpoints) > 1 else "rollout"
    folder = Path(out) if out else run_folder(checkpoints[0]) / name
    evaluate(settings, networks, info, device, folder)


def evaluate(
    settings: Sequence[Settings],
    networks: Sequence[WorldTransformer],
    info: DatasetInfo,
    device: torch.device,
    folder: Path,
) -> None:
    """Evaluate world models and print the main results.

    Args:
        settings: Of each world model.
        networks: The world models.
        info: Description of their dataset.
        device: Where they run.
        folder: Folder for the results; several world models get a folder in it each, beside the page that compares
            them.

    Raises:
        OwlError: As `prepare`; or the scripts are invalid.
    """
    names = [name.strip("./").replace("/", "-") for name in run_names([own.checkpoint for own in settings])]
    folders = [folder / name for name in names] if len(names) > 1 else [folder]
    evaluations = [
        prepare(own, info, network, device, place)
        for own, network, place in zip(settings, networks, folders, strict=True)
    ]
    scripted = scripted_evaluation(settings[0], evaluations[0].engine.network, evaluations[0].episodes)
    results = {}
    for own, name, evaluation in zip(settings, names, evaluations, strict=True):
        results[name] = evaluation.run(scripted)
        print_table(f"{own.checkpoint} on the {own.split} split of {own.data}", headline(results[name]))
        print(f"Report: {evaluation.out / 'report.md'}")
    if len(evaluations) > 1:
        write_page(folder, dict(zip(names, evaluations, strict=True)), results)
        print(f"Page: {folder / 'index.html'}")


def load_network(checkpoint: str) -> tuple[WorldTransformer, Parts]:
    """Load a world model, and what belongs to it."""
    network, content = load_world_model(checkpoint)
    return network, parts_of(checkpoint, content)


def for_each(name: str, values: list[Any], checkpoints: list[str]) -> list[Any]:
    """Return a value for each world model, None if there are none.

    Raises:
        OwlError: There is neither one for all nor one for each.
    """
    if not values:
        return [None] * len(checkpoints)
    if len(values) == 1:
        return values * len(checkpoints)
    if len(values) != len(checkpoints):
        raise OwlError(
            "arguments.wrong-value",
            f"{name} has {len(values)} values, expected one, or one for each of {len(checkpoints)} world models; "
            f"correct --{name}",
        )
    return values


def prepare(
    settings: Settings, info: DatasetInfo, network: WorldTransformer, device: torch.device, out: Path
) -> Evaluation:
    """Load what the evaluation of a world model needs.

    Raises:
        OwlError: Something is missing, or does not belong to the world model.
    """
    fingerprint = models.fingerprint(network)  # before the engine changes its precision
    data, given = settings.data, {"audio": settings.audio_decoder, "motion": settings.motion_decoder}
    decoders = load_decoders(settings.decoder)
    others = {name: other_decoder(network, name, info, data, path) for name, path in given.items()}
    if len(decoders) > 1 and "rgb" not in info.modalities:
        raise OwlError(
            "dataset.modalities",
            f"{data} has no rgb, with which {len(decoders)} decoders could be compared; encode it with --keep "
            "controls,rgb, or give one decoder",
        )
    reader: InverseDynamicsReader | None = None
    if settings.inverse_dynamics:
        reader = InverseDynamicsReader.load(settings.inverse_dynamics, network, settings.stride)
    engine = Engine(
        network,
        {"video": next(iter(decoders.values()))} | ({} if others["audio"] is None else {"audio": others["audio"]}),
        **vars(Schedule.of(settings.sampling, settings.inner_guidance)),
        dtype=DTYPES.get(settings.precision) or fast_dtype(device),
        quantization=settings.precision if settings.precision in ("fp8_weight_only", "fp8_dynamic") else None,
        compile=settings.compile,
        device=device,
    )
    video, audio = (engine.decoders.get(name) for name in ("video", "audio"))
    assert video is not None
    length = settings.context + settings.horizon
    episodes = Episodes(
        data, info, settings.split, network, video, settings.stride, length, device, sound_decoder=audio
    )
    for other in decoders.values():
        check_decoder(network, "video", other)
        other.to(device)
    return Evaluation(settings, engine, decoders, others["motion"], episodes, reader, fingerprint, out)


def scripted_evaluation(settings: Settings, network: WorldTransformer, episodes: Episodes) -> ScriptedEvaluation | None:
    """Read the scripts and play them in the real game; None without starts."""
    if not settings.starts:
        return None
    scripts = load_scripts(settings.scripts, network.buttons, network.axes)
    return ScriptedEvaluation(scripts, episodes, settings.starts, settings.context, settings.game)
