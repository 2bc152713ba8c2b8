"""Bad input gives one line on stderr that names it, exit code 2, no traceback, and no partial files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridgen import evaluate, recipe, sample, train
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError

ROOT = Path(__file__).parents[2]
VQ, PRIOR, RECIPE = (f"configs/{name}.py:tiny" for name in ("tokenizers/vq", "ar/raster", "recipes/shapes"))
JOINT, FOLDER = "configs/hybrid/cascade.py:tiny", "configs/recipes/imagefolder.py:tiny"
SMALL = f"{ROOT}/{VQ},model.channels=(16,),model.attention=False"  # soon compiled


def refused(main, *words: object) -> str:
    """Runs a command that must fail; returns its message of one line."""
    with pytest.raises(UserError) as error:
        main([str(word) for word in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def start(module: str, *words: object) -> subprocess.Popen:
    """A command in a process of its own, not in the foreground group, so that a signal reaches it only."""
    line = [sys.executable, "-m", f"hybridgen.{module}", *map(str, words)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0)


# ---- what is wrong in a config


@pytest.mark.parametrize(
    ("config", "override", "says"),
    [
        (VQ, "optim.lrr=1", "unknown config key 'optim.lrr'; did you mean 'optim.lr'?"),
        (VQ, "optim.learning=1", "unknown config key 'optim.learning'"),
        (VQ, "optim=1", "config key 'optim' is a group; set one of"),
        (VQ, "steps=many", "config key 'steps' takes int, such as 20, not 'many'"),
        (VQ, "steps=none", "config key 'steps' takes int, such as 20, not None"),
        (VQ, "model.attention=2", "config key 'model.attention' takes bool"),
        (VQ, "model.quantizer.levels=(8,five)", "config key 'model.quantizer.levels' takes int"),
        (VQ, "batch=0", "config key 'batch' 0 is not within 1 and"),
        (VQ, "log.every=0", "config key 'log.every' 0 is not within 1 and"),
        (VQ, "mesh.data=3", "mesh {'data': 3"),
        (VQ, "batch=9;accumulate=2", "batch 9 in 2 accumulation steps does not divide over 1 "),
        (VQ, "family=tokenizers.qv", "no family 'tokenizers.qv'"),
        (VQ, "data.source=cloud", "'cloud'"),
        (VQ, "data.text.kind=letters", "'letters'"),
        (VQ, "optim.kind=sgd", "optim.kind 'sgd' is not one of adamw, adafactor"),
        (VQ, "optim.schedule=step", "optim.schedule 'step' is not one of"),
        (f"{VQ}y", "steps=1", "unknown variant 'tinyy': one of tiny, "),
        (VQ.replace("vq.py", "vqq.py"), "steps=1", "no config file"),
        ("configs/common.py", "steps=1", "is not a config"),
        ("configs", "steps=1", "no config file"),
        (PRIOR, "steps=1", "no run in '../tokenizer'"),
        (VQ, "model.quantizer.kind=pq", "'pq'"),
        (VQ, "data.resolution=30", "30"),
        (VQ, "model.quantizer.levels=(1,0)", "config key 'model.quantizer.levels' 1 is not within 2 and"),
        (VQ, "model.quantizer.levels=()", "config key 'model.quantizer.levels' is empty"),
        (VQ, "model.channels=(0,)", "config key 'model.channels' 0 is not within 1 and"),
        (VQ, "model.blocks=0", "config key 'model.blocks' 0 is not within 1 and"),
        (VQ, "model.patch=0", "config key 'model.patch' 0 is not within 1 and"),
        (PRIOR, "model.heads=0", "config key 'model.heads' 0 is not within 1 and"),
        (PRIOR, "model.depth=-1", "config key 'model.depth' -1 is not within 1 and"),
        (PRIOR, "model.width=0", "config key 'model.width' 0 is not within 1 and"),
        (JOINT, "model.prior.model.kv_heads=0", "config key 'model.prior.model.kv_heads' 0 is not within 1 and"),
        (PRIOR, "model.dtype=bf16", "'model.dtype' 'bf16' is not one of float32, bfloat16, float64"),
        (PRIOR, "model.dtype=float16", "'float16' is not one of float32, bfloat16, float64"),
        (JOINT, "model.decoder.model.dtype=half", "config key 'model.decoder.model.dtype' 'half' is not one of"),
        (VQ, "frozen_dtype=fp16", "config key 'frozen_dtype' 'fp16' is not one of"),
        (VQ, "trainable=('text',)", "config key 'trainable' takes pairs, such as (('^text/', False),), not ("),
        (VQ, "trainable=('text', False)", "config key 'trainable' takes pairs"),
        (VQ, "trainable=text", "config key 'trainable' takes pairs"),
        (VQ, "trainable=(('text', 1),)", "config key 'trainable' takes pairs"),
        (VQ, "trainable=(('(', False),)", "config key 'trainable' '(' is not a regular expression"),
        (VQ, "optim.decay_on=(", "config key 'optim.decay_on' '(' is not a regular expression: missing )"),
        (VQ, "ema.skip=[", "config key 'ema.skip' '[' is not a regular expression"),
        (VQ, "optim.groups.slow.match=*", "config key 'optim.groups.slow.match' '*' is not a regular expression"),
        (VQ, "optim.groups.slow.lrr=1", "did you mean 'optim.groups.slow.lr'?"),
        (VQ, "optim.groups.slow.lr=fast", "config key 'optim.groups.slow.lr' takes float"),
        (VQ, "optim.groups.slow=1", "unknown config key 'optim.groups.slow'"),
        (VQ, "parts.a.b=1", "unknown config key 'parts.a.b'"),
        (VQ, "part.tokenizer=x", "unknown config key 'part.tokenizer'"),
        (PRIOR, "sample.options.prior.guidance=none", "config key 'sample.options.prior.guidance' takes float"),
        (PRIOR, "sample.options.prior.guidance=-1", "prior.guidance -1.0 is not within 0.0 and 100.0"),
        (PRIOR, "sample.options.prior.guidance_schedule=steep", "'steep' is not one of constant"),
        (JOINT, "sample.options.decoder.steps=0", "decoder.steps 0 is not within 1 and 1000"),
        (VQ, "health.skip=((4,4),)", "health.skip: (4, 4) is not an interval"),
        (VQ, "health.streak=0", "config key 'health.streak' 0 is not within 1 and"),
        (VQ, "health.spike=-1", "config key 'health.spike' -1.0 is not within 0.0 and"),
        (VQ, "checkpoint.keep_every=-1", "config key 'checkpoint.keep_every' -1 is not within 0 and"),
        ("README.md", "steps=1", "README.md is not a config: a config is a Python file such as"),
        ("pyproject.toml", "steps=1", "pyproject.toml is not a config"),
    ],
)
def test_a_config_that_cannot_be_trained(config, override, says, tmp_path):
    where = tmp_path / "new" / "run"
    overrides = [f"--config.{pair}" for pair in override.split(";")]
    message = refused(train.main, "--config", ROOT / config, "--workdir", where, *overrides)
    assert says in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "a refused run has left something"


def test_a_sampling_option_without_a_value(tmp_path):
    """Also if it comes from a file."""
    file = tmp_path / "mine.py"
    file.write_text("from configs.ar import raster\n\n\ndef get_config(_):\n    config = raster.get_config('tiny')\n")
    with file.open("a") as lines:
        lines.write("    config.sample.options.prior.top_p = None\n    return config\n")
    config_lib.load(f"{ROOT / PRIOR}")  # now `configs` can be imported
    with pytest.raises(UserError, match="config key 'sample.options.prior.top_p' is none"):
        config_lib.load(str(file))


def test_what_is_added_to_open_groups():
    words = ["init_from.all=runs/x", "init_from.prior.blocks=runs/y:blocks", "parts.text=../text"]
    words += ["optim.groups.slow.match=^encoder/", "optim.groups.slow.lr=1", "optim.groups.slow.lr=1e-4"]
    words += ["trainable=[('^encoder/', True), ('', False)]"]
    one = config_lib.load(f"{ROOT / VQ}", words)
    assert one.init_from.to_dict() == {"all": "runs/x", "prior/blocks": "runs/y:blocks"}
    assert one.parts.text == "../text"
    assert one.optim.groups.to_dict() == {"slow": {"match": "^encoder/", "lr": 1e-4}}
    assert one.trainable == (("^encoder/", True), ("", False))
    assert config_lib.from_plain(json.loads(json.dumps(config_lib.plain(one)))).to_dict() == one.to_dict()

    whole = config_lib.load(f"{ROOT / RECIPE}", [f"stages.decoder.{word}" for word in words[:4]])
    assert whole.stages.decoder.init_from.all == "runs/x" and not whole.stages.prior.init_from
    assert whole.stages.decoder.optim.groups.slow.match == "^encoder/"
    twice = f"{ROOT / VQ},trainable=(('a', True),)"
    assert config_lib.load(twice, ["trainable=(('b', False), ('c', True))"]).trainable == (("b", False), ("c", True))


@pytest.mark.parametrize("turn", [1, -1])
def test_what_stages_share_is_set_for_all_or_for_one(turn):
    words = ["path=/all", "stages.decoder.data.options.path=/one", "text_key=none", "length=7"]
    stages = config_lib.load(f"{ROOT / FOLDER}", words[::turn]).copy_and_resolve_references().stages
    found = {name: stages[name].data for name in ("tokenizer", "prior", "decoder", "cascade")}
    places = {name: data.options.path for name, data in found.items()}
    assert places == dict.fromkeys(found, "/all") | {"decoder": "/one"}
    assert all(data.options.text_key is None and data.text.length == 7 for data in found.values())


def test_where_none_is_a_word():
    """`none` is the name of a quantizer, but the empty value of a data source's option."""
    assert config_lib.load(f"{ROOT / VQ}", ["model.quantizer.kind=none"]).model.quantizer.kind == "none"
    for text, value in (("none", None), ("caption", "caption"), ("('en', 'zh')", ("en", "zh")), ("'none'", "none")):
        stages = config_lib.load(f"{ROOT / FOLDER}", [f"stages.prior.data.options.text_key={text}", "path=12"]).stages
        assert stages.prior.data.options.to_dict() == {"text_key": value, "path": "12"}
        assert stages.decoder.data.options.text_key == "text"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--confg", VQ, "--workdir", "x"], "--config"),
        (["--config", VQ, "--workdir", "x", "--wokdir=y"], "unknown argument '--wokdir=y'; did you mean '--workdir'?"),
        (["--config", VQ, "--workdir", "x", "stray"], "unknown argument 'stray'"),
        (["--config", VQ, "--workdir", "x", "--config.steps"], "--config.steps needs a value: --config.steps=VALUE"),
        (["--config", VQ], "--workdir"),
        (["--workdir", "x"], "--config"),
    ],
)
def test_flags_that_are_not_known(words, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert says in refused(train.main, *words)


def test_a_recipe_and_a_stage_are_told_apart(tmp_path):
    assert "not a recipe" in refused(recipe.main, "--config", ROOT / VQ, "--workdir", tmp_path / "a")
    words = ["--config", ROOT / RECIPE, "--workdir", tmp_path / "b"]
    message = refused(recipe.main, *words, "--config.stages.tokeniser.steps=1")
    assert "did you mean 'stages.tokenizer.steps'?" in message
    assert "recipe" in refused(train.main, "--config", ROOT / RECIPE, "--workdir", tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_picture_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    words = ["--config", f"{ROOT}/configs/recipes/imagefolder.py:tiny", "--workdir", tmp_path / "run"]
    for name in ("missing", "empty", "file"):
        assert str(tmp_path / name) in refused(recipe.main, *words, f"--config.path={tmp_path / name}")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("main", [train.main, recipe.main], ids=["train", "recipe"])
def test_a_folder_that_cannot_be_written(main, tmp_path):
    (tmp_path / "file").write_text("mine")
    config = VQ if main is train.main else RECIPE
    for place in ("file", "file/below"):
        assert str(tmp_path / place) in refused(main, "--config", ROOT / config, "--workdir", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


# ---- what is wrong in a run


@pytest.mark.slow
def test_a_checkpoint_of_another_config_is_not_gone_on_from(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run("configs/tokenizers/vq.py").folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changes = ["--config.model.blocks=2", "--config.optim.lr=0.5"]
    message = refused(train.main, "--config", ROOT / VQ, "--workdir", run, *changes)
    assert "config.model.blocks was 1 and is 2" in message and "config.optim.lr was 0.003 and is 0.5" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_runs_that_are_not_there(tmp_path):
    prompt = ["--prompt", "a red circle", "--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        assert f"no run in '{tmp_path / name}'" in refused(sample.main, "--run", tmp_path / name, *prompt)
        assert f"no run in '{tmp_path / name}'" in refused(evaluate.main, "--run", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_runs_that_are_damaged(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run("configs/tokenizers/vq.py").folder, tmp_path / "run")
    words = ["--run", run, "--out", tmp_path / "out"]
    shutil.rmtree(run / "checkpoints")
    assert f"no usable checkpoint in {run / 'checkpoints'}" in refused(evaluate.main, *words)
    (run / "config.json").write_text("{")
    assert f"{run / 'config.json'} is not the config of a run" in refused(evaluate.main, *words)
    (run / "config.json").write_text("[]")
    assert f"{run / 'config.json'} is not the config of a run" in refused(evaluate.main, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_config_is_not_drawn_from(tiny_run, tmp_path):
    """Neither if the config was changed, nor if the checkpoint was copied into another run."""
    tokenizer, prior = (tiny_run(f"configs/{name}.py").folder for name in ("tokenizers/vq", "ar/raster"))
    run = shutil.copytree(prior, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["width"] *= 2
    (run / "config.json").write_text(json.dumps(config))
    words = ["--run", run, "--out", tmp_path / "out"]
    for main, more in ((sample.main, ["--prompt", "a red circle"]), (evaluate.main, [])):
        assert "has another config: model.width was 64 and is 128" in refused(main, *words, *more)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tokenizer / "checkpoints", run / "checkpoints")
    assert 'family was "tokenizers.vq" and is "ar.raster"; model.attention was' in refused(evaluate.main, *words)
    assert not (tmp_path / "out").exists()


# ---- what is wrong in a prompt, an option, an output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", "a red circle", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "a red circel"], "does not know the word 'circel'; the nearest known word is 'circle'"),
        (["--prompt", " ".join(["a red circle"] * 99)], "the prompt has 297 tokens, but this model reads at most 16"),
        ([], "no prompt: give --prompt TEXT, --prompts FILE or"),
        (["--prompts", "nowhere.txt"], "--prompts: no such file 'nowhere.txt'"),
        (["--prompts", __file__.replace("tests/core/test_cli.py", "hybridgen")], "--prompts: no such file"),
        (["--prompt", "a red circle", "--guidance", "-1"], "prior.guidance -1.0 is not within 0.0 and 100.0"),
        (["--prompt", "a red circle", "--guidance", "nan"], "prior.guidance nan is not within"),
        (["--prompt", "a red circle", "--guidance", "strong"], "argument --guidance: invalid float value: 'strong'"),
        (["--prompt", "a red circle", "--temperature", "-0.1"], "prior.temperature -0.1 is not within"),
        (["--prompt", "a red circle", "--top-k", "-1"], "prior.top_k -1 is not within"),
        (["--prompt", "a red circle", "--top-p", "0"], "prior.top_p 0.0 is not within"),
        (
            ["--prompt", "a red circle", "--steps", "4"],
            "--steps 4; the sampling options of this run are --guidance, --guidance-schedule,",
        ),
        (["--prompt", "a red circle", "--count", "0"], "--count 0 is not within 1 and"),
        (["--prompt", "a red circle", "--batch", "-2"], "--batch -2 is not within 1 and"),
        (["--prompt", "a red circle", "--seed", "-1"], "--seed -1"),
        (["--prompt", "a red circle", "--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        (["--prompt", "a red circle", "--prompts-file", "x"], "unrecognized arguments: --prompts-file x"),
    ],
)
def test_prompts_and_options_that_cannot_be_drawn(words, says, tiny_run, tmp_path):
    run, out = tiny_run("configs/ar/raster.py").folder, tmp_path / "out"
    assert says in refused(sample.main, "--run", run, "--out", out, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "decoder.steps 0 is not within 1 and 1000"),
        (["--steps", "100000"], "decoder.steps 100000 is not within 1 and 1000"),
        (["--steps", "2.5"], "argument --steps: invalid int value: '2.5'"),
        (["--solver", "eulr"], "decoder.solver 'eulr' is not one of euler"),
        (["--decoder-guidance", "inf"], "decoder.guidance inf is not within"),
        (["--splits", "test"], "'test'"),
        (["--splits", ""], "''"),
        (["--count", "0"], "--count 0 is not within 1 and"),
    ],
)
def test_evaluations_that_cannot_be_made(words, says, tiny_run, tmp_path):
    run, out = tiny_run("configs/diffusion/dit.py").folder, tmp_path / "out"
    assert says in refused(evaluate.main, "--run", run, "--out", out, *words)
    assert not out.exists()


def test_prompts_for_a_run_that_takes_none(tiny_run, tmp_path):
    for path in ("configs/tokenizers/vq.py", "configs/diffusion/dit.py"):
        run, out = tiny_run(path).folder, tmp_path / "out"
        assert "takes no prompts" in refused(sample.main, "--run", run, "--prompt", "a red circle", "--out", out)
        assert not out.exists()


def test_outputs_that_cannot_be_written(tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    run = tiny_run("configs/ar/raster.py").folder
    for place in ("file", "file/below"):
        assert str(tmp_path / place) in refused(
            sample.main, "--run", run, "--prompt", "a red circle", "--out", tmp_path / place
        )
        assert str(tmp_path / place) in refused(evaluate.main, "--run", run, "--out", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_of_prompts_that_is_not_text(tiny_run, tmp_path):
    (tmp_path / "prompts").write_bytes(b"\xff\xfe\x00")
    run = tiny_run("configs/ar/raster.py").folder
    message = refused(sample.main, "--run", run, "--prompts", tmp_path / "prompts", "--out", tmp_path / "out")
    assert str(tmp_path / "prompts") in message and not (tmp_path / "out").exists()
    (tmp_path / "prompts").write_text("\n \n")
    message = refused(sample.main, "--run", run, "--prompts", tmp_path / "prompts", "--out", tmp_path / "out")
    assert message == f"--prompts {tmp_path / 'prompts'} has no prompts: write one per line"


# ---- as a process


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("train", ["--config", VQ, "--workdir", "runs/x", "--config.optim.lrr=1"], "did you mean 'optim.lr'?"),
        ("sample", ["--run", "nowhere", "--prompt", "a"], "no run in 'nowhere'"),
        ("cli", ["smaple"], "unknown command 'smaple'; did you mean 'sample'?"),
        ("cli", ["train"], "--workdir"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(module, words, says):
    code = f"import sys; sys.argv = ['hybridgen', *{words!r}]; from hybridgen.cli import main; main()"
    line = [sys.executable, "-c", code] if module == "cli" else [sys.executable, "-m", f"hybridgen.{module}", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and says in done.stderr


def wait_for(process: subprocess.Popen, text: str, seconds: float = 300) -> None:
    """Reads lines until one has `text`."""
    limit = time.monotonic() + seconds
    for line in process.stdout:
        if text in line:
            return
        assert time.monotonic() < limit
    raise AssertionError(process.communicate()[1])


def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(tmp_path):
    words = ["--config", f"{SMALL},steps=1000000,log.every=1", "--workdir", tmp_path / "run"]
    process = start("train", *words)
    try:
        wait_for(process, "train       2/")
        message = refused(train.main, *words)
        assert f"run folder {tmp_path / 'run'} is in use" in message and f"pid {process.pid}" in message
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    assert "SIGINT: saving and stopping" in err
    stopped = int(err.split("stopped at step ")[1].split(";")[0])
    assert stopped >= 2 and "run the same command again to resume" in err
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == str(stopped) and (saved / "manifest.json").is_file()

    process = start("train", *words)  # the same command
    try:
        wait_for(process, f"steps {stopped} to 1000000")
        wait_for(process, f"train {stopped + 2:7d}/")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "SIGTERM: saving and stopping" in err and "stopped at step" in err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, steps[-1] + 1)), "a step is missing from the log, or there twice"
