"""The web server: one page, its pictures, and one WebSocket for each viewer, one of which plays."""

import asyncio
import hmac
import socket
import time
from collections import deque
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiohttp import WSCloseCode, WSMsgType, web

from owl.errors import OwlError
from owl.play import protocol
from owl.play.protocol import Close, Command, Input, MalformedError
from owl.play.session import Session
from owl.play.world import World

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_VIEWERS = 16
RATE, BURST = 250.0, 500.0
"""Messages per second of one client, and how many it may send at once."""
WAITING = 3
"""Frames that wait for a slow viewer; older ones are dropped."""
WAITING_SOUND = 8
"""Sounds of frames that wait for a slow viewer: more than pictures, since what is missing is heard."""
BUFFER = 2**16
"""Bytes of the buffers of a connection: more would delay the picture on slow networks."""
HEARTBEAT = 10.0
"""Seconds between signs of life that are expected of a client."""
PATIENCE = 10.0
"""Seconds after which a client that takes nothing is disconnected."""
COOKIE = "owl-play"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Viewer:
    """One connection: frames and sounds of which the oldest are dropped, the latest state and meters, and notices.

    Args:
        connection: The WebSocket.
        request: Its request.

    Attributes:
        measures: Whether it requested the meters.
    """

    def __init__(self, connection: web.WebSocketResponse, request: web.Request) -> None:
        self.connection, self.request = connection, request
        self.frames: deque[bytes] = deque(maxlen=WAITING)
        self.sounds: deque[bytes] = deque(maxlen=WAITING_SOUND)
        self.state: bytes | None = None
        self.notices: deque[bytes] = deque(maxlen=WAITING)
        self.meters: deque[bytes] = deque(maxlen=1)
        self.measures = False
        self._ready = asyncio.Event()
        self._tokens, self._refilled = BURST, time.monotonic()

    def wake(self) -> None:
        """Send what waits."""
        self._ready.set()

    def allowed(self) -> bool:
        """Return whether the client may send one more message now (a token bucket)."""
        now = time.monotonic()
        self._tokens = min(BURST, self._tokens + (now - self._refilled) * RATE) - 1
        self._refilled = now
        return self._tokens >= 0

    async def send(self) -> None:
        """Send whatever waits, until cancelled or until the client does not take it."""
        try:
            while True:
                await self._ready.wait()
                self._ready.clear()
                while self.state is not None or self.notices or self.meters or self.sounds or self.frames:
                    if self.state is not None:
                        message, self.state = self.state, None
                    else:
                        message = (self.notices or self.meters or self.sounds or self.frames).popleft()
                    async with asyncio.timeout(PATIENCE):
                        await self.connection.send_bytes(message)
        except (TimeoutError, ConnectionError):
            if self.request.transport is not None:
                self.request.transport.abort()


