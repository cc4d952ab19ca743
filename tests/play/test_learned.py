"""A learned world: settings change while it is played, and an action log gives the same frames bit for bit."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch

from owl import models
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder
from owl.play import protocol
from owl.play.learned import LearnedWorld, Sources
from owl.play.log import Action, ActionLog, digest
from owl.play.replay import make_world, replay
from owl.play.world import Settings
from tests.helpers.errors import refused
from tests.helpers.play import Client
from tests.helpers.shards import BUTTONS
from tests.helpers.tiny import owl_here
from tests.helpers.world import AUTOENCODER, INVERSE_DYNAMICS, LATENTS, WORLD_MODEL, stir
from tests.helpers.world import make_world as make_lab

RUN = "runs/world_model_quickstart"
IDLE = np.zeros(len(BUTTONS), bool)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a world model whose frames depend on everything, and a second decoder in ``other``."""
    folder = make_lab(tmp_path_factory.mktemp("play"))
    stir(folder / WORLD_MODEL)
    network = models.load(folder / AUTOENCODER)
    assert isinstance(network, ImageAutoencoder)
    decoder = ImageDecoder.of(network)
    with torch.no_grad():
        for weights in decoder.parameters():
            weights.mul_(0.7)
    models.save(decoder, folder / "other")
    return folder


@pytest.fixture
def world(lab: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LearnedWorld]:
    """The world of the lab's run."""
    monkeypatch.chdir(lab)
    made = LearnedWorld(Sources(RUN, decoders=("runs/quickstart", "other")), steps=2)
    yield made
    made.close()


def axes(moved: float) -> np.ndarray:
    return np.array([moved, -moved], np.float32)


def test_the_page_learns_what_it_must_know(world: LearnedWorld) -> None:
    description = world.description
    assert (description.kind, description.name) == ("world model", "world_model_quickstart")
    assert description.buttons == BUTTONS
    assert list(description.axes) == ["mouse_x", "mouse_y"]
    assert all(full > 0 for full in description.axes.values())
    assert description.fps == 17.5  # of the stride that it was trained with
    assert description.size == (32, 48)
    assert {start.shape for start in description.starts} == {(32, 48, 3)}
    assert description.decoders == ["quickstart", "other"]
    json.dumps(description.origin)


def test_frames_depend_on_seed_start_controls_and_settings(world: LearnedWorld) -> None:
    def played(start: int = 0, seed: int = 0, moved: float = 1.0, **settings: object) -> str:
        world.reset(start, seed)
        world.change(replace(Settings(steps=2, decoder="quickstart"), **settings))  # type: ignore[arg-type]
        world.step(IDLE, axes(moved))
        return digest(world.step(IDLE, axes(moved)))

    different = [
        *(played(), played(start=1), played(seed=1), played(moved=2.0), played(steps=3)),
        *(played(guidance=1.7), played(context_noise=0.3), played(decoder="other")),
        *(played(shift=2.0), played(sampler="consistency")),
    ]
    assert len(set(different)) == len(different)
    assert played() == different[0]


def test_a_moment_comes_back_under_any_later_settings(world: LearnedWorld) -> None:
    """Also where guidance has started since, for which the cache has one more slot."""
    world.reset(0, 0)
    world.step(IDLE, axes(1))
    moment = world.snapshot()
    expected = [digest(world.step(IDLE, axes(n))) for n in range(3)]
    world.change(Settings(steps=3, guidance=2.0, decoder="other"))
    guided = world.snapshot()
    later = [digest(world.step(IDLE, axes(n))) for n in range(3)]
    world.restore(moment)
    assert world.settings.guidance == 1
    assert [digest(world.step(IDLE, axes(n))) for n in range(3)] == expected
    world.restore(guided)
    assert [digest(world.step(IDLE, axes(n))) for n in range(3)] == later
    assert world.snapshot_bytes() > 0


