"""Private names of jsonargparse, and others that are not documented."""

from jsonargparse import ArgumentParser

from owl.data.datamodule import ShardDataModule
from tests.contracts.contract import contract


@contract("_typehint", needed_by="owl/cli/mistakes.py: what a value was expected to be")
def test_an_argument_knows_its_type() -> None:
    parser = ArgumentParser()
    assert parser.add_argument("--size", type=int | None)._typehint == int | None


@contract("_extra_required_keys", needed_by="owl/cli/mistakes.py: which arguments were not given")
def test_a_parser_knows_which_objects_it_cannot_do_without() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(ShardDataModule, "data", required=True)
    assert parser._extra_required_keys == {"data"}


@contract("groups", needed_by="owl/cli/lightning.py: the sections that a configuration may have")
def test_a_parser_knows_its_sections() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ShardDataModule, "data")
    assert list(parser.groups or ()) == ["data"]
