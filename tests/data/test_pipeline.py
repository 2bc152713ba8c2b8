"""The data position is a pure function of (seed, step), for any hosts, workers and restarts; prefetch ends cleanly."""

import json
import multiprocessing

import ml_collections
import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.data import pipeline, sources, text, transforms
from hybridgen.runs.fingerprint import check_fingerprint


class Numbers:
    """Picture i shows i; `seen` lists what was read. `bad` records are broken."""

    def __init__(self, length=37, bad=()):
        self.length, self.bad, self.seen = length, set(bad), []

    def __len__(self):
        return self.length

    def name(self, index):
        return f"number {index}"

    def __getitem__(self, index):
        self.seen.append(index)
        if index in self.bad:
            raise sources.BrokenRecord(f"{self.name(index)}: bad")
        picture = np.full((2, 2, 3), index % 256, np.uint8)
        picture[0, 0, 0] = index // 256
        return {"image": picture, "text": f"a {index}", "scene": {"number": index}}


TOKENIZER = text.Bytes(6)


def take(count, source=None, **options):
    loader = pipeline.batches(source or Numbers(), TOKENIZER, **{"batch": 8, "seed": 5, **options})
    out = [next(loader) for _ in range(count)]
    loader.close()
    return out


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def numbers(batch):
    image = transforms.to_uint8(batch["image"]).astype(int)
    return (image[:, 0, 0, 0] * 256 + image[:, 1, 1, 1]).tolist()


# ---- the order


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 37, 64, 65, 1000])
def test_every_epoch_is_a_new_permutation(length):
    epochs = pipeline.order(np.arange(4 * length), length, seed=1).reshape(4, length)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(length), (4, 1)))
    if length >= 8:
        other = pipeline.order(np.arange(4 * length), length, seed=2).reshape(4, length)
        rows = {tuple(row) for row in (*epochs.tolist(), *other.tolist(), list(range(length)))}
        assert len(rows) == 9  # no two epochs alike, no seed a shifted copy of another, none unshuffled


def test_order_has_no_favourites():
    three = pipeline.order(np.arange(3 * 6000), 3, seed=0).reshape(-1, 3)
    counts = np.unique(three, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and abs(counts - 1000).max() < 130
    ten = pipeline.order(np.arange(10 * 4000), 10, seed=0).reshape(-1, 10)
    for place in range(10):
        assert abs(np.bincount(ten[:, place], minlength=10) - 400).max() < 100


def test_order_is_random_access_and_far():
    places = np.array([2**40 + 3, 5, 2**40 + 2, 5])
    got = pipeline.order(places, 1000, 0)
    assert got[1] == got[3] and got[0] != got[2] and ((0 <= got) & (got < 1000)).all()
    assert got[0] == pipeline.order(places[:1], 1000, 0)[0]


def test_the_order_of_a_seed_never_changes():
    # A change here breaks the resume of every run there is.
    assert pipeline.order(np.arange(8), 1000, 0).tolist() == ORDER_OF_SEED_0


ORDER_OF_SEED_0 = [222, 461, 177, 95, 365, 702, 938, 835]


# ---- batches


def test_a_batch_is_what_it_says():
    batch = take(1)[0]
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "id": ((8,), "uint32"),
        "image": ((8, 2, 2, 3), "float32"),
        "text": ((8, 6), "int32"),
        "text_mask": ((8, 6), "bool"),
        "label": ((8,), "int32"),
        "broken": ((8,), "int32"),
    }
    assert [TOKENIZER.decode(ids) for ids in batch["text"]] == [f"a {i}" for i in numbers(batch)]
    assert numbers(batch) == pipeline.order(np.arange(8), 37, 5).tolist()


def test_each_epoch_visits_every_sample_once():
    seen = [number for batch in take(3 * 37, batch=2) for number in numbers(batch)]
    epochs = [seen[i : i + 37] for i in range(0, len(seen), 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs) and epochs[0] != epochs[1]


def test_ids_count_samples_and_wrap():
    assert [batch["id"].tolist() for batch in take(2, batch=3)] == [[0, 1, 2], [3, 4, 5]]
    assert take(1, batch=3, start=2**32 // 3)[0]["id"].tolist() == [2**32 - 1, 0, 1]


@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_restart_anywhere(start):
    whole = take(16)
    assert all(same(one, two) for one, two in zip(whole[start:], take(16 - start, start=start), strict=True))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_their_rows_and_no_others(hosts):
    whole = take(6)
    parts = np.array_split(np.arange(8), hosts)
    for rows in parts:
        source = Numbers()
        mine = take(6, source, rows=rows, threads=0)
        for full, part in zip(whole, mine, strict=True):
            assert all(np.array_equal(full[key][rows], part[key]) for key in full)
        assert sorted(source.seen) == sorted(number for batch in mine for number in numbers(batch))
    # Rows need not be a range: two devices of a host may hold rows far apart, or hosts share them.
    odd = take(1, rows=[6, 1, 2])[0]
    assert all(np.array_equal(whole[0][key][[6, 1, 2]], odd[key]) for key in odd)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 5}, {"threads": 3, "ahead": 7}, {"ahead": 0}])
def test_threads_change_nothing(options, caplog):
    assert all(same(one, two) for one, two in zip(take(9), take(9, **options), strict=True))
    assert not caplog.records  # Grain would warn of threads that have to wait


