"""Official weights to run folders and back, by the command; bad input gives one line, exit code 2 and no files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchfile

from hybridgen import cli, convert
from hybridgen.core import trees
from hybridgen.runs import checkpoint, importing, reading
from hybridgen.weights import safetensors, tables
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SYSTEMS = ("taming_gumbel", "llamagen_vq", "sd_kl_vae")


def run(capsys, *args):
    """(exit code, what it said) of `hybridgen convert`."""
    with pytest.raises(SystemExit) as end:
        cli.command(lambda: convert.main([str(arg) for arg in args]))
    reported = capsys.readouterr()
    return end.value.code, reported.err if end.value.code else reported.out


@pytest.mark.parametrize("system", SYSTEMS)
def test_in_and_out_again(system, tmp_path, capsys):
    source = GOLDEN / system
    code, message = run(capsys, system, source, tmp_path / "run")
    assert code == 0 and "parameters" in message
    code, message = run(capsys, system, tmp_path / "run", tmp_path / "back.safetensors", "--export")
    assert code == 0, message
    first, back = (open_weights(path) for path in (source / "weights.safetensors", tmp_path / "back.safetensors"))
    assert set(first) == set(back)
    assert all(first[name].read().tobytes() == back[name].read().tobytes() for name in first)

    # what other commands see is a run: verified, with the config that makes its model
    assert not checkpoint.Checkpointer(tmp_path / "run" / "checkpoints", read_only=True).verify(0)
    loaded = reading.load(tmp_path / "run")
    image = np.zeros((1, 16, 16, 3), np.float32)
    code = loaded.part.call("encode", image)
    assert loaded.step == 0 and np.isfinite(np.asarray(code)).all()
    goal, arrays = importing.load(tables.find(system), json.loads((source / "config.json").read_text()), first)
    same = trees.flatten(loaded.part.params)
    assert all((np.asarray(same[path]) == leaf).all() for path, leaf in trees.flatten(arrays["params"]).items())
    assert loaded.part.model == goal.model


def test_a_lightning_checkpoint(tmp_path, capsys):
    """Under `state_dict`, with the optimiser beside it and tensors of the loss in it: neither is for the model."""
    golden, more = GOLDEN / "taming_gumbel", np.ones(3, np.float32)
    state = {name: tensor.read() for name, tensor in open_weights(golden / "weights.safetensors").items()}
    whole = {"state_dict": state | {"loss.perceptual.weight": more}, "epoch": 3}
    torchfile.save(tmp_path / "last.ckpt", whole | {"optimizer_states": [{"state": {"0": more}}]})
    config = golden / "config.json"
    code, message = run(capsys, "taming_gumbel", tmp_path / "last.ckpt", tmp_path / "run", "--config", config)
    assert code == 0, message
    assert run(capsys, "taming_gumbel", tmp_path / "run", tmp_path / "w.safetensors", "--export")[0] == 0
    back = open_weights(tmp_path / "w.safetensors")
    assert set(back) == set(state) and all((back[name].read() == state[name]).all() for name in state)


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def state():
    return {name: tensor.read() for name, tensor in open_weights(GOLDEN / "sd_kl_vae" / "weights.safetensors").items()}


def folder_of(tmp_path, state, **changes):
    """A folder of weights with its config changed."""
    tmp_path = tmp_path / "in"
    tmp_path.mkdir()
    safetensors.write(tmp_path / "w.safetensors", state)
    config = json.loads((GOLDEN / "sd_kl_vae" / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def dropped(state, name):
    return {key: value for key, value in state.items() if key != name}


def refused(capsys, tmp_path, message, *args):
    """It prints one line with the reason, exits with code 2 and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    code, reported = run(capsys, *args)
    assert code == 2 and message in reported and reported.count("error: ") == 1, reported
    assert sorted(tmp_path.rglob("*")) == before


