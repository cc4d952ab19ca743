"""Sound of rollouts: no seams between frames, nothing of the context, and measures with known values."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.models.audio_autoencoder import AudioAutoencoder
from owl.models.world_model import WorldTransformer
from owl.rollout.engine import Engine, Frame
from owl.rollout.sound import (
    Sound,
    SoundDecoder,
    area_under_roc,
    by_frame,
    decode_sound,
    joined,
    mel_curves,
    onset_agreement,
    onset_strength,
)
from tests.helpers.errors import refused
from tests.helpers.latents import draw, lively, streams

RATE, SAMPLES = 44_100, 2520  # per second, and per frame of a world model at 17.5 frames a second
TOKENS, CHANNELS = 2, 3


def autoencoder(causal: bool, seed: int = 0) -> AudioAutoencoder:
    """Two tokens in a frame of 1,260 samples."""
    torch.manual_seed(seed)
    network = AudioAutoencoder(2, RATE, [15, 42], [4, 4, 4], CHANNELS, causal=causal)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def world_of(network: AudioAutoencoder) -> WorldTransformer:
    """A world model of the latents of an autoencoder."""
    world = lively(**streams("audio"))
    world.audio_encoder.copy_(torch.tensor(list(bytes.fromhex(models.fingerprint(network.encoder)))))
    return world


@pytest.mark.parametrize("causal", [True, False])
def test_frames_of_sound_are_the_decoded_whole(causal: bool) -> None:
    network, latents = autoencoder(causal), torch.randn(2, 12, TOKENS, CHANNELS)
    whole = network.decode(latents.flatten(1, 2).mT)
    decoder = SoundDecoder(network, latents[:, :4])
    frames = [decoder(latents[:, t]) for t in range(4, 12)]
    if causal:
        assert [frame.shape for frame in frames] == [(2, 2, TOKENS * network.hop)] * 8
    found = torch.cat(frames, -1)
    expected = whole[..., 4 * TOKENS * network.hop :]
    later = (network.context()[1] + 1) * network.hop  # the last samples wait for later latents
    assert expected.shape[-1] - later <= found.shape[-1] <= expected.shape[-1]
    torch.testing.assert_close(found, expected[..., : found.shape[-1]], atol=1e-5, rtol=1e-5)


def test_a_snapshot_continues_the_sound_and_shares_the_weights() -> None:
    network = autoencoder(causal=False)
    world = world_of(network)
    controls = draw(world, 9)[2]
    engine = Engine(world, {"audio": network}, noise_levels=(1.0,))
    engine.reset(seed=1)

    def roll(first: int, last: int) -> Tensor:
        steps = [engine.step(controls.buttons[:, t], controls.axes[:, t]) for t in range(first, last)]
        return torch.cat([frame.decoded["audio"] for frame in steps], -1)

    roll(0, 4)
    snapshot = engine.snapshot()
    expected = roll(4, 9)
    engine.restore(snapshot)
    assert torch.equal(roll(4, 9), expected)
    engine.restore(snapshot)  # which the continuations have not changed
    assert torch.equal(roll(4, 9), expected)
    modules = {id(module) for module in network.modules()}
    assert {id(step._layer) for step in snapshot.sound["audio"]._stream._steps if hasattr(step, "_layer")} <= modules


def test_sound_is_decoded_beside_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    network = autoencoder(causal=True)
    world = world_of(network)
    controls = draw(world, 3)[2]
    engine = Engine(world, {"audio": network}, noise_levels=(1.0,))

    def roll() -> list[Frame]:
        engine.reset(seed=1)
        return [engine.step(controls.buttons[:, t], controls.axes[:, t]) for t in range(3)]

    expected = [frame.decoded["audio"] for frame in roll()]
    begun, plain = threading.Event(), SoundDecoder.__call__

    def late(decoder: SoundDecoder, tokens: Tensor) -> Tensor:
        assert begun.wait(60)
        return plain(decoder, tokens)

    monkeypatch.setattr(SoundDecoder, "__call__", late)
    frames = roll()  # would wait for ever if it decoded sound itself
    begun.set()
    for frame, sound in zip(frames, expected, strict=True):
        assert torch.equal(frame.decoded["audio"], sound)


def test_a_decoder_of_other_sound_is_refused() -> None:
    world = lively(**streams("audio"))
    with refused("latents.encoder", "audio decoder", models.fingerprint(autoencoder(True).encoder)):
        Engine(world, {"audio": autoencoder(True)})


def test_clips_are_decoded_whole_and_divided_into_frames() -> None:
    network, latents = autoencoder(causal=False), torch.randn(2, 5, TOKENS, CHANNELS)
    sound = decode_sound(network, latents)
    assert sound.shape == (2, 5, 2, TOKENS * network.hop)
    assert torch.equal(joined(sound), network.decode(latents.flatten(1, 2).mT).clamp(-1, 1))
    assert torch.equal(by_frame(joined(sound), 5), sound)


def noise(*shape: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return level * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_mel_distance_is_that_of_its_frame() -> None:
    true = noise(3, 2 + 6, 2, SAMPLES)
    generated = true[:, 2:].clone()
    curves = mel_curves(Sound(true, generated, RATE))
    assert curves["mel"] == [0.0] * 6
    assert min(curves["other_mel"]) > 1
    generated[:, 4] *= 10  # 20 dB louder
    found = mel_curves(Sound(true, generated, RATE))["mel"]
    assert found[4] == pytest.approx(20, abs=6)  # windows of the spectrum overlap its neighbours
    assert found[:3] == [0.0] * 3
    assert set(mel_curves(Sound(true[:1], generated[:1], RATE))) == {"mel"}


def shots(clips: int = 6, frames: int = 40, context: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Presses of ATTACK, eight frames apart, float[B, T, 1], and sound with a bang a hundredth of a second later."""
    generator = torch.Generator().manual_seed(seed)
    buttons = torch.zeros(clips, frames, 1)
    sound = noise(clips, frames, 2, SAMPLES, seed=seed, level=1e-3)
    for clip in range(clips):
        first = int(torch.randint(context, context + 8, (), generator=generator))
        for t in range(first, frames, 16):
            buttons[clip, t : t + 2] = 1
            sound[clip, t, :, 441:] += noise(2, SAMPLES - 441, seed=clip + t, level=0.3)
    return buttons, sound


