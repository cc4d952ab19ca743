"""Compiled blocks for the engine: compiled in a separate process while frames run eagerly, and cached on disk.

The tracer of ``torch.compile`` patches ``nn.Module`` for the whole process, so it cannot run in a thread beside the
engine. The compiled unit is one block for one shape, with the weights as inputs: it is shared by all layers and by all
checkpoints of a network of that shape.
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
"""Modules whose code is compiled: cached code from other versions of them is not used."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative error above which a compiled block is not used."""
TOLERANCE_OF_LESS_PRECISION = 0.05


@dataclass(frozen=True)
class Shape:
    """Shape for which a block is compiled: dtypes by name, frames and tokens of a pass, slots of the ring buffer."""

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
        """Return random inputs of `run_block`, without the block."""
        random = torch.Generator().manual_seed(0)  # does not change the global random state
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
    """Run a block over the frames of a pass and the cache, as a function of tensors."""
    return block(x, condition, turns, CachedAttention(LayerCache(key, value), places, seen))


class CompiledBlocks:
    """Run blocks, compiled as soon as the compiled code is ready and matches the eager block.

    Args:
        network: The world model.
        quantization: Quantization of its weights.
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
        """Start compiling, or loading cached code, in the background; see `shapes`."""
        asked = [shape for shape in self.shapes(batch, frames, copies) if shape not in self._asked]
        self._asked.update(asked)
        if asked:
            thread = threading.Thread(target=self._make, args=(asked,), daemon=True)
            self._work.threads.append(thread)
            thread.start()

    def shapes(self, batch: int, frames: Sequence[int], copies: int) -> list[Shape]:
        """Return the shapes that passes need.

        Args:
            batch: Number of parallel rollouts.
            frames: Numbers of frames per pass, the most frequent first.
            copies: Largest number of noisy copies in a pass.
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
        """Wait for the requested blocks; return whether all of them are ready."""
        self._work.join()
        self.warn_of_failure()
        return self._asked <= self.ready.keys()

    def warn_of_failure(self) -> None:
        """Warn, once, if compilation has failed."""
        if self._failure is not None:
            reason, self._failure = self._failure, None
            warnings.warn(f"frames stay uncompiled and take longer: {reason}", stacklevel=4)

    def __call__(self, block: Block, x: Tensor, condition: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Apply a block; see `Block.forward`."""
        assert isinstance(attend, CachedAttention)
        cached = attend.cache
        compiled = self._of.get((len(x), x.shape[1], cached.key.shape[2]))
        if compiled is None:
            return block(x, condition, turns, attend)
        return compiled(block, x, condition, turns, attend.places, attend.seen, cached.key, cached.value)

    def _make(self, shapes: list[Shape]) -> None:
        """Load cached blocks, compile the others and load each."""
        try:
            folder = cache_folder()
            missing = [shape for shape in shapes if not self._load_kept(shape, folder)]
            with closing(self._work.compile(missing, folder)) as compiled:
                for shape in compiled:
                    self._load(shape, folder)
        except Exception as error:  # compilers raise any type; frames continue uncompiled
            self._failure = " ".join(str(error).split())[-500:] or type(error).__name__

    def _load_kept(self, shape: Shape, folder: Path) -> bool:
        """Load a cached block; return False if it must be compiled again."""
        try:
            self._load(shape, folder)
        except Exception:  # missing, damaged, or rejected by torch
            return False
        return True

    @torch.no_grad()
    def _load(self, shape: Shape, folder: Path) -> None:
        """Load and check a compiled block, and use it from now on."""
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
        error = torch.stack([(a.float() - b.float()).norm() / b.float().norm() for a, b in pairs]).max().item()
        if not error <= TOLERANCE.get(getattr(torch, shape.dtype), TOLERANCE_OF_LESS_PRECISION):  # nor NaN
            raise RuntimeError(f"compiled code differs from uncompiled by {error:.2g} ({file})")
        self.ready[shape] = compiled
        self._of[shape.batch, shape.frames, shape.places] = compiled


class Work:
    """Background work: threads that load, and processes that compile."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._stopping = False

    def join(self) -> None:
        """Wait until all work is done."""
        for thread in self.threads:
            thread.join()
        self.threads.clear()

    def stop(self) -> None:
        """Stop all work: threads must not run during interpreter shutdown."""
        self._stopping = True
        for process in list(self._processes):
            end(process)
        self.join()

    def compile(self, shapes: list[Shape], folder: Path) -> Generator[Shape, None, None]:
        """Compile blocks in another process, which writes them into a folder; yield each finished shape.

        Raises:
            RuntimeError: The process has failed.
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
        if shapes[0].device == "cpu":  # a block has few kernels: more processes are slower
            variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
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
            finally:  # also if the compiled block is wrong
                end(process)
                status = process.wait()
                self._processes.remove(process)
            if done < len(shapes):
                log.seek(0)
                lines = [line for line in log.read().splitlines() if line and not line.startswith(" ")]
                raise RuntimeError(lines[-1] if lines else f"the compiling process ended with status {status}")


DONE = "compiled "


def end(process: "subprocess.Popen[str]") -> None:
    """Stop a compiling process, which runs until its standard input is closed."""
    assert process.stdin is not None
    process.stdin.close()


def compile_blocks(folder: Path, shapes: dict[str, Shape]) -> None:
    """Compile blocks of these shapes and write each into a folder by its name; runs in the compiling process."""
    import torch._dynamo.config

    if hasattr(torch._dynamo.config, "enable_aot_compile"):  # off by default in PyTorch 2.11
        torch._dynamo.config.enable_aot_compile = True
    for name, shape in shapes.items():
        torch.set_num_threads(shape.threads)  # the compiled code depends on the number of threads
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
    """Return the cache folder for this kind of machine, below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    If it is not writable, or is writable by others, return a temporary folder that is removed with the process: code in
    it is executed.
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
    except (OSError, RuntimeError):  # no home directory, or it is not writable
        pass
    return Path(_vanishing().name)


@cache
def _vanishing() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="owl-compiled-", ignore_cleanup_errors=True)


@cache
def machine() -> str:
    """Return twelve digits that identify the machine's properties on which compiled code depends."""
    vectors = torch.backends.cpu.get_cpu_capability()
    properties = [platform.platform(), platform.python_version(), torch.__version__, sys.prefix, vectors]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        properties += sorted(
            {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        )
    if torch.cuda.is_available():
        properties.append(torch.cuda.get_device_name())
    return hashlib.sha256("\n".join(properties).encode()).hexdigest()[:12]


@cache
def sources() -> str:
    """Return the hash of the compiled modules' source, as of the first call in this process."""
    return hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES)).hexdigest()


def digest(shape: Shape) -> str:
    """Return a hash of sixteen digits of a shape and of the source code."""
    return hashlib.sha256(f"{sources()} {json.dumps(asdict(shape), sort_keys=True)}".encode()).hexdigest()[:16]


@contextmanager
def inductor_cache(folder: Path) -> Iterator[None]:
    """Let the compiler cache kernels in a folder."""
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
    """Compile the shapes given on the command line; exit when the parent process exits."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    shapes = {name: Shape(**shape) for name, shape in json.loads(sys.argv[2]).items()}
    compile_blocks(Path(sys.argv[1]), shapes)
