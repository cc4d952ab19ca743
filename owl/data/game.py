"""Episodes of a real game, ViZDoom with the free Freedoom assets, played by a random policy or a person.

Timing: the controls of frame t are those of the tic from frame t-1 to frame t; the sound of frame t is that of the same
tic. The first frame of an episode has idle controls. Every tic (1/35 s) is a frame.
"""

import contextlib
import ctypes
import itertools
import os
import re
import struct
import tempfile
from collections.abc import Collection, Generator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil

from owl.data.screen import find_resolution, fit, load_vizdoom
from owl.errors import OwlError, suggestion

FPS = 35.0
SAMPLE_RATE = 44_100
CHANNELS = 2
BUTTONS = ("ATTACK", "MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT")
AXES = ("mouse_x",)  # degrees turned in the tic, positive to the right (ViZDoom's TURN_LEFT_RIGHT_DELTA)
POSITION = ("POSITION_X", "POSITION_Y")  # the player's, as variables of the game

Buffer = Literal["depth", "labels", "automap", "audio"]
"""What the game can show beside the screen."""


@dataclass(frozen=True)
class Frame:
    """The game after one tic.

    Attributes:
        rgb: uint8[H, W, 3].
        buttons: float32[5], 1 for held buttons of ``BUTTONS``.
        axes: float32[1], degrees turned to the right.
        cut: Whether the frame does not continue its predecessor: the first frame of an episode, and the first frame
            after the scenario ended (its goal was reached) and restarted. Its controls are idle.
        state: ViZDoom's ``GameState``, a copy, with the requested buffers at the size of the screen.
        variables: The requested variables of the game by name.
    """

    rgb: np.ndarray
    buttons: np.ndarray
    axes: np.ndarray
    cut: bool
    state: Any
    variables: dict[str, float]


class Policy(Protocol):
    """Chooses the controls of a game: a random policy, a recording, or a person."""

    def act(self, x: float, y: float) -> np.ndarray:
        """Return the controls of the next tic, float64[5 + 1] in the order of ``BUTTONS`` and ``AXES``.

        Args:
            x: Position of the player, in map units.
            y: The same.
        """


def idle() -> np.ndarray:
    """Return controls with no button held and no turn."""
    return np.zeros(len(BUTTONS) + len(AXES))


def find_scenario(name: str) -> tuple[Path, str | None]:
    """Return the .cfg file of a scenario and the map to play, None for the map in the file.

    Args:
        name: A scenario of ViZDoom, such as "deathmatch", optionally with a map, such as "freedoom2:MAP07"; or the path
            of a .cfg file.

    Raises:
        OwlError: ViZDoom is not installed, the scenario or the map does not exist, or it needs other players or the
            commercial game.
    """
    if name.endswith(".cfg"):
        if not Path(name).is_file():
            raise OwlError(
                "game.scenario",
                f"there is no scenario file {name}; give the path of a ViZDoom .cfg or a scenario's name",
            )
        return Path(name).resolve(), None
    name, _, wanted = name.partition(":")
    folder = Path(load_vizdoom().scenarios_path)
    wads = {path.stem: _find_wad(path) for path in sorted(folder.glob("*.cfg"))}
    maps = {scenario: _read_maps(wad) for scenario, wad in wads.items() if wad.exists()}
    known = [scenario for scenario, starts in maps.items() if next(iter(starts.values()))]
    if name not in known:
        meant = suggestion(name, known) or "; choose another"
        raise OwlError("game.scenario", f"there is no scenario '{name}'{meant} (the scenarios are: {', '.join(known)})")
    playable = [level for level, can_start in maps[name].items() if can_start]
    if wanted and wanted.upper() not in playable:
        raise OwlError(
            "game.map",
            f"scenario {name} has no map {wanted}; write {name}:MAP with one of its maps ({', '.join(playable)})",
        )
    return folder / f"{name}.cfg", wanted.upper() or None


def installed_version() -> str:
    """Return the version of ViZDoom.

    Raises:
        OwlError: It is not installed.
    """
    load_vizdoom()
    return metadata.version("vizdoom")


def check_size(size: tuple[int, int]) -> None:
    """Check that the game can draw pictures of (H, W).

    Raises:
        OwlError: The size is larger than the largest screen.
    """
    find_resolution(size)


