"""``python -m owl data trajectories``: follow a world model's flow to each frame, for the regression of a student."""

from owl.cli.datasets import print_inspect, printed_warnings
from owl.data.shards import ShardIndex
from owl.rollout.trajectories import write_trajectories


def main(
    teacher: str,
    source: str,
    directory: str,
    *,
    points: int = 4,
    shift: float = 5.0,
    steps: int = 32,
    guidance: float = 1.0,
    hop: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> None:
    """Write a dataset of clips with trajectories of a causal world model, from which owl.recipes.ode_regression learns.

    Each frame is denoised from noise after the true frames before it. The points at the student's noise levels and the
    result are stored in float16 beside copies of the latents and controls. A clip has the length and the stride of the
    clips that the teacher was trained on, and becomes an episode. A GPU is used if there is one.

    After an interruption or a full disk, run the same command again: complete shards are kept.

    Args:
        teacher: Checkpoint or export of the causal world model.
        source: The dataset of latents: a folder, or any fsspec URL.
        directory: Local folder for the new dataset; created if missing.
        points: Denoising steps of the student: noise levels at which points are stored.
        shift: Shift of noise levels towards noise, of student and teacher.
        steps: Denoising steps of the teacher, a multiple of the points.
        guidance: Weight of the teacher's guidance on controls, null + w (conditional - null); 1: none.
        hop: Stored frames from the start of one clip to the start of the next; default: clips follow one another.
        seed: Seed of the noise.
        batch_size: Clips that are denoised together.
    """
    with printed_warnings():
        info = write_trajectories(
            teacher,
            source,
            directory,
            points=points,
            shift=shift,
            steps=steps,
            guidance=guidance,
            hop=hop,
            seed=seed,
            batch_size=batch_size,
        )
    index, clip = ShardIndex.load(directory), info.modalities["trajectory"]
    levels = ", ".join(f"{level:.4g}" for level in clip["noise_levels"])
    print(
        f"{directory} holds {len(index.episodes):,} clips of {clip['length']} frames with stride {clip['stride']}, "
        f"trajectories at noise levels {levels} and 0"
    )
    print_inspect(directory)
