"""On a CPU, large memory blocks are kept by the process; with another platform or setting nothing is changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridgen.core import hostmemory

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, numpy, sys
from hybridgen.core import hostmemory
kept = hostmemory.keep() if sys.argv[1] == "keep" else False
def touch():
    numpy.empty(2**27, numpy.uint8).fill(1)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str, **environment: str) -> tuple[str, int]:
    """(what `keep` said, page faults of touching 128 MiB ten times) in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    clean |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    out = subprocess.run([sys.executable, "-c", FAULTS, word], env=clean, capture_output=True, text=True, check=True)
    kept, count = out.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's allocator")
def test_blocks_are_touched_once():
    kept, few = faults("keep")
    _, many = faults("leave")
    if kept != "True":
        pytest.skip("another C library")
    assert few < 100 < many  # 2560 of 2 MiB or 327,680 of 4 KiB, or none


@pytest.mark.parametrize("setting", [{"MALLOC_ARENA_MAX": "2"}, {"JAX_PLATFORMS": "tpu"}])
def test_what_was_asked_for_stays(setting):
    assert faults("keep", **setting)[0] == "False"


def test_accelerators_are_seen(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert hostmemory.accelerated()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not hostmemory.accelerated()
