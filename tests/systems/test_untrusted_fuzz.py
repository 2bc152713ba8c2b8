"""Damaged files of weights: read or refused in one line, at once."""

import random
import struct
import time
from pathlib import Path

import numpy as np
import torchfile

from hybridgen.core.errors import UserError
from hybridgen.weights import safetensors
from hybridgen.weights.files import open_weights

ROOT = Path(__file__).parents[2]
HUGE = 2**62


# ---- what a fuzzer finds


def mutations(data, count, seed):
    """`count` damaged forms of `data`: bytes changed, cut off, moved, doubled, numbers made extreme."""
    draw = random.Random(seed)
    numbers = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, HUGE, 2**64 - 1)]
    for _ in range(count):
        out = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at, to = (draw.randrange(len(out) + 1) for _ in range(2))
            match draw.randrange(6):
                case 0:
                    out[at : at + 1] = bytes([draw.randrange(256)])
                case 1 if at < len(out):
                    out[at] ^= 1 << draw.randrange(8)
                case 2:
                    del out[at : at + draw.choice((1, 4, 100))]
                case 3:
                    out[at:at] = out[to : to + draw.choice((1, 8, 64))]
                case 4:
                    out[at : at + 8] = draw.choice(numbers)[: draw.choice((1, 2, 4, 8))]
                case 5 if draw.random() < 0.2:
                    del out[at:]
        yield bytes(out)


def fuzz(path, count, seed):
    """(files that were read, files that were refused). Anything else that is raised, or takes long, fails."""
    data, read, says = path.read_bytes(), 0, set()
    for number, mutant in enumerate(mutations(data, count, seed)):
        path.write_bytes(mutant)
        start = time.process_time()
        try:
            weights = open_weights(path)
            assert sum(tensor.read().nbytes for tensor in weights.tensors.values()) < 2**20
            read += 1
        except UserError as error:
            says.add(str(error))
            assert str(error).isprintable()
        assert time.process_time() - start < 1, number
    return read, len(says)


def test_mutants_of_weights_are_read_or_refused(tmp_path):
    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.arange(6).reshape(2, 3).T, "c": np.ones((), np.bool_)}
    safetensors.write(tmp_path / "w.safetensors", arrays, {"format": "pt"})
    value = {"model": torchfile.ordered(arrays), "args": {"lr": 0.1, "sizes": [1, 2]}, "step": 7}
    counts = [
        fuzz(tmp_path / "w.safetensors", 2000, 1),
        fuzz(torchfile.save(tmp_path / "w.pt", value), 1300, 2),
        fuzz(torchfile.save(tmp_path / "w.ckpt", value, legacy=True), 700, 3),
    ]
    for read, refusals in counts:
        assert read > 10 and refusals > 20, counts  # it does not stop at the first byte
