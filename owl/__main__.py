"""``python -m owl``: help and dispatch, without importing heavy packages."""

import gc
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from itertools import takewhile
from types import ModuleType
from typing import Any, get_origin

from owl.errors import OwlError, suggestion
from owl.process import prepare_process
from owl.trust import trust

COMMANDS = {
    "fit": "train a recipe: python -m owl fit --config experiments/quickstart.yaml",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "run a checkpoint on the test split and write its output",
    "sweep": "search the settings of an experiment in parallel; report the best one and their importance",
    "rollout": "roll out a world model with recorded controls; measure quality, action accuracy, drift and speed",
    "play": "play a world model, or the real game, in a browser",
    "replay": "play an action log again and compare every frame with the recorded one",
    "compare": "show decoders of the same latents side by side on held-out clips: quality, flicker and speed",
    "submit": "run an experiment as a job of a SLURM cluster: --nodes 2 --gpus_per_node 8",
    "bench": "measure how fast an experiment trains or a network runs; predict it for other devices",
    "rerun": "repeat a run from its folder and check that the result is the same",
    "data record": "record a real game (ViZDoom): frames, depth, flow, sound and controls",
    "data import": "import your own footage: a folder of videos or of OWL Control recordings",
    "data encode": "encode a dataset's pictures, depth, flow or sound into latents of a trained autoencoder",
    "data annotate": "add controls, optical flow, depth or cameras to footage, computed from its frames",
    "data trajectories": "follow a world model from noise to each frame, for the regression of a few-step student",
    "data inspect": "summarise a dataset and draw its contact sheet",
    "data verify": "check every member of a dataset, rebuild a missing index",
    "export": "convert a checkpoint to safetensors + config.yaml, or to a folder that plays its world anywhere",
}
"""Every command with its description. A command of two words is a subcommand of a group."""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def overview(prefix: str = "") -> str:
    """Return the help text that lists every command starting with ``prefix``, one line each."""
    commands = {name: line for name, line in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, commands))
    lines = [f"usage: python -m owl {prefix}COMMAND [options]", ""]
    lines += [f"  {name:<{width}}  {line}" for name, line in commands.items()]
    lines += [
        "",
        "Each command explains its options with --help; --debug shows the full traceback of an error,",
        "--trust PACKAGE lets checkpoints name classes of your own package.",
    ]
    return "\n".join(lines)


