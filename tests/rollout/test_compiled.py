"""Code compiled in the background: eager frames at once, the switch changes nothing, kept for the next start."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl import models
from owl.models.world_model import Controls, WorldTransformer
from owl.rollout import compiled
from owl.rollout.engine import Engine
from tests.helpers.latents import draw, lively
from tests.helpers.tiny import REPOSITORY

SETTINGS: dict[str, Any] = {"noise_levels": (1.0, 0.5), "sampler": "consistency", "context_noise": 0.1}
FRAMES = 8


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.cache_folder.cache_clear()
    yield compiled.cache_folder()
    compiled.cache_folder.cache_clear()


@pytest.fixture
def network() -> WorldTransformer:
    return lively(sink=1)


@pytest.fixture
def controls(network: WorldTransformer) -> Controls:
    return draw(network, FRAMES)[2]


def steps(engine: Engine, controls: Controls, frames: range) -> list[Tensor]:
    return [engine.step(controls.buttons[:, t], controls.axes[:, t]).latents["video"] for t in frames]


def expected_of(network: WorldTransformer, controls: Controls) -> list[Tensor]:
    engine = Engine(network, **SETTINGS)
    engine.reset()
    return steps(engine, controls, range(FRAMES))


def refuse_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every compiling process fail."""
    monkeypatch.setattr(sys, "executable", "false")


def test_a_switch_during_a_rollout_changes_nothing(
    network: WorldTransformer, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the function that is compiled, uncompiled: it must be given what the eager block is given."""
    refuse_to_compile(monkeypatch)
    runs: list[tuple[int, ...]] = []

    def counted(*given: Any) -> Tensor:
        runs.append((given[1].shape[1], given[6].shape[2]))
        return compiled.run_block(*given)

    engine = Engine(network, compile=True, **SETTINGS)
    engine.reset()
    with pytest.warns(UserWarning, match="uncompiled"):
        engine.wait_compiled()
    blocks, rings = engine._blocks, engine.cache.tensors()
    assert blocks is not None
    found = steps(engine, controls, range(3))
    assert not runs
    snapshot = engine.snapshot()
    blocks._of.update({(1, frames, places): counted for frames in (1, 2) for places in (5, 7)})  # type: ignore[misc]
    found += steps(engine, controls, range(3, FRAMES))
    expected = expected_of(network, controls)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert set(runs) == {(1, 5), (1, 7), (2, 5), (2, 7)}  # one frame or two, in a local layer or a global one
    engine.restore(snapshot)
    again = steps(engine, controls, range(3, FRAMES))
    assert all(torch.equal(a, b) for a, b in zip(again, expected[3:], strict=True))
    assert [x.data_ptr() for x in engine.cache.tensors()] == [x.data_ptr() for x in rings]


def test_a_failure_is_reported_once_and_frames_continue(
    network: WorldTransformer,
    controls: Controls,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    refuse_to_compile(monkeypatch)
    engine = Engine(network, compile=True, **SETTINGS)
    for shape in (folder / f"{compiled.digest(shape)}.bin" for shape in shapes_of(engine)):
        shape.write_bytes(b"no compiled code")  # damaged code is compiled again
    engine.reset()
    assert not engine.wait_compiled()
    assert not engine.wait_compiled()
    found = steps(engine, controls, range(FRAMES))
    assert all(torch.equal(a, b) for a, b in zip(found, expected_of(network, controls), strict=True))
    messages = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert messages == ["frames stay uncompiled and take longer: the compiling process ended with status 1"]


def shapes_of(engine: Engine) -> list[compiled.Shape]:
    """What an engine needs for a single rollout."""
    assert engine._blocks is not None
    return engine._blocks.shapes(1, [1, 2], 1)


def test_other_networks_machines_and_threads_have_code_of_their_own(network: WorldTransformer) -> None:
    engine = Engine(network, compile=True, **SETTINGS)
    (shape, *_) = shapes_of(engine)
    assert compiled.digest(shape) == compiled.digest(shapes_of(Engine(lively(1, sink=1), compile=True))[0])
    others = [Engine(lively(), compile=True), Engine(network, compile=True, dtype=torch.bfloat16)]
    assert len({compiled.digest(shapes_of(other)[0]) for other in (engine, *others)}) == 3


@pytest.mark.parametrize("home", ["/dev/null/home", "writable by others"])
def test_code_is_not_kept_where_the_home_cannot_be_written_or_others_could_change_it(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home == "writable by others":
        shared = tmp_path / "shared"
        (shared / ".cache" / "owl" / "compiled" / compiled.machine()).mkdir(parents=True)
        (shared / ".cache" / "owl" / "compiled" / compiled.machine()).chmod(0o777)
        home = str(shared)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    compiled.cache_folder.cache_clear()
    found = compiled.cache_folder()
    assert found.is_dir()
    assert not found.is_relative_to(home)
    assert found.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow  # compiling two kinds of blocks takes half a minute
@pytest.mark.timeout(900)
def test_compiled_code_gives_the_same_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"sink": 1, "depth": 1, "global_every": 0}
    network = lively(**shape)
    controls = draw(network, FRAMES)[2]
    expected = expected_of(network, controls)
    engine = Engine(network, compile=True, **SETTINGS)
    engine.reset()
    assert engine.wait_compiled()
    found = steps(engine, controls, range(FRAMES))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # it was compiled code that ran
    refuse_to_compile(monkeypatch)
    other = lively(seed=1, **shape)  # other weights of the same shape
    again = Engine(other, compile=True, **SETTINGS)
    again.reset()
    assert again.wait_compiled()
    torch.testing.assert_close(
        steps(again, controls, range(FRAMES)), expected_of(other, controls), atol=1e-4, rtol=1e-4
    )
    monkeypatch.setattr(compiled, "TOLERANCE", {torch.float32: -1.0})  # what differs too much is not used
    distrustful = Engine(network, compile=True, **SETTINGS)
    distrustful.reset()
    with pytest.warns(UserWarning, match="uncompiled"):
        assert not distrustful.wait_compiled()
    found = steps(distrustful, controls, range(FRAMES))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("quantization", [None, "fp8_weight_only"])
def test_less_precision_compiles_too(quantization: Any) -> None:
    network = lively(depth=1, global_every=0)
    controls = draw(network, 3)[2]
    settings = SETTINGS | {"dtype": torch.bfloat16, "quantization": quantization}
    frames = []
    for compile in (False, True):
        engine = Engine(network, compile=compile, **settings)
        engine.reset()
        assert engine.wait_compiled() == compile
        frames.append(torch.stack(steps(engine, controls, range(3))))
    assert (frames[1] - frames[0]).norm() < 0.1 * frames[0].norm()


def test_the_first_frame_waits_for_no_compiler_and_no_trainer(network: WorldTransformer, tmp_path: Path) -> None:
    models.save(network, tmp_path / "exported")
    program = f"""
import sys, torch
from owl.rollout.engine import Engine
engine = Engine.load({str(tmp_path / "exported")!r})
engine.reset()
engine.step(torch.zeros(1, {len(network.buttons)}), torch.zeros(1, {len(network.axes)}))
print([name for name in ("torch._dynamo", "torch._inductor", "lightning", "matplotlib") if name in sys.modules])
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert process.stdout == "[]\n"
