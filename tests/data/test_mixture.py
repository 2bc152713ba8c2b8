"""Mixtures: exact shares in every window, a function of (seed, position), each record once per epoch of its source."""

import itertools

import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text
from hybridgen.data.sources import mixture
from hybridgen.data.sources.folder import BrokenRecord


class Numbers:
    """Pictures of one number each, from `first` on; `bad` ones are broken."""

    def __init__(self, first, length, bad=()):
        self.first, self.length, self.bad, self.class_names = first, length, bad, []

    def __len__(self):
        return self.length

    def name(self, index):
        return f"number {index}"

    def __getitem__(self, index):
        if index in self.bad:
            raise BrokenRecord(f"{self.name(index)}: bad")
        return {"image": np.full((1, 1, 3), self.first + index, np.uint8), "text": f"a {self.first + index}"}


def mixed(weights=(3, 1, 0.5), lengths=(50, 7, 11), bad=()):
    firsts = (0, 100, 200)
    each = [
        (Numbers(first, length, bad if not i else ()), weight)
        for i, (first, length, weight) in enumerate(zip(firsts, lengths, weights, strict=True))
    ]
    return mixture.Mixture(dict(zip("abc", each, strict=True)), split="train", resolution=1)


def take(source, count, batch=6, **options):
    loader = pipeline.batches(source, None, **{"batch": batch, "seed": 4, **options})
    out = [
        np.rint((b["image"][:, 0, 0, 0] + 1) * 127.5).astype(int) for _, b in zip(range(count), loader, strict=False)
    ]
    loader.close()
    return np.concatenate(out)


@pytest.mark.parametrize("weights", [(3, 1, 0.5), (1, 1, 1), (0.7, 0.2, 0.1), (98, 1, 1), (0.333, 0.333, 0.334)])
def test_every_window_has_the_shares(weights):
    which = take(mixed(weights), 300) // 100
    share = np.asarray(weights) / sum(weights)
    before = np.concatenate([np.zeros((1, 3)), np.cumsum(np.eye(3)[which], 0)])  # of each prefix
    assert np.abs(before - np.arange(len(before))[:, None] * share).max() < 1
    for length in (7, 100, 900):
        windows = before[length:] - before[:-length]
        assert np.abs(windows - length * share).max() < 2


def test_each_source_is_seen_in_its_own_epochs():
    seen = take(mixed(), 300)
    for first, length in ((0, 50), (100, 7), (200, 11)):
        mine = seen[(seen >= first) & (seen < first + 100)] - first
        epochs = [mine[i : i + length] for i in range(0, len(mine) - length + 1, length)]
        assert len(epochs) > 3 and all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert any((one != two).any() for one, two in itertools.pairwise(epochs))


def test_a_batch_is_a_function_of_its_number():
    everything = take(mixed(), 40)
    np.testing.assert_array_equal(take(mixed(), 1, start=33), everything[33 * 6 : 34 * 6])
    np.testing.assert_array_equal(take(mixed(), 20, rows=(4, 1)), everything.reshape(-1, 6)[:20, [4, 1]].reshape(-1))
    assert (take(mixed(), 40, seed=5) != everything).any()
    np.testing.assert_array_equal(take(mixed(), 40, seed=5) // 100, everything // 100)  # the pattern has no seed


def test_a_sequential_pass_sees_all():
    loader = pipeline.batches(mixed(), None, batch=6, seed=0, shuffle=False)
    seen = [int(i) for batch in loader for i, valid in zip(batch["id"], batch["valid"], strict=True) if valid]
    assert seen == list(range(68))


def test_a_broken_record_is_replaced_from_its_source():
    source = mixed(bad=(49,))
    item, broken = pipeline.read(source, 49)
    assert broken == 49 and item["text"] == "a 0" and source.name(49) == "a: number 49" and source.name(50)[0] == "b"


SHAPES = {"source": "shapes", "options": {"size": 30}, "weight": 2}


def config(**entries):
    return {
        "source": "mixture",
        "options": {"sources": entries},
        "resolution": 16,
        "text": {"kind": "words", "length": 24},
    }


def test_from_a_config():
    data = config(one=SHAPES, two={"source": "shapes", "options": {"size": 10, "languages": ("zh",)}})
    source = sources.build(data, "train")
    reader = text.build(data, source)
    for index in (0, 35):  # the vocabulary is that of both
        reader.encode(source[index]["text"], strict=True)
    message = pipeline.fingerprint(data, source, reader, batch=4, seed=0)
    assert message["source"]["options"]["sources"]["one"]["weight"] == 2 and message["source"]["length"] == 40


@pytest.mark.parametrize(
    "entries, says",
    [
        ({}, "empty"),
        ({"a": 3}, "a is 3"),
        ({"a": SHAPES | {"wieght": 1}}, "'wieght'.*'weight'"),
        ({"a": {"source": "mixture"}}, "a source other than mixture"),
        ({"a": SHAPES | {"weight": 0}}, "'a' is 0"),
        ({"a": SHAPES | {"weight": 1.000001}, "b": SHAPES}, "round them"),
        ({"a": {"source": "shape"}}, "sources.a.source 'shape'"),
    ],
)
def test_what_is_refused(entries, says):
    with pytest.raises(UserError, match=says):
        sources.build(config(**entries), "train")


def test_sources_must_agree():
    one, two = Numbers(0, 3), Numbers(0, 3)
    two.class_names = ["x"]
    with pytest.raises(UserError, match="different classes"):
        mixture.Mixture({"a": (one, 1), "b": (two, 1)}, split="train", resolution=1)
    two.class_names, two.encoders = [], {"tokens": "d"}
    with pytest.raises(UserError, match="cached by different models"):
        mixture.Mixture({"a": (one, 1), "b": (two, 1)}, split="train", resolution=1)