def find_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Split a command line into the command's full name and the arguments that follow it.

    Raises:
        OwlError: The command does not exist; the message suggests the nearest one.
    """
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    words = 2 if arguments[0] in groups else 1
    command = " ".join(arguments[:words])
    if command in COMMANDS:
        return command, arguments[words:]
    meant = suggestion(command, COMMANDS)
    raise OwlError(
        "command.unknown", f"there is no command '{command}'{meant} (the commands are: {', '.join(COMMANDS)})"
    )


def is_list(annotation: Any) -> bool:
    """Return whether a parameter takes several words."""
    return get_origin(annotation) is list


def join_lists(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Join the words given to each list of a function into one YAML list: ``a.yaml b.ckpt --trials x y``."""
    parameters = {f"--{name}": parameter for name, parameter in inspect.signature(function).parameters.items()}
    lists = {option: p.annotation for option, p in parameters.items() if is_list(p.annotation)}
    if not lists:
        return arguments
    words, joined, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in lists:
            values = list(takewhile(lambda word: not word.startswith("--"), rest))
            rest = rest[len(values) :]
            text = json.dumps(values) if lists[argument] == list[str] else f"[{', '.join(values)}]"
            joined.append(f"{argument}={text}")
        elif (option := argument.partition("=")[0]) in lists and not argument.startswith(f"{option}=["):
            joined.append(f"{option}=[{argument.removeprefix(f'{option}=')}]")
        elif (argument in parameters or argument == "--config") and rest:
            joined.append(f"{argument}={rest.pop(0)}")  # in one word, so that the value can start with a dash
        elif argument.startswith("-"):
            joined.append(argument)
        else:
            words.append(argument)
    # words without an option belong to the list without a default, except for one for each parameter after it
    required = [p.annotation for p in parameters.values() if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    if words and list[str] in required:
        stop = len(words) - required[::-1].index(list[str])
        words = [json.dumps(words[:stop]), *words[stop:]]
    return [*words, *joined]


def underscored(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Replace dashes in a function's options by underscores: ``--dry-run`` becomes ``--dry_run``."""
    known = inspect.signature(function).parameters
    spelled = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        name = option[2:].replace("-", "_")
        spelled.append(f"--{name}{equals}{value}" if option.startswith("--") and name in known else argument)
    return spelled


def shorten_help(parser: Any, function: Callable[..., Any]) -> None:
    """Show lists as ``X ...`` in the help, and hide options that do not apply."""
    from argparse import SUPPRESS

    parameters = inspect.signature(function).parameters
    for action in parser._actions:
        if action.dest == "print_config" or (action.dest == "config" and "config" not in parameters):
            action.help = SUPPRESS
        elif action.dest in parameters and is_list(parameters[action.dest].annotation):
            action.metavar = "VALUE ..." if action.option_strings else f"{action.dest.upper().removesuffix('S')} ..."


def run_function(function: Callable[..., Any], arguments: list[str], command: str) -> int:
    """Call a command's function with its signature as the command line; an int it returns is the exit status."""
    from jsonargparse import ArgumentError, auto_parser

    from owl.cli.arguments import config_files, gather_options
    from owl.cli.mistakes import explain

    arguments = underscored(function, arguments)
    if "options" in inspect.signature(function).parameters:
        if "config" not in inspect.signature(function).parameters and (files := config_files(arguments)):
            raise OwlError("arguments.no-config", f"--config is no option of this command; give {files[0]} without it")
        arguments = gather_options(arguments)
    # `--depth` alone means true; jsonargparse requires a value after every boolean option.
    switches = {
        f"--{name}"
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is bool
    }
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if argument in switches and following.lower() not in ("true", "false", "yes", "no"):
            arguments[position] = f"{argument}=true"
    arguments = join_lists(function, arguments)
    parser_arguments: dict[str, Any] = {"prog": f"python -m owl {command}", "exit_on_error": False}
    parser = auto_parser(function, as_positional=True, **parser_arguments)
    shorten_help(parser, function)
    try:
        given = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise explain(error, arguments, parser) from error
    if "config" not in inspect.signature(function).parameters:
        given.pop("config", None)  # added by jsonargparse, for a file with all arguments
    result = function(**given)
    return result if isinstance(result, int) else 0


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if any(name.startswith(f"{arguments[0]} ") for name in COMMANDS) and (
        len(arguments) == 1 or arguments[1] in ("-h", "--help")
    ):
        print(overview(f"{arguments[0]} "))
        return 0
    command, rest = find_command(arguments)
    if command in TRAINER_COMMANDS:
        status: int = imported("owl.cli.lightning").main([command, *rest])
        return status
    return run_function(imported(f"owl.commands.{command.replace(' ', '_')}").main, rest, command)


def imported(name: str) -> ModuleType:
    """Import a module. Nearly all objects that imports create stay, so garbage is not collected meanwhile."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def take_trust(arguments: list[str]) -> None:
    """Remove every ``--trust PACKAGE`` from a command line and trust these packages.

    Raises:
        OwlError: No package follows.
    """
    while found := next((a for a in arguments if a == "--trust" or a.startswith("--trust=")), None):
        at = arguments.index(found)
        package = found.partition("=")[2] if "=" in found else "".join(arguments[at + 1 : at + 2])
        if not all(part.isidentifier() for part in package.split(".")):
            raise OwlError("arguments.missing-value", "--trust names no package; add one, as in --trust mypackage")
        trust(package)
        del arguments[at : at + (1 if "=" in found else 2)]


def main() -> None:
    """Entry point: an `owl.errors.OwlError` becomes one line and exit status 2."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    prepare_process()
    sys.path.insert(0, os.getcwd())  # so that a class_path can name a module in the current folder
    try:
        take_trust(sys.argv)
        status = run(sys.argv[1:])
    except OwlError as error:
        if debug:
            raise
        print(f"owl: error: {' '.join(str(error).split())} [{error.code}]", file=sys.stderr)
        status = 2
    except OSError as error:  # a full disk, an unwritable folder, a folder instead of a file
        if debug or error.filename is None:
            raise
        print(f"owl: error: {error.filename}: {error.strerror}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("owl: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