def test_a_log_gives_the_same_frames_in_another_world_and_folder(
    world: LearnedWorld, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.reset(1, 5)
    actions = []
    for number in range(12):
        if number == 4:
            world.change(Settings(steps=1, guidance=1.5, context_noise=0.1, decoder="other"))
        if number == 8:
            world.change(Settings(steps=2, decoder="quickstart"))
        buttons, moved = np.arange(len(BUTTONS)) == number % 4, axes(number / 3)
        actions.append(Action(buttons, moved, world.settings, digest(world.step(buttons, moved))))
    description = world.description
    ActionLog(description.origin, BUTTONS, list(description.axes), 1, 5, actions).save(tmp_path / "log.jsonl")
    monkeypatch.chdir(tmp_path)
    assert owl_here("replay", "log.jsonl", "--out", "film.mp4", cwd=tmp_path) == 0
    assert (tmp_path / "film.mp4").stat().st_size > 0

    log = ActionLog.load("log.jsonl")
    again = make_world(log, checkpoint=[str(lab / WORLD_MODEL)], decoder=[str(lab / AUTOENCODER), str(lab / "other")])
    assert all(frame.same for frame in replay(log, again))
    with refused("actions.other-weights", models.fingerprint(models.load(lab / "other"))):
        make_world(log, decoder=[str(lab / "other"), str(lab / AUTOENCODER)])
    log.origin.pop("fingerprints")
    with refused("actions.origin", "fingerprints"):
        make_world(log)


def test_another_frame_is_reported(world: LearnedWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.reset(0, 0)
    action = Action(IDLE, axes(1), world.settings, digest(world.step(IDLE, axes(1))))
    log = ActionLog(world.description.origin, BUTTONS, list(world.description.axes), 0, 0, [action, action])
    log.save(tmp_path / "log.jsonl")
    assert owl_here("replay", tmp_path / "log.jsonl", cwd=tmp_path) == 1
    assert "1 of 2 frames differ, the first is frame 2" in capsys.readouterr().out
    replace(log, actions=[]).save(tmp_path / "empty.jsonl")
    with refused("actions.empty", "empty.jsonl", "film.mp4"):
        owl_here("replay", tmp_path / "empty.jsonl", "--out", "film.mp4", cwd=tmp_path)
    assert not (tmp_path / "film.mp4").exists()


def test_what_does_not_fit_is_reported(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    with refused("play.decoder", "another", "quickstart"):
        LearnedWorld(Sources(RUN), decoder="another")
    with refused("checkpoint.missing", "nowhere"):
        LearnedWorld(Sources("nowhere"))
    with refused("network.kind", "ImageAutoencoder", "a world model"):
        LearnedWorld(Sources(AUTOENCODER))
    models.save(models.load(WORLD_MODEL), "exported")
    with refused("world.data", "exported", "--data"):
        LearnedWorld(Sources("exported"))
    exported = LearnedWorld(Sources("exported", data=LATENTS, stride=2))
    assert exported.description.fps == 17.5


def test_the_command_serves_until_it_is_stopped(lab: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As it is typed; a person connects, plays and records, and the log is played again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reported: list[BaseException | str] = []

    async def visit() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    url = f"http://127.0.0.1:{port}/play"
                    connection = await session.ws_connect(url, protocols=[protocol.SUBPROTOCOL])
                    break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)
            client = Client(connection)
            for name, fields in (("play", {}), ("settings", {"steps": 1}), ("record", {"on": True}), ("resume", {})):
                await client.command(name, **fields)
            await client.hold(True, *[False] * (len(BUTTONS) - 1), moved=[0.5, 0.5])
            await client.command("meters", on=True)
            await client.until(lambda c: c.frames and c.frames[-1][0] >= 5)
            assert set(client.frames[-1][2]) == set(protocol.PARTS)
            assert client.frames[-1][2]["decode"] > 0
            await client.until(lambda c: c.meters)
            ((measured,),) = client.meters
            assert 0 <= measured["agreement"] <= 1
            assert BUTTONS[0] in measured["controls"]
            assert measured["drift"] is None  # of one episode
            await client.command("record", on=False)
            await client.until(lambda c: c.state.get("recordings"))
            reported.extend(client.state["recordings"])
            await connection.close()

    def person() -> None:
        try:
            asyncio.run(asyncio.wait_for(visit(), 60))
        except BaseException as error:
            reported.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=person)
    thread.start()
    reader = ("--inverse_dynamics", str(Path(INVERSE_DYNAMICS).parents[1]))
    assert owl_here("play", RUN, "--port", str(port), "--browser", "false", *reader, cwd=lab) == 0
    thread.join()
    assert len(reported) == 2, reported
    assert f"Play world_model_quickstart at http://127.0.0.1:{port}/" in capfd.readouterr().out
    log = next(str(name) for name in reported if str(name).endswith(".jsonl"))
    assert owl_here("replay", f"played/{log}", cwd=lab) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "tokens"),
    [
        (("--game", "deathmatch", "--steps", "2"), "play.game", ["--steps"]),
        (("--game", "deathmatch", "basic"), "play.game", ["deathmatch, basic"]),
        ((RUN, "--size", "96x160"), "play.game", ["--size 96x160"]),
        (("--game", "deathmatch", "--size", "96"), "arguments.size", ["96", "96x160"]),
        ((RUN, "--steps", "0"), "sampling.settings", ["steps is 0"]),
        ((RUN, "--shift", "0"), "sampling.settings", ["shift is 0"]),
        ((RUN, "--port", "0", "--seed", "-1"), "arguments.seed", ["seed is -1", f"0 to {2**32 - 1}"]),
        (("--game", "deathmatch", "--port", "0", "--seed", str(2**32)), "arguments.seed", [f"seed is {2**32}"]),
        ((RUN, "--host", "192.0.2.1"), "play.address", ["192.0.2.1:8420"]),
        ((RUN, "--port", "70000"), "play.address", ["127.0.0.1:70000", "0-65535"]),
        ((RUN, "--host", "a" * 70), "play.address", ["aaa"]),
        ((RUN, "--stride", "0"), "arguments.too-small", ["stride is 0"]),
        ((RUN, "--inverse_dynamics", RUN), "network.kind", ["WorldTransformer", "does not read controls"]),
        (("--game", "deathmatch", "--inverse_dynamics", RUN), "play.game", ["--inverse_dynamics"]),
    ],
)
def test_what_cannot_be_played_is_reported(lab: Path, arguments: tuple[str, ...], code: str, tokens: list[str]) -> None:
    with refused(code, *tokens):
        owl_here("play", *arguments, "--browser", "false", cwd=lab)
