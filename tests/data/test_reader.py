"""Ranges of bytes from a real S3 server, in forked workers, and whole copies that several processes make at once."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer

from owl.data import reader as reader_module
from owl.data.loader import GlobalBatches, ResumableLoader
from owl.data.reader import ShardReader
from owl.data.shards import DatasetInfo, ShardIndex, shard_name
from owl.data.windows import WindowDataset
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("reader") / "data", episodes=5, frames=6)


@pytest.fixture(scope="module")
def bucket(dataset: Path) -> Iterator[str]:
    """URL of the dataset on a local S3 server."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3 = fsspec.filesystem("s3")
        s3.mkdir("footage")
        for path in dataset.iterdir():
            s3.put_file(str(path), f"footage/game/{path.name}")
        yield "s3://footage/game"
    server.stop()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_s3_gives_the_same_batches_as_the_local_folder(
    dataset: Path, bucket: str, tmp_path: Path, workers: int, cached: bool
) -> None:
    local = WindowDataset(dataset, modalities=("rgb", "flow", "controls"), length=2)
    remote = WindowDataset(
        bucket, modalities=("rgb", "flow", "controls"), length=2, cache_dir=tmp_path if cached else None
    )
    assert remote.identity == local.identity
    assert torch.equal(remote[0]["rgb"], local[0]["rgb"])  # opens the connection that workers must not inherit
    expected = list(ResumableLoader(local, GlobalBatches(local, 3)))
    found = list(ResumableLoader(remote, GlobalBatches(remote, 3, shuffle_block=None), workers))
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    copies = {path.relative_to(tmp_path / local.identity).name for path in tmp_path.rglob("shard-*.tar")}
    assert copies == ({shard_name(number) for number in range(3)} if cached else set())
    assert not list(tmp_path.rglob("*.partial"))


def test_a_shard_missing_on_s3_is_named(bucket: str) -> None:
    with refused("shard.member", bucket, "shard-000099.tar", "--repair"):
        ShardReader(bucket, None, "x").read(99, 0, 10)


def test_an_unavailable_storage_is_reported_in_one_sentence(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ShardReader(bucket, tmp_path, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    for ask in (
        lambda: DatasetInfo.load(bucket),
        lambda: ShardIndex.load(bucket),
        lambda: ShardReader(bucket, None, "x").read(0, 0, 10),
        lambda: cached.read(0, 0, 10),
        lambda: cached.download([0]),
    ):
        with refused("storage.unreadable", bucket, "127.0.0.1:9"):
            ask()
    fsspec.filesystem("s3").clear_instance_cache()


def test_what_is_missing_is_reported_when_it_is_to_be_downloaded(bucket: str, tmp_path: Path) -> None:
    with refused("shard.member", bucket, "shard-000099.tar", "--repair"):
        ShardReader(bucket, tmp_path, "x").download([99])


def test_a_range_behind_the_end_is_empty(bucket: str, dataset: Path) -> None:
    size = (dataset / shard_name(0)).stat().st_size
    assert ShardReader(bucket, None, "x").read(0, size + 100, size + 200) == b""
    assert len(ShardReader(bucket, None, "x").read(0, size - 10, size + 200)) == 10


def _read_whole(url: str, cache: str, size: int, start, results) -> None:
    start.wait()
    results.put(ShardReader(url, cache, "identity").read(0, 0, size) if size else b"")


def test_processes_that_cache_at_once_never_see_half_a_shard(bucket: str, dataset: Path, tmp_path: Path) -> None:
    content = (dataset / shard_name(0)).read_bytes()
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    arguments = (bucket, str(tmp_path), len(content), start, results)
    processes = [context.Process(target=_read_whole, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    assert all(results.get(timeout=60) == content for _ in processes)
    for process in processes:
        process.join()


def test_few_files_stay_open(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_FILES", 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ShardReader(dataset, None, "x")
    for _ in range(2):
        for number in range(5):
            assert reader.read(number, 0, 11) == b"episode-00" + str(number).encode()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
