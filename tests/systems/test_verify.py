"""All recorded outputs are reproduced; a changed weight or number is detected; bad folders are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference

from hybridgen import cli, verify
from hybridgen.core.errors import UserError
from hybridgen.replays import names
from hybridgen.weights import safetensors
from hybridgen.weights.files import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
HERE = sorted(path.parent.name for path in GOLDEN.glob("*/io.npz"))


LONG = ("taming_gumbel", "taming_gpt_codes", "llama_lm_linear", "llama_lm_yarn")  # and told by others


@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in HERE]
)
def test_recorded_outputs_are_reproduced(system):
    lines = []
    assert verify.verify(f"{system}-variant", GOLDEN / system, lines.append), "\n".join(lines)
    io = np.load(GOLDEN / system / "io.npz")
    reported = {line.split()[0] for line in lines}
    outputs = {name for name in io.files if name.startswith("out_")}
    assert reported and outputs <= reported <= set(io.files) and all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize("system", sorted(set(names()) - set(HERE)))
def test_recordings_too_large_to_keep_are_reproduced(system):
    if not (SHARED / system).is_dir():
        pytest.skip("the recordings are not beside this clone")
    assert verify.verify(system, SHARED / system)


# ---------------------------------------------------------------- fixtures of the same kind, by tests/reference.py


def written(folder, system, config, arrays):
    """A fixture of a random checkpoint. `arrays(Reference)` computes io.npz from the official state dict."""
    from test_autoencoders import drawn

    _, state = drawn(system, config)
    folder.mkdir()
    safetensors.write(folder / "weights.safetensors", state)
    (folder / "config.json").write_text(json.dumps(config))
    io = arrays(reference.Reference(state, reference.TAMING))
    io = {name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in io.items()}
    np.savez(folder / "io.npz", **io)
    return folder


def test_a_vqgan_of_another_size(tmp_path):
    config = {"ddconfig": {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 6}}
    config["ddconfig"] |= {"z_channels": 4, "double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.1}
    config |= {"n_embed": 9, "embed_dim": 5, "sane_index_shape": True}

    def arrays(it):
        image = np.random.RandomState(0).randn(2, 3, 6, 6).astype(np.float32)
        z, codebook = it.encode(image, 1, 1), it.get("quantize.embedding.weight")
        distance = np.square(z.transpose(0, 2, 3, 1)[..., None, :] - codebook).sum(-1)  # b h w v
        best = np.sort(distance, -1)
        assert (best[..., 1] - best[..., 0]).min() > 1e-4  # rounding does not decide
        ids = distance.argmin(-1)
        quant = codebook[ids].transpose(0, 3, 1, 2)
        error = np.square(quant - z).mean()
        out = {"image": image, "enc_prenorm": it.hidden(image, 1, 1), "pre_quant": z, "quant": quant}
        given = np.random.RandomState(1).randint(0, 9, 36).astype(np.int32)
        out |= {"indices": ids.reshape(-1).astype(np.int32), "vq_loss": np.asarray(1.25 * error), "code_ids": given}
        picture = it.decode(codebook[given].reshape(1, 6, 6, 5).transpose(0, 3, 1, 2), 1, 1)
        return out | {"recon": it.decode(quant, 1, 1), "decode_code": picture}

    assert verify.verify("taming_vqgan_small", written(tmp_path / "f", "taming_vqgan", config, arrays))


def test_a_kl16_of_another_size(tmp_path):
    config = {"embed_dim": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 8}

    def arrays(it):
        draw = np.random.RandomState(0)
        image, noise, z = (draw.randn(1, 3, side, side).astype(np.float32) for side in (8, 4, 4))
        moments = it.encode(image, 2, 1)
        mean, spread_of = moments[:, :3], moments[:, 3:]
        sample = mean + np.exp(spread_of / 2) * noise
        each = 0.5 * (mean**2 + np.exp(spread_of) - 1 - spread_of)
        out = {"image": image, "noise": noise, "z": z, "moments": moments, "mean": mean, "logvar": spread_of}
        out |= {"kl": each.sum((1, 2, 3)), "latent": 0.2325 * sample}
        return out | {"recon": it.decode(sample, 2, 1), "decoded": it.decode(z, 2, 1)}

    assert verify.verify("mar_kl16", written(tmp_path / "f", "mar_kl16", config, arrays))


# ---------------------------------------------------------------- what is not equal is found


def copied(tmp_path, system, change=None, tensors=None, config=None):
    """A fixture's copy with its arrays, weights or config changed by a function each."""
    folder = tmp_path / system
    shutil.copytree(GOLDEN / system, folder)
    io = dict(np.load(folder / "io.npz"))
    if change:
        np.savez(folder / "io.npz", **(change(io) or io))
    if tensors:
        state = {name: tensor.read() for name, tensor in open_weights(folder / "weights.safetensors").items()}
        tensors(state)
        safetensors.write(folder / "weights.safetensors", state)
    if config:
        official = json.loads((folder / "config.json").read_text())
        config(official)
        (folder / "config.json").write_text(json.dumps(official))
    return folder


