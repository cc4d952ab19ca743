"""Clips that recipes of world models take."""

import torch
from torch import Tensor

from owl.rollout.clips import clip_inputs, unpacked_inputs
from tests.helpers.errors import refused
from tests.helpers.latents import draw, lively, streams


def batch() -> dict[str, Tensor]:
    network = lively(**streams("audio"))
    latents, _, controls = draw(network, 6, 2)
    stored = {network.latent_modalities[name]: x for name, x in latents.items()}
    return stored | {"buttons": controls.buttons, "axes": controls.axes}


def test_latents_are_standardised_and_given_ones_go_with_the_controls() -> None:
    network = lively(**streams("audio", "conditioning"))
    network.video_mean += 1
    network.conditioning_std *= 2
    data = batch() | {"conditioning_latent": torch.randn(2, 6, 1, 4, 6)}
    latents, controls, document = clip_inputs(network, data)
    assert document is None
    assert latents.keys() == {"video", "audio"}
    torch.testing.assert_close(latents["video"], data["latent"] - 1)
    torch.testing.assert_close(controls.given["conditioning"], data["conditioning_latent"] / 2)


def test_packed_or_short_clips_are_refused_where_one_episode_is_needed() -> None:
    network, data = lively(**streams("audio")), batch()
    unpacked_inputs(network, data, 6)
    with refused("recipe.dataset", "6 frames long", "7 frames"):
        unpacked_inputs(network, data, 7)
    with refused("recipe.dataset", "packed", "pack to false"):
        unpacked_inputs(network, data | {"document": torch.zeros(2, 6, dtype=torch.int64)}, 6)
    with refused("recipe.dataset", "no audio_latent"):
        unpacked_inputs(network, {name: x for name, x in data.items() if name != "audio_latent"}, 6)
