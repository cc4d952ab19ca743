"""The lock file pins every package that pyproject.toml requires, to a release that it allows."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent


def test_the_lock_file_pins_what_is_required() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and pin.url is None and not pin.extras for pin in pins)
    assert all(
        specifier.operator == "==" and "+" not in specifier.version for pin in pins for specifier in pin.specifier
    )
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for required in (Requirement(text) for group in groups for text in group):
        name = canonicalize_name(required.name)
        if name != project["name"]:
            assert name in versions, f"constraints.txt does not pin {name}; run `make lock`"
            assert required.specifier.contains(versions[name]), (
                f"constraints.txt pins {name} to {versions[name]}, {required}"
            )
