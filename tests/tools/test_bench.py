"""Bench on a tiny config: its report must be consistent, and unsupported input is refused."""

import json

import jax
import pytest
from PIL import Image

from hybridgen import bench, cli, preflight
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.cost import programs
from hybridgen.data.sources import buckets

PRIOR = ["--config", "configs/ar/raster.py:tiny", "--config.parts.tokenizer=configs/tokenizers/vq.py:tiny"]
SMALL = ["--config.model.depth=1", "--config.batch=2", "--count", "3"]


@pytest.mark.slow
def test_the_report_of_training_and_sampling(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert bench.main([*PRIOR, *SMALL, "--steps", "3", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    shown = capsys.readouterr().out
    for name, images in (("train", 2), ("sample", 3)):
        entry = report[name]
        seconds = entry["seconds"]
        assert seconds["runs"] == 3 and 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert entry["images"] == images
        assert entry["images_per_s"] == pytest.approx(images / seconds["median"])
        assert entry["tokens_per_s"] == pytest.approx(16 * entry["images_per_s"])  # a 4 x 4 grid
        assert entry["flops_per_s"] == pytest.approx(entry["flops"]["total"] / seconds["median"])
        assert 0 < entry["matmul_fraction"] < 1
        memory = entry["memory"]
        assert memory["peak"] == sum(memory[key] for key in ("arguments", "outputs", "temporaries")) - memory["aliased"]
        assert entry["mfu"] is None and report["chip"] is None  # a CPU is in no table
        assert 0 < entry["memory_bytes"] and 0 < entry["copy_fraction"]
        assert 0 < entry["warm_compile_s"] < entry["lower_s"] + entry["compile_s"]
        assert f"\n{name} " in shown
    waits = report["train"]["input"]
    assert waits["steps"] == 3 and 0 <= waits["stall"] < 1 and "with the data loader: waits" in shown
    decode = report["sample"]["decode"]
    assert decode["steps"] == 15 and 0 < decode["copy_fraction"] and decode["bandwidth_fraction"] is None
    assert decode["tokens_per_s"] == pytest.approx(16 * 3 / decode["seconds"]["median"])
    # one layer of 4 d d + 3 d f, two norms and one of each head's queries and keys; the last norm; the head
    d, f, vocab, positions = 64, 192, 1000, 16 + 16
    assert decode["bytes"] == 4 * (4 * d * d + 3 * d * f + 2 * d + 2 * d + d + d * vocab) + 4 * (
        2 * (2 * 3) * (positions - 7.5) * d  # keys and values of both halves of three guided pictures
    )
    # a training state is updated in place
    assert report["train"]["memory"]["aliased"] > 3 * 4 * report["parameters"]


def test_the_warm_compile_is_read_from_the_files(tmp_path):
    found = []
    count = lambda event, **_: found.append(event.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(count)
    try:
        with bench.cached(str(tmp_path)):
            program = jax.jit(lambda x: jax.numpy.sin(x @ x) + 1)
            compiled, entry = bench.compile_twice(program, (jax.ShapeDtypeStruct((3, 3), "float32"),))
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert (found.count("cache_misses"), found.count("cache_hits")) == (1, 1)
    assert compiled(jax.numpy.eye(3)).shape == (3, 3) and entry["warm_compile_s"] > 0


def build(path, *overrides, stage=None, **options):
    return programs.build(*programs.choose(config_lib.load(path, overrides), stage), **options)


def test_the_bytes_of_a_step_count_what_is_filled_and_shard():
    part = "parts.tokenizer=configs/tokenizers/vq.py:tiny"
    plain, half = (build("configs/ar/raster.py:tiny", part, f"model.dtype={kind}") for kind in ("float32", "bfloat16"))
    assert half.decoding().bytes == plain.decoding().bytes / 2
    cascade = build("configs/recipes/shapes.py:tiny", stage="cascade")
    prior = build("configs/recipes/shapes.py:tiny", stage="prior")
    assert cascade.decoding().steps == prior.decoding().steps
    assert build("configs/diffusion/dit.py:tiny", part).decoding() is None


def test_cached_tokens_replace_the_encoder():
    part = "parts.tokenizer=configs/tokenizers/vq.py:tiny"
    plain, cached = (build("configs/ar/raster.py:tiny", part, cached=cached) for cached in (False, True))
    assert cached.batch["tokens"].shape == (8, 16)
    assert plain.train_flops()[0]["convolution"] > 0 and "convolution" not in cached.train_flops()[0]
    _, batch, _, _, _ = cached.make()
    assert batch["tokens"].shape == (8, 16) and 0 < batch["tokens"].max() < 1000


def test_the_stages_of_a_recipe_are_parts_of_each_other():
    built = build("configs/recipes/shapes.py:tiny", stage="cascade")
    assert set(built.experiment.parts) == {"tokenizer", "prior", "decoder"} and not built.trains
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(built.experiment.parts))
    assert built.sample_flops()["attention"] > 0
    with pytest.raises(UserError, match="tokenizer, prior, decoder, cascade.*--stage"):
        build("configs/recipes/shapes.py:tiny")
    with pytest.raises(UserError, match="did you mean 'prior'"):
        build("configs/recipes/shapes.py:tiny", stage="priors")


def test_a_missing_part_says_how_to_do_without():
    with pytest.raises(UserError, match=r"part 'tokenizer': no run in .*--config\.parts\.tokenizer=configs/"):
        build("configs/ar/raster.py:tiny")


@pytest.mark.parametrize("argument", [["--what", "eval"], ["--steps", "0"], ["--wat"], ["--count", "0"]])
def test_wrong_arguments_exit_with_2(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.command(lambda: bench.main([*PRIOR, *argument]))
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_trains_in_an_assembled_cascade(capsys):
    with pytest.raises(UserError, match="no training steps"):
        bench.main(["--config", "configs/recipes/shapes.py:tiny", "--stage", "cascade", "--what", "train"])


@pytest.mark.slow
def test_of_several_shapes_the_largest_is_compiled(tmp_path, capsys):
    """Pictures of two ratios, and of training and drawing the programs that the larger shape has."""
    for i in range(12):
        Image.new("RGB", (60, 30) if i % 3 else (30, 50), (i, i, i)).save(tmp_path / f"{i}.png")
    options = {"path": str(tmp_path), "validation": 0}
    (tmp_path / "table").write_text(json.dumps(buckets.build(options, 16, 4, aspect=2, least=4)))
    words = ["--config", "configs/tokenizers/vq.py:tiny,model.channels=(16,),model.attention=False,batch=2"]
    words += ["--config.data.source=folder", "--config.data.resolution=16", "--count", "3"]
    words += [f"--config.data.options.{name}={value}" for name, value in options.items()]
    words += [f"--config.data.options.buckets={tmp_path / 'table'}", "--json", str(tmp_path / "report.json")]
    assert bench.main([*words, "--steps", "1", "--what", "train"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["shape"] == [20, 12] and "images of 20 x 12, the largest of several" in capsys.readouterr().out
    assert report["train"]["tokens_per_s"] == pytest.approx(15 * report["train"]["images_per_s"])  # a 5 x 3 grid
    assert preflight.main(words) == 0
    assert json.loads((tmp_path / "report.json").read_text())["shape"] == [20, 12]
