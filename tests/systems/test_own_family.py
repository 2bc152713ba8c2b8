"""A family of one's own: each violation of the contract takes one line, and a prior needs no attention."""

import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hybridgen import evaluate, sample, train
from hybridgen.core import importing, rng, sharding
from hybridgen.core.errors import UserError
from hybridgen.models import checks, contract
from hybridgen.models.contract import Inputs, Option
from hybridgen.models.roles import next_token
from hybridgen.nn.linear import Embed, Linear
from hybridgen.runs import bundle, drawing, reading


class Recurrent(nn.Module):
    """Next-token prior whose state is `h [b, d]`: the running sum of what each token adds, without attention."""

    vocab: int
    length: int = 5
    width: int = 8
    depth: int = 1
    classes: int = 3
    unroll: int = 1
    cond_drop_prob: float = 0.1
    dtype: str = "float32"

    has_unconditional = True

    def setup(self) -> None:
        self.tokens = Embed(self.vocab, self.width)
        self.start = Embed(self.classes + 1, self.width)
        self.head = Linear(self.vocab)

    def begin(self, cond: dict) -> jax.Array:
        drop = cond.get("drop", jnp.zeros(cond["label"].shape, bool))
        return self.start(jnp.where(drop, self.classes, cond["label"]))  # b d

    def run(self, h: jax.Array, tokens: jax.Array) -> jax.Array:
        """The states `[b, n, d]` after each of `tokens [b, n]`."""
        return h[:, None] + jnp.cumsum(jnp.tanh(self.tokens(tokens)), 1)

    def features(self, tokens: jax.Array, cond: dict, keys: jax.Array | None = None) -> jax.Array:
        h = self.begin(cond)
        return jnp.concatenate([h[:, None], self.run(h, tokens[:, :-1])], 1)

    def prefill(self, cond: dict, room: int) -> tuple[jax.Array, dict]:
        h = self.begin(cond)
        return self.logits(h), {"h": h}

    def step(self, cache: dict, chunk: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, dict]:
        states = self.run(cache["h"], chunk)
        return self.logits(states), {"h": states[:, -1]}

    def grow(self, cache: dict, more: int) -> dict:
        return cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        return 3 * self.head(hidden)


class Unsized:
    """A model whose length cannot be computed."""

    width = 8

    @property
    def length(self) -> int:
        return len(self.width)


def recurrent(**changes: object) -> types.ModuleType:
    """A family around it, as a module; `changes` replace its members, None removes one."""

    def init(model, key, specs, parts):
        tokens, cond = jnp.zeros((1, model.length), jnp.int32), {"label": jnp.zeros((1,), jnp.int32)}
        return {"params": model.init(key, tokens, cond, method=next_token.forward)["params"], "extra": {}}

    def conditioning(model, batch, parts):
        return {"label": batch["label"]}

    def loss(model, params, batch, key, *, parts, extra, step, train):
        cond = next_token.drop_condition(model, conditioning(model, batch, parts), rng.sample_keys(key, batch["id"]))
        return next_token.token_loss(model, params, batch, batch["tokens"], cond)

    def drawn(model, params, cond, keys, *, parts, extra, options):
        return next_token.sample_image(model, params, extra, cond, keys, parts, options)

    family = types.ModuleType("my_pkg.recurrent")
    shared = {name: getattr(next_token, name) for name in ("prefill", "step", "score", "features", "generate")}
    own = {"init": init, "conditioning": conditioning, "loss": loss, "sample": drawn, "Recurrent": Recurrent}
    own |= {"ROLE": "prior", "OPTIONS": {"prior": next_token.OPTIONS}, "build": lambda config: Recurrent(**config)}
    own |= {"inputs": lambda model: Inputs(classes=model.classes)}
    vars(family).update({name: value for name, value in (shared | own | changes).items() if value is not None})
    return family


@pytest.fixture(scope="module")
def made():
    """(family, model, parameters)."""
    family = recurrent()
    model = contract.model_of(family, {"vocab": 11})
    return family, model, family.init(model, jax.random.key(0), {}, {})["params"]


# ---------------------------------------------------------------- a network without attention


