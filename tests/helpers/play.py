"""A world whose pictures and sounds say what was done, and a client that speaks the page's protocol."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from torch import Tensor

from owl.play import protocol
from owl.play.meters import Reference
from owl.play.protocol import Command, Input, Kind
from owl.play.server import Server
from owl.play.world import Description, Picture, Settings, SoundFormat, World
from owl.rollout.inverse_dynamics import InverseDynamicsReader
from tests.helpers.rollouts import Painted

RATE, PITCH = 44_100, 441.0
"""Of the sound: samples per second, and vibrations of the tone."""


class Strip(World):
    """A window on a long strip: the axis moves it, the first button inverts it, and every frame has noise of the seed.

    Args:
        size: (H, W).
        fps: Frames per second.
        sound: Whether there is a tone while the first button is held, twice as loud on the left.
    """

    def __init__(self, size: tuple[int, int] = (16, 24), fps: float = 500.0, sound: bool = False) -> None:
        starts = [self.texture(start, size)[:, : size[1]] for start in range(2)]
        self.description = Description(
            kind="world model",
            name="strip",
            device="the CPU",
            buttons=["MOVE_FORWARD", "ATTACK"],
            axes={"mouse_x": 4.0},
            fps=fps,
            size=size,
            origin={"kind": "strip"},
            starts=starts,
            decoders=["only"],
            sound=SoundFormat(RATE, 2) if sound else None,
        )
        self.settings = Settings(decoder="only")
        self.closed = False

    @staticmethod
    def texture(start: int, size: tuple[int, int]) -> np.ndarray:
        """uint8[H, 64 W, 3]."""
        return np.random.default_rng(start).integers(0, 255, (size[0], 64 * size[1], 3), np.uint8)

    def reset(self, start: int, seed: int) -> Picture:
        """Begin on the left."""
        self.check_start(start, seed)
        self.strip = np.tile(self.description.starts[start], (1, 64, 1))
        if start < 2:
            self.strip = self.texture(start, self.description.size)
        self.x, self.random = 0.0, np.random.default_rng(seed)
        self.samples = 0
        return replace(self.look(False), hear=None)

    def add_start(self, rgb: np.ndarray) -> None:
        """Add a strip that repeats a picture."""
        self.description.starts.append(rgb)

    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Move."""
        self.x += float(axes[0])
        return self.look(bool(buttons[0]))

    def look(self, inverted: bool) -> Picture:
        """Return what is seen, with as much noise as there are steps."""
        height, width = self.description.size
        columns = (round(self.x) + np.arange(width)) % self.strip.shape[1]
        rgb = self.strip[:, columns] ^ self.random.integers(0, self.settings.steps, (height, width, 3), np.uint8)
        sound = self.sound(inverted)
        shown = Picture(255 - rgb if inverted else rgb, {"denoise": 1e-3})
        return shown if sound is None else replace(shown, hear=lambda: sound)

    def sound(self, loud: bool) -> np.ndarray | None:
        """Return the sound of a frame."""
        if self.description.sound is None:
            return None
        time = self.samples + np.arange(round(RATE / self.description.fps))
        self.samples += len(time)
        tone = loud * np.sin(2 * np.pi * PITCH / RATE * time).astype(np.float32)
        return np.stack([0.8 * tone, 0.4 * tone])

    def snapshot(self) -> Any:
        """Copy everything."""
        return self.strip, self.x, deepcopy(self.random), self.settings, self.samples

    def restore(self, snapshot: Any) -> None:
        """Return."""
        self.strip, self.x, random, self.settings, self.samples = snapshot
        self.random = deepcopy(random)

    def snapshot_bytes(self) -> int:
        """Return a guess."""
        return 1000

    def change(self, settings: Settings) -> None:
        """Accept everything."""
        self.settings = settings

    def close(self) -> None:
        """Remember."""
        self.closed = True


