"""Sets JAX to one CPU device before it is imported, and provides tiny runs, trained once per session.

Tests that need several devices start a process with XLA_FLAGS=--xla_force_host_platform_device_count=8: a mesh takes
all devices, so eight devices here would make the programs of all other tests data-parallel.
"""

import importlib.metadata
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# tests compile much and compute little: quick compilation, slower programs
QUICK = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA exits with an error at a flag that it does not know
    QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]  # half the time
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# who starts them in the background has Ctrl-C ignored, by them and by every process of theirs
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]
PARTS = {"tokenizer": "configs/tokenizers/vq.py", "text": "configs/text/lm.py"}


class TinyRun(NamedTuple):
    folder: Path
    losses: list[float]  # one a step


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Callable[[str], TinyRun]:
    """Config file -> the run of its `tiny` variant (or of FILE:VARIANT), trained at the first request.

    All use the same tokenizer and the same text tokenizer.
    """
    runs: dict[str, TinyRun] = {}

    def get(path: str) -> TinyRun:
        if path not in runs:
            named = path if ":" in path else f"{path}:tiny"
            runs[path] = _train(named, tmp_path_factory.mktemp("runs") / Path(path).stem, get)
        return runs[path]

    return get


def _train(path: str, folder: Path, get: Callable[[str], TinyRun]) -> TinyRun:
    from hybridgen import train
    from hybridgen.core import config

    tiny = config.load(f"{ROOT / path}", ["log.every=1"]).copy_and_resolve_references()
    with tiny.unlocked():
        for name in tiny.parts:
            assert name in PARTS, f"{path} has a part {name!r}, which this fixture cannot give it"
            tiny.parts[name] = str(get(PARTS[name]).folder)
    assert train.run(tiny, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == tiny.steps
    return TinyRun(folder, losses)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For a file whose runs have the same programs: they, and processes that they start, share a compile cache."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache"))}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
