"""The server in the open: real clients on a real port, well-behaved and otherwise."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from owl.play import protocol, server
from owl.play.protocol import Close, Kind
from owl.play.server import Server
from owl.viz.pictures import png
from tests.helpers.play import RATE, Strip, connected, playing, serving

JPEG = b"\xff\xd8"
SCRIPTS = [path.name for path in (Path(server.__file__).parent / "page").glob("*.js")]


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine; one that hangs fails."""

    async def limited() -> None:
        async with asyncio.timeout(100):
            await test()

    asyncio.run(limited())


async def get(server: Server, path: str, **options: object) -> tuple[int, bytes, aiohttp.ClientResponse]:
    """Return status, body and response of a request."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{server.port}{path}", **options) as r:
        return r.status, await r.read(), r


def test_the_page_and_its_pictures_are_served_and_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Strip(), tmp_path) as served, playing(served) as client:
            status, page, response = await get(served, "/")
            assert status == 200
            assert b"page/main.js" in page
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
            for name in SCRIPTS:
                status, _script, response = await get(served, f"/page/{name}")
                assert status == 200
                assert "javascript" in response.headers["Content-Type"]
            for path in ("/starts/1.jpg", f"/moments/{client.state['moments'][0]['number']}.jpg"):
                status, picture, _ = await get(served, path)
                assert (status, picture[:2]) == (200, JPEG)
            await client.command("record", on=True)
            await client.command("step")
            await client.command("record", on=False)
            await client.until(lambda c: c.state["recordings"])
            for name in client.state["recordings"]:
                status, content, response = await get(served, f"/recordings/{name}")
                assert status == 200
                assert content == (tmp_path / name).read_bytes()
                assert "attachment" in response.headers["Content-Disposition"]
            (tmp_path / "secret").write_text("not recorded here", "utf-8")
            for path in (
                *("/starts/2.jpg", "/moments/9.jpg", "/recordings/secret", "/recordings/..%2Fsecret", "/secret"),
                *("/page/../server.py", "/page/%2e%2e/server.py", "/page/"),
            ):
                status, _, _ = await get(served, path)
                assert status in (403, 404), path

    run(test)


def test_one_plays_and_others_watch(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Strip(fps=50.0), tmp_path) as served, playing(served) as player, connected(served) as viewer:
            assert (viewer.state["role"], viewer.state["free"], viewer.state["viewers"]) == ("viewer", False, 2)
            await viewer.command("play")
            await viewer.until(lambda c: c.notices)
            assert "someone else is playing" in viewer.notices[-1]
            await viewer.command("reset", seed=5)
            await viewer.until(lambda c: len(c.notices) == 2)
            assert "only the player" in viewer.notices[-1]
            await viewer.socket.send_bytes(protocol.start_message(b"picture"))
            await viewer.until(lambda c: len(c.notices) == 3)
            assert "only the player" in viewer.notices[-1]
            await viewer.hold(True, False, moved=[9.0])  # ignored
            await player.hold(True, False, moved=[2.0], time=17.0)
            await player.command("resume")
            await player.until(lambda c: c.frames and c.frames[-1][0] >= 3)
            _number, time, parts, jpeg = next(frame for frame in player.frames if frame[0] == 1)
            assert (time, jpeg[:2]) == (17.0, JPEG)
            assert parts["wait"] > 0
            assert parts["denoise"] == 1.0
            await viewer.until(lambda c: c.frames and c.frames[-1][0] >= 3)
            action = served.session.log().actions[0]
            assert (action.buttons.tolist(), action.axes.tolist()) == ([True, False], [2.0])
            await player.command("watch")
            await viewer.until(lambda c: c.state["free"] and c.state["paused"])
            await viewer.command("play")
            await viewer.until(lambda c: c.state["role"] == "player")

    run(test)


def test_everyone_hears_the_sound(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Strip(fps=50.0, sound=True), tmp_path) as served, playing(served) as player:
            assert player.state["sound"] == {"sample_rate": RATE, "channels": 2}
            async with connected(served) as viewer:
                await player.hold(True, False)
                await player.command("resume")
                for client in (player, viewer):
                    await client.until(lambda c: c.frames and c.frames[-1][0] >= 3 and c.sounds)
                    numbers = [number for number, _ in client.sounds]
                    assert numbers == list(range(numbers[0], numbers[-1] + 1))
                    assert {sound.shape for _, sound in client.sounds} == {(2, RATE // 50)}
                    assert np.abs(client.sounds[-1][1]).max() > 0.7
        async with serving(Strip(), tmp_path) as served, connected(served) as client:
            assert client.state["sound"] is None

    run(test)


def test_fifty_come_and_go_and_leave_the_world_free(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Strip(), tmp_path) as served:
            for turn in range(50):
                async with playing(served) as client:
                    await client.until(lambda c: c.state["paused"])
                    await client.hold(True, True)
                    await client.command("resume")
                    await client.until(lambda c: not c.state["paused"])
                    if turn % 2:  # without saying good-bye
                        transport = client.socket._response.connection.transport  # type: ignore[attr-defined]
                        transport.abort()
                async with asyncio.timeout(10):
                    while served.viewers:
                        await asyncio.sleep(0.001)
            assert served.player is None
            async with connected(served) as client:
                await client.until(lambda c: c.state["paused"])
                assert (client.state["free"], client.state["viewers"]) == (True, 1)
                assert not served.session.inputs.take().buttons.any()

    run(test)


def test_a_thousand_malformed_messages(tmp_path: Path) -> None:
    chance = random.Random(0)

    def malformed() -> bytes | str:
        kind = chance.randrange(5)
        if kind == 0:
            return "text"
        if kind == 1:
            return bytes([chance.choice([0, 4, 9, 16, 17, 200])]) + chance.randbytes(chance.randrange(50))
        if kind == 2:
            return bytes([Kind.INPUT]) + chance.randbytes(chance.choice([0, 5, 12, 14, 100]))
        if kind == 3:
            return bytes([Kind.COMMAND]) + chance.randbytes(chance.randrange(50))
        return bytes([Kind.COMMAND]) + b'{"name": "' + chance.randbytes(4).hex().encode() + b'"}'

    async def test() -> None:
        async with serving(Strip(), tmp_path) as served, playing(served) as player:
            url = f"http://127.0.0.1:{served.port}/play"
            async with aiohttp.ClientSession() as session:
                for number in range(1000):
                    async with session.ws_connect(url, protocols=[protocol.SUBPROTOCOL]) as connection:
                        message = malformed()
                        await (connection.send_str if isinstance(message, str) else connection.send_bytes)(message)
                        while (found := await connection.receive()).type == aiohttp.WSMsgType.BINARY:
                            pass
                        assert found.data == Close.MALFORMED, message
                        assert found.extra, message
                    if number % 20 == 0:  # the player continues
                        await player.command("step")
                        await player.until(lambda c, n=number: c.state["frame"] == n // 20 + 1)

    run(test)


def test_clients_with_too_many_requests_are_disconnected_with_a_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Strip(), tmp_path) as served, playing(served) as player:
            async with connected(served) as client:
                await client.socket.send_bytes(bytes(protocol.LARGEST + 1))
                assert (await client.closed())[0] == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
            async with connected(served) as client:
                for _ in range(int(server.BURST) + 200):
                    await client.hold(False, False)
                code, reason = await client.closed()
                assert code == Close.TOO_MANY_MESSAGES
                assert "messages per second" in reason
            url = f"http://127.0.0.1:{served.port}/play"
            async with aiohttp.ClientSession() as session, session.ws_connect(url) as connection:
                found = await connection.receive()
                assert (found.data, found.extra) == (Close.VERSION, "this server speaks owl-play.1")
            async with asyncio.timeout(10):
                while len(served.viewers) > 1:
                    await asyncio.sleep(0.001)
            others = [connected(served) for _ in range(server.MOST_VIEWERS - 1)]
            for other in others:
                await other.__aenter__()
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(url, protocols=[protocol.SUBPROTOCOL]) as connection,
            ):
                found = await connection.receive()
                assert found.data == Close.FULL
                assert "16" in found.extra
            for other in others:
                await other.__aexit__(None, None, None)
            await player.command("step")
            await player.until(lambda c: c.state["frame"] == 1)

    run(test)


def test_a_picture_to_start_with_may_be_as_large_as_its_pixels_need(tmp_path: Path) -> None:
    """As those of 720p worlds are."""
    given = png(np.random.default_rng(0).integers(0, 255, (320, 320, 3), np.uint8))
    assert len(given) > protocol.LARGEST

    async def test() -> None:
        async with serving(Strip((320, 320)), tmp_path) as served, playing(served) as player:
            await player.socket.send_bytes(protocol.start_message(given))
            await player.until(lambda c: c.state["starts"] == 3)
            await player.socket.send_bytes(bytes(protocol.PIXEL * 320 * 320 + 1))
            assert (await player.closed())[0] == aiohttp.WSCloseCode.MESSAGE_TOO_BIG

    run(test)


def test_a_client_that_never_reads_delays_no_one_and_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.5)

    async def test() -> None:
        async with serving(Strip(size=(240, 320), sound=True), tmp_path) as served, playing(served) as player:
            stalled = socket.create_connection(("127.0.0.1", served.port))
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.sendall(
                b"GET /play HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                b"Sec-WebSocket-Protocol: owl-play.1\r\n\r\n"
            )
            await player.until(lambda c: c.state["viewers"] == 2)
            (slow,) = (viewer for viewer in served.viewers if viewer is not served.player)
            await player.command("resume")
            most, seen = 0, 0
            while player.state["viewers"] == 2:
                seen += 1
                await player.until(lambda c, n=seen: len(c.frames) + len(c.states) > n)
                most = max(most, len(slow.frames))
                player.frames = player.frames[-1:]
                seen = len(player.frames) + len(player.states)
            assert 0 < most <= server.WAITING
            assert 0 < len(slow.sounds) <= server.WAITING_SOUND
            assert player.frames[-1][0] > most  # frames continued
            stalled.close()

    run(test)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Host": "[::1]:9000", "Origin": "http://[::1]:9000"}, 200),  # through a tunnel
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://127.0.0.1:PORT.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 403),
    ],
)
def test_pages_of_other_sites_get_nothing(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    async def test() -> None:
        async with serving(Strip(), tmp_path) as served:
            filled = {name: value.replace("PORT", str(served.port)) for name, value in headers.items()}
            assert (await get(served, "/", headers=filled))[0] == status
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{served.port}/play"
                try:
                    async with session.ws_connect(url, protocols=[protocol.SUBPROTOCOL], headers=filled):
                        found = 200
                except aiohttp.WSServerHandshakeError as error:
                    found = error.status
                assert found == status

    run(test)


def test_elsewhere_than_on_this_machine_the_token_is_needed(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(Strip(), tmp_path, host="0.0.0.0", token="secret") as served:
            assert served.url == f"http://0.0.0.0:{served.port}/?token=secret"
            for path, options in (
                ("/", {}),
                ("/?token=other", {}),
                ("/page/main.js", {}),
                ("/play", {}),
                ("/", {"cookies": {"owl-play": "s\u00e9cret"}}),
            ):
                assert (await get(served, path, **options))[0] == 403
            jar = aiohttp.CookieJar(unsafe=True)  # for addresses without a name
            headers = {"Host": "my-machine:80"}
            async with aiohttp.ClientSession(cookie_jar=jar) as session:
                base = f"http://127.0.0.1:{served.port}"
                async with session.get(f"{base}/?token=secret", headers=headers) as response:
                    assert response.status == 200
                    cookie = response.headers["Set-Cookie"]
                    assert "HttpOnly" in cookie
                    assert "SameSite=Strict" in cookie
                given = {"cookies": {"owl-play": "secret"}}
            assert (await get(served, "/page/main.js", **given))[0] == 200
            assert (await get(served, "/", headers={"Origin": "http://evil.example"}, **given))[0] == 403

    run(test)


def test_stopping_notifies_every_page(tmp_path: Path) -> None:
    async def test() -> None:
        world = Strip()
        served = Server(world, tmp_path, 0, "127.0.0.1", 0, None)
        await served.__aenter__()
        async with connected(served) as client:
            closing = asyncio.create_task(served.__aexit__())
            assert await client.closed() == (aiohttp.WSCloseCode.GOING_AWAY, "the server has been stopped")
            await closing
        assert world.closed

    run(test)
