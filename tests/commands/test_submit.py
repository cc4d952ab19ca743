"""Jobs of a cluster: the script says what was asked for, and queues itself again only when time ran out."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from owl.commands import submit
from tests.commands.conftest import place
from tests.helpers.errors import refused
from tests.helpers.tiny import REPOSITORY, owl_here
from tests.test_docs import blocks, lines

EXPERIMENT = "experiments/quickstart.yaml"


def written(cluster: Path, *arguments: str) -> str:
    assert owl_here("submit", "--config", EXPERIMENT, *arguments, cwd=cluster) == 0
    return (cluster / "runs" / "quickstart" / "submit.sh").read_text()


def test_the_script_requests_the_given_resources(cluster: Path) -> None:
    script = written(
        cluster,
        *("--nodes", "2", "--gpus_per_node", "8", "--time", "1-00:00:00", "--setup", "module load cuda"),
        *("--sbatch", "partition=gpu", "cpus-per-task=3", "exclusive", "--trainer.max_steps", "500"),
    )
    directives = re.findall(r"^#SBATCH --(.+)$", script, re.MULTILINE)
    assert {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "requeue", "signal=USR1@120"} <= set(directives)
    assert {"time=1-00:00:00", "partition=gpu", "exclusive", "output=runs/quickstart/slurm-%j.log"} <= set(directives)
    assert [d for d in directives if d.startswith("cpus-per-task")] == ["cpus-per-task=3"]  # sbatch's own options win
    (line,) = re.findall(r"^srun .*$", script, re.MULTILINE)
    assert f"--config {EXPERIMENT} --name quickstart --runs runs --ckpt_path last" in line
    assert "--trainer.num_nodes 2 --trainer.devices 8 --trainer.accelerator gpu --trainer.max_steps=500" in line
    assert script.index("module load cuda") < script.index("srun")
    assert (cluster / "calls").read_text() == "sbatch runs/quickstart/submit.sh\n"


def test_what_a_shell_would_split_is_quoted(cluster: Path) -> None:
    name = 'my "50%" \\run # 1'
    options = ("--name", name, "--sbatch", "comment=two words", "partition=gpu")
    assert owl_here("submit", "--config", EXPERIMENT, *options, cwd=cluster) == 0
    script = (cluster / "runs" / name / "submit.sh").read_text()
    given = [shlex.split(line) for line in re.findall(r"^#SBATCH (.+)$", script, re.MULTILINE)]
    assert all(len(words) == 1 for words in given)  # sbatch reads quotation marks and backslashes as shells do
    directives = [words[0] for words in given]
    assert f"--job-name={name}" in directives
    assert "--output=runs/" + name.replace("%", "%%") + "/slurm-%j.log" in directives
    assert "--comment=two words" in directives
    assert "#SBATCH --partition=gpu\n" in script
    (line,) = re.findall(r"^srun .*$", script, re.MULTILINE)
    words = shlex.split(line)
    assert words[words.index("--name") + 1] == name


@pytest.mark.parametrize("arguments", [("--name", "a\nb"), ("--sbatch", "comment=a\nscancel")])
def test_a_line_break_cannot_be_smuggled_into_the_script(cluster: Path, arguments: tuple[str, ...]) -> None:
    with refused("slurm.line"):
        owl_here("submit", "--config", EXPERIMENT, *arguments, cwd=cluster)
    assert not (cluster / "calls").exists()


@pytest.mark.parametrize(("status", "queued"), [(0, False), (138, True), (143, False), (1, False)])
def test_a_job_queues_itself_again_when_its_time_ran_out_alone(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, status: int, queued: bool
) -> None:
    written(cluster, "--gpus_per_node", "0")
    (cluster / "calls").unlink()
    monkeypatch.setenv("SRUN_STATUS", str(status))
    assert subprocess.run(["bash", "runs/quickstart/submit.sh"]).returncode == status
    first, *others = (cluster / "calls").read_text().splitlines()
    assert first.startswith("srun ")
    assert "--trainer.devices 1 --trainer.accelerator cpu" in first
    assert others == (["scontrol requeue 7"] if queued else [])


def test_a_dry_run_writes_nothing(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert owl_here("submit", "--config", EXPERIMENT, "--gpus-per-node=3", "--dry-run", cwd=cluster) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=quickstart\n")
    assert "--ntasks-per-node=3\n" in script  # options may be spelled with dashes
    assert not (cluster / "runs").exists()
    assert not (cluster / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "tokens"),
    [
        (("--nodes", "0"), "arguments.too-small", ["nodes is 0", "at least 1"]),
        (("--time", "tomorrow"), "submit.time", ['"tomorrow"', "hours:minutes:seconds"]),
        (("--config", "nothing.yaml"), "submit.config", ["nothing.yaml", "--config"]),
    ],
)
def test_bad_input_is_reported(cluster: Path, arguments: tuple[str, ...], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        owl_here("submit", "--config", EXPERIMENT, *arguments, cwd=cluster)
    assert not (cluster / "calls").exists()


def test_what_sbatch_refuses_is_reported(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(cluster / "bin", "sbatch", "echo invalid partition >&2; exit 1")
    with refused("slurm.refused", "runs/quickstart/submit.sh", "invalid partition", "--sbatch"):
        owl_here("submit", "--config", EXPERIMENT, cwd=cluster)
    monkeypatch.setenv("PATH", "/nowhere")
    with refused("slurm.missing", "sbatch"):
        submit.main(config=[EXPERIMENT])


def test_the_commands_of_cluster_md(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "configs").symlink_to(REPOSITORY / "configs")
    page = blocks(REPOSITORY / "docs" / "how-to" / "cluster.md")
    commands = [shlex.split(c) for block in page if block.language == "bash" for c in lines(block.content)]
    given = [words[words.index("owl") + 1 :] for words in commands]
    assert [words[0] for words in given] == ["submit", "fit", "fit"]
    assert owl_here(*given[0], cwd=cluster) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    for words in given[1:]:  # for more GPUs than there are: read, not run
        with pytest.raises(SystemExit) as left:
            owl_here(*words, "--print_config", cwd=cluster)
        assert left.value.code == 0
    assert "  strategy: fsdp2\n" in capsys.readouterr().out


def test_the_job_of_other_clouds_trains_in_the_same_way() -> None:
    job = yaml.safe_load((REPOSITORY / "configs" / "cluster" / "skypilot.yaml").read_text())
    words = job["run"].replace("\\\n", " ").split()
    assert words[words.index("-m") : words.index("--config")] == ["-m", "owl", "fit"]
    assert words[words.index("--ckpt_path") + 1] == "last"
    assert (REPOSITORY / job["envs"]["EXPERIMENT"]).exists()
