"""The streaming engine gives what whole sequences without any cache give, and nothing of it grows."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.flow_matching import Step, add_noise
from owl.models.image_autoencoder import ImageAutoencoder
from owl.models.image_decoder import ImageDecoder, decode_clips
from owl.models.world_model import Controls, Streams, WorldTransformer
from owl.nn.attention import Frames
from owl.nn.frozen import freeze
from owl.nn.placement import placement
from owl.precision.inference import Quantization
from owl.rollout.engine import Engine, Frame
from owl.rollout.generate import SAMPLERS, Schedule
from tests.helpers.errors import refused
from tests.helpers.latents import LATENT, TINY, draw, lively, streams

LEVELS = (1.0, 0.6, 0.3)


def at(controls: Controls, frame: int) -> tuple[Tensor, Tensor]:
    return controls.buttons[:, frame], controls.axes[:, frame]


def roll(engine: Engine, controls: Controls, context: Streams | None = None, seed: int = 0) -> list[Streams]:
    """Roll out: the context's frames take the first controls; returns the latents of every generated frame."""
    known = 0 if context is None else context["video"].shape[1]
    shown = None if context is None else Controls(controls.buttons[:, :known], controls.axes[:, :known])
    engine.reset(context, shown, batch=len(controls.buttons), seed=seed)
    return [engine.step(*at(controls, t)).latents for t in range(known, controls.buttons.shape[1])]


def same(found: list[Streams], expected: list[Streams]) -> bool:
    """Bit for bit."""
    return len(found) == len(expected) and all(
        torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in b
    )


class Reference:
    """What an engine should do, from whole sequences: no cache, no ring, no joined passes."""

    def __init__(
        self,
        network: WorldTransformer,
        sampler: str,
        context_noise: float,
        guidance: float,
        inner_guidance: float = 0.0,
    ) -> None:
        self.network, self.sampler = network, sampler
        self.context_noise, self.guidance, self.inner_guidance = context_noise, guidance, inner_guidance

    @torch.no_grad()
    def roll(self, controls: Controls, context: Streams | None, seed: int) -> list[Streams]:
        batch, length = controls.buttons.shape[:2]
        random = torch.Generator().manual_seed(seed)

        def noise() -> Streams:
            return {
                name: torch.randn(batch, 1, *stream.shape, generator=random)
                for name, stream in self.network.generated.items()
            }

        def spoiled(x: Streams) -> Streams:
            if not self.context_noise:
                return x
            fresh = noise()
            return {n: add_noise(x[n], fresh[n], torch.full((batch, 1), self.context_noise)) for n in x}

        known = 0 if context is None else context["video"].shape[1]
        given = {} if context is None else self.network.standardize(context)
        past = [spoiled({name: x[:, t : t + 1] for name, x in given.items()}) for t in range(known)]
        generated = []
        for now in range(known, length):
            x, before = noise(), 1.0
            earlier: Streams = {}
            for level, following in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
                velocity = self.velocity(past, x, level, controls, now)
                fresh = noise() if self.sampler == "consistency" else x
                x = {
                    n: SAMPLERS[self.sampler](
                        Step(x[n], velocity[n], level, following, earlier.get(n), before, fresh[n])
                    )
                    for n in x
                }
                earlier, before = velocity, level
            past.append(spoiled(x))
            generated.append({name: latent[:, 0] for name, latent in self.network.restore(x).items()})
        return generated

    def velocity(self, past: list[Streams], x: Streams, level: float, controls: Controls, now: int) -> Streams:
        """Of the frame ``now``, by one pass over all frames so far."""
        latents = {name: torch.cat([*(frame[name] for frame in past), x[name]], 1) for name in x}
        levels = torch.tensor([self.context_noise] * now + [level]).expand(len(controls.buttons), -1)
        frames = Frames(torch.arange(now + 1)[None], torch.tensor([0] * now + [1]))
        found = []
        for aware, moving in ((True, True), (False, True), (True, False)):
            known = torch.ones(len(controls.buttons), now + 1, dtype=torch.bool)
            known[:, -1] = aware
            shown = Controls(controls.buttons[:, : now + 1], controls.axes[:, : now + 1], known)
            hinted = dict(latents)
            if "motion" in x:
                hinted["motion"] = torch.cat([latents["motion"][:, :-1], moving * x["motion"]], 1)
            velocity = self.network(hinted, levels, shown, frames)
            found.append({name: v[:, -1:] for name, v in velocity.items()})
        conditional, null, still = found
        w1, w2 = self.guidance - 1, self.inner_guidance  # VideoJAM's
        return {n: (1 + w1 + w2) * conditional[n] - w1 * null[n] - w2 * still[n] for n in null}


