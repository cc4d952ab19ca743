"""The documentation keeps its word: every command in it runs, every link leads somewhere."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from owl.__main__ import run
from tests.helpers.tiny import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
EXECUTED = ["docs/tutorial/first-autoencoder.md", "docs/how-to/record.md", "docs/how-to/experiments.md"]
"""Pages whose commands are run, in order and in one folder, as a reader would. docs/how-to/own-footage.md is run by
tests/commands/test_data_import.py, which has footage."""

# What makes a command short without changing its kind; options given later win.
SHORTER = {
    "data record": ["--frames", "90", "--workers", "1"],
    "fit": [
        *("--trainer.max_time", "null", "--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0"),
        *("--data.init_args.validation_windows", "2", "--trainer.enable_progress_bar", "false"),
    ],
    "measure": ["--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0"],
}
STEPS = {"first": "2", "longer": "3"}


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return (rest of the opening line, content) of every fenced block of a language."""
    return re.findall(rf"^```{language}([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the command lines of a page without comments."""
    lines = [line for _, block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [stripped for line in lines if (stripped := line.partition(" #")[0].strip()) and stripped[0] != "#"]


def shortened(command: str) -> list[str]:
    """Turn a documented ``python -m owl`` command into arguments that take seconds instead of minutes."""
    arguments = shlex.split(command)[3:]
    name = " ".join(arguments[:2]) if arguments[0] == "data" else arguments[0]
    if name == "fit" and "--print_config" not in arguments:
        longer = "--trainer.max_steps" in arguments
        arguments += [*SHORTER["fit"], "--trainer.max_steps", STEPS["longer" if longer else "first"]]
        if "experiments/quickstart.yaml" in arguments:
            arguments += ["--data.init_args.record.frames", "90"]
    elif name in ("validate", "test", "predict"):
        arguments += [*SHORTER["measure"], "--data.init_args.validation_windows", "2"]
    return arguments + SHORTER.get(name, []) if name == "data record" else arguments


@pytest.mark.parametrize("page", EXECUTED)
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    for title, content in blocks(REPOSITORY / page, "yaml"):
        if named := re.search(r'title="(.+?)"', title):
            (tmp_path / named.group(1)).write_text(content)
    for command in commands(REPOSITORY / page):
        if command.startswith("python -m owl"):
            arguments = shortened(command)
            monkeypatch.setattr(sys, "argv", ["owl", *arguments])
            try:
                status: object = run(arguments)
            except SystemExit as exit_:  # --print_config and --help leave this way
                status = exit_.code or 0
            assert status == 0, command
        else:
            check_without_running(command)
    for _, code in blocks(REPOSITORY / page, "python"):
        if "import torch\n" in code:  # complete examples; the others show a call
            exec(code, {})


def check_without_running(command: str) -> None:
    """Check a command of another program as far as that goes without running it."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), command
    elif words[0] == "tensorboard":
        assert words[1] == "--logdir", command
    elif words[0] == "apt-get":
        assert words[1] == "install", command
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"owl-platform\[(\w+)\]", words[2])
        assert extra, command
        assert f"\n{extra.group(1)} = [" in (REPOSITORY / "pyproject.toml").read_text(), command
    else:
        pytest.fail(f"no rule says how to check {command!r}")


@pytest.mark.parametrize("page", [str(page.relative_to(REPOSITORY)) for page in PAGES])
def test_commands_that_are_only_shown_exist_and_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    for command in commands(path):
        if not command.startswith("python -m owl") and command.split()[0] in ("make", "pip", "apt-get", "tensorboard"):
            check_without_running(command)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target and "snippet" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}, which does not exist"


def test_navigation_names_every_page() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text()
    for page in (REPOSITORY / "docs").rglob("*.md"):
        assert str(page.relative_to(REPOSITORY / "docs")) in navigation


def test_documented_options_exist() -> None:
    from owl.cli import OwlCLI  # noqa: F401  (imports Lightning: only where it is needed)

    documented = (REPOSITORY / "docs" / "reference" / "configuration.md").read_text()
    quickstart = yaml.safe_load((REPOSITORY / "experiments" / "quickstart.yaml").read_text())
    for key in quickstart:
        assert f"`{key}" in documented, f"experiments/quickstart.yaml uses {key}, which is not documented"
