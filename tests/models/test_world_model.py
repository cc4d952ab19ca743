"""What a frame's velocity depends on, and on nothing else: causality, windows, packing, extensions, save and load."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl import models
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import NEVER, Frames
from tests.helpers.errors import refused
from tests.helpers.latents import TINY, draw, lively, streams

FULL = streams("audio", "motion")


def call(network: nn.Module, latents: Streams, level: Tensor, controls: Controls, **more: Any) -> Streams:
    with torch.no_grad():
        return network(latents, level, controls, **more)


def part(latents: Streams, level: Tensor, controls: Controls, frames: slice) -> tuple[Streams, Tensor, Controls]:
    """Some of the frames."""
    shown = Controls(controls.buttons[:, frames], controls.axes[:, frames])
    return {name: x[:, frames] for name, x in latents.items()}, level[:, frames], shown


def assert_close(found: Streams, expected: Streams) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def changes(latents: Streams, level: Tensor, controls: Controls, frame: int) -> dict[str, tuple]:
    """Everything about one frame that can be changed, each change on its own."""

    def replaced(x: Tensor) -> Tensor:
        other = x.clone()
        other[:, frame] = 1 - x[:, frame] * 0.9
        return other

    changed: dict[str, tuple] = {name: (latents | {name: replaced(x)}, level, controls) for name, x in latents.items()}
    changed["level"] = (latents, replaced(level), controls)
    changed["buttons"] = (latents, level, Controls(replaced(controls.buttons), controls.axes))
    changed["axes"] = (latents, level, Controls(controls.buttons, replaced(controls.axes)))
    known = torch.ones_like(level, dtype=torch.bool)
    known[:, frame] = False
    changed["known"] = (latents, level, Controls(controls.buttons, controls.axes, known))
    return changed


@pytest.mark.parametrize("patch", [1, 2])
def test_a_frame_depends_on_those_within_its_windows_and_on_no_later_one(patch: int) -> None:
    network = lively(**streams("audio", "motion", patch=patch))
    assert network.windows == [2, 4]
    given = draw(network, 12, batch=2)
    before = call(network, *given)
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in given[0].items()}
    for changed in (0, 4, 11):
        for what, other in changes(*given, changed).items():
            after = call(network, *other)
            for stream, x in after.items():
                affected = [t for t in range(12) if not torch.equal(x[:, t], before[stream][:, t])]
                assert affected == list(range(changed, min(12, changed + 2 + 4 + 1))), (what, stream)


def test_frames_of_the_sink_are_always_visible() -> None:
    network = lively(sink=2)
    given = draw(network, 14)
    before = call(network, *given)["video"]
    for changed, last in ((0, 13), (1, 13), (2, 8)):
        after = call(network, *changes(*given, changed)["video"])["video"]
        affected = [t for t in range(14) if not torch.equal(after[:, t], before[:, t])]
        assert affected == list(range(changed, last + 1))


def test_without_causality_every_frame_sees_every_other() -> None:
    network = lively()
    given = draw(network, 10)
    before = call(network, *given, causal=False)["video"]
    after = call(network, *changes(*given, 9)["video"], causal=False)["video"]
    assert (before != after).flatten(2).any(-1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_as_if_each_were_alone(causal: bool) -> None:
    network = lively(**FULL, sink=1)
    given = draw(network, 10, batch=2)
    documents = torch.tensor([[0] * 4 + [1] * 4 + [-1] * 2, [0] * 7 + [1] * 3])
    time = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, NEVER, NEVER], [*range(7), 0, 1, 2]])
    frames = Frames(time, torch.zeros(10, dtype=torch.int64), documents)
    together = call(network, *given, frames=frames, causal=causal)
    assert all(x.isfinite().all() for x in together.values())
    for item, pieces in enumerate([(slice(0, 4), slice(4, 8)), (slice(0, 7), slice(7, 10))]):
        for piece in pieces:
            alone = call(network, *part(*given, piece), causal=causal)
            assert_close(
                {name: x[item : item + 1, piece] for name, x in together.items()},
                {name: x[item : item + 1] for name, x in alone.items()},
            )


def test_teacher_forcing_is_one_noisy_frame_after_a_clean_context() -> None:
    network = lively(**FULL)
    clean, context_level, controls = draw(network, 8)
    noisy, level, _ = draw(network, 8, seed=1)
    now = torch.arange(8)
    frames = Frames(torch.cat([now, now])[None], torch.cat([torch.zeros(8), torch.ones(8)]).long())
    both = {name: torch.cat([clean[name], noisy[name]], 1) for name in clean}
    doubled = Controls(controls.buttons.repeat(1, 2, 1), controls.axes.repeat(1, 2, 1))
    forced = call(network, both, torch.cat([context_level, level], 1), doubled, frames=frames)
    assert_close({name: x[:, :8] for name, x in forced.items()}, call(network, clean, context_level, controls))
    for t in range(8):
        last = {name: torch.cat([clean[name][:, :t], noisy[name][:, t : t + 1]], 1) for name in clean}
        levels = torch.cat([context_level[:, :t], level[:, t : t + 1]], 1)
        shown = Controls(controls.buttons[:, : t + 1], controls.axes[:, : t + 1])
        one = call(network, last, levels, shown)
        assert_close({n: x[:, 8 + t] for n, x in forced.items()}, {n: x[:, t] for n, x in one.items()})


def test_a_clip_is_the_same_at_any_time() -> None:
    network = lively()
    given = draw(network, 6)
    copy = torch.zeros(6, dtype=torch.int64)
    late = call(network, *given, frames=Frames(10**9 + torch.arange(6)[None], copy))
    assert_close(late, call(network, *given))


def test_a_motion_stream_is_started_from_the_model_that_it_extends() -> None:
    base = lively()
    torch.manual_seed(1)
    extended = WorldTransformer(**TINY | streams("motion")).eval()
    missing = extended.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("motion_") for name in missing.missing_keys)
    latents, level, controls = draw(extended, 6)
    before = call(base, {"video": latents["video"]}, level, controls)["video"]
    after = call(extended, latents, level, controls)
    assert torch.equal(after["video"], before)
    assert not after["motion"].any()
    out = extended(latents, level, controls)
    sum(x.square().sum() for x in (out["video"], out["motion"] - 1)).backward()
    assert extended.motion_in.weight.grad.any()
    assert extended.motion_out.linear.weight.grad.any()


def test_a_conditioning_does_not_matter_at_first_and_can_be_learnt() -> None:
    network = lively(**streams("conditioning", channels=3))
    nn.init.zeros_(network.conditioning_in.weight)
    given = draw(network, 5)
    conditioning = torch.randn(1, 5, 3, 4, 6)
    latents, level, controls = given

    def shown(conditioning: Tensor) -> tuple[Streams, Tensor, Controls]:
        return latents, level, replace(controls, given={"conditioning": conditioning})

    without = call(network, *given)["video"]
    assert torch.equal(call(network, *shown(conditioning))["video"], without)
    network(*shown(conditioning))["video"].square().sum().backward()
    assert network.conditioning_in.weight.grad.any()
    nn.init.normal_(network.conditioning_in.weight)
    assert not torch.equal(call(network, *shown(conditioning))["video"], without)
    assert torch.equal(call(network, *shown(torch.zeros_like(conditioning)))["video"], without)


@pytest.mark.parametrize("stream", ["audio", "motion"])
def test_streams_attend_to_each_other_and_exist_only_if_configured(stream: str) -> None:
    assert list(lively().streams) == ["video"]
    network = lively(**streams(stream))
    assert list(network.streams) == ["video", stream]
    assert network.tokens == 6 + (2 if stream == "audio" else 0)
    given = draw(network, 3)
    before = call(network, *given)
    for changed in network.streams:
        after = call(network, *changes(*given, 0)[changed])
        assert all(not torch.equal(after[name][:, 0], before[name][:, 0]) for name in network.streams)


def test_controls_of_some_frames_are_theirs() -> None:
    controls = draw(lively(), 5)[2]
    controls.known, controls.given = torch.arange(5)[None] % 2 == 0, {"depth": torch.randn(1, 5, 1, 4, 6)}
    part = controls.at(slice(1, 4))
    again = Controls.joined([controls.at(slice(1)), part, controls.at(slice(4, 5))])
    assert torch.equal(part.known, torch.tensor([[False, True, False]]))
    for name in ("buttons", "axes", "known"):
        assert torch.equal(getattr(again, name), getattr(controls, name))
    assert torch.equal(again.given["depth"], controls.given["depth"])
    assert controls.at(slice(2)).given["depth"].shape[1] == 2


def test_motion_joins_a_trained_model_without_changing_it() -> None:
    """As VideoJAM starts: its projections are zero, and both learn from the first step on."""
    alone = lively()
    jam = WorldTransformer(**TINY | streams("motion")).eval()
    added = jam.load_state_dict(alone.state_dict(), strict=False)
    assert not added.unexpected_keys
    assert all(name.startswith("motion_") for name in added.missing_keys)
    latents, level, controls = draw(jam, 5)
    found = call(jam, latents, level, controls)
    assert torch.equal(found["video"], call(alone, {"video": latents["video"]}, level, controls)["video"])
    assert not found["motion"].any()
    velocities = jam(latents, level, controls)
    (velocities["video"].square().mean() + (velocities["motion"] - 1).square().mean()).backward()
    assert jam.motion_in.weight.grad.any()
    assert jam.motion_out.linear.weight.grad.any()


def test_sinks_have_no_place_and_every_token_attends_to_them() -> None:
    declared = streams("audio")["streams"]
    declared["audio"] |= {"sinks": 2}
    network = lively(streams=declared)
    assert network.tokens == 6 + 2 + 2
    given = draw(network, 4)
    before = call(network, *given)
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in given[0].items()}
    # they have no order, and the order of others matters (test_each_token_knows_its_place)
    with torch.no_grad():
        network.audio_sinks.copy_(network.audio_sinks.flip(0))
        torch.testing.assert_close(call(network, *given), before, atol=1e-5, rtol=1e-5)
        network.audio_sinks[0] += 1
    after = call(network, *given)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_each_token_knows_its_place() -> None:
    """Two audio tokens, or two places of the picture, that change places do not simply exchange their outputs."""
    network = lively(**streams("audio", patch=1))
    latents, level, controls = draw(network, 2)
    before = call(network, latents, level, controls)
    for name, axis in (("audio", 2), ("video", 3), ("video", 4)):
        swapped = call(network, latents | {name: latents[name].flip(axis)}, level, controls)[name].flip(axis)
        assert (swapped - before[name]).abs().max() > 1e-2
    places = torch.stack(network._positions(torch.device("cpu")), 1)
    assert len(places.unique(dim=0)) == network.tokens == 4 * 6 + 2  # sound lies where no picture does


def test_a_new_network_predicts_nothing_and_learns_at_once() -> None:
    network = WorldTransformer(**TINY | FULL)
    given = draw(network, 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        velocities = network(*given)
        loss = torch.stack([(x - 1).square().mean() for x in velocities.values()]).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == 3
    assert losses[-1] < 0.1


def gradients(network: WorldTransformer) -> dict[str, Tensor]:
    network.train().zero_grad()
    velocities = network(*draw(network, 6, batch=2))
    torch.stack([x.square().sum() for x in velocities.values()]).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_recomputing_activations_changes_no_gradient() -> None:
    expected, found = gradients(lively(**FULL)), gradients(lively(**FULL, checkpoint=True))
    assert expected.keys() == found.keys() == {n for n, _ in lively(**FULL).named_parameters()} - {"controls.unknown"}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_compiled_blocks_compute_the_same_and_are_not_compiled_again_for_every_packing() -> None:
    expected = gradients(lively(depth=1, global_every=0))
    network = lively(depth=1, global_every=0)
    for block in network.blocks:
        block.compile()
    found = gradients(network)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.utils.counters.clear()
    given = draw(network, 6, batch=2)
    for cut in range(1, 6):
        document = (torch.arange(6) >= cut).long().expand(2, 6)
        time = torch.where(document == 0, torch.arange(6), torch.arange(6) - cut)
        network(*given, frames=Frames(time, torch.zeros(6, dtype=torch.int64), document))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # times of shape [2, ...] instead of [1, ...]


def test_standardised_latents_have_unit_statistics_and_come_back() -> None:
    network = lively(**FULL)
    for name, buffer in network.named_buffers():
        if name.endswith(("mean", "std")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    latents = draw(network, 4)[0]
    standard = network.standardize(latents)
    torch.testing.assert_close(network.restore(standard), latents)
    for name, axis in (("video", 2), ("motion", 2), ("audio", 3)):
        mean, std = getattr(network, f"{name}_mean"), getattr(network, f"{name}_std")
        for channel in range(latents[name].shape[axis]):
            expected = (latents[name].select(axis, channel) - mean[channel]) / std[channel]
            torch.testing.assert_close(standard[name].select(axis, channel), expected)


def test_a_saved_network_predicts_the_same(tmp_path: Path) -> None:
    network = lively(**streams("audio", "motion", "conditioning"), sink=1)
    network.video_encoder.copy_(torch.arange(8))
    network.video_std.fill_(3)
    models.save(network, tmp_path)
    loaded = models.load(tmp_path)
    assert isinstance(loaded, WorldTransformer)
    assert loaded.config == network.config
    assert loaded.video_encoder.tolist() == list(range(8))
    assert loaded.video_std.unique().item() == 3
    given = draw(network, 5)
    torch.testing.assert_close(call(loaded, *given), call(network, *given), atol=0, rtol=0)


def test_streams_are_declared_in_one_place() -> None:
    """Sound and pose with tokens of their own beside the picture, depth on its grid; each with its role and name."""
    declared = streams("audio", "conditioning")["streams"]
    declared |= {"pose": {"shape": [3, 5], "role": "given", "modality": "camera"}}
    network = lively(streams=declared)
    assert list(network.generated) == ["video", "audio"]
    assert list(network.given) == ["conditioning", "pose"]
    assert network.latent_modalities == {
        "video": "latent",
        "audio": "audio_latent",
        "conditioning": "conditioning_latent",
        "pose": "camera",
    }
    assert network.tokens == 6 + 2 + 3
    places = torch.stack(network._positions(torch.device("cpu")), 1)
    assert len(places.unique(dim=0)) == network.tokens
    assert not hasattr(network, "pose_out")
    latents, level, controls = draw(network, 4)
    given = {"conditioning": torch.randn(1, 4, 1, 4, 6), "pose": torch.randn(1, 4, 3, 5)}
    before = call(network, latents, level, replace(controls, given=given))
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in latents.items()}
    for name, latent in given.items():
        without = {other: x for other, x in given.items() if other != name}
        after = call(network, latents, level, replace(controls, given=without))
        assert all(not torch.equal(after[stream], before[stream]) for stream in before)
        zeros = without | {name: torch.zeros_like(latent)}
        assert_close(call(network, latents, level, replace(controls, given=zeros)), after)


def test_hidden_states_come_out_and_residuals_go_in() -> None:
    network = lively(depth=3)
    given = draw(network, 4)
    before = call(network, *given)
    (_, (second, first)) = call(network, *given, hidden=[1, 0])
    assert first.shape == second.shape == (1, 4, 6, 32)
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in network.blocks]
    assert_close(call(network, *given, residuals={}), before)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], first)
    assert torch.equal(seen[1], second)
    residual = torch.randn_like(first)
    velocities, (changed,) = call(network, *given, residuals={0: residual}, hidden=[0])
    assert_close({"layer": changed}, {"layer": first + residual})
    assert not torch.equal(velocities["video"], before["video"])
    (_, (last,)) = call(network, *given, residuals={2: -seen[2]}, hidden=[2])
    assert not last.any()
    for wrong in ({"hidden": [3]}, {"residuals": {3: residual}}):
        with refused("network.layer", "no layer 3", "0 to 2"):
            call(network, *given, **wrong)


@pytest.mark.parametrize(
    ("wrong", "token"),
    [
        (streams(video=(4,)), "shape is [4]"),
        (streams(video=(0, 4, 6)), "shape is [0, 4, 6]"),
        (streams(patch=4), "patch is 4, expected a divisor of the latent's 4x6"),
        (streams(patch=0), "patch is 0"),
        ({"width": 48}, "width 48, heads 2, depth 2"),
        ({"heads": 0}, "heads 0"),
        ({"depth": 0}, "depth 0"),
        ({"window": 0}, "window 0"),
        ({"global_window": 1}, "global_window 1"),
        ({"global_every": -1}, "global_every -1"),
        ({"sink": -1}, "sink -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0"),
        ({"streams": {"audio": {"shape": [0, 4]}}}, "shape is [0, 4]"),
        ({"streams": {"audio": {"shape": [4, 4], "patch": 2}}}, "patch is 2, expected 1"),
        ({"streams": {"a b": {"shape": [4, 4]}}}, 'named "a b"'),
        ({"streams": {"audio": {"shape": [4, 4], "dropout": 1.0}}}, "dropout of a generated stream is 1"),
        ({"streams": {"audio": {"shape": [4, 4], "sinks": -1}}}, "sinks is -1"),
        ({"streams": {"video": {"shape": [1, 4, 6], "sinks": 1}}}, "sinks is 1"),
        (
            {"streams": {"depth": {"shape": [1, 4, 6], "role": "given", "dropout": 0.1}}},
            "dropout of a given stream is 0.1",
        ),
        ({"streams": {"depth": {"shape": [1, 4, 6], "role": "seen"}}}, 'role is "seen"'),
        ({"streams": {"depth": {"shape": [1, 4, 6], "role": "given"}}}, "no stream of depth is generated"),
        ({"streams": {}}, "none"),
        (
            {"streams": {"video": {"shape": [1, 4, 6]}, "motion": {"shape": [1, 4, 6], "patch": 2}}},
            "4x6 (video), 2x3 (motion)",
        ),
    ],
)
def test_impossible_networks_are_reported_in_one_sentence(wrong: dict[str, Any], token: str) -> None:
    with refused("network.arguments", token):
        WorldTransformer(**TINY | wrong)


@pytest.mark.parametrize("possible", [{"global_every": 0, "global_window": 1}, {"buttons": []}, {"axes": []}])
def test_unusual_networks_are_possible(possible: dict[str, Any]) -> None:
    network = lively(**possible)
    assert call(network, *draw(network, 3))["video"].isfinite().all()
