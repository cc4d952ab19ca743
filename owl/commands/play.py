"""``python -m owl play``: play a learned world, or the real game, in a browser."""

import asyncio
import gc
import os
import secrets
import signal
import sys
import webbrowser
from pathlib import Path

from owl.cli.arguments import changed, parse_size
from owl.data.game import check_audio
from owl.errors import OwlError, at_least
from owl.hardware import leave_a_core
from owl.models.sampling import Sampler
from owl.play.beside import SideBySide
from owl.play.game import GameWorld
from owl.play.learned import LearnedWorld, Precision, Sources
from owl.play.server import LOOPBACK, Server
from owl.play.world import World


def main(
    worlds: list[str],
    *,
    game: bool = False,
    data: str | None = None,
    decoder: list[str] = [],  # noqa: B006  (never changed)
    audio_decoder: str | None = None,
    inverse_dynamics: str | None = None,
    sound: bool = True,
    split: str = "test",
    context: int = 8,
    steps: int | None = None,
    shift: float | None = None,
    sampler: Sampler | None = None,
    context_noise: float | None = None,
    guidance: float | None = None,
    stride: int | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    size: str | None = None,
    seed: int = 0,
    out: str = "played",
    host: str = "127.0.0.1",
    port: int = 8420,
    browser: bool = True,
) -> None:
    """Play a world model, or with --game the real game, on a web page that this command serves until Ctrl-C.

    Several world models are shown side by side and get the same inputs, so that you can compare them. Several pages can
    watch, one of them plays. The page shows the controls, start scenes of the dataset, a timeline to return to, and
    where the time of a frame goes. It records films and action logs; `replay` plays a log again, and `data record
    --actions` turns logs of the real game into a dataset. A GPU is used if available.

    The folder of a shared world, which `export --decoder` writes, has its own start scenes and decoders.

    Args:
        worlds: Run folders, checkpoints or exports of world models; several worlds are played side by side on the same
            inputs. With --game a scenario of ViZDoom, such as deathmatch.
        game: Play the real game.
        data: Dataset of latents with the start scenes; by default the one that the world model was trained on.
        decoder: Run folders, checkpoints or exports of the autoencoder or of decoders trained on its latents, among
            which the page can choose; by default the autoencoder named in the dataset.
        audio_decoder: The same for the sound of a world model that generates it.
        inverse_dynamics: Run folder, checkpoint or export of the recipe
            owl.recipes.inverse_dynamics.InverseDynamics, trained with the world model's stride. The page then shows
            how often the controls that it reads from the frames are those that were given.
        sound: Whether the page is given the sound of a world model that generates it, or of the real game.
        split: Split of the start scenes.
        context: Frames of a start scene.
        steps: Evaluations of the network per frame; this and the next four options are by default those that the
            checkpoint stores.
        shift: Shift of their noise levels towards noise; 1: even levels.
        sampler: adams_bashforth, euler, or consistency for few-step students.
        context_noise: Noise level at which generated frames become context.
        guidance: Weight of classifier-free guidance on the controls; 1: none.
        stride: Stored frames from one frame of the world model to the next; where left out, as it was trained.
        precision: bf16 or fp32; where left out, bf16 if the device multiplies that fast, else fp32.
        compile: Run the network through torch.compile: frames are faster after about a minute, but no longer exactly
            those of a replay.
        size: Height x width of the real game's pictures, 270x480 where left out.
        seed: Seed of all noise, and of the game.
        out: Folder for recordings.
        host: Address to listen on. Any other than 127.0.0.1 can be reached from the network: the page then needs the
            secret token in the printed address.
        port: Port to listen on; 0 takes a free one.
        browser: Open the page in a browser.
    """
    learned = {
        "data": data,
        "decoder": decoder,
        "audio_decoder": audio_decoder,
        "inverse_dynamics": inverse_dynamics,
        "split": split,
        "context": context,
        "steps": steps,
        "shift": shift,
        "sampler": sampler,
        "context_noise": context_noise,
        "guidance": guidance,
        "stride": stride,
        "precision": precision,
        "compile": compile,
    }
    if game and (unfit := changed(main, learned)):
        raise OwlError("play.game", f"--{unfit[0]} is for world models, --game plays the real game; leave one out")
    if not game and size is not None:
        raise OwlError("play.game", f"--size {size} is for the real game, a world model has its own; leave it out")
    if game and len(worlds) > 1:
        raise OwlError("play.game", f"--game plays one scenario, got {', '.join(worlds)}; give one of them")
    at_least(1, context=context, stride=stride)
    played: World
    if game:
        played = GameWorld(worlds[0], parse_size(size or "270x480"), sound and has_sound())
    else:
        leave_a_core()
        made = [
            LearnedWorld(
                Sources(
                    path,
                    data,
                    tuple(decoder),
                    audio_decoder,
                    sound,
                    split,
                    context,
                    stride,
                    precision,
                    compile,
                    inverse_dynamics,
                ),
                steps=steps,
                shift=shift,
                sampler=sampler,
                context_noise=context_noise,
                guidance=guidance,
            )
            for path in worlds
        ]
        played = made[0] if len(made) == 1 else SideBySide(made)
    token = None if host in LOOPBACK else secrets.token_urlsafe(16)
    server = Server(played, Path(out), seed, host, port, token)
    # what is loaded stays: to search it for garbage takes a third of a second, in which no frame is made
    gc.collect()
    gc.freeze()
    asyncio.run(serve(server, browser))


async def serve(server: Server, browser: bool) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        OwlError: The address cannot be used.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with server:
        print(f"Play {server.world.description.name} at {server.url}  (Ctrl-C ends it)", flush=True)
        if browser and has_display():
            webbrowser.open(server.url)
        serving = asyncio.create_task(server.serve())
        await asyncio.wait([serving, asyncio.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()


def has_sound() -> bool:
    """Return whether the real game can be heard on this machine; print the reason if not."""
    try:
        check_audio()
    except OwlError as error:
        print(f"The game is played without sound: {error}")
        return False
    return True


def has_display() -> bool:
    """Return whether a browser can open a window; without one a browser of the terminal would take it over."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