@pytest.mark.parametrize("guided", [1.0, 2.0])
def test_a_recurrent_prior_draws_what_it_scores(made, guided, monkeypatch):
    """In parts too: greedy tokens are the most likely ones of the (guided) teacher-forced logits."""
    monkeypatch.setattr(next_token.decode, "PART", 2)
    family, model, params = made
    assert contract.faults(family) == []
    cond, keys = {"label": jnp.array([0, 1, 2])}, jax.random.split(jax.random.key(1), 3)
    tokens, _ = family.generate(model, params, {}, cond, keys, {"temperature": 0.0, "guidance": guided})
    on = family.score(model, params, {}, tokens, cond)
    off = family.score(model, params, {}, tokens, cond | {"drop": jnp.ones((3,), bool)})
    np.testing.assert_array_equal(tokens, jnp.argmax(off + guided * (on - off), -1))
    assert len(np.unique(tokens)) > 1


def test_its_loss_trains(made):
    family, model, params = made
    batch = {"id": jnp.arange(2), "label": jnp.array([0, 1]), "tokens": jnp.zeros((2, 5), jnp.int32)}
    rest = {"parts": {}, "extra": {}, "step": 0, "train": True}
    value, aux = contract.returned(family, "loss", family.loss(model, params, batch, jax.random.key(0), **rest))
    assert value.shape == () and aux["extra"] == {}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (Option(1.0, "x"), "its option 'prior.mine' is a number without a range: give low and high"),
        (Option(5, "x", 0, 1), "the default of its option 'prior.mine', 5 is not within 0 and 1"),
        (Option(True, "x", 0, 1), "the default True of its option 'prior.mine' is neither a number nor a text"),
        (Option("a", "x", choices=("b",)), "the default of its option 'prior.mine', 'a' is not one of b"),
        (Option(1, "x", 0, 9, flag="seed"), "the flag --seed of its option 'prior.mine' is one of the commands' own"),
        (1.0, "its OPTIONS are not {group: {name: Option}}"),
    ],
)
def test_an_option_that_cannot_be_set_is_refused(option, says):
    (fault,) = contract.faults(recurrent(OPTIONS={"prior": {"mine": option}}))
    assert fault.startswith(says)


def test_the_flags_of_the_commands_are_known(capsys, monkeypatch):
    """`checks.FLAGS` is complete: the flags of the commands that have a run's options."""
    monkeypatch.setattr(reading, "families_of", lambda folder: [])
    monkeypatch.setattr(reading, "find_run", lambda run, folder: None)
    monkeypatch.setattr(
        reading, "read_config", lambda folder: types.SimpleNamespace(sample=types.SimpleNamespace(options={}))
    )
    found = set()
    for main in (sample.main, evaluate.main):
        with pytest.raises(SystemExit):
            main(["--run", "x", "--help"])
        lines = capsys.readouterr().out.splitlines()
        found |= {line.split()[0 if line.split()[0][:2] == "--" else 1] for line in lines if line.startswith("  -")}
    assert {flag.strip("-,").replace("-", "_") for flag in found} | {"labels"} == set(checks.FLAGS)


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"vocab": 11, "depht": 2}, "'my_pkg.recurrent' has no model option 'depht'; did you mean 'depth'?"),
        ({}, {"width": 8}, "'my_pkg.recurrent' needs the model option 'vocab'"),
        ({"build": lambda config: None}, {}, "is not a family: its build(config) returns None"),
        ({"build": lambda config: 3}, {}, "is not a family: its model has no attribute 'width'"),
        (
            {"build": lambda config: Unsized()},
            {},
            "no valid 'length': TypeError: object of type 'int' has no len() (test_",
        ),
        (
            {"inputs": None},
            {"vocab": 11},
            "",  # its classes are a default, not an option of the config
        ),
        (
            {"inputs": None},
            {"vocab": 11, "classes": 3},
            "has the option classes 3, but does not declare that it reads classes: define inputs(model)",
        ),
        (
            {"build": lambda config: Recurrent(config["vocab"])},
            {"vocab": 11, "text_vocab": 50},
            "has the option text_vocab 50, but does not declare that it reads captions: define inputs(model) -> Inputs("
            "text=True)",
        ),
    ],
)
def test_a_model_that_does_not_fit_its_family_is_refused(changes, options, says):
    if not says:
        assert contract.model_of(recurrent(**changes), options) == Recurrent(11)
        return
    with pytest.raises(UserError) as error:
        contract.model_of(recurrent(**changes), options)
    assert says in str(error.value)


