"""The documentation keeps its word: its commands and examples run, its links lead somewhere, its options exist."""

import pkgutil
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml

from owl.__main__ import COMMANDS, find_command
from tests.data.test_game import can_sound
from tests.helpers.tiny import REPOSITORY, owl_here

DOCS = REPOSITORY / "docs"
PAGES = [
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "README.md", REPOSITORY / "experiments" / "README.md", *sorted(DOCS.rglob("*.md")))
]
EXECUTED = [
    "docs/tutorial/first-autoencoder.md",
    "docs/how-to/record.md",
    "docs/how-to/experiments.md",
    "docs/how-to/add-a-recipe.md",
]
"""Pages whose blocks are run from top to bottom in one folder, as a reader would."""
EXECUTED_ELSEWHERE = {
    "docs/tutorial/your-own-world.md": "tests/commands/test_your_own_world.py",
    "docs/how-to/encode.md": "tests/commands/test_data_encode.py",
    "docs/how-to/controls.md": "tests/commands/test_data_annotate.py",
    "docs/how-to/depth-and-flow.md": "tests/commands/test_data_annotate.py",
    "docs/how-to/fp8.md": "tests/precision/test_fp8.py",
    "docs/how-to/rollout.md": "tests/commands/test_rollout.py",
    "docs/how-to/compare.md": "tests/commands/test_compare.py",
    "docs/how-to/cluster.md": "tests/commands/test_submit.py",
    "docs/how-to/sweep.md": "tests/commands/test_sweep.py",
    "docs/how-to/world-model.md": "tests/commands/test_rollout.py",
    "docs/how-to/sound-and-motion.md": "tests/commands/test_rollout_senses.py",
    "docs/how-to/own-footage.md": "tests/commands/test_data_import.py",
    "docs/how-to/embed.md": "tests/play/test_environment.py",
    "docs/how-to/bench.md": "tests/commands/test_bench.py",
    "docs/how-to/add-a-modality.md": "tests/data/modalities/test_page.py",
    "docs/how-to/add-a-loss.md": "tests/losses/test_reconstruction.py",
    "docs/reference/shards.md": "tests/data/test_shards.py",
}
"""Pages that take a dataset or footage for granted; the tests there, which have them, run their blocks."""

# Everything that differs from what the page says: options appended to a command (the last one wins), and what a page
# takes for granted.
MEASURE = (
    *("--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0"),
    *("--data.init_args.validation_windows", "2", "--trainer.enable_progress_bar", "false"),
)
SHORTER = {
    "data record": ("--frames", "90", "--workers", "1"),
    "fit": (*MEASURE, "--trainer.max_time", "null", "--trainer.max_steps", "2"),
    "fit on": (*MEASURE, "--trainer.max_time", "null", "--trainer.max_steps", "3"),  # where the page trains longer
    "fit quickstart": (
        *("--data.init_args.record.frames", "90"),
        *("--data.init_args.record.scenario", "deathmatch,freedoom2:MAP01"),  # six games instead of 48
    ),
    "validate": MEASURE,
    "test": MEASURE,
    "predict": MEASURE,
}
NAMES = {"docs/how-to/experiments.md": {"image": torch.zeros(1, 3, 96, 160)}}
FOREIGN_OPTIONS = {"--logdir"}  # of tensorboard


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    content: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, (re.findall(r'title="(.+?)"', rest) or [""])[0], text) for language, rest, text in found]


def lines(block: str) -> list[str]:
    """Return the commands of a bash block without comments."""
    every = (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in every if line and not line.startswith("#")]


def commands(page: Path) -> list[str]:
    """Return all commands of a page."""
    return [line for block in blocks(page) if block.language == "bash" for line in lines(block.content)]


def inline(page: Path) -> list[str]:
    """Return the inline code of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [code.replace("\\|", "|") for code in re.findall(r"`([^`\n]+)`", text)]


def shortened(command: str) -> list[str]:
    """Turn a documented ``python -m owl`` command into arguments that take seconds instead of minutes."""
    arguments = shlex.split(command)[3:]
    name = find_command(arguments)[0]
    if "--print_config" in arguments:
        return arguments
    if name == "fit" and "experiments/quickstart.yaml" in arguments:
        arguments += SHORTER["fit quickstart"]
    return [*arguments, *SHORTER.get("fit on" if "--trainer.max_steps" in arguments else name, ())]


def execute(command: str) -> None:
    """Run a command of a page in the current folder, or check it if it is of another program."""
    if not command.startswith("python -m owl "):
        return check(command)
    arguments = shortened(command)
    if "--audio" in arguments and not can_sound():  # then the command says what to install, as the page does
        arguments.remove("--audio")
    status = leave(arguments) if "--print_config" in arguments else owl_here(*arguments, cwd=Path.cwd())
    assert status == 0, command


def leave(arguments: list[str]) -> int:
    """Run a command that prints something and then exits on its own; return the exit status."""
    with pytest.raises(SystemExit) as exit_:
        owl_here(*arguments, cwd=Path.cwd())
    return int(exit_.value.code or 0)


def check(command: str) -> None:
    """Check a command of another program as far as that goes without running it."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), command
    elif words[0] == "tensorboard":
        assert words[1] == "--logdir", command
    elif words[:2] == ["apt-get", "install"]:
        assert words[2:] in (["libopenal1"], ["g++", "python3-dev"]), command
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"(?:owl-platform|\.)\[(\w+)\]", words[-1])
        assert extra, command
        assert f"\n{extra[1]} = [" in (REPOSITORY / "pyproject.toml").read_text(), command
    elif words[:3] == ["python", "-m", "owl"]:  # trains for long, on what other pages make: only the words are checked
        name = find_command(words[3:])[0]
        assert name in COMMANDS, command
        if name == "fit":
            with chdir(REPOSITORY):
                assert leave([*words[3:], "--print_config"]) == 0, command
    else:
        pytest.fail(f"no rule says how to check {command!r}")


