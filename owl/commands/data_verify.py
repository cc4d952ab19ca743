"""``python -m owl data verify``: find damaged members, rebuild a missing index."""

from tqdm import tqdm

from owl.data.modalities.audio import AudioLevels
from owl.data.overview import DatasetReader
from owl.data.verification import index_is_current, missing_episodes, repair_index, verify_members


def main(directory: str, *, repair: bool = False) -> int:
    """Decode every member of a dataset and list damaged ones; the exit status is 1 if there are any.

    Also prints the level of the sound and counts clipped samples, which are no damage.

    Training does not require repair: it warns about damaged members and uses other windows instead.

    Args:
        directory: The dataset's folder, or any fsspec URL.
        repair: First rebuild the index from the shards, if it is missing, outdated or of another version.
    """
    if repair:
        rebuilt = repair_index(directory)
        print(f"the index of {directory} {'was rebuilt' if rebuilt else 'fits its shards and was kept'}")
    reader = DatasetReader(directory)
    problems, levels = missing_episodes(reader), AudioLevels()
    for problem in problems:
        print(problem)
    with tqdm(total=reader.index.frames, unit="frame", desc="verify") as progress:
        for frames, found in zip(reader.index.episode_frames, verify_members(reader, levels), strict=True):
            for problem in found:
                progress.write(problem)
            problems += found
            progress.update(int(frames))
    if problems and not index_is_current(directory):
        print(f"the index of {directory} does not fit its shards, which were changed since; --repair rebuilds it")
    if levels.frames:
        print(f"sound: {levels}")
    members = sum(int((reader.index.sizes[:, column] >= 0).sum()) for column in reader.columns.values())
    print(f"{members:,} members: " + (f"{len(problems):,} problems" if problems else "all valid"))
    return int(bool(problems))