SETTINGS: dict[str, dict[str, Any]] = {
    "adams_bashforth": {},
    "euler": {"sampler": "euler"},
    "consistency": {"sampler": "consistency"},
    "guidance": {"guidance": 2.5},
    "inner guidance": {"inner_guidance": 1.5},
    "context noise": {"context_noise": 0.1},
    "everything": {"sampler": "consistency", "guidance": 0.5, "context_noise": 0.2, "inner_guidance": 0.5},
}


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("known", [0, 1, 9], ids=["from nothing", "from one frame", "context longer than any window"])
@pytest.mark.parametrize("name", SETTINGS)
def test_streaming_equals_whole_sequences_without_a_cache(name: str, known: int, one_pass: bool) -> None:
    settings: dict[str, Any] = {"sampler": "adams_bashforth", "context_noise": 0.0, "guidance": 1.0}
    settings |= {"inner_guidance": 0.0} | SETTINGS[name]
    declared = streams("audio", "motion")["streams"]
    declared["audio"] |= {"sinks": 1}
    declared["motion"] |= {"dropout": 0.2}
    network = lively(sink=1, streams=declared)
    network.video_mean.fill_(0.3)
    network.audio_std.fill_(2)
    latents, _, controls = draw(network, known + 10, batch=2)
    context = {stream: x[:, :known] for stream, x in latents.items()} if known else None
    expected = Reference(network, **settings).roll(controls, context, seed=3)
    found = roll(Engine(network, noise_levels=LEVELS, one_pass=one_pass, **settings), controls, context, seed=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)  # of ten frames, each on those before


def test_hundreds_of_frames_equal_a_sliding_window_over_the_whole_sequence() -> None:
    """One step a frame, so that one pass over [clean frames, noisy frames] must give every frame again."""
    frames = 300
    network = lively(**streams(video=(2, 4, 4)), sink=2, window=3, global_window=7)
    controls = draw(network, frames)[2]
    engine = Engine(network, noise_levels=(1.0,))
    generated = torch.stack([frame["video"] for frame in roll(engine, controls, seed=5)], 1)
    random = torch.Generator().manual_seed(5)
    noise = torch.cat([torch.randn(1, 1, 2, 4, 4, generator=random) for _ in range(frames)], 1)
    now = torch.arange(frames)
    layout = Frames(torch.cat([now, now])[None], torch.cat([torch.zeros(frames), torch.ones(frames)]).long())
    doubled = Controls(controls.buttons.repeat(1, 2, 1), controls.axes.repeat(1, 2, 1))
    level = torch.cat([torch.zeros(1, frames), torch.ones(1, frames)], 1)
    with torch.no_grad():
        velocity = network({"video": torch.cat([generated, noise], 1)}, level, doubled, layout)["video"][:, frames:]
    torch.testing.assert_close(generated, noise - velocity, atol=1e-5, rtol=1e-5)


def test_an_action_changes_its_frame_and_no_earlier_one() -> None:
    network = lively()
    controls = draw(network, 12)[2]
    before = roll(Engine(network, noise_levels=LEVELS), controls)
    other = Controls(controls.buttons.clone(), controls.axes.clone())
    other.buttons[:, 6] = 1 - other.buttons[:, 6]
    after = roll(Engine(network, noise_levels=LEVELS), other)
    assert [torch.equal(a["video"], b["video"]) for a, b in zip(after, before, strict=True)] == [True] * 6 + [False] * 6


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_snapshot_continues_bit_for_bit(one_pass: bool) -> None:
    network = lively(sink=1)
    controls = draw(network, 20)[2]
    settings: dict[str, Any] = {"noise_levels": LEVELS, "sampler": "consistency", "guidance": 2, "context_noise": 0.1}
    engine = Engine(network, one_pass=one_pass, **settings)
    engine.reset(seed=1)
    for t in range(8):
        engine.step(*at(controls, t))
    snapshot = engine.snapshot()
    expected = [engine.step(*at(controls, t)).latents for t in range(8, 20)]
    engine.restore(snapshot)
    assert same([engine.step(*at(controls, t)).latents for t in range(8, 20)], expected)
    another = Engine(network, one_pass=one_pass, **settings)
    another.reset(seed=7)
    another.step(*at(controls, 3))
    another.restore(snapshot)  # which neither continuation has changed
    assert same([another.step(*at(controls, t)).latents for t in range(8, 20)], expected)


