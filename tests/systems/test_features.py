"""Feature networks: equal to the official code, converted both ways; and a run evaluated with one."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hybridgen import convert, evaluate
from hybridgen.core import config as config_lib
from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.evals import fid, prdc
from hybridgen.models.contract import Part
from hybridgen.models.features import inception
from hybridgen.nn import convnorm
from hybridgen.reports import distances
from hybridgen.runs import importing
from hybridgen.runs.restore import restore
from hybridgen.weights import rules, safetensors, tables
from hybridgen.weights.files import open_weights

VQ = "configs/tokenizers/vq.py"
LITE = {"width_coefficient": 0.1, "depth_coefficient": 0.2, "image_size": 33, "num_classes": 5}


def target(source: str, config: dict) -> importing.Target:
    return importing.target(tables.find(source).plan(config, {}))


def named(source: str, config: dict) -> dict[str, np.ndarray]:
    """An official state dict whose numbers follow from the names of its tensors."""
    goal = target(source, config)
    outlines = {path: np.broadcast_to(np.float32(0), spec.shape) for path, spec in goal.shapes.items()}
    out = {}
    for name, lazy in rules.export(outlines, goal.plan.rules).items():
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(lazy.shape)
        if name.endswith("running_var"):
            z = 0.5 + np.abs(z)
        elif z.ndim > 1:
            z = z * np.sqrt(2 / np.prod(z.shape[1:]))
        else:
            z = z * 0.1 + ("bn" in name and name.endswith("weight"))
        out[name] = z.astype(np.float32)
    return out


def made(source: str, config: dict, state: dict) -> Part:
    goal, arrays = importing.load(tables.find(source), config, state)
    return importing.part(goal, arrays)


# ---- EfficientNet-Lite


class Lite:
    """The official network in numpy and float64, on its own state dict. Letters: b c h w, f filters."""

    def __init__(self, state):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def conv(self, name, norm, x, stride=1):
        weight = self.state[f"{name}.weight"]
        k = weight.shape[-1]
        pads = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[2:]]
        x = np.pad(x, ((0, 0), (0, 0), *((pad // 2, pad - pad // 2) for pad in pads)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::stride, ::stride]
        deep = weight.shape[1] == 1
        y = np.einsum("bchwij,cij->bchw" if deep else "bchwij,fcij->bfhw", windows, weight[:, 0] if deep else weight)
        scale, bias, mean, var = (
            self.state[f"{norm}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / np.sqrt(var + 1e-3) * scale + bias

    def block(self, i, x, stride):
        name, y = f"_blocks.{i}", x
        if f"{name}._expand_conv.weight" in self.state:
            y = np.clip(self.conv(f"{name}._expand_conv", f"{name}._bn0", y), 0, 6)
        y = np.clip(self.conv(f"{name}._depthwise_conv", f"{name}._bn1", y, stride), 0, 6)
        y = self.conv(f"{name}._project_conv", f"{name}._bn2", y)
        return x + y if stride == 1 and x.shape == y.shape else y

    def __call__(self, pixels, strides):
        """`pixels [b, 3, H, W]` in 0 to 255."""
        x = np.clip(self.conv("_conv_stem", "_bn0", (pixels - 127) / 128, 2), 0, 6)
        for i, stride in enumerate(strides):
            x = self.block(i, x, stride)
        x = np.clip(self.conv("_conv_head", "_bn1", x), 0, 6).mean((2, 3))
        return x, x @ self.state["_fc.weight"].T + self.state["_fc.bias"]


def test_efficientnet_is_the_official_one():
    state = named("efficientnet_lite0", LITE)
    part = made("efficientnet_lite0", LITE, state)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 33, 33, 3)).astype(np.float32)
    strides = (1, 2, 2, 2, 1, 2, 1)  # a block a stage: a fifth of 2 to 4 is one
    features, logits = Lite(state)(pixels.transpose(0, 3, 1, 2), strides)
    image = pixels / 127.5 - 1
    got = jax.jit(lambda part, x: (part.call("encode", x), part.call("logits", x)))(part, image)
    assert np.abs(features).max() > 1 and np.ptp(features, 0).max() > 0.1
    np.testing.assert_allclose(got[0], features, atol=2e-5 * np.abs(features).max())
    np.testing.assert_allclose(got[1], logits, atol=2e-5 * np.abs(logits).max())
    with pytest.raises(UserError, match="'_blocks.3._bn2.running_var' is missing"):
        made("efficientnet_lite0", LITE, {name: state[name] for name in state if name != "_blocks.3._bn2.running_var"})


def test_efficientnet_of_the_published_sizes():
    """Lite0 has 4,652,008 parameters, Lite4 13.0 million (both as published: 4.7 and 13.0)."""
    for scales, count in (((1.0, 1.0), 4_652_008), ((1.4, 1.8), 13_006_568)):
        config = dict(zip(("width_coefficient", "depth_coefficient"), scales, strict=True))
        goal = target("efficientnet_lite0", config)
        assert sum(spec.size for path, spec in goal.shapes.items() if path.startswith("params/")) == count


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_shifted_sums_are_the_grouped_convolution(stride, padding):
    draw = np.random.default_rng(1)
    x, kernel = draw.normal(size=(2, 9, 6, 4)), draw.normal(size=(5, 3, 1, 4))
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(x), jnp.asarray(kernel)
        got = convnorm._shifted(x, kernel, stride, padding)
        np.testing.assert_allclose(got, convnorm._convolved(x, kernel, stride, padding), rtol=1e-12, atol=1e-12)


# ---- InceptionV3


def test_inception_has_the_official_tensors():
    """By name, shape and number those of pytorch-fid's file: 94 convolutions, 23,850,960 parameters."""
    goal = target("inception_v3", {"preprocessing": "adm"})
    params = sum(spec.size for path, spec in goal.shapes.items() if path.startswith("params/"))
    outlines = {path: np.broadcast_to(np.float32(0), spec.shape) for path, spec in goal.shapes.items()}
    names = rules.export(outlines, goal.plan.rules)
    assert params == 23_850_960 and len(names) == 94 * 5 + 2
    for name, shape in {
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.bn.running_var": (32,),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert names[name].shape == shape


# from a torch network of the official layers, in float64, with the weights of `named` and the pictures below:
# features [0, -1] and the mean of picture 1 of each block, logits [0, 0], [0, -1], [1, 504]
RECORDED = {0: (0.143967, 0.795081), 1: (0.79669, 0.737925), 2: (0.134702, 0.176272), 3: (0.620336, 0.107233)}
LOGITS = (0.106626, -0.264043, -0.345465)


@pytest.mark.slow
def test_inception_is_the_official_one():
    state = named("inception_v3", {})
    image = np.random.RandomState(0).uniform(-1, 1, (2, 3, 99, 80)).astype(np.float32).transpose(0, 2, 3, 1)
    for block, (last, mean) in RECORDED.items():
        part = made("inception_v3", {"output_blocks": [block], "resize_input": False}, state)
        features = jax.jit(lambda part, x: part.call("encode", x))(part, image)
        assert features.shape == (2, inception.WIDTHS[block])
        assert (features[0, -1], features[1].mean()) == pytest.approx((last, mean), abs=2e-6)
    logits = jax.jit(lambda part, x: part.call("logits", x))(part, image)
    assert (logits[0, 0], logits[0, -1], logits[1, 504]) == pytest.approx(LOGITS, abs=2e-6)


def test_pools_of_inception():
    """Averages leave the padding out, the last block takes a maximum, and those that halve drop the rest."""
    x = np.random.default_rng(2).normal(size=(1, 6, 5, 2)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # 1 6 5 2 3 3
    for pool, reduce in (("average", np.nanmean), ("max", np.nanmax)):
        block = inception.Mixed((), pool, 2)
        params = block.init(jax.random.key(0), x)["params"]
        params["branch_pool"] |= {"kernel": jnp.eye(2)[None, None], "variance": jnp.full(2, 1 - 1e-3)}
        got = block.apply({"params": params}, x)
        np.testing.assert_allclose(got, np.maximum(reduce(windows, (4, 5)), 0), atol=1e-6)
    halved = inception.Mixed((), "halve", 0).apply({}, x)
    np.testing.assert_array_equal(halved, windows[:, 1:-1, 1:-1].max((4, 5))[:, ::2, ::2])


def test_how_pictures_are_enlarged():
    """A ramp stays one: from the centres of pixels it is clamped at both ends, from their corners at the last."""
    ramp = np.arange(4, dtype=np.float32)[None, :, None, None] * np.ones((1, 4, 4, 3), np.float32)
    centres, corners = (np.asarray(inception.resized(ramp, 8, centres))[0, :, 0, 0] for centres in (True, False))
    np.testing.assert_allclose(centres, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    np.testing.assert_allclose(corners, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_allclose(inception.resized(ramp, 2, False)[0, :, 0, 0], [0, 2])  # picks, does not smooth
    np.testing.assert_allclose(inception.resized(ramp[:, :1], 3, True), 0)


@pytest.mark.parametrize(
    ("source", "config", "says"),
    [
        ("inception_v3", {"output_blocks": [2, 3]}, "output_blocks [2, 3] is not supported"),
        ("inception_v3", {"output_blocks": [4]}, "output_blocks [4] is not supported"),
        (
            "inception_v3",
            {"preprocessing": "clean"},
            "preprocessing 'clean' is not supported, only 'pytorch_fid', 'adm'",
        ),
        ("inception_v3", {"use_fid_inception": False}, "use_fid_inception False is not supported"),
        ("efficientnet_lite0", {"relu_fn": "swish"}, "relu_fn 'swish' is not supported"),
        ("efficientnet_lite0", {"width_coefficient": 0}, "width_coefficient 0.0 is not within 0 and 16"),
        ("efficientnet_lite0", {"width": 1}, "has the key 'width', which is not supported"),
    ],
)
def test_options_that_are_not_built(source, config, says):
    with pytest.raises(UserError) as error:
        target(source, config)
    assert says in str(error.value)


# ---- a run measured on features


@pytest.fixture(scope="module")
def lite(tmp_path_factory) -> Path:
    """A run folder of a small random network, converted by command and back."""
    place = tmp_path_factory.mktemp("features")
    state = named("efficientnet_lite0", LITE)
    counts = {"_bn0.num_batches_tracked": np.int64(1), "_blocks.0._bn1.num_batches_tracked": np.int64(1)}
    safetensors.write(place / "lite.safetensors", state | counts)
    (place / "lite.json").write_text(json.dumps(LITE))
    words = [place / "lite.safetensors", place / "run", "--config", place / "lite.json"]
    assert convert.main(["efficientnet_lite0", *map(str, words)]) == 0
    words = [place / "run", place / "back.safetensors", "--export"]
    assert convert.main(["efficientnet_lite0", *map(str, words)]) == 0
    back = open_weights(place / "back.safetensors")
    whole = state | counts
    assert set(back) == set(whole) and all(np.array_equal(back[name].read(), whole[name]) for name in whole)
    return place / "run"


@pytest.mark.slow
def test_a_report_with_distances(tiny_run, lite, tmp_path, capsys):
    run = tiny_run(VQ).folder
    words = ["--run", run, "--features", lite, "--count", 21, "--batch", 8, "--splits", "validation,holdout"]
    assert evaluate.main([str(word) for word in (*words, "--out", tmp_path)]) == 0
    report, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out and "| validation | true pictures | 21 | " in text
    about = report["distances"]
    assert about["features"] == "features.efficientnet" and about["reference_pictures"] == 21
    for split in ("validation", "holdout"):
        found = report["splits"][split]["distances"]
        assert list(found) == ["true pictures", "reconstructed, render"]
        floor, drawn = found.values()
        assert floor["pictures"] == drawn["pictures"] == 21 and 0 < floor["fd"] < drawn["fd"]
        assert floor["kd"] < drawn["kd"] and drawn["kd_standard_error"] > 0


@pytest.fixture(scope="module")
def measured(tiny_run, lite):
    """(the run, what its features of true pictures are, those pictures as bytes)."""
    loaded = restore(tiny_run(VQ).folder, {})
    compare = distances.build(loaded, str(lite), (), 16, 6, 0, "train", 16)
    size = loaded.config.data.resolution
    pixels = np.random.default_rng(3).integers(0, 256, (16, size, size, 3)).astype(np.uint8)
    with jax.set_mesh(loaded.mesh):
        features = np.concatenate([compare.encode(pixels[i : i + 6]) for i in range(0, 16, 6)])
    return loaded, features, pixels


@pytest.mark.slow
def test_references_of_every_kind(measured, lite, tmp_path):
    """A folder and a reference file of the same pictures give the distances of their features, computed directly."""
    loaded, features, pixels = measured
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02}.png")
    moments = fid.Moments(features.shape[1])
    moments.add(features + 1)
    mean, cov = moments.statistics()
    np.savez(tmp_path / "pictures.npz", arr_0=pixels)
    np.savez(tmp_path / "both.npz", mu=mean, sigma=cov, arr_0=pixels)
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=cov)
    images = np.random.default_rng(4).uniform(-1, 1, (14, *pixels.shape[1:]))
    spoilt = np.where(np.arange(14)[:, None, None, None] < 2, np.nan, images)
    found = {}
    for name in ("pictures", "pictures.npz", "both.npz", "statistics.npz"):
        compare = distances.build(loaded, str(lite), ("validation",), 14, 6, 0, str(tmp_path / name), 16)
        with jax.set_mesh(loaded.mesh):
            found[name] = compare(images, name)
            rows = np.concatenate([compare.encode(_bytes(images[i : i + 6])) for i in range(0, 14, 6)])
    (own_mean, own), (root, close) = (rows.mean(0), fid.root_of_rows(rows)), (fid.root_of_rows(features), {"rel": 1e-4})
    direct, shifted = (fid.frechet_of_roots(own_mean, own, other, root) for other in (mean - 1, mean))
    assert found["pictures"]["fd"] == pytest.approx(direct, **close) == found["pictures.npz"]["fd"]
    assert found["pictures.npz"]["kd"] == pytest.approx(fid.kernel(rows, features)[0], **close)
    assert {**found["pictures.npz"], **prdc.prdc(features, rows)} == found["pictures.npz"]
    assert found["statistics.npz"] == {"pictures": 14, "fd": pytest.approx(shifted, **close)}
    assert found["both.npz"] == found["pictures.npz"] | {"fd": found["statistics.npz"]["fd"]}
    with pytest.raises(UserError, match=r"^2 of 14 images are not finite"):
        compare(spoilt, "spoilt")


def _bytes(images):
    return np.rint((images + 1) * 127.5).astype(np.uint8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--reference", "train"], "--reference needs --features"),
        (["--reference-count", "9"], "--reference-count needs --features"),
        (["--features", "nowhere"], "no run in 'nowhere'"),
        (["--features", "VQ"], "is a run of tokenizers.vq, not of a feature network"),
        (["--features", "LITE", "--count", "8"], "--count 8: distances need at least 12 images"),
        (["--features", "LITE", "--reference-count", "3"], "--reference-count 3: distances need at least 12 images"),
        (["--features", "LITE", "--reference", "trian"], "'trian' is neither a file nor a folder nor one of train"),
        (["--features", "LITE", "--reference", "EMPTY"], "has no usable image"),
        (["--features", "LITE", "--reference", "NARROW"], "has statistics of 2 features, but the network has 1280"),
        (["--features", "LITE", "--reference", "FEW"], "has 4 usable images, but distances need at least 12"),
        (["--features", "LITE", "--reference", __file__], "test_features.py is not a valid reference file"),
    ],
)
def test_distances_that_cannot_be_taken(words, says, tiny_run, lite, tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    places = {"LITE": lite, "VQ": tiny_run(VQ).folder, "EMPTY": tmp_path / "empty"}
    places |= {"NARROW": tmp_path / "narrow.npz", "FEW": tmp_path / "few.npz"}
    line = ["--run", tiny_run(VQ).folder, "--out", tmp_path / "out", *(places.get(word, word) for word in words)]
    with pytest.raises(UserError) as error:
        evaluate.main([str(word) for word in line])
    assert says in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_network_of_features_is_measured_by_nothing(lite, tmp_path):
    with pytest.raises(UserError, match="a features.efficientnet run generates no images"):
        evaluate.main(["--run", str(lite), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and config_lib.read(lite / "config.json").family == "features.efficientnet"
    assert {path.split("/")[-1] for path in trees.flatten(restore(lite, {}).config.model.to_dict())} >= {"classes"}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tiny_run, lite, tmp_path):
    """13 pictures in batches of 8: the last is padded, also to what two processes share."""
    from test_hosts_draw import found, run

    words = ["--run", str(tiny_run(VQ).folder), "--features", str(lite), "--count", "13", "--batch", "8"]
    for count in (1, 2):
        run(count, "evaluate", *words, "--out", str(tmp_path / str(count)))
    one, two = (trees.flatten(found(tmp_path / str(count))["report.json"]) for count in (1, 2))
    same = {path: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for path, value in one.items()}
    assert two == same and any(path.endswith("true pictures/fd") for path in one)
