"""``owl data verify`` names damage and says so in its exit status."""

from pathlib import Path

import pytest

from owl.commands.data_verify import main
from owl.data.shards import shard_name
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset, pack_again


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", episodes=3, frames=3)


def test_a_sound_dataset_ends_with_status_0(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(dataset)) == 0
    assert "45 members: all valid" in capsys.readouterr().out


def test_damage_is_named_and_ends_with_status_1(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = dataset / shard_name(1)
    data = bytearray(shard.read_bytes())
    data[700] ^= 255
    shard.write_bytes(data)
    assert main(str(dataset)) == 1
    printed = capsys.readouterr().out
    assert f"{shard}: episode-001/000000.rgb.jpg: its checksum is wrong" in printed
    assert "45 members: 1 problems" in printed


def test_repair_rebuilds_a_missing_index(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "index.npz").unlink()
    with refused("index.missing", str(dataset), "index.npz", "--repair"):
        main(str(dataset))
    assert main(str(dataset), repair=True) == 0
    assert "was rebuilt" in capsys.readouterr().out
    assert main(str(dataset), repair=True) == 0
    assert "fits its shards and was kept" in capsys.readouterr().out


def test_shards_that_were_changed_since_are_reported(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_again(dataset, "--sort=name")
    assert main(str(dataset)) == 1
    assert "--repair rebuilds it" in capsys.readouterr().out
    assert main(str(dataset), repair=True) == 0
    assert "45 members: all valid" in capsys.readouterr().out