@pytest.mark.parametrize("family", ["tokenizers.vq", "ar.raster", "diffusion.dit", "hybrid.cascade", "text.clip"])
def test_a_misspelt_model_option_of_every_family_takes_one_line(family):
    module = contract.find(family)
    with pytest.raises(UserError, match=f"'{family}' (has no model option 'widht'|needs the model option)"):
        contract.model_of(module, {"widht": 3, "vocab": 4, "grid": (2, 2)})


def test_a_mistake_of_the_familys_own_code_is_not_hidden():
    def build(config):
        return Embed(1, nonsense=2)

    with pytest.raises(TypeError, match="nonsense"):
        contract.model_of(recurrent(build=build), {"vocab": 11})


def aux(**changes: object) -> dict:
    return {"metrics": {"nll": jnp.zeros(())}, "weight": jnp.ones(()), "extra": {}} | changes


@pytest.mark.parametrize(
    ("name", "out", "says"),
    [
        ("loss", jnp.zeros(()), r"loss returns an array of shape \(\), but must return \(scalar, {'metrics'"),
        ("loss", (jnp.zeros((4,)), aux()), r"returns as loss an array of shape \(4,\), but must return a scalar"),
        ("loss", (jnp.zeros(()), {"metrics": {}, "weight": 1.0}), "an aux without 'extra', but must return"),
        ("loss", (jnp.zeros(()), aux(metrics={"a": jnp.ones(3)})), r"aux\['metrics'\]\['a'\] an array of shape \(3,\)"),
        ("loss", (jnp.zeros(()), aux(metrics=1.0)), "must return {name: scalar}"),
        ("loss", (jnp.zeros(()), aux(weight=None)), r"as aux\['weight'\] None, but must return a scalar"),
        ("loss", (jnp.zeros(()), aux(extra={"n": jnp.ones(2)})), "the family has no merge"),
        ("decoder_loss", None, "decoder_loss returns None, but must return"),
        ("init", {"params": {}}, "init returns a mapping of 'params', but must return {'params': ..., 'extra': ...}"),
        ("sample", jnp.zeros((1, 2)), r"sample returns an array of shape \(1, 2\), but must return {'image'"),
    ],
)
def test_what_a_function_returns_is_checked(name, out, says):
    with pytest.raises(UserError, match=f"'my_pkg.recurrent' is not a family: .*{says}"):
        contract.returned(recurrent(), name, out)


def test_training_and_sampling_check_it(made):
    """While their programs are traced."""
    _, model, params = made
    bad = recurrent(loss=lambda *given, **options: jnp.zeros(()))
    rule = train.Rule(bad, model, None, types.SimpleNamespace(split=lambda x: (x, {})), 0, 1, 0.0)
    state = {"step": jnp.int32(0), "params": params, "extra": {}, "ema": {}}
    for function in (train.train_step, train.eval_step):
        with pytest.raises(UserError, match="'my_pkg.recurrent' is not a family: loss returns an array"):
            jax.eval_shape(lambda *given, function=function: function(rule, *given), state, {}, {})
    part = tiny.tokenizer()
    imageless = recurrent(sample=lambda *given, **options: {"tokens": jnp.zeros((1, 4))})
    draw = drawing.sampler(imageless, model, {}, {"tokenizer": part})
    with pytest.raises(UserError, match="sample returns tokens without 'image'"):
        draw(params, {}, {"tokenizer": part}, {}, jax.random.split(jax.random.key(0), 1))


def test_options_of_a_group_without_owner_are_refused(monkeypatch):
    found = {"my_pkg.recurrent": recurrent(OPTIONS={})}
    monkeypatch.setattr(drawing, "find", found.__getitem__)
    config = types.SimpleNamespace(
        family="my_pkg.recurrent", parts={}, sample=types.SimpleNamespace(options={"prior": {"guidance": 2.0}})
    )
    monkeypatch.setattr(reading, "families", lambda config: [config.family])
    message = "config.sample.options has the group 'prior', but 'my_pkg.recurrent' declares no OPTIONS for it"
    with pytest.raises(UserError, match=message):
        drawing.check_config(config, None, {})


