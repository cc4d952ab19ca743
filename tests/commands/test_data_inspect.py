"""``owl data inspect`` prints the figures and writes the picture."""

from pathlib import Path

import pytest
from PIL import Image

from owl.commands.data_inspect import main
from tests.helpers.errors import refused
from tests.helpers.shards import make_dataset


def test_it_prints_tables_and_writes_a_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    make_dataset(tmp_path / "tiny")
    main(str(tmp_path / "tiny"), out=str(tmp_path / "deep" / "sheet.png"))
    printed = capsys.readouterr().out
    for part in ("24 x 40", "35 frames/s", "ATTACK, MOVE_LEFT, MOVE_RIGHT", "unit pixels of the stored rgb frame"):
        assert part in printed
    assert [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")] == [
        "train",
        "validation",
        "test",
        "rgb",
        "depth",
        "flow",
        "audio",
        "controls",
    ]
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 1000


def test_the_sheet_goes_to_the_current_folder_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "tiny[v2]", modalities=("rgb",))
    monkeypatch.chdir(tmp_path)
    main("tiny[v2]")
    assert (tmp_path / "tiny[v2]-contact-sheet.png").exists()
    assert "contact sheet: tiny[v2]-contact-sheet.png" in capsys.readouterr().out


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with refused("dataset.missing", f"{tmp_path} holds no dataset.json"):
        main(str(tmp_path))