@pytest.mark.slow
def test_worker_processes_change_nothing():
    """Their exceptions also arrive unchanged, and closing ends them."""
    source = Numbers(bad={3})
    assert all(same(one, two) for one, two in zip(take(9, source), take(9, source, workers=2), strict=True))
    assert not multiprocessing.active_children()
    one_pass = {"batch": 4, "seed": 0, "shuffle": False}
    one, two = (list(pipeline.batches(source, TOKENIZER, **one_pass, workers=workers)) for workers in (0, 3))
    assert len(one) == len(two) == 10 and all(same(*pair) for pair in zip(one, two, strict=True))
    loader = pipeline.batches(Numbers(3, bad={0, 1, 2}), TOKENIZER, batch=2, seed=0, workers=1)
    with pytest.raises(UserError, match="3 records in a row cannot be read.*: bad"):
        next(loader)
    loader.close()
    assert not multiprocessing.active_children()


def test_flip_is_the_samples_own():
    class Halves(Numbers):
        def __getitem__(self, index):
            image = np.zeros((2, 2, 3), np.uint8)
            image[:, 0] = 255
            return {"image": image, "text": ""}

    left = [batch["image"][:, 0, 0, 0] > 0 for batch in take(16, Halves(), flip=True)]
    assert 40 < np.sum(left) < 88  # of 128
    again = take(1, Halves(), flip=True, start=3, rows=[5, 6])[0]["image"][:, 0, 0, 0] > 0
    np.testing.assert_array_equal(again, left[3][[5, 6]])
    assert not np.array_equal(left[0], left[5])
    assert all((batch["image"][:, 0, 0, 0] > 0).all() for batch in take(3, Halves()))


def test_one_sequential_pass_for_evaluation():
    got = list(pipeline.batches(Numbers(11), TOKENIZER, batch=4, seed=0, shuffle=False))
    assert [numbers(batch) for batch in got] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]
    assert [batch["valid"].tolist() for batch in got] == [[True] * 4, [True] * 4, [True, True, True, False]]
    last = list(pipeline.batches(Numbers(11), TOKENIZER, batch=4, seed=0, shuffle=False, rows=[2, 3], start=2))
    assert len(last) == 1 and last[0]["valid"].tolist() == [True, False]
    assert not list(pipeline.batches(Numbers(11), TOKENIZER, batch=4, seed=0, shuffle=False, start=9))


def test_examples_carry_their_scenes():
    got = pipeline.examples(Numbers(5, bad={4}), [2, 4, 0])
    facts = [(item["index"], item["broken"], item["scene"]["number"]) for item in got]
    assert facts == [(2, -1, 2), (4, 4, 0), (0, -1, 0)]
    assert got[0]["image"].dtype == np.uint8


def test_broken_records_are_named_and_harm_no_other():
    good, hurt = take(12), take(12, Numbers(bad={7, 8}))
    for one, two in zip(good, hurt, strict=True):
        for row, (before, after) in enumerate(zip(numbers(one), numbers(two), strict=True)):
            assert after == (9 if before in (7, 8) else before)
            assert two["broken"][row] == (before if before in (7, 8) else -1)
    assert sum((pipeline.take_broken(batch) for batch in hurt), []).count(7) in (2, 3)  # 96 samples of 37


def test_a_broken_run_longer_than_tries_is_an_error():
    assert pipeline.read(Numbers(1000, bad=range(99)), 0)[1] == 0
    with pytest.raises(UserError, match="100 records in a row cannot be read, from number 0 on; .*number 99: bad"):
        pipeline.read(Numbers(1000, bad=range(100)), 0)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rows": [8]}, "global batch of 8"),
        ({"rows": []}, "rows"),
        ({"batch": 0}, "0"),
        ({"start": -1}, "-1"),
        ({"workers": -2}, "-2"),
        ({"source": Numbers(0)}, "has 0"),
    ],
)
def test_batches_refuses(options, says):
    with pytest.raises(UserError, match=says):
        pipeline.batches(options.pop("source", Numbers()), TOKENIZER, **{"batch": 8, "seed": 0, **options})


# ---- the fingerprint


def test_fingerprint_survives_json_and_names_what_differs():
    config = {"source": "shapes", "resolution": 16, "options": {"objects": (1,), "size": 50}, "text": {"kind": "words"}}

    def fingerprint(batch=8, seed=0, **changes):
        changed = ml_collections.ConfigDict({**config, **changes})
        source = sources.build(changed, "train")
        return pipeline.fingerprint(changed, source, text.build(changed, source), batch=batch, seed=seed)

    base = fingerprint()
    assert json.loads(json.dumps(base)) == base == fingerprint(workers=3, threads=2)
    check_fingerprint(base, fingerprint())
    for changes, says in (
        ({"batch": 16}, "batch was 8 and is 16 .to resume nevertheless: --allow batch."),
        ({"resolution": 32}, "source.resolution was 16 and is 32"),
        ({"options": {"objects": (1, 2), "size": 50}}, r"source.options.objects was \[1\] and is \[1, 2\]"),
        ({"text": {"kind": "words", "length": 9}, "flip": True, "seed": 1}, "flip,seed,text.digest,text.length"),
    ):
        with pytest.raises(UserError, match=says):
            check_fingerprint(base, fingerprint(**changes))


def test_without_a_text_tokenizer_there_is_no_text():
    config = {"source": "shapes", "resolution": 16, "options": {"size": 50}}
    source = sources.build(config, "train")
    batch = next(pipeline.batches(source, None, batch=4, seed=0))
    assert sorted(batch) == ["broken", "id", "image", "label"] and batch["image"].shape == (4, 16, 16, 3)
    assert pipeline.fingerprint(config, source, None, batch=4, seed=0)["text"] is None