def test_a_value_out_of_range_names_the_flag():
    known = {"prior": {"top_k": Option(0, "x", 0, 9)}, "decoder": {"top_k": Option(0, "x", 0, 9)}}
    for group, flag in (("prior", "--top-k"), ("decoder", "--decoder-top-k")):
        with pytest.raises(UserError, match=rf"{group}.top_k 10 is not within 0 and 9 \({flag}\)"):
            drawing.checked({group: {"top_k": 10}}, known)
    with pytest.raises(UserError, match="unknown option 'prior.topk'; did you mean 'top_k'?"):
        drawing.checked({"prior": {"topk": 1}}, known)


def test_an_option_of_another_family_in_a_cascade_is_refused(monkeypatch):
    """As after --config.model.prior.family=my_pkg.recurrent."""
    monkeypatch.setattr(contract, "find", {"my_pkg.recurrent": recurrent()}.__getitem__)
    options = {"prior": {"family": "my_pkg.recurrent", "model": {"vocab": 11, "qk_norm": True}}}
    with pytest.raises(UserError, match="'my_pkg.recurrent' has no model option 'qk_norm'"):
        sys.modules["hybridgen.models.hybrid.cascade"].build(options)


def test_a_rule_for_a_parameter_is_proposed():
    with pytest.raises(UserError) as error:
        sharding.find_rule("blocks/core/gate/kernel", (8, 8))
    assert 'call, for example, param_rules.add_rules(Rule(r"gate/kernel", "df", fsdp="df"))' in str(error.value)


# ---------------------------------------------------------------- modules by name


def test_what_is_no_family_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "their_pkg"
    package.mkdir()
    files = {"half": "ROLE = 'prior'\ndef build(config): return 0\n", "broken": "\nimport hybridgen.nn.mpl\n"}
    files |= {"typo": "def build(config:\n", "moved": "from hybridgen.nn.norm import Nrom\n"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for family, says in (
        ("half", r"'their_pkg.half' is not a family: it has no function init\(model, key, specs, parts\)"),
        (
            "broken",
            r"family 'their_pkg.broken' cannot be imported: No module named 'hybridgen.nn.mpl' \(broken.py, line 2",
        ),
        ("typo", r"family 'their_pkg.typo' cannot be imported: .*\(typo.py, line 1\)"),
        ("moved", r"family 'their_pkg.moved' cannot be imported: cannot import name 'Nrom' .* \(moved.py, line 1\)"),
        ("none", "Python finds no module 'their_pkg.none'"),
    ):
        with pytest.raises(UserError, match=says) as error:
            contract.find(f"their_pkg.{family}")
        assert "\n" not in str(error.value)


def test_a_bundle_names_only_code_that_is_trusted(tmp_path, monkeypatch, capsys):
    package = tmp_path / "traded_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "prior.py").write_text("ROLE = 'prior'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importing, "_trusted", set())
    config = {"family": "traded_pkg.prior", "model": {}, "data": {"source": "traded_pkg.data.Mine"}}
    config |= {"mesh": {}, "parts": {}, "sample": {"options": {}}}
    bundle.write(tmp_path / "bundle", bundle.Bundle({"params": {}, "extra": {}}, {}, 0), config, None, "float32")
    words = ["--run", str(tmp_path / "bundle")]
    for main in (sample.main, evaluate.main):
        with pytest.raises(UserError, match="if you trust them, give --trust traded_pkg, or import first"):
            main(words)
        assert "traded_pkg.prior" not in sys.modules
    with pytest.raises(UserError, match="argument --trust: Python finds no module 'traded_pgk'"):
        sample.main([*words, "--trust", "traded_pgk"])
    assert "traded_pkg" not in sys.modules
    with pytest.raises(UserError, match="'traded_pkg.prior' is not a family: it has no function build"):
        sample.main([*words, "--trust", "traded_pkg"])  # it is imported
    assert reading.read_config(tmp_path / "bundle").family == "traded_pkg.prior"
    assert importing.is_trusted("traded_pkg.data") and not importing.is_trusted("traded_pkgs")