@pytest.fixture
def in_this_process(recorded_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record and rerun here: a new process for each command takes long. tests/commands/test_rerun.py has one."""

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, owl_here(*command[3:], cwd=Path.cwd()))

    monkeypatch.setattr("owl.commands.rerun.subprocess", SimpleNamespace(run=run))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("page", EXECUTED)
def test_every_block_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("experiments", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    for block in blocks(REPOSITORY / page):
        if block.title:
            Path(block.title).write_text(block.content)
        elif block.language == "bash":
            for command in lines(block.content):
                execute(command)
        elif block.language == "python":
            exec(block.content, dict(NAMES.get(page, {})))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_checked(page: str) -> None:
    path = REPOSITORY / page
    if page in EXECUTED_ELSEWHERE:
        assert path.name in (REPOSITORY / EXECUTED_ELSEWHERE[page]).read_text()
    elif page not in EXECUTED:
        for command in commands(path):
            check(command)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_exist(page: str) -> None:
    for code in inline(REPOSITORY / page):
        words = code.split()
        if words[0] in ("make", "tensorboard", "pip", "apt-get"):
            if len(words) > 1:
                check(code)
        elif words[:3] == ["python", "-m", "owl"] and len(words) > 3 and words[3][0] not in "-C":
            for name in words[3].split("|") if words[3] != "data" else [f"data {n}" for n in words[4].split("|")]:
                assert name in COMMANDS, code
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            script = (REPOSITORY / f"{words[2].replace('.', '/')}.py").read_text()
            assert all(f'"{option}"' in script for option in words[3:] if option[:2] == "--"), code


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command, as --help lists them."""
    text = StringIO()
    with redirect_stdout(text):
        for name in COMMANDS:
            leave([*name.split(), "--help"])
        leave(["fit", "--data.help", "owl.data.datamodule.ShardDataModule"])
    return {"--debug", "--trust", *re.findall(r"--[\w.]+", text.getvalue())}


def test_options_within_sentences_exist(options: set[str]) -> None:
    for page in PAGES:
        for code in inline(REPOSITORY / page):
            for option in re.findall(r"(?<![\w-])--[\w.]+", code) if "benchmarks." not in code else ():
                known = option in options | FOREIGN_OPTIONS or ".init_args." in option  # these are run
                assert known, f"{page} names {option}, which no command has"


def test_the_configuration_reference_is_true_and_complete(options: set[str]) -> None:
    page = (DOCS / "reference" / "configuration.md").read_text()
    documented = []
    for row in re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE):
        keys = re.findall(r"`([\w.]+)`", row)
        documented += [keys[0].partition(".")[0] + key if key[0] == "." else key for key in keys]
    assert documented
    assert {f"--{key}" for key in documented} <= options
    for experiment in sorted((REPOSITORY / "experiments").glob("*.yaml")):
        for key, value in yaml.safe_load(experiment.read_text()).items():
            leaves = [f"{key}.{leaf}" for leaf in value] if key in ("ema", "checkpoint", "media") else [key]
            assert set(leaves) <= set(documented), f"{experiment.name} uses keys that are not documented"


def test_the_settings_of_the_how_to_page_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of ways to be faster: each row alone, on the quickstart."""
    page = (DOCS / "how-to" / "experiments.md").read_text()
    settings = re.findall(r"^\| [^|]+ \| `([\w.]+): (.+?)`", page, re.MULTILINE)
    assert len(settings) >= 5
    for key, value in settings:
        experiment = REPOSITORY / "experiments" / "quickstart.yaml"
        assert leave(["fit", "--config", str(experiment), f"--{key}={value}", "--print_config"]) == 0
    assert "owl.optim.MuonAdamW" in capsys.readouterr().out


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    path = REPOSITORY / page
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text()):
        if "://" in target:
            continue
        goal = path.parent / target if target else path
        assert goal.exists(), f"{page} links to {target}, which does not exist"
        assert not anchor or anchor in headings(goal), f"{page} links to {target}#{anchor}, which does not exist"


def test_every_picture_is_shown_and_small() -> None:
    shown = "".join((REPOSITORY / page).read_text() for page in PAGES)
    for picture in (DOCS / "images").iterdir():
        assert f"images/{picture.name}" in shown
        assert picture.stat().st_size < 200_000, picture.name


def pages_of(navigation: list | dict | str) -> Iterator[str]:
    """Yield the pages that a part of mkdocs' navigation names."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for part in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from pages_of(part)


def test_the_navigation_names_every_page_once() -> None:
    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(navigation)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_api_reference_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert names
    for name in names:
        assert pkgutil.resolve_name(name).__doc__, name