def test_a_seed_decides_everything_and_a_reset_forgets_everything() -> None:
    network = lively()
    latents, _, controls = draw(network, 9)
    context = {"video": latents["video"][:, :4]}
    engine = Engine(network, noise_levels=LEVELS, sampler="consistency")
    first = roll(engine, controls, context, seed=4)
    torch.manual_seed(99)  # the global state plays no part
    assert same(roll(engine, controls, context, seed=4), first)
    assert not same(roll(engine, controls, context, seed=5), first)
    assert same(roll(engine, controls, context, seed=4), first)


def test_rollouts_side_by_side_do_not_touch_each_other() -> None:
    network = lively(**streams("audio"))
    latents, _, controls = draw(network, 9, batch=2)
    context = {name: x[:, :3] for name, x in latents.items()}
    engine = Engine(network, noise_levels=LEVELS, guidance=2)
    before = roll(engine, controls, context)
    other = Controls(controls.buttons.clone(), controls.axes.clone())
    other.axes[1] += 1
    changed = {name: torch.cat([x[:1], x[1:] + 1]) for name, x in context.items()}
    after = roll(engine, other, changed)
    for a, b in zip(after, before, strict=True):
        for name in b:
            assert torch.equal(a[name][0], b[name][0])
            assert not torch.equal(a[name][1], b[name][1])


@pytest.mark.parametrize("one_pass", [True, False])
def test_nothing_grows_with_time(one_pass: bool) -> None:
    network = lively(sink=1)
    controls = draw(network, 120)[2]
    engine = Engine(network, noise_levels=(1.0, 0.5), guidance=2, one_pass=one_pass)
    engine.reset()
    places = [(tensor.data_ptr(), tensor.shape) for tensor in engine.cache.tensors()]
    sizes = []
    for t in range(120):
        frame = engine.step(*at(controls, t))
        assert frame.latents["video"].isfinite().all()
        if t % 40 == 39:
            sizes.append(sum(tensor.numel() for tensor in engine.snapshot().cache))
    assert [(tensor.data_ptr(), tensor.shape) for tensor in engine.cache.tensors()] == places
    assert len(set(sizes)) == 1


def count_passes(engine: Engine, controls: Controls) -> list[int]:
    """Frames in each pass of the third generated frame."""
    engine.reset(batch=len(controls.buttons))
    for t in range(2):
        engine.step(*at(controls, t))
    seen: list[int] = []
    handle = engine.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]["video"].shape[1]))
    engine.step(*at(controls, 2))
    handle.remove()
    return seen


def test_one_pass_commits_along_with_the_first_denoising_step() -> None:
    network = lively()
    controls = draw(network, 3)[2]
    assert count_passes(Engine(network, noise_levels=LEVELS), controls) == [2, 1, 1]
    assert count_passes(Engine(network, noise_levels=LEVELS, one_pass=False), controls) == [1, 1, 1, 1]
    assert count_passes(Engine(network, noise_levels=LEVELS, guidance=3), controls) == [3, 2, 2]
    moving = lively(streams=streams("motion")["streams"] | {"motion": {"shape": [1, 4, 6], "patch": 2, "dropout": 0.2}})
    guided = Engine(moving, noise_levels=LEVELS, guidance=6, inner_guidance=3)
    assert count_passes(guided, controls) == [4, 3, 3]
    with refused("engine.guidance", "inner_guidance is 3", "no stream of video"):
        Engine(network, inner_guidance=3)


def test_the_network_given_is_left_as_it_is() -> None:
    network = lively().train()
    controls = draw(network, 3)[2]
    engine = Engine(network, noise_levels=LEVELS, dtype=torch.bfloat16)
    coarse = roll(engine, controls)
    assert network.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())
    fine = roll(Engine(network, noise_levels=LEVELS), controls)
    torch.testing.assert_close(coarse[0]["video"], fine[0]["video"], atol=0.3, rtol=0.05)


