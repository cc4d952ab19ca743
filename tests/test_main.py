"""Help and dispatch: quick, complete, and one line for every mistake."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from owl.__main__ import COMMANDS, TRAINER_COMMANDS, find_command, main, run
from tests.helpers.errors import check_line, refused


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
def test_a_mistyped_command_names_the_nearest_one(typed: list[str], meant: str) -> None:
    with refused("command.unknown", f"'{' '.join(typed)}'", f"did you mean '{meant}'"):
        find_command(typed)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(TRAINER_COMMANDS)))
def test_every_command_has_help_for_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run([*command.split(), "--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    function = importlib.import_module(f"owl.commands.{command.replace(' ', '_')}").main
    summary = inspect.getdoc(function).split("\n\n")[0]
    assert " ".join(summary.split()) in shown
    for name in inspect.signature(function).parameters:
        assert name in shown


@pytest.fixture
def leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give a command that must end with status 2; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def leave(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["owl", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        return capsys.readouterr().err.strip()

    return leave


def test_a_switch_needs_no_value_and_a_wrong_option_names_the_right_one(leave: Callable[..., str]) -> None:
    check_line(leave("export", "missing.ckpt", "out", "--fold"), "checkpoint.missing", "missing.ckpt")
    check_line(
        leave("export", "missing.ckpt", "out", "--flod"), "arguments.unknown-key", "--flod", "did you mean '--fold'?"
    )


def test_debug_shows_the_traceback(leave: Callable[..., str]) -> None:
    with refused("checkpoint.missing", "missing.ckpt"):  # as Python shows it, with status 1
        leave("export", "missing.ckpt", "out", "--debug")
