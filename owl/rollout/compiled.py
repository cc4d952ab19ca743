"""Compiled blocks for the engine: made by a process of their own while frames run eagerly, kept for the next start.

The tracer of ``torch.compile`` patches ``nn.Module`` for the whole process while it works, so it does not run in a
thread beside the engine. What is compiled is one block under one shape, weights among its inputs: all layers share it,
however many there are, and every checkpoint of a network of that shape does.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owl.models.world_model import WorldTransformer
from owl.nn.attention import Attend
from owl.nn.cache import CachedAttention, LayerCache
from owl.nn.placement import placement
from owl.nn.transformer import Block
from owl.precision.inference import Quantization, quantize

Compiled = Callable[[Block, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

ROOT = Path(__file__).parent.parent
SOURCES = ("nn/attention.py", "nn/cache.py", "nn/rope.py", "nn/transformer.py", "rollout/compiled.py")
"""The code that is compiled: what was made from other code is not used."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative error at which a compiled block is not used."""
TOLERANCE_OF_LESS_PRECISION = 0.05


@dataclass(frozen=True)
class Shape:
    """What a block is compiled for: dtypes by name, numbers of frames and tokens of a pass, places of the ring."""

    width: int
    heads: int
    hidden: int
    dtype: str
    quantization: Quantization | None
    device: str
    batch: int
    frames: int
    tokens: int
    places: int
    threads: int

    def inputs(self) -> tuple[Tensor, ...]:
        """Made-up inputs of `run_block` but for the block."""
        random = torch.Generator().manual_seed(0)  # the process's own random numbers stay what they are
        kind: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        channels = self.width // self.heads

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(**kind)

        kept = (self.batch, self.heads, self.places, self.tokens, channels)
        angles = torch.randn(1, self.frames * self.tokens, channels // 2, generator=random).to(self.device)
        return (
            noise(self.batch, self.frames, self.tokens, self.width),
            noise(self.batch, self.frames, self.width),
            torch.stack([angles.cos(), angles.sin()], -1),
            torch.arange(self.frames, device=self.device),
            (torch.arange(self.places) % 3 != 2).expand(1, self.frames, -1).contiguous().to(self.device),
            noise(*kept),
            noise(*kept),
        )


def run_block(
    block: Block,
    x: Tensor,
    condition: Tensor,
    turns: Tensor,
    places: Tensor,
    seen: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """A block over the frames of a pass and what is cached, as a function of tensors."""
    return block(x, condition, turns, CachedAttention(LayerCache(key, value), places, seen))


class CompiledBlocks:
    """Runs blocks, compiled as soon as what was asked for is ready and was compared with the eager block.

    Args:
        network: The world model that runs.
        quantization: Of its weights.
    """

    def __init__(self, network: WorldTransformer, quantization: Quantization | None) -> None:
        self.network, self.quantization = network, quantization
        self.ready: dict[Shape, Compiled] = {}
        self._of: dict[tuple[int, ...], Compiled] = {}
        self._asked: set[Shape] = set()
        self._failure: str | None = None
        self._work = Work()
        weakref.finalize(self, self._work.stop)

    def prepare(self, batch: int, frames: Sequence[int], copies: int) -> None:
        """Begin to compile, or to load what was compiled before, in the background; see `shapes`."""
        asked = [shape for shape in self.shapes(batch, frames, copies) if shape not in self._asked]
        self._asked.update(asked)
        if asked:
            thread = threading.Thread(target=self._make, args=(asked,), daemon=True)
            self._work.threads.append(thread)
            thread.start()

    def shapes(self, batch: int, frames: Sequence[int], copies: int) -> list[Shape]:
        """What passes need.

        Args:
            batch: Rollouts side by side.
            frames: Numbers of frames of the passes to come, the most frequent first.
            copies: Noisy copies that a pass may hold.
        """
        network, (device, dtype) = self.network, placement(self.network)
        block = network.blocks[0]
        assert isinstance(block, Block)
        return [
            Shape(
                width=network.width,
                heads=network.heads,
                hidden=block.up.out_features,
                dtype=str(dtype).removeprefix("torch."),
                quantization=self.quantization,
                device=str(device),
                batch=batch,
                frames=number,
                tokens=network.tokens,
                places=network.sink + window + 1 + copies,
                threads=torch.get_num_threads(),
            )
            for number in frames
            for window in sorted(set(network.windows))
        ]

    def wait(self) -> bool:
        """Wait for what was asked for; return whether all of it is ready."""
        self._work.join()
        self.tell()
        return self._asked <= self.ready.keys()

    def tell(self) -> None:
        """Warn, once, where compiling has failed."""
        if self._failure is not None:
            told, self._failure = self._failure, None
            warnings.warn(f"frames stay uncompiled and take longer: {told}", stacklevel=4)

    def __call__(self, block: Block, x: Tensor, condition: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Apply a block; see `Block.forward`."""
        assert isinstance(attend, CachedAttention)
        cached = attend.cache
        compiled = self._of.get((len(x), x.shape[1], cached.key.shape[2]))
        if compiled is None:
            return block(x, condition, turns, attend)
        return compiled(block, x, condition, turns, attend.places, attend.seen, cached.key, cached.value)

    def _make(self, shapes: list[Shape]) -> None:
        """Load what is there, have the rest compiled and load it one by one."""
        try:
            folder = cache_folder()
            missing = [shape for shape in shapes if not self._load_kept(shape, folder)]
            with closing(self._work.compile(missing, folder)) as compiled:
                for shape in compiled:
                    self._load(shape, folder)
        except Exception as error:  # whatever a compiler may raise: frames go on without it
            self._failure = " ".join(str(error).split())[-500:] or type(error).__name__

    def _load_kept(self, shape: Shape, folder: Path) -> bool:
        """Load what an earlier start compiled; what cannot be used any more is compiled anew."""
        try:
            self._load(shape, folder)
        except Exception:  # there is none, it is damaged, or torch refuses it
            return False
        return True

    @torch.no_grad()
    def _load(self, shape: Shape, folder: Path) -> None:
        """Load, check and begin to use a compiled block."""
        file = folder / f"{digest(shape)}.bin"
        with inductor_cache(folder), file.open("rb") as content:
            compiled: Compiled = torch.compiler.load_compiled_function(content)
        block = self.network.blocks[0]
        given, expected = shape.inputs(), shape.inputs()
        pairs = zip(
            (compiled(block, *given), *given[-2:]),  # type: ignore[arg-type]
            (run_block(block, *expected), *expected[-2:]),  # type: ignore[arg-type]
            strict=True,
        )
        error = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
        if not error <= TOLERANCE.get(getattr(torch, shape.dtype), TOLERANCE_OF_LESS_PRECISION):  # nor NaN
            raise RuntimeError(f"compiled code differs from uncompiled by {error:.2g} ({file})")
        self.ready[shape] = compiled
        self._of[shape.batch, shape.frames, shape.places] = compiled


class Work:
    """What goes on in the background: threads that load, and processes that compile."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._stopping = False

    def join(self) -> None:
        """Wait for all of it."""
        for thread in self.threads:
            thread.join()
        self.threads.clear()

    def stop(self) -> None:
        """End it: Python must not be torn down around threads that run."""
        self._stopping = True
        for process in list(self._processes):
            end(process)
        self.join()

    def compile(self, shapes: list[Shape], folder: Path) -> Generator[Shape, None, None]:
        """Have blocks compiled by another process, which writes them into a folder; yields each that is done.

        Raises:
            RuntimeError: It has failed.
        """
        if not shapes:
            return
        start = "from owl.rollout.compiled import main; main()"
        command = [
            sys.executable,
            "-c",
            start,
            str(folder),
            json.dumps({digest(shape): asdict(shape) for shape in shapes}),
        ]
        path = os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        if shapes[0].device == "cpu":  # a block has few kernels: more processes cost more than they save
            variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=told,
                text=True,
                env=os.environ | variables,
            )
            self._processes.append(process)
            if self._stopping:
                end(process)
            done = 0
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith(DONE):
                        yield shapes[done]
                        done += 1
            finally:  # also where what was compiled is not what was expected
                end(process)
                status = process.wait()
                self._processes.remove(process)
            if done < len(shapes):
                told.seek(0)
                lines = [line for line in told.read().splitlines() if line and not line.startswith(" ")]
                raise RuntimeError(lines[-1] if lines else f"the compiling process ended with status {status}")


DONE = "compiled "


def end(process: "subprocess.Popen[str]") -> None:
    """End a compiling process, which lives as long as its standard input is open."""
    assert process.stdin is not None
    process.stdin.close()


def compile_blocks(folder: Path, shapes: dict[str, Shape]) -> None:
    """Compile blocks of these shapes and write each into a folder by its name; what the compiling process does."""
    for name, shape in shapes.items():
        torch.set_num_threads(shape.threads)  # of which the code is made for so many
        block = Block(shape.width, shape.heads, shape.hidden).eval().requires_grad_(False)
        block = block.to(shape.device, getattr(torch, shape.dtype))
        if shape.quantization is not None:
            quantize(block, shape.quantization)
        unguarded: dict[str, Any] = {"guard_filter_fn": lambda entries: [False for _ in entries]}
        traced: Any = torch.compile(run_block, fullgraph=True, dynamic=False, options=unguarded)
        with torch.no_grad():
            compiled = traced.aot_compile(((block, *shape.inputs()), {}))
        file = folder / f"{name}.bin"
        part = file.with_suffix(f".{os.getpid()}.part")
        compiled.save_compiled_function(str(part))
        part.replace(file)
        print(DONE + file.name, flush=True)


@cache
def cache_folder() -> Path:
    """Folder of compiled code for this kind of machine, below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    One that vanishes with the process where that cannot be written, or others could write into it: what is in there is
    executed.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owl" / "compiled"
        folder = root / machine()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        state = folder.stat()
        if not hasattr(os, "getuid") or (state.st_uid == os.getuid() and not state.st_mode & 0o022):
            return folder
    except (OSError, RuntimeError):  # there is no home, or it cannot be written
        pass
    return Path(_vanishing().name)


@cache
def _vanishing() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="owl-compiled-", ignore_cleanup_errors=True)


@cache
def machine() -> str:
    """Twelve digits that tell machines apart on which other code is compiled."""
    told = [platform.platform(), platform.python_version(), torch.__version__, sys.prefix]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    if torch.cuda.is_available():
        told.append(torch.cuda.get_device_name())
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


@cache
def sources() -> str:
    """Hash of the code that is compiled, as it was when this process first asked."""
    return hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES)).hexdigest()


def digest(shape: Shape) -> str:
    """Sixteen digits of a shape and of the code that is compiled for it."""
    return hashlib.sha256(f"{sources()} {json.dumps(asdict(shape), sort_keys=True)}".encode()).hexdigest()[:16]


@contextmanager
def inductor_cache(folder: Path) -> Iterator[None]:
    """Have the compiler look for kernels in a folder."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def main() -> None:
    """Compile what the command line says, and end when whoever asked for it does."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    shapes = {name: Shape(**shape) for name, shape in json.loads(sys.argv[2]).items()}
    compile_blocks(Path(sys.argv[1]), shapes)
