"""``python -m owl replay``: play an action log again."""

from collections.abc import Iterator

from tqdm import tqdm

from owl.errors import OwlError
from owl.play.log import ActionLog
from owl.play.recording import write_pictures
from owl.play.replay import make_world, replay
from owl.play.world import Picture


def main(
    log: str,
    *,
    out: str | None = None,
    checkpoint: list[str] = [],  # noqa: B006  (never changed)
    data: str | None = None,
    decoder: list[str] = [],  # noqa: B006  (never changed)
    audio_decoder: str | None = None,
) -> int:
    """Play an action log again and compare every frame with the recorded one; exit with status 1 if one differs.

    The log has the seed, and the paths of the world model, its dataset and its decoders. On the CPU all frames are the
    same, bit for bit, with the same version of PyTorch and without --compile.

    Args:
        log: A .jsonl file that `play` recorded.
        out: Film to write, an .mp4.
        checkpoint: Where the world model is now, if it was moved; of several, all in the same order. Of a shared world,
            this is enough.
        data: Where the dataset is now, if it was moved.
        decoder: Where the decoders are now, if they were moved, in the same order.
        audio_decoder: Where the decoder of sound is now, if it was moved.
    """
    actions = ActionLog.load(log)
    if out is not None and not actions.actions:
        raise OwlError(
            "actions.empty",
            f"{log} has no frames after its start, expected at least one for the film {out}; leave --out out, or play "
            "before you stop recording",
        )
    world = make_world(actions, checkpoint, data, decoder, audio_decoder)
    different: list[int] = []

    def frames() -> Iterator[Picture]:
        total = len(actions.actions)
        for number, frame in enumerate(tqdm(replay(actions, world), "replay", total, unit="frame"), 1):
            if not frame.same:
                different.append(number)
            yield frame.picture

    try:
        if out is None:
            for _ in frames():
                pass
        else:
            write_pictures(out, frames(), world.description)
    finally:
        world.close()
    if not different:
        print(f"all {len(actions.actions)} frames are the same")
        return 0
    print(f"{len(different)} of {len(actions.actions)} frames differ, the first is frame {different[0]}")
    return 1