@pytest.mark.parametrize("system", ["sd_kl_vae", "sched_flowmatch", "llamagen_vq"])
def test_any_changed_number_is_found(system, tmp_path):
    """Of every recorded output one number is moved by ten times the bound, of indices by one."""
    names, lines = [], []
    assert verify.verify(system, GOLDEN / system, lambda line: names.append(line.split()[0]))

    def change(io):
        for name in names:
            place = np.unravel_index(io[name].size // 2, io[name].shape)
            step = 1 if io[name].dtype.kind == "i" else 2e-4 * max(1, np.abs(io[name]).max())
            io[name][place] += 0.01 if name == "out_density_moments" else step

    assert not verify.verify(system, copied(tmp_path, system, change), lines.append)
    assert len(lines) == len(names) and all("FAILED" in line for line in lines), "\n".join(lines)


MOVED = ("quant_conv.bias", "decoder.conv_out.weight", "encoder.mid_block.attentions.0.to_q.weight")


@pytest.mark.parametrize("name", MOVED)
def test_a_changed_weight_is_found(name, tmp_path):
    def tensors(state):
        state[name] = state[name] + np.float32(0.01) * np.sign(state[name])

    lines = []
    assert not verify.verify("sd_kl_vae", copied(tmp_path, "sd_kl_vae", tensors=tensors), lines.append)
    assert any("FAILED" in line for line in lines)


def test_another_option_is_found(tmp_path):
    def config(official):
        official["runs"]["sd"]["scheduler"]["set_alpha_to_one"] = True

    lines = []
    assert not verify.verify("sched_ddim", copied(tmp_path, "sched_ddim", config=config), lines.append)
    assert ["FAILED" in line for line in lines if "_traj" in line] == [False, False, True]


def test_densities_are_those_of_the_config(tmp_path):
    """Without the key they are SD3's, which were recorded."""
    without = copied(tmp_path / "without", "sched_flowmatch", config=lambda official: official.pop("density"))
    assert verify.verify("sched_flowmatch", without, lambda line: None)

    def other(official):
        official["density"][1:3] = [["logit_normal", 0.4, 0.6], ["mode", 1.2]]

    lines = []
    assert not verify.verify(
        "sched_flowmatch", copied(tmp_path / "other", "sched_flowmatch", config=other), lines.append
    )
    assert {line.split()[0] for line in lines if "FAILED" in line} == {"out_mode_map", "out_density_moments"}
    for row in ("mode", ["mode", 1.0, 2.0], ["mode", "1"], ["beta", 1.0], []):
        folder = copied(
            tmp_path / str(row), "sched_flowmatch", config=lambda official, row=row: official.update(density=[row])
        )
        with pytest.raises(UserError, match="is not supported, only logit_normal, mode, uniform"):
            verify.verify("sched_flowmatch", folder, lambda line: None)


def test_numbers_that_are_none_do_not_hold(tmp_path):
    def change(io):
        io["out_q_noisy"][0] = np.nan

    lines = []
    assert not verify.verify("sched_ddpm", copied(tmp_path, "sched_ddpm", change), lines.append)
    assert sum("FAILED" in line for line in lines) == 1


# ---------------------------------------------------------------- folders that cannot be replayed


def refused(message, capsys, *args):
    with pytest.raises(SystemExit) as end:
        cli.command(lambda: verify.main([str(arg) for arg in args]))
    reported = capsys.readouterr().err
    assert end.value.code == 2 and message in reported and reported.count("\n") == 1, reported


def test_bad_folders(tmp_path, capsys):
    refused("unknown source 'dall_e'; it must be one of clip_text, dit,", capsys, "dall_e", GOLDEN / "sd_kl_vae")
    refused("cannot read", capsys, "sched_ddpm", tmp_path)

    def scheduler(official):
        official["runs"]["clip"]["scheduler"]["churn"] = 1

    folder = copied(tmp_path, "sched_ddim", config=scheduler)
    refused("clip.scheduler has the key 'churn', which is not supported", capsys, "sched_ddim", folder)
    (folder / "config.json").write_text("[]")
    refused("config.json is not a JSON object", capsys, "sched_ddim", folder)
    shutil.copy(GOLDEN / "sched_ddim" / "config.json", folder)
    (folder / "io.npz").write_bytes((folder / "io.npz").read_bytes()[:-40])
    refused("is not a valid .npz file of arrays", capsys, "sched_ddim", folder)
    np.savez(folder / "io.npz", x=np.asarray([{}], object))
    refused("is not a valid .npz file of arrays", capsys, "sched_ddim", folder)


def test_no_array_is_left_out(tmp_path, capsys):
    def unknown(io):
        io["out_more"] = np.ones(3, np.float32)

    with pytest.raises(UserError, match="'out_more', which the replay of sched_euler does not use"):
        verify.verify("sched_euler", copied(tmp_path, "sched_euler", unknown), lambda line: None)

    def without(io):
        del io["in_x_T"]

    with pytest.raises(UserError, match="lacks the input 'in_x_T'"):
        verify.verify("sched_ddpm", copied(tmp_path, "sched_ddpm", without), lambda line: None)

    def inputs_only(io):
        return {"in_x_T": io["in_x_T"]}

    with pytest.raises(UserError, match="has no output to compare"):
        verify.verify("sched_dpmsolver", copied(tmp_path, "sched_dpmsolver", inputs_only), lambda line: None)

    def unused(io):
        io["in_sd_noise"] = np.ones(3, np.float32)

    with pytest.raises(UserError, match="'in_sd_noise', which the replay"):
        verify.verify("sched_euler", copied(tmp_path / "other", "sched_euler", unused), lambda line: None)


def test_exit_codes(capsys, tmp_path):
    def change(io):
        io["out_sd_traj"] += 1

    bad = copied(tmp_path, "sched_euler", change)
    for folder, code in ((GOLDEN / "sched_euler", 0), (bad, 1)):
        with pytest.raises(SystemExit) as end:
            cli.command(lambda folder=folder: verify.main(["sched_euler", str(folder)]))
        assert end.value.code == code
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[0] == "out_leading_timesteps" and out[0].endswith("ok") and "FAILED" in out[-1]