class Canvas(Strip):
    """A strip in whose first pixel the controls are painted, as `Painted` reads them.

    Args:
        follows: Whether what is painted are the controls that were given; otherwise none.
    """

    def __init__(self, follows: bool) -> None:
        super().__init__(fps=50.0)
        self.follows = follows
        changed = {"buttons": Painted.buttons, "axes": dict.fromkeys(Painted.axes, 4.0)}
        self.description = replace(self.description, name="following" if follows else "ignoring", **changed)
        reader = InverseDynamicsReader(Painted(), 1.0)  # type: ignore[arg-type]
        self.references = [Reference(self.true_frames, reader, torch.device("cpu"))]

    def true_frames(self) -> tuple[Tensor, Tensor]:
        """Two frames of each of two strips."""
        parts = [np.split(self.texture(start, (16, 24))[:, : 2 * 24], 2, 1) for start in range(2)]
        return torch.from_numpy(np.concatenate(parts)).movedim(-1, 1), torch.tensor([0, 0, 1, 1])

    def step(self, buttons: np.ndarray, axes: np.ndarray) -> Picture:
        """Paint."""
        picture = super().step(buttons, axes)
        picture.rgb[0, 0] = [255 * buttons[1], max(0, axes[1]), 0] if self.follows else 0
        return picture


class Client:
    """A connection as the page has one.

    Attributes:
        states: All states so far.
        notices: All notices so far.
        frames: Number, time, parts and JPEG of all frames so far.
        sounds: Number, and float32[2, samples], of all sounds so far.
        meters: What was measured, all so far.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.states: list[dict[str, Any]] = []
        self.notices: list[str] = []
        self.frames: list[tuple[int, float, dict[str, float], bytes]] = []
        self.sounds: list[tuple[int, np.ndarray]] = []
        self.meters: list[list[dict[str, Any]]] = []

    @property
    def state(self) -> dict[str, Any]:
        """The latest state."""
        return self.states[-1]

    async def command(self, name: str, **fields: Any) -> None:
        """Ask for something."""
        await self.socket.send_bytes(protocol.command_message(Command(name, **fields)))

    async def hold(self, *buttons: bool, moved: Sequence[float] = (0.0,), time: float = 1.0) -> None:
        """Hold buttons and move axes."""
        axes = np.array(moved, np.float32)
        given = Input(time, np.array(buttons, bool), axes, np.zeros_like(axes))
        await self.socket.send_bytes(protocol.input_message(given))

    async def until(self, condition: Callable[["Client"], Any]) -> None:
        """Receive until a condition holds.

        Raises:
            AssertionError: The connection was closed before.
        """
        async with asyncio.timeout(60):
            while not condition(self):
                message = await self.socket.receive()
                assert message.type == aiohttp.WSMsgType.BINARY, (message, self.socket.close_code)
                kind = message.data[0]
                if kind == Kind.STATE:
                    self.states.append(json.loads(message.data[1:]))
                elif kind == Kind.NOTICE:
                    self.notices.append(message.data[1:].decode())
                elif kind == Kind.SOUND:
                    self.sounds.append(protocol.parse_sound(message.data, channels=2))
                elif kind == Kind.METERS:
                    self.meters.append(json.loads(message.data[1:]))
                else:
                    self.frames.append(protocol.parse_frame(message.data))

    async def closed(self) -> tuple[int | None, str]:
        """Receive until the connection is closed; return the code and the reason."""
        async with asyncio.timeout(60):
            while (message := await self.socket.receive()).type == aiohttp.WSMsgType.BINARY:
                pass
        return message.data if message.type == aiohttp.WSMsgType.CLOSE else self.socket.close_code, str(message.extra)


@asynccontextmanager
async def serving(world: World, folder: Path, **options: Any) -> AsyncIterator[Server]:
    """Serve a world on a free port."""
    arguments: dict[str, Any] = {"seed": 0, "host": "127.0.0.1", "port": 0, "token": None} | options
    async with Server(world, folder, **arguments) as server:
        yield server


@asynccontextmanager
async def connected(server: Server, **options: Any) -> AsyncIterator[Client]:
    """Connect to a server and receive the first state."""
    url = f"http://127.0.0.1:{server.port}/play"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, protocols=[protocol.SUBPROTOCOL], **options) as socket,
    ):
        client = Client(socket)
        await client.until(lambda c: c.states)
        yield client


@asynccontextmanager
async def playing(server: Server) -> AsyncIterator[Client]:
    """Connect and take the controls."""
    async with connected(server) as client:
        await client.command("play")
        await client.until(lambda c: c.state["role"] == "player")
        yield client