class Server:
    """Serve a world.

    Args:
        world: The world; it is used by one thread of a `Session`.
        folder: Folder for recordings.
        seed: First seed.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        token: Secret that every request must know; None: requests must come from this machine.
    """

    def __init__(self, world: World, folder: Path, seed: int, host: str, port: int, token: str | None) -> None:
        self.world, self.folder, self.host, self.port, self.token = world, folder, host, port, token
        self.session = Session(world, folder, seed, self)
        self.viewers: list[Viewer] = []
        self.player: Viewer | None = None
        self._state: dict[str, Any] = {}
        self._last_frame: bytes | None = None

    async def __aenter__(self) -> "Server":
        """Listen; ``port`` is then the one in use.

        Raises:
            OwlError: The address cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        application = web.Application(middlewares=[self._guard])
        application.router.add_get("/", self._index)
        application.router.add_get("/play", self._connect)
        application.router.add_get(r"/starts/{number:\d{1,6}}.jpg", self._start_picture)
        application.router.add_get(r"/moments/{number:\d{1,9}}.jpg", self._moment_picture)
        application.router.add_get("/recordings/{name}", self._recorded)
        self._page = Path(str(resources.files("owl.play") / "page"))
        application.router.add_static("/page", self._page)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        try:
            await site.start()
        except (OSError, OverflowError, UnicodeError) as error:  # the latter of ports and names that cannot exist
            reason = getattr(error, "strerror", None) or error
            raise OwlError(
                "play.address",
                f"{self.host}:{self.port} cannot be used ({reason}); choose another --port or --host",
            ) from error
        self.port = self._runner.addresses[0][1]
        self.session.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Notify every client, and end the session."""
        for viewer in list(self.viewers):
            await viewer.connection.close(code=WSCloseCode.GOING_AWAY, message=b"the server has been stopped")
        await asyncio.to_thread(self.session.close)
        await self._runner.cleanup()

    async def serve(self) -> None:
        """Serve until cancelled.

        Raises:
            BaseException: What ended the session's thread.
        """
        await self._failure

    @property
    def url(self) -> str:
        """Address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    # The session's threads call these.

    def frame(self, message: bytes) -> None:
        """Send a frame to every viewer."""
        self._call(self._spread_frame, message)

    def sound(self, message: bytes) -> None:
        """Send the sound of the next frame to every viewer."""
        self._call(self._spread_sound, message)

    def state(self, state: dict[str, Any]) -> None:
        """Send a state to every viewer."""
        self._call(self._spread_state, state)

    def notice(self, text: str) -> None:
        """Send a sentence to the player."""
        self._call(self._notify_player, text)

    def meters(self, values: list[dict[str, Any]]) -> None:
        """Send what was measured to every viewer who requested it."""
        self._call(self._spread_meters, protocol.meters_message(values))

    def failed(self, error: BaseException) -> None:
        """End `serve`."""
        self._call(self._fail, error)

    def _call(self, function: Any, argument: Any) -> None:
        self._loop.call_soon_threadsafe(function, argument)

    # The following runs in the loop.

    def _spread_frame(self, message: bytes) -> None:
        self._last_frame = message
        for viewer in self.viewers:
            viewer.frames.append(message)
            viewer.wake()

    def _spread_sound(self, message: bytes) -> None:
        for viewer in self.viewers:
            viewer.sounds.append(message)
            viewer.wake()

    def _spread_meters(self, message: bytes) -> None:
        for viewer in self.viewers:
            if viewer.measures:
                viewer.meters.append(message)
                viewer.wake()

    def _spread_state(self, state: dict[str, Any] | None = None) -> None:
        if state is not None:
            self._state = state
        for viewer in self.viewers if self._state else ():  # before its first state the world is not ready
            role = "player" if viewer is self.player else "viewer"
            seats = {"role": role, "free": self.player is None, "viewers": len(self.viewers)}
            viewer.state = protocol.state_message(self._about() | self._state | seats)
            viewer.wake()

    def _about(self) -> dict[str, Any]:
        """Return what never changes."""
        description = self.world.description
        return {
            "kind": description.kind,
            "name": description.name,
            "device": description.device,
            "buttons": description.buttons,
            "axes": description.axes,
            "fps": description.fps,
            "start_size": description.start_size if description.starts else None,
            "decoders": description.decoders,
            "names": description.names,
            "meters": self.session.meters.names,
            "sound": description.sound and asdict(description.sound),
            "folder": str(self.folder),
        }

    def _notify_player(self, text: str) -> None:
        if self.player is not None:
            self._notify(self.player, text)

    def _notify(self, viewer: Viewer, text: str) -> None:
        viewer.notices.append(protocol.notice_message(text))
        viewer.wake()

    def _fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Refuse pages of other sites, names that only seem to be this machine, and clients without the token."""
        origin = request.headers.get("Origin")
        if origin is not None and _parts(origin).netloc != request.host:
            raise web.HTTPForbidden(text="this page belongs to another site", headers=HEADERS)
        if self.token is None:
            if _parts(f"//{request.host}").hostname not in LOOPBACK:
                raise web.HTTPForbidden(text=f"this server is called {self.host}:{self.port}", headers=HEADERS)
        else:
            given = request.query.get("token") or request.cookies.get(COOKIE, "")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise web.HTTPForbidden(text="open the address with the token that the server printed", headers=HEADERS)
        response: web.StreamResponse = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _index(self, _: web.Request) -> web.StreamResponse:
        response = web.FileResponse(self._page / "index.html")
        if self.token:
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="Strict")
        return response

    async def _start_picture(self, request: web.Request) -> web.StreamResponse:
        return _jpeg(self.session.starts, request)

    async def _moment_picture(self, request: web.Request) -> web.StreamResponse:
        return _jpeg(self.session.thumbnails, request)

    async def _recorded(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in self.session.recordings:
            raise web.HTTPNotFound
        return web.FileResponse(self.folder / name, headers={"Content-Disposition": f'attachment; filename="{name}"'})

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        height, width = self.world.description.start_size
        connection = web.WebSocketResponse(
            protocols=(protocol.SUBPROTOCOL,),
            max_msg_size=max(protocol.LARGEST, protocol.PIXEL * height * width),
            heartbeat=HEARTBEAT,
            compress=False,
            timeout=1.0,
        )
        await connection.prepare(request)
        if connection.ws_protocol != protocol.SUBPROTOCOL:
            await connection.close(code=Close.VERSION, message=f"this server speaks {protocol.SUBPROTOCOL}".encode())
        elif len(self.viewers) >= MOST_VIEWERS:
            await connection.close(code=Close.FULL, message=f"{MOST_VIEWERS} pages are watching already".encode())
        else:
            await self._attend(Viewer(connection, request))
        return connection

    async def _attend(self, viewer: Viewer) -> None:
        """Serve one connection until it ends."""
        transport = viewer.request.transport
        if transport is None:  # it has gone already
            return
        transport.set_write_buffer_limits(high=BUFFER)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.viewers.append(viewer)
        self._spread_state()
        if self._last_frame is not None:
            viewer.frames.append(self._last_frame)
        sender = asyncio.create_task(viewer.send())
        try:
            async for message in viewer.connection:
                code, reason = Close.MALFORMED, "expected binary messages"
                if not viewer.allowed():
                    code, reason = Close.TOO_MANY_MESSAGES, f"more than {RATE:.0f} messages per second"
                elif message.type == WSMsgType.BINARY:
                    try:
                        self._receive(viewer, message.data)
                        continue
                    except MalformedError as error:
                        reason = str(error)
                await viewer.connection.close(code=code, message=reason.encode("ascii", "replace")[: protocol.REASON])
        finally:
            sender.cancel()
            self.viewers.remove(viewer)
            self._watch_meters()
            if viewer is self.player:
                self._leave()
            self._spread_state()

    def _receive(self, viewer: Viewer, data: bytes) -> None:
        description = self.world.description
        message = protocol.parse(data, len(description.buttons), len(description.axes))
        if isinstance(message, Input):
            if viewer is self.player:
                self.session.inputs.put(message)
        elif isinstance(message, Command) and message.name == "meters":
            viewer.measures = bool(message.on)
            self._watch_meters()
        elif isinstance(message, Command) and message.name == "play":
            if self.player is None:
                self.player = viewer
                self._spread_state()
            elif viewer is not self.player:
                self._notify(viewer, "someone else is playing; you are watching")
        elif viewer is not self.player:
            self._notify(viewer, "only the player can do that; you are watching")
        elif isinstance(message, Command) and message.name == "watch":
            self._leave()
            self._spread_state()
        elif not self.session.send(message):
            self._notify(viewer, "the world is busy; try again in a moment")

    def _watch_meters(self) -> None:
        self.session.meters.watch(any(viewer.measures for viewer in self.viewers))

    def _leave(self) -> None:
        """Free the controls; the world waits where it is."""
        self.player = None
        self.session.release()


def _parts(url: str) -> SplitResult:
    """Take an address apart; of one that is none, nothing is known."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _jpeg(pictures: dict[int, bytes], request: web.Request) -> web.StreamResponse:
    jpeg = pictures.get(int(request.match_info["number"]))
    if jpeg is None:
        raise web.HTTPNotFound
    return web.Response(body=jpeg, content_type="image/jpeg")
