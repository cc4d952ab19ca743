"""A term of the loss is added in two places: docs/how-to/add-a-loss.md is followed in a copy of owl."""

import json
import shutil
from pathlib import Path

from tests.data.modalities.test_page import change, follow
from tests.helpers.shards import make_dataset
from tests.helpers.tiny import REPOSITORY, tiny_experiment, write_config
from tests.test_docs import blocks, commands

PAGE = REPOSITORY / "docs" / "how-to" / "add-a-loss.md"


def test_the_page_adds_a_term(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "owl", tmp_path / "owl", ignore=shutil.ignore_patterns("__pycache__"))
    properties = []
    for block in blocks(PAGE):
        if block.language == "diff":
            change(tmp_path / block.title, block.content)
        elif block.title:
            (tmp_path / block.title).write_text(block.content)
        elif block.language == "python":
            properties.append(("python", block.content))
    data = make_dataset(tmp_path / "data", episodes=4, frames=6, size=(32, 48), modalities=("rgb",))
    write_config(tmp_path / "tiny.yaml", tiny_experiment(data, max_steps=1))
    (command,) = commands(PAGE)
    fit = ["fit", "--config", "tiny.yaml", "--name", "edges", *command.split()[-2:]]
    assert properties
    follow([*properties, ("command", fit)], tmp_path)
    assert json.loads((tmp_path / "runs" / "edges" / "metrics.json").read_text())["train/edges"] > 0