class Still(WorldTransformer):
    """One whose velocity is the same everywhere, and a number of its dtype, so that only the integrator rounds."""

    def forward(self, latents: Streams, *given: Any, **more: Any) -> Streams:
        return {name: torch.full_like(x, 0.25, dtype=torch.bfloat16) for name, x in latents.items()}


def test_frames_and_statistics_are_of_full_precision_in_an_engine_of_less() -> None:
    network = Still(**TINY | streams("audio"))
    for name in network.streams:
        getattr(network, f"{name}_mean").fill_(1.001)
        getattr(network, f"{name}_std").fill_(0.3003)
    latents, _, controls = draw(network, 4)
    context = {name: x[:, :2] for name, x in latents.items()}
    settings: dict[str, Any] = {"noise_levels": LEVELS, "sampler": "euler", "context_noise": 0.1}
    expected = roll(Engine(network, **settings), controls, context)
    engine = Engine(network, dtype=torch.bfloat16, **settings)
    assert same(roll(engine, controls, context), expected)  # nothing but the network's own numbers is rounded
    assert placement(engine.network).dtype == torch.bfloat16
    assert all(layer.key.dtype == layer.value.dtype == torch.bfloat16 for layer in engine.cache.layers)
    assert engine._pending is not None
    assert all(x.dtype == torch.float32 for x in engine._pending[0].values())
    rough = Engine(deepcopy(network).bfloat16(), **settings)  # also where it comes in that dtype
    assert same(roll(rough, controls, context), expected)


def test_a_context_is_committed_with_its_conditioning() -> None:
    network = lively(**streams("conditioning", channels=2))
    latents, _, controls = draw(network, 4)
    scene = torch.randn(1, 4, 2, 4, 6)
    engine = Engine(network, noise_levels=LEVELS, sampler="euler")
    engine.reset(
        {"video": latents["video"][:, :3]},
        Controls(controls.buttons[:, :3], controls.axes[:, :3], given={"conditioning": scene[:, :3]}),
    )
    found = engine.step(*at(controls, 3), {"conditioning": scene[:, 3]}).latents["video"]
    # the same by one sequence without a cache: the context clean, the last frame from the engine's noise
    x = torch.randn(1, 1, *network.streams["video"].shape, generator=torch.Generator().manual_seed(0))
    for level, following in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
        whole = {"video": torch.cat([latents["video"][:, :3], x], 1)}
        levels = torch.tensor([[0, 0, 0, level]])
        velocity = network(whole, levels, Controls(controls.buttons, controls.axes, given={"conditioning": scene}))[
            "video"
        ][:, 3:]
        x = x + (following - level) * velocity
    torch.testing.assert_close(found, x[:, 0].detach(), atol=1e-5, rtol=1e-5)


def test_a_conditioning_is_seen_by_the_frame_that_it_is_given_for() -> None:
    network = lively(**streams("conditioning", channels=2))
    controls = draw(network, 3, batch=2)[2]
    engine, conditioning = Engine(network, noise_levels=LEVELS, guidance=2), torch.randn(2, 2, 4, 6)

    def second(given: Tensor | None) -> Tensor:
        engine.reset(batch=2)
        engine.step(*at(controls, 0))
        scene = None if given is None else {"conditioning": given}
        return engine.step(*at(controls, 1), scene).latents["video"]

    network.conditioning_mean.fill_(0.5)
    engine = Engine(network, noise_levels=LEVELS, guidance=2)
    assert torch.equal(second(None), second(torch.full((2, 2, 4, 6), 0.5)))  # standardised: nothing is the mean
    assert not torch.equal(second(None), second(conditioning))
    with refused("engine.shape", "conditioning", "[2, 2, 4]", "[2, 2, 4, 6]"):
        second(conditioning[..., 0])


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


def test_a_decoder_that_sees_its_previous_frame_streams_what_it_decodes_in_sequence(
    autoencoder: ImageAutoencoder,
) -> None:
    network = of_encoder(lively(), autoencoder)
    decoder = ImageDecoder.of(autoencoder, previous=True)
    torch.nn.init.normal_(decoder.hint.weight, std=0.3)
    engine = Engine(network, {"video": decoder}, noise_levels=LEVELS)
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
            latents = torch.cat([context["video"][:, -1:], latents], 1)  # it begins with the context's last frame
        with torch.no_grad():
            expected = decode_clips(decoder, latents)[:, -len(frames) :]
            assert not torch.allclose(expected[:, -1], decoder.decode(latents[:, -1]), atol=1e-3)
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


