"""Every string survives config.yaml, whichever loader reads it, and a file that is no configuration is refused."""

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, get_loader, set_dumper
from omegaconf import OmegaConf

from owl.configuration import check_file, dump
from tests.helpers.errors import refused

LOOK_LIKE_OTHERS = (
    *("1e-3", "1e5", ".5", "1_000", "0x10", "0o17", "017", "+1", "-1", "1:30", "00:00:10:00", "1.e3", "123"),
    *("null", "~", "true", "yes", "on", "n", "No", ".inf", "nan", ".NaN", "Infinity", "2026-01-01", "=", "<<"),
    *(
        "",
        "-",
        "[a]",
        "{a: b}",
        "a: b",
        "a #b",
        "#x",
        "&a",
        "*a",
        "!x",
        "%a",
        "@a",
        " x",
        "x ",
        "a\nb",
        "\x85",
        "|",
        "'",
    ),
)
strings = st.one_of(st.sampled_from(LOOK_LIKE_OTHERS), st.text(), st.from_regex(r"[-+.0-9_eExo:]{1,9}", fullmatch=True))


@given(strings)
def test_every_loader_reads_back_what_was_written(text: str) -> None:
    content = {"a": text, "b": [text, {text: 1e-3}]}
    written = dump(content)
    assert yaml.safe_load(written) == content
    assert get_loader("yaml")(written) == content
    if "${" not in text:
        assert OmegaConf.to_container(OmegaConf.create(written)) == content


@given(strings.filter(lambda text: "${" not in text))
@example("1e-3")
@example("null")
def test_a_parser_reads_back_its_own_dump(text: str) -> None:
    """As fit does; "${" starts a reference, in a string too."""
    set_dumper("yaml", dump)
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--name", type=str)
    parser.add_argument("--names", type=list[str])
    # where one value refers to another, all are dumped and read once more before anything else
    parser.add_argument("--other", type=str, default="${name}")
    given = parser.parse_object({"name": text, "names": [text]})
    assert (given.name, given.names, given.other) == (text, [text], text)
    assert parser.parse_string(parser.dump(given)) == given


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "arguments.empty-file"),
        (b"# only\n# comments\n", "arguments.empty-file"),
        (b"---\n", "arguments.empty-file"),
        (b"trainer:\n", "arguments.empty-file"),
        (b"- a\n- b\n", "arguments.no-mapping"),
        (b"just a string\n", "arguments.no-mapping"),
        (b"42\n", "arguments.no-mapping"),
        (b"trainer: {max_steps: 3}\ntrainer: {max_epochs: 2}\n", "arguments.duplicate-key"),
        (b"model:\n  init_args:\n  - lr: 1\n    lr: 2\n", "arguments.duplicate-key"),
        (b"trainer:\n\tmax_steps: 3\n", "arguments.not-yaml"),
        (b"a: 1\n---\nb: 2\n", "arguments.not-yaml"),
        (b"a: [1\n", "arguments.not-yaml"),
        (b"a: *b\n", "arguments.not-yaml"),
        (b'runs: "caf\xe9"\n', "arguments.not-yaml"),
        (b"\xff\xfea\x00", "arguments.not-yaml"),
    ],
)
def test_a_file_that_is_no_configuration_is_reported(tmp_path: Path, content: bytes, code: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content)
    with refused(code, str(file)):
        check_file(str(file))


@pytest.mark.parametrize(
    ("content", "found"), [("3", "'3'"), ("3.5", "'3.5'"), ("true", "'true'"), ("[1, 2]", "a list"), ("", "no value")]
)
def test_a_section_without_keys_is_reported(tmp_path: Path, content: str, found: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"name: first\ntrainer: {content}\n")
    with refused("arguments.no-mapping", str(file), "'trainer'", found):
        check_file(str(file), ["trainer"])
    check_file(str(file), ["model"])
    file.write_text("trainer: another.yaml\nmodel: &x {a: 1}\ndata: *x\n")
    check_file(str(file), ["trainer", "model", "data"])


def test_what_is_wrong_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("trainer:\n\tmax_steps: 3\n")
    with refused("arguments.not-yaml", "line 2, column 1", "tab"):
        check_file(str(file))
    file.write_text("a: 1\nb: 2\na: 3\n")
    with refused("arguments.duplicate-key", "'a'", "lines 1 and 3"):
        check_file(str(file))


def test_valid_files_pass(tmp_path: Path) -> None:
    file = tmp_path / "right.yaml"
    file.write_text("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: null\nb: [{b: 1}, {b: 2}]\n")
    check_file(str(file))
    check_file(str(tmp_path / "none.yaml"))  # the parser says that better