def check_audio() -> None:
    """Check that OpenAL is installed: without it the game silently returns zeros as sound.

    Raises:
        OwlError: The system library is missing.
    """
    try:
        ctypes.CDLL("libopenal.so.1")
    except OSError as error:
        raise OwlError(
            "game.sound",
            f"the game's sound needs the system library libopenal.so.1 ({error}); "
            "install it with `apt-get install libopenal1`, or leave the sound out",
        ) from error


def play(
    scenario: str,
    frames: int,
    size: tuple[int, int] = (96, 160),
    seed: int = 0,
    buffers: Collection[Buffer] = (),
    variables: Collection[str] = (),
    policy: Policy | None = None,
) -> Generator[Frame, None, None]:
    """Play one episode and yield its frames; equal arguments and controls give equal frames.

    The player cannot die, so footage is continuous, except if a scenario ends on its own and restarts.

    Args:
        scenario: As in `find_scenario`.
        frames: Length of the episode.
        size: (H, W). The game renders at its smallest resolution that covers it, twice where W is at most 320; the
            picture is cropped around its centre to the aspect and area-averaged.
        seed: Seed of the game and of the random policy.
        buffers: Buffers that ``Frame.state`` contains as well as the screen.
        variables: Names of ``vizdoom.GameVariable`` that ``Frame.variables`` contains.
        policy: Chooses the controls; called for those of a frame when that frame is requested. None: a random policy.

    Raises:
        OwlError: The scenario, the size or the sound library is not available, or the game stopped unexpectedly.
    """
    vizdoom = load_vizdoom()
    config, level = find_scenario(scenario)
    if "audio" in buffers:
        check_audio()
    names = tuple(dict.fromkeys((*POSITION, *variables)))
    player = policy or random_policy(seed)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="owl-game-"))
        try:
            game = _open_game(config, level, folder, size, _seeds(seed)[0], buffers, names)
            stack.callback(game.close)
            cut = True
            action = idle()
            for _ in range(frames):
                if game.is_episode_finished() or game.is_player_dead():
                    game.new_episode()
                    _begin(game)
                    cut, action = True, idle()
                state = game.get_state()
                values = dict(zip(names, state.game_variables.tolist(), strict=True))
                yield Frame(
                    rgb=fit(state.screen_buffer, size),
                    buttons=action[: len(BUTTONS)].astype(np.float32),
                    axes=action[len(BUTTONS) :].astype(np.float32),
                    cut=cut,
                    state=state,
                    variables=values,
                )
                action = player.act(*(values[name] for name in POSITION))
                game.make_action(action.tolist())
                cut = False
        except vizdoom.FileDoesNotExistException as error:
            raise OwlError(
                "game.start", f"scenario {scenario} cannot start ({error}); put the file there or correct the .cfg"
            ) from error
        except (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException) as error:
            raise OwlError(
                "game.stopped", f"the game stopped while playing {scenario} ({error}); run the same command again"
            ) from error


def random_policy(seed: int) -> Policy:
    """Return the random policy that plays an episode of `play` with this seed."""
    return _StickyPolicy(np.random.default_rng(_seeds(seed)[1]))


def end_games(folder: str) -> None:
    """Kill the game processes whose scratch files are in a folder, and free the shared memory of killed games.

    A game does not exit when its parent process is killed: it waits for the next action forever.
    """
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "+viz_instance_id" in command and any(argument.startswith(folder) for argument in command):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            for memory in Path("/dev/shm").glob(f"ViZDoom*{command[command.index('+viz_instance_id') + 1]}"):
                memory.unlink(missing_ok=True)


