"""Distances of features: closed forms of Gaussians, direct sums, nested sets; and the reference files of ADM."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from hybridgen.core.errors import UserError
from hybridgen.evals import fid, prdc
from hybridgen.evals.reference import open_reference


def gaussian(seed, d=7, rank=None):
    draw = np.random.default_rng(seed)
    half = draw.normal(size=(d, rank or d))
    return draw.normal(size=d), half @ half.T


def moments(rows, cuts=()):
    out = fid.Moments(rows.shape[1])
    for part in np.split(rows, cuts):
        out.add(part)
    return out.statistics()


# ---- Fréchet distance


def test_of_gaussians_with_a_common_basis():
    """With A = Q a Q', B = Q b Q' the distance is that of the diagonals: sum of (sqrt a - sqrt b)^2."""
    draw = np.random.default_rng(0)
    basis, _ = np.linalg.qr(draw.normal(size=(9, 9)))
    a, b = draw.uniform(0, 3, (2, 9)) * (draw.uniform(size=(2, 9)) > 0.3)  # some directions have no variance
    mean_a, mean_b = draw.normal(size=(2, 9))
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    got = fid.frechet(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
    assert got == pytest.approx(expected, rel=1e-12)


def test_of_two_planes_of_gaussians():
    """In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)): here of matrices that do not commute."""
    (mean_a, a), (mean_b, b) = gaussian(1, 2), gaussian(2, 2)
    product = a @ b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.square(mean_a - mean_b).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert fid.frechet(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-12)
    assert fid.frechet(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [200, 5])
def test_of_a_set_with_itself_is_zero(rank):
    """Also where most directions have no variance at all: the root of a rounding error would be 1e-8 for each."""
    mean, cov = gaussian(3, 200, rank)
    assert abs(fid.frechet(mean, cov, mean, cov)) < 1e-12 * np.trace(cov)
    assert fid.frechet(mean, cov, mean + 1, cov) == pytest.approx(200, rel=1e-9)


def test_batches_give_the_moments_of_the_whole():
    rows = np.random.default_rng(4).normal(size=(101, 6)) * 1e-3 + 1e4  # a mean that swamps the spread
    mean, cov = moments(rows.astype(np.float64), [0, 1, 40, 41, 100])
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-15)
    np.testing.assert_allclose(cov, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-14)


def test_few_rows_need_no_covariance():
    draw = np.random.default_rng(13)
    a, b = draw.normal(size=(9, 20)), draw.normal(size=(30, 20)) * 2
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    expected = fid.frechet(mean_a, cov_a, mean_b, cov_b)
    roots = fid.root_of_rows(a), fid.root(cov_b)
    assert fid.frechet_of_roots(mean_a, roots[0], mean_b, roots[1]) == pytest.approx(expected, rel=1e-12)


def test_the_memory_is_that_of_the_covariance():
    out = fid.Moments(32)
    batch = np.random.default_rng(5).normal(size=(64, 32))
    out.add(batch)
    tracemalloc.start()
    for _ in range(200):
        out.add(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.count == 64 * 201 and peak < 8 * batch.nbytes


def spoilt(x, value=np.inf):
    x = np.array(x, np.float64)
    x.flat[0] = value
    return x


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fid.Moments(3).add(np.ones((2, 4))), "features must have the shape n 3, not (2, 4)"),
        (lambda: fid.Moments(2).add([[0, np.nan], [1, 1]]), "1 of 2 pictures have non-finite features"),
        (lambda: fid.Moments(2).statistics(), "at least 2 pictures, not 0"),
        (lambda: fid.frechet(*gaussian(0, 3), *gaussian(0, 4)), "different widths"),
        (lambda: fid.kernel(np.ones((3, 2)), np.ones((9, 2))), "at least 4 pictures in each set, not 3 and 9"),
        (lambda: fid.kernel(np.ones((9, 3)), np.ones((9, 2))), "different widths: 3 and 2"),
        (lambda: prdc.prdc(np.ones((5, 2)), np.ones((9, 2))), "more than 5 pictures in each set, not 5"),
        (lambda: prdc.prdc(np.ones((9, 3)), np.ones((9, 2))), "must have the shapes n d and m d"),
        (lambda: prdc.prdc(np.ones((9, 2)), spoilt(np.ones((9, 2)))), "features are not finite"),
        (lambda: fid.kernel(np.ones((9, 2)), spoilt(np.ones((9, 2)))), "1 of 9 pictures have non-finite features"),
        (lambda: fid.unbiased(spoilt(np.ones((9, 2))), np.ones((9, 2))), "1 of 9 pictures have non-finite features"),
        (lambda: fid.root_of_rows(spoilt(np.ones((9, 2)))), "1 of 9 pictures have non-finite features"),
        (lambda: fid.frechet(EYE[0], spoilt(EYE), EYE[0], EYE), "covariance of a set of features is not finite"),
        (lambda: fid.frechet(EYE[0], EYE, spoilt(EYE[0]), EYE), "covariance of a set of features is not finite"),
    ],
)
def test_features_that_cannot_be_compared(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)


# ---- kernel distance


def test_against_sums_over_pairs():
    draw = np.random.default_rng(6)
    a, b = draw.normal(size=(5, 3)), draw.normal(size=(4, 3)) + 1

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    same_a = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    same_b = np.mean([k(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    expected = same_a + same_b - 2 * np.mean([k(x, y) for x in a for y in b])
    assert fid.unbiased(a, b) == pytest.approx(expected, rel=1e-12)


def test_of_two_shifted_gaussians():
    """In one dimension the kernel is 1 + 3xy + 3(xy)^2 + (xy)^3: differences of the first three moments, squared."""
    shift = 0.7
    expected = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    draw = np.random.default_rng(7)
    found, errors = zip(
        *(fid.kernel(draw.normal(size=(200, 1)), draw.normal(size=(160, 1)) + shift, seed) for seed in range(150)),
        strict=True,
    )
    spread_of = np.std(found)
    assert abs(np.mean(found) - expected) < 3 * spread_of / np.sqrt(150)
    # the standard error is what it says: how far one estimate lies from the truth
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread_of, rel=0.25)


def test_a_seed_gives_the_same_subsets():
    a, b = np.random.default_rng(8).normal(size=(2, 40, 3))
    assert fid.kernel(a, b, 1) == fid.kernel(a, b, 1) != fid.kernel(a, b, 2)


# ---- precision, recall, density, coverage


def direct(true, generated, k, wide):
    """By the definitions, over lists of distances."""

    def ball(rows, i, k):
        return sorted(np.linalg.norm(rows[i] - rows[j]) for j in range(len(rows)) if j != i)[k - 1]

    far = np.array([[np.linalg.norm(x - y) for y in generated] for x in true])  # n m
    near, own, cover = (
        np.array([ball(rows, i, number) for i in range(len(rows))])
        for rows, number in ((true, k), (generated, k), (true, wide))
    )
    return {
        "precision": np.mean([(far[:, j] <= near).any() for j in range(len(generated))]),
        "recall": np.mean([(far[i] <= own).any() for i in range(len(true))]),
        "density": (far <= cover[:, None]).sum() / (wide * len(generated)),
        "coverage": np.mean([far[i].min() <= cover[i] for i in range(len(true))]),
    }


def test_neighbours_against_the_definitions(monkeypatch):
    monkeypatch.setattr(prdc, "CHUNK", 7)
    draw = np.random.default_rng(9)
    true, generated = draw.normal(size=(40, 3)), draw.normal(size=(31, 3)) * 0.8 + 1.2
    found = prdc.prdc(true, generated)
    assert found == pytest.approx(direct(true, generated, 3, 5), rel=1e-12)
    assert all(0.05 < share < 0.95 for share in found.values()), "the sets say nothing"


def test_nested_uniform_sets():
    """A set inside of another is precise and does not recall it, and the other way round."""
    draw = np.random.default_rng(10)
    inner, outer = draw.uniform(0.4, 0.6, (500, 2)), draw.uniform(0, 1, (500, 2))
    inside, around = prdc.prdc(outer, inner), prdc.prdc(inner, outer)
    assert inside["precision"] > 0.95 and inside["recall"] < 0.1 and inside["coverage"] < 0.15
    assert around["recall"] == inside["precision"] and around["precision"] == inside["recall"]
    gap = prdc.prdc(inner, outer + 5)
    assert set(gap.values()) == {0.0}


def test_of_equal_sets_all_is_found():
    """Also where pictures are there many times, so that balls have no radius."""
    rows = np.random.default_rng(11).normal(size=(30, 4)).repeat(7, 0) * 1e3
    found = prdc.prdc(rows, rows[np.random.default_rng(0).permutation(len(rows))])
    assert found == {"precision": 1.0, "recall": 1.0, "density": pytest.approx(7 / 5), "coverage": 1.0}


# ---- reference files


def test_reference_files(tmp_path):
    mean, cov = gaussian(12, 5)
    pictures = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3)).astype(np.uint8)
    np.savez(tmp_path / "both.npz", mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, arr_0=pictures)
    np.savez_compressed(tmp_path / "pictures.npz", pictures)
    np.savez(tmp_path / "statistics.npz", mu=mean.astype(np.float32), sigma=np.asfortranarray(cov))
    both = open_reference(tmp_path / "both.npz")
    assert (both.count, both.side) == (7, (4, 6))
    np.testing.assert_array_equal(both.statistics[0], mean)
    np.testing.assert_array_equal(both.statistics[1], cov)
    for file in (both, open_reference(tmp_path / "pictures.npz")):
        batches = list(file.pictures(5, 2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(batches), pictures[:5])
    assert open_reference(tmp_path / "pictures.npz").statistics is None
    alone = open_reference(tmp_path / "statistics.npz")
    assert alone.count == 0 and np.array_equal(alone.statistics[1], cov)


def written(path, **arrays):
    np.savez(path, **arrays)


def damaged(path):
    np.savez(path, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)


def claims(path):
    """A head that promises more than the file has."""
    with zipfile.ZipFile(path, "w") as packed, packed.open("arr_0.npy", "w") as file:
        head = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 64, 64, 3)}
        np.lib.format.write_array_header_1_0(file, head)


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "cannot read"),
        (lambda path: path.write_text("mine"), "is not a valid reference file: File is not a zip file"),
        (lambda path: written(path, x=EYE), "has neither mu and sigma nor pictures as arr_0"),
        (lambda path: written(path, mu=EYE[0]), "has neither mu and sigma nor pictures as arr_0"),
        (lambda path: written(path, mu=EYE[0], sigma=np.eye(4)), "mu has 3 features, but sigma 4"),
        (lambda path: written(path, mu=EYE[0], sigma=EYE * np.nan), "sigma contains numbers that are not finite"),
        (lambda path: written(path, mu=EYE[0], sigma=np.tri(3)), "sigma is not a covariance"),
        (lambda path: written(path, mu=EYE[0], sigma=-EYE), "sigma is not a covariance"),
        (lambda path: written(path, mu=np.array([0]), sigma=EYE), "mu is int64 of shape (1,)"),
        (lambda path: written(path, mu=np.array([None]), sigma=EYE), "mu is object of shape (1,)"),
        (lambda path: written(path, arr_0=np.zeros((2, 8, 8, 3))), "arr_0 is float64 of shape (2, 8, 8, 3)"),
        (lambda path: written(path, arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "arr_0 is uint8 of shape (0, 8, 8, 3)"),
        (lambda path: written(path, arr_0=np.zeros((2, 8, 8), np.uint8)), "arr_0 is uint8 of shape (2, 8, 8)"),
        (damaged, "Bad CRC-32"),
        (claims, "it is truncated"),
    ],
)
def test_reference_files_that_cannot_be_used(make, says, tmp_path):
    path = tmp_path / "reference.npz"
    make(path)
    with pytest.raises(UserError) as error:
        list(open_reference(path).pictures(9, 4))
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