@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_the_schedule_can_change_between_frames(before: float, after: float) -> None:
    """As if the frames so far had been given to an engine with the new schedule as context."""
    network = lively()
    _, _, controls = draw(network, 8)
    batch = len(controls.buttons)
    changed = Engine(network, noise_levels=LEVELS, guidance=before)
    changed.reset(batch=batch)
    first = [changed.step(*at(controls, t)).latents for t in range(4)]
    random = changed.snapshot().random
    changed.change(Schedule((1.0, 0.5), guidance=after))
    assert changed.time == 4
    found = [changed.step(*at(controls, t)).latents for t in range(4, 8)]

    other = Engine(network, guidance=5.0)
    other.change(Schedule((1.0, 0.5), guidance=after))  # before the rollout
    context = {name: torch.stack([frame[name] for frame in first], 1) for name in first[0]}
    other.reset(context, Controls(controls.buttons[:, :4], controls.axes[:, :4]))
    state = other.snapshot()
    state.random = random
    other.restore(state)
    for t, frame in zip(range(4, 8), found, strict=True):
        expected = other.step(*at(controls, t)).latents
        for name, latent in frame.items():
            torch.testing.assert_close(latent, expected[name], rtol=1e-3, atol=1e-3)


def test_settings_that_make_no_sense_are_told(autoencoder: ImageAutoencoder) -> None:
    network = lively()
    for levels in ([], [0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0], [1.0, 0.5, -0.1]):
        with refused("engine.levels", str(levels)):
            Engine(network, noise_levels=levels)
    with refused("engine.sampler", "ddim", "adams_bashforth or euler or consistency"):
        Engine(network, sampler="ddim")  # type: ignore[arg-type]
    with refused("latents.encoder", "video decoder", models.fingerprint(autoencoder.encoder), "0000000000000000"):
        Engine(network, {"video": autoencoder})
    with refused("decoder.kind", "video decoder", "Linear"):
        Engine(network, {"video": torch.nn.Linear(1, 1)})
    with refused("decoder.stream", "decoder for audio", "has video"):
        Engine(network, {"audio": autoencoder})


def test_what_does_not_fit_is_told() -> None:
    network = lively(**streams("audio"))
    engine = Engine(network, noise_levels=LEVELS)
    latents, _, controls = draw(network, 4, batch=2)
    for call in (engine.snapshot, lambda: engine.step(*at(controls, 0))):
        with refused("engine.not-reset", "reset"):
            call()
    with refused("context.controls", "controls"):
        engine.reset(latents)
    with refused("context.empty", "0 frames"):
        empty = Controls(controls.buttons[:, :0], controls.axes[:, :0])
        engine.reset({name: x[:, :0] for name, x in latents.items()}, empty)
    with refused("context.shape", "audio is missing"):
        engine.reset({"video": latents["video"]}, controls)
    with refused("context.shape", "video is [2, 3, 2, 4, 6]", "[2, 4, "):
        engine.reset(latents | {"video": latents["video"][:, :3]}, controls)
    with refused("context.shape", "buttons are [2, 4, 2]", "[2, 4, 3]"):
        engine.reset(latents, Controls(controls.buttons[..., :2], controls.axes))
    for bad in (torch.nan, torch.inf):
        spoiled = latents["audio"].clone()
        spoiled[1, 2, 0, 0] = bad
        with refused("context.non-finite", "audio"):
            engine.reset(latents | {"audio": spoiled}, controls)
    engine.reset(latents, controls)
    with refused("engine.shape", "buttons", "[1, 3]", "[2, 3]"):
        engine.step(*(x[:1] for x in at(controls, 0)))
    with refused("engine.shape", "axes", "[2, 1]"):
        engine.step(controls.buttons[:, 0], controls.axes[:, 0, :1])
    with refused("engine.shape", "conditioning is given", "takes nothing"):
        engine.step(*at(controls, 0), {"conditioning": torch.zeros(2, 1, 4, 6)})
    engine.step(*at(controls, 0))  # refusals have harmed nothing
    snapshot = engine.snapshot()
    engine.reset(batch=3)
    with refused("engine.snapshot", "2 rollouts", "the engine 3"):
        engine.restore(snapshot)
    guided = Engine(network, noise_levels=LEVELS, guidance=2)
    guided.reset(batch=2)
    with refused("engine.other-snapshot", "guidance"):
        guided.restore(snapshot)