def test_tensors_that_do_not_fit(tmp_path, capsys, state):
    bad = {
        "missing": (dropped(state, "quant_conv.bias"), "the tensor 'quant_conv.bias' is missing"),
        "extra": (state | {"more.bias": np.ones(3, np.float32)}, "the tensor 'more.bias' is matched by no rule"),
        "shape": (state | {"quant_conv.bias": np.ones(7, np.float32)}, "bias' has the shape 7, 8 is expected"),
    }
    for name, (tensors, message) in bad.items():
        (tmp_path / name).mkdir()
        folder = folder_of(tmp_path / name, tensors)
        refused(capsys, tmp_path, message, "sd_kl_vae", folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiles": 3}, "config has the key 'tiles', which is not supported"),
        ({"act_fn": "tanh"}, "act_fn 'tanh' is not supported, only 'silu'"),
        ({"latents_mean": [0.0]}, "latents_mean [0.0] is not supported"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "is not supported, only 'AutoencoderKL'"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types ['DownEncoderBlock2D'] is not supported"),
        ({"norm_num_groups": 7}, "do not divide into 7 groups"),
        ({"block_out_channels": [16, -8]}, "block_out_channels -8 is not an integer"),
        ({"layers_per_block": 2}, "the tensor 'encoder.down_blocks.0.resnets.1.norm1.weight' is missing"),
        ({"scaling_factor": "one"}, "scaling_factor 'one' is not a number"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, capsys, state, changes, message):
    folder = folder_of(tmp_path, state, **changes)
    code, reported = run(capsys, "sd_kl_vae", folder, tmp_path / "run")
    assert code == 2 and reported.count("error: ") == 1 and not (tmp_path / "run").exists()
    assert message in reported or (message.startswith("the tensor") and "is missing" in reported), reported


def test_files_that_cannot_be_read(tmp_path, capsys, state):
    folder = folder_of(tmp_path, state)
    whole = (folder / "w.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(whole[:-4])
    refused(capsys, tmp_path, "is not a valid safetensors file", "sd_kl_vae", folder, tmp_path / "run")
    (folder / "w.safetensors").write_bytes(whole)
    refused(capsys, tmp_path, "unknown source 'dall_e'; it must be one of", "dall_e", folder, tmp_path / "run")
    refused(capsys, tmp_path, "three arguments are needed", "sd_kl_vae", folder)
    refused(capsys, tmp_path, "no config 'sd9'", "sd_kl_vae", folder, tmp_path / "run", "--config", "sd9")
    refused(capsys, tmp_path, "already exists", "sd_kl_vae", folder, folder)
    (folder / "config.json").write_text("[1]")
    refused(capsys, tmp_path, "is not a JSON object", "sd_kl_vae", folder, tmp_path / "run")
    (folder / "config.json").unlink()
    refused(capsys, tmp_path, "presets SD, SDXL, SD3, Flux", "sd_kl_vae", folder, tmp_path / "run")
    # a checkpoint of another size than its config
    message = "a model of this config does not have"
    refused(capsys, tmp_path, message, "sd_kl_vae", folder, tmp_path / "run", "--config", "SD3")


def test_exports_that_cannot_be(tmp_path, capsys):
    assert run(capsys, "sd_kl_vae", GOLDEN / "sd_kl_vae", tmp_path / "run")[0] == 0
    made, out = tmp_path / "run", tmp_path / "out.safetensors"
    refused(capsys, tmp_path, "was imported from sd_kl_vae", "llamagen_vq", made, out, "--export")
    message = "does not fit the config: "
    refused(capsys, tmp_path, message, "llamagen_vq", made, out, "--export", "--config", "VQ-16")
    refused(capsys, tmp_path, "is not the name of a .safetensors", "sd_kl_vae", made, tmp_path / "o", "--export")
    (made / "official.json").unlink()
    refused(capsys, tmp_path, "was not imported", "sd_kl_vae", made, out, "--export")


# ---------------------------------------------------------------- sizes, listing, layers

# of the specifications: all parameters, but for VQGAN's those of encoder and decoder
OFFICIAL = {
    ("taming_vqgan", "f16-1024"): 71_747_971,
    ("llamagen_vq", "VQ-16"): 71_883_403,
    ("llamagen_vq", "VQ-8"): 70_109_835,
    ("mar_kl16", "KL-16"): 66_456_019,
    ("sd_kl_vae", "SD"): 83_653_863,
    ("sd_kl_vae", "SD3"): 83_819_683,
    ("sd_kl_vae", "Flux"): 83_819_683,
}


@pytest.mark.parametrize("source, preset", OFFICIAL)
def test_published_sizes(source, preset):
    known = tables.find(source)
    shapes = importing.target(known.plan(known.about.presets[preset], {})).shapes
    parts = ("params/net/encoder", "params/net/decoder") if source == "taming_vqgan" else "params/"
    count = sum(int(np.prod(spec.shape)) for path, spec in shapes.items() if path.startswith(parts))
    assert count == OFFICIAL[source, preset]


def test_the_list_shows_every_source(capsys):
    code, message = run(capsys, "--list")
    assert code == 0
    for name in tables.names():
        about = tables.find(name).about
        assert name in message and about.licence in message and all(preset in message for preset in about.presets)


def test_suffixes_name_variants():
    assert tables.find("sd_kl_vae_flux").name == "sd_kl_vae" and tables.find("taming_vqgan-f8").name == "taming_vqgan"
    assert tables.longest("dit_official_xl", ["dit", "dit_official"]) == "dit_official"


def test_convert_never_sees_a_model():
    """Every module of the package imported: none of models, nn or flax comes along."""
    program = (
        "import sys, pkgutil, importlib, hybridgen.weights as c\n"
        "for m in pkgutil.walk_packages(c.__path__, 'hybridgen.weights.'):\n"
        "    importlib.import_module(m.name)\n"
        "bad = [n for n in sys.modules if n.startswith(('hybridgen.models', 'hybridgen.nn', 'flax', 'torch'))]\n"
        "assert 'hybridgen.weights.tables.sd_kl_vae' in sys.modules and not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
