"""Default optimisers of recipes are readable by the command line, so that any other argument can be given there."""

import inspect
import pkgutil
from importlib import import_module

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule

import owl.recipes

RECIPES = {
    name: member
    for module in pkgutil.iter_modules(owl.recipes.__path__)
    for name, member in vars(import_module(f"owl.recipes.{module.name}")).items()
    if inspect.isclass(member)
    and issubclass(member, LightningModule)
    and "__init__" in vars(member)
    and member.training_step is not LightningModule.training_step
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_default_optimizer_is_a_class_with_arguments_or_has_a_name(name: str) -> None:
    """Of a lambda, jsonargparse reads constants only: with a tuple of betas, every option of the recipe is an error."""
    parser = ArgumentParser()
    parser.add_class_arguments(RECIPES[name], "recipe")
    defaults = parser.get_defaults().recipe
    optimizers = [key for key in vars(defaults) if key.endswith("optimizer")]
    assert optimizers
    for key in optimizers:
        default = defaults[key]
        assert default.__name__ != "<lambda>" if callable(default) else default.class_path
