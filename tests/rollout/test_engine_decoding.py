"""The streaming engine with decoders, and built from files."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from owl import models
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder, decode_clips
from owl.models.world_model import Controls, WorldTransformer
from owl.nn.frozen import freeze
from owl.precision.inference import Quantization
from owl.rollout.engine import Engine, Frame
from tests.helpers.errors import refused
from tests.helpers.latents import LATENT, draw, lively
from tests.helpers.rollouts import LEVELS, Reference, at


@pytest.fixture(scope="module")
def autoencoder() -> ImageAutoencoder:
    torch.manual_seed(0)
    made = {"size": (32, 48), "latent_size": LATENT[1:], "latent_channels": LATENT[0], "widths": [8, 16, 16]}
    return ImageAutoencoder(**made, blocks=[1, 1, 1]).eval()


def of_encoder(network: WorldTransformer, autoencoder: ImageAutoencoder) -> WorldTransformer:
    network.video_encoder.copy_(torch.tensor(list(bytes.fromhex(models.fingerprint(autoencoder.encoder)))))
    return network


def test_frames_are_decoded_and_everything_comes_from_files(autoencoder: ImageAutoencoder, tmp_path: Path) -> None:
    network = of_encoder(lively(), autoencoder)
    network.video_std.fill_(0.1)
    models.save(network, tmp_path / "world_model")
    models.save(autoencoder, tmp_path / "autoencoder")
    engine = Engine.load(tmp_path / "world_model", {"video": tmp_path / "autoencoder"}, noise_levels=LEVELS)
    controls = draw(network, 3, batch=2)[2]
    expected = Reference(network, "adams_bashforth", 0.0, 1.0).roll(controls, None, seed=4)
    pictures = []
    engine.reset(batch=2, seed=4)
    for t, latents in enumerate(expected):
        frame: Frame = engine.step(*at(controls, t))
        torch.testing.assert_close(frame.latents["video"], latents["video"], atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            pictures.append(autoencoder.decode(latents["video"]))
        torch.testing.assert_close(frame.decoded["video"], pictures[-1], atol=1e-4, rtol=1e-4)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01  # it is seen which frame is decoded
    assert sorted(frame.seconds) == ["commit", "decode", "denoise"]
    assert all(seconds > 0 for seconds in frame.seconds.values())
    with refused("network.kind", str(tmp_path / "autoencoder"), "ImageAutoencoder"):
        Engine.load(tmp_path / "autoencoder")


@pytest.fixture
def continuing(autoencoder: ImageAutoencoder) -> ImageDecoder:
    """A decoder whose pictures depend much on the picture before."""
    decoder = ImageDecoder.of(autoencoder, previous=True)
    torch.nn.init.normal_(decoder.hint.weight, std=0.3)
    return freeze(decoder)


def test_a_decoder_that_takes_over_continues_the_last_picture(
    autoencoder: ImageAutoencoder, continuing: ImageDecoder
) -> None:
    network = of_encoder(lively(), autoencoder)
    engine = Engine(network, {"video": autoencoder}, noise_levels=LEVELS)
    latents, _, controls = draw(network, 4)
    given = {name: x[:, :2] for name, x in latents.items()}
    engine.reset(given, Controls(controls.buttons[:, :2], controls.axes[:, :2]))
    begin = autoencoder.decode(given["video"][:, -1])
    for t, decoder in ((2, continuing), (3, autoencoder), (3, continuing)):
        engine.decoders["video"] = decoder
        frame = engine.step(*at(controls, t))
        memory = (begin,) if decoder is continuing else ()
        begin = decoder.decode(frame.latents["video"], *memory)
        torch.testing.assert_close(frame.decoded["video"], begin)


def test_a_rollout_continues_the_true_picture_of_its_context(
    autoencoder: ImageAutoencoder, continuing: ImageDecoder
) -> None:
    network = of_encoder(lively(), autoencoder)
    engine = Engine(network, {"video": continuing}, noise_levels=LEVELS)
    latents, _, controls = draw(network, 3, batch=2)
    given = {name: x[:, :2] for name, x in latents.items()}, Controls(controls.buttons[:, :2], controls.axes[:, :2])
    for picture in (2 * torch.rand(2, 3, 32, 48) - 1, None):
        engine.reset(*given, picture=picture)
        frame = engine.step(*at(controls, 2))
        begin = continuing.decode(given[0]["video"][:, -1]) if picture is None else picture
        torch.testing.assert_close(frame.decoded["video"], continuing.decode(frame.latents["video"], begin))


def test_a_decoder_that_sees_its_previous_frame_streams_what_it_decodes_in_sequence(
    autoencoder: ImageAutoencoder, continuing: ImageDecoder
) -> None:
    network = of_encoder(lively(), autoencoder)
    engine = Engine(network, {"video": continuing}, noise_levels=LEVELS)
    latents, _, controls = draw(network, 6, batch=2)
    context = {name: x[:, :2] for name, x in latents.items()}
    for known in (2, 0, 2):  # a reset forgets
        shown = Controls(controls.buttons[:, :known], controls.axes[:, :known])
        engine.reset(*((context, shown) if known else (None, None)), batch=2)
        frames, snapshot = [], None
        for t in range(known, 6):
            if t == 4:
                snapshot = engine.snapshot()
            frames.append(engine.step(*at(controls, t)))
        latents = torch.stack([frame.latents["video"] for frame in frames], 1)
        if known:
            latents = torch.cat([context["video"][:, -1:], latents], 1)  # it starts with the context's last frame
        with torch.no_grad():
            expected = decode_clips(continuing, latents)[:, -len(frames) :]
            assert not torch.allclose(expected[:, -1], continuing.decode(latents[:, -1]), atol=1e-3)
        torch.testing.assert_close(torch.stack([frame.decoded["video"] for frame in frames], 1), expected)
        engine.restore(snapshot)
        assert torch.equal(engine.step(*at(controls, 4)).decoded["video"], frames[4 - known].decoded["video"])


@pytest.mark.parametrize("quantization", [None, "fp8_weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_decoder_and_a_frozen_network_play(
    autoencoder: ImageAutoencoder, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    network = of_encoder(lively(), autoencoder)
    controls = draw(network, 1)[2]
    frames = []
    for prepare in (lambda module: module, freeze):
        given = {"video": prepare(deepcopy(autoencoder))}
        engine = Engine(prepare(deepcopy(network)), given, quantization=quantization)
        engine.decoders["video"].to(dtype)  # afterwards: an encoder is known by the exact values of its weights
        engine.reset()
        frames.append(engine.step(*at(controls, 0)).decoded["video"])
    assert frames[0].dtype == torch.float32
    assert torch.equal(frames[0], frames[1])


def test_settings_that_make_no_sense_are_reported(autoencoder: ImageAutoencoder) -> None:
    network = lively()
    for levels in ([], [0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0], [1.0, 0.5, -0.1]):
        with refused("engine.levels", str(levels)):
            Engine(network, noise_levels=levels)
    with refused("sampling.settings", "sampler is ddim", "adams_bashforth, euler, consistency"):
        Engine(network, sampler="ddim")  # type: ignore[arg-type]
    with refused("latents.encoder", "video decoder", models.fingerprint(autoencoder.encoder), "0000000000000000"):
        Engine(network, {"video": autoencoder})
    with refused("decoder.kind", "video decoder", "Linear"):
        Engine(network, {"video": torch.nn.Linear(1, 1)})
    with refused("decoder.stream", "decoder for audio", "has video"):
        Engine(network, {"audio": autoencoder})