def agreement(buttons: Tensor, true: Tensor, generated: Tensor, names: list[str]) -> dict[str, Any]:
    return onset_agreement(Sound(true, generated[:, 4:], RATE), buttons, names)


def test_an_audible_shot_agrees_and_an_inaudible_one_is_at_chance() -> None:
    buttons, sound = shots()
    found = agreement(buttons, sound, sound, ["ATTACK"])
    assert found["onset_agreement"] == found["onset_agreement_true"] == 1
    assert found["shots"] == int((buttons[:, 4:].diff(dim=1, prepend=buttons[:, 3:4]) > 0).sum())
    late = sound.roll(8, 1)
    assert agreement(buttons, sound, late, ["ATTACK"])["onset_agreement"] < 0.5
    silent = torch.zeros_like(sound)
    assert agreement(buttons, sound, silent, ["ATTACK"])["onset_agreement"] == 0.5
    assert agreement(buttons, sound, sound, ["USE"]) == {}
    assert agreement(torch.zeros_like(buttons), sound, sound, ["ATTACK"]) == {}
    assert agreement(torch.ones_like(buttons), sound, sound, ["ATTACK"]) == {}


def test_the_end_of_a_sound_is_no_onset() -> None:
    ending = noise(1, 2, 4 * SAMPLES)
    ending[..., 2 * SAMPLES :] = 0
    end, begin = (onset_strength(sound, RATE, 4, 1).max() for sound in (ending, ending.flip(-1)))
    assert begin > 3 * end


def test_the_area_under_the_curve_counts_pairs() -> None:
    assert area_under_roc(torch.tensor([1.0, 2]), torch.tensor([0.0, 1, 3])) == pytest.approx((1.5 + 2) / 6)