class _StickyPolicy:
    """A random policy that holds each action for a third of a second to a second and turns away from walls.

    The speed of a turn is constant, so that it can be inferred from the pictures.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._hold = 0
        self._action = idle()
        self._positions: list[tuple[float, float]] = []

    def act(self, x: float, y: float) -> np.ndarray:
        """Return the controls of the next tic for a player at (x, y), in map units."""
        self._positions = [*self._positions[-7:], (x, y)]
        if self._hold == 0:
            self._decide()
        elif self._is_blocked():
            self._turn_away()
        self._hold -= 1
        return self._action

    def _decide(self) -> None:
        rng = self._rng
        self._hold = int(rng.integers(10, 36))
        self._positions.clear()  # standing still while turning does not indicate a wall
        turn = rng.choice([-1, 0, 1], p=[0.3, 0.4, 0.3]) * rng.uniform(2, 6)
        walk, side = rng.random(2)
        self._action = np.array(
            [rng.random() < 0.06, walk < 0.8, walk > 0.95, side < 0.08, side > 0.92, turn], np.float64
        )

    def _is_blocked(self) -> bool:
        """Return whether walking (about 10 units per tic at full speed) has not moved the player for eight tics."""
        if not self._action[1:3].any() or len(self._positions) < 8:
            return False
        first, last = np.array(self._positions[0]), np.array(self._positions[-1])
        return bool(np.abs(last - first).max() < 8)

    def _turn_away(self) -> None:
        self._positions.clear()
        self._hold = int(self._rng.integers(15, 30))
        self._action = idle()
        self._action[-1] = self._rng.choice([-1, 1]) * self._rng.uniform(4, 7)


def _seeds(seed: int) -> tuple[int, int]:
    """Return the seeds of the game and of the random policy."""
    game_seed, policy_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    return game_seed, policy_seed


def _find_wad(config: Path) -> Path:
    """Return the file with the maps of a scenario of ViZDoom."""
    lines = [line.partition("=") for line in config.read_text("utf-8").splitlines()]
    settings = {key.strip().lower(): value.strip() for key, _, value in lines}
    if scenario := settings.get("doom_scenario_path"):
        return config.parent / scenario
    return config.parent.parent / settings.get("doom_game_path", "freedoom2.wad")


def _read_maps(wad: Path) -> dict[str, bool]:
    """Return the maps of a WAD file, and whether each has a single-player start; without one the game crashes."""
    maps = {}
    with open(wad, "rb") as file:
        _, count, directory = struct.unpack("<4sii", file.read(12))
        file.seek(directory)
        lumps = [struct.unpack("<ii8s", file.read(16)) for _ in range(count)]
        for (_, _, name), (begin, size, kind) in itertools.pairwise(lumps):  # a map's name, then what is in it
            kind = kind.rstrip(b"\0")
            if kind not in (b"THINGS", b"TEXTMAP"):
                continue
            file.seek(begin)
            content = file.read(size)
            if kind == b"THINGS":  # x, y, angle, type, flags
                can_start = 1 in np.frombuffer(content, "<i2").reshape(-1, 5)[:, 3]
            else:
                can_start = re.search(rb"\btype\s*=\s*1\s*;", content) is not None
            maps[name.rstrip(b"\0").decode()] = can_start
    return maps


def _open_game(
    config: Path,
    level: str | None,
    folder: str,
    size: tuple[int, int],
    seed: int,
    buffers: Collection[Buffer],
    variables: Collection[str],
) -> Any:
    vizdoom = load_vizdoom()
    game = vizdoom.DoomGame()
    game.load_config(str(config))
    if level:
        game.set_doom_map(level)
    game.set_screen_resolution(find_resolution(size))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled("depth" in buffers)
    game.set_labels_buffer_enabled("labels" in buffers)
    game.set_automap_buffer_enabled("automap" in buffers)
    game.set_audio_buffer_enabled("audio" in buffers)
    if "audio" in buffers:
        game.set_audio_sampling_rate(vizdoom.SamplingRate.SR_44100)
        game.set_audio_buffer_size(1)
        game.add_game_args("+snd_efx 0")  # reverberation trips an assertion of OpenAL 1.19 and kills the game
        # the sound goes into the buffer, never to a device: without this OpenAL talks to a sound server
        os.environ.setdefault("ALSOFT_DRIVERS", "null")
    for switch in (game.set_render_hud, game.set_render_crosshair, game.set_render_messages, game.set_window_visible):
        switch(False)
    game.set_render_screen_flashes(False)
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in (*BUTTONS, "TURN_LEFT_RIGHT_DELTA")])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in variables])
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_seed(seed)
    game.set_episode_timeout(0)
    game.set_episode_start_time(max(1, game.get_episode_start_time()))
    game.set_doom_config_path(str(Path(folder) / "game.ini"))
    with contextlib.chdir(folder):  # the game makes a folder wherever it starts
        game.init()
    _begin(game)
    return game


def _begin(game: Any) -> None:
    game.send_game_command("god")
