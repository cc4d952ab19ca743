"""Help and dispatch: quick, complete, and one line for every mistake."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from owl.__main__ import COMMANDS, TRAINER_COMMANDS, find_command, run
from tests.helpers.errors import check_line, refused
from tests.helpers.tiny import owl


@pytest.mark.parametrize("arguments", [["--help"], [], ["fitt"], ["data"], ["data", "recrod"]])
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['owl', *{arguments!r}]\n"
        "try: runpy.run_module('owl', run_name='__main__')\n"
        "except SystemExit as exit: status = exit.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'cv2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    mistaken = arguments in (["fitt"], ["data", "recrod"])
    assert finished.returncode == (2 if mistaken else 0), finished.stderr
    answer = finished.stderr if mistaken else finished.stdout
    for command in COMMANDS:
        if arguments[:1] != ["data"] or command.startswith("data") or mistaken:
            assert command in answer
    if mistaken:
        assert len(finished.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "meant"), [(["fti"], "fit"), (["exprot"], "export"), (["data", "recrod"], "data record")]
)
def test_a_mistyped_command_is_told_the_nearest_one(typed: list[str], meant: str) -> None:
    with refused("command.unknown", f"'{' '.join(typed)}'", f"did you mean '{meant}'"):
        find_command(typed)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(TRAINER_COMMANDS)))
def test_every_command_teaches_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run([*command.split(), "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    function = importlib.import_module(f"owl.commands.{command.replace(' ', '_')}").main
    summary = inspect.getdoc(function).split("\n\n")[0]
    assert " ".join(summary.split()) in shown
    for name in inspect.signature(function).parameters:
        assert name in shown


def test_a_switch_needs_no_value_and_a_wrong_option_names_the_right_one(tmp_path: Path) -> None:
    finished = owl("export", "missing.ckpt", "out", "--fold", cwd=tmp_path, check=False)
    assert finished.returncode == 2
    check_line(finished.stderr.strip(), "checkpoint.missing", "missing.ckpt")
    finished = owl("export", "missing.ckpt", "out", "--flod", cwd=tmp_path, check=False)
    assert finished.returncode == 2
    check_line(finished.stderr.strip(), "arguments.unknown-key", "--flod", "did you mean '--fold'?")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    finished = owl("export", "missing.ckpt", "out", "--debug", cwd=tmp_path, check=False)
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
