"""Optimizers: groups by path, each with its own learning rate, schedule, clipping and decay; invalid patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_sharding
import tiny

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.training import optim

ADAM = {"kind": "adamw", "lr": 0.1, "schedule": "constant", "warmup": 0, "final": 0.0, "clip": 0.0, "decay": 0.0}
ADAM |= {"decay_on": "kernel$", "b1": 0.9, "b2": 0.95, "eps": 1e-8}


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def gradients(params, step):
    draw = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape) * 10 ** draw.uniform(-1, 2), x.dtype), params)


def updates_of(config, params, count=4, steps=10):
    rule = optim.build(config, steps, params)
    opt, out = rule.init(params), []
    for i in range(count):
        opt = optim.unpack(rule, params, optim.pack(opt))
        updates, opt = rule.update(gradients(params, i), opt, params)
        out.append(updates)
    return out


def test_a_group_acts_alone():
    """Each group, with its own clip, rate, schedule and decay, is the optimiser of its own parameters."""
    params = {
        "x": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "y": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    }
    own = {
        "match": "^y/",
        "clip": 0.5,
        "lr": 0.02,
        "schedule": "linear",
        "warmup": 3,
        "decay": 0.3,
        "decay_on": "bias$",
    }
    both = updates_of(ADAM | {"clip": 5.0, "groups": {"slow": own}}, params)
    for name, config in (("x", ADAM | {"clip": 5.0}), ("y", ADAM | own)):
        # gradients are drawn for the whole tree, so that each leaf sees the same ones
        rule = optim.build(config, 10, {name: params[name]})
        opt = rule.init({name: params[name]})
        for i, got in enumerate(both):
            updates, opt = rule.update({name: gradients(params, i)[name]}, opt, {name: params[name]})
            assert tiny.same(updates[name], got[name])
    # and by hand: the first update of Adam is the sign of the gradient, whatever its clip
    assert (
        tiny.gap(jax.tree.map(jnp.abs, both[0]["x"]), jax.tree.map(lambda x: jnp.full(x.shape, 0.1), params["x"]))
        < 1e-5
    )


def test_clip_is_the_norm_of_the_group():
    params = {"x": {"kernel": jnp.zeros(4)}, "y": {"kernel": jnp.zeros(9)}}
    grads = {"x": {"kernel": jnp.full(4, 3.0)}, "y": {"kernel": jnp.full(9, 5.0)}}  # norms 6 and 15
    config = ADAM | {"b1": 0.0, "clip": 12.0, "groups": {"own": {"match": "^y", "clip": 3.0}}}
    rule = optim.build(config, 10, params)
    _, opt = rule.update(grads, rule.init(params), params)
    moments = {path: leaf for path, leaf in trees.flatten(optim.pack(opt)).items() if "/mu/" in path}
    by_name = {path[-8]: leaf for path, leaf in moments.items()}
    np.testing.assert_allclose(by_name["x"], 3.0)  # not clipped by the norm of both, 16.2
    np.testing.assert_allclose(by_name["y"], 1.0, rtol=1e-6)


def test_decay_goes_by_path_and_not_by_rank():
    params = {
        "blocks": {"norm": {"scale": jnp.ones((2, 4))}, "mlp": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones(4)}}
    }
    still = jax.tree.map(jnp.zeros_like, params)
    for kind in optim.KINDS:
        for pattern, touched in (("kernel$", {"kernel"}), ("norm/|bias$", {"scale", "bias"})):
            rule = optim.build(ADAM | {"kind": kind, "decay": 0.5, "decay_on": pattern}, 10, params)
            updates, _ = rule.update(still, rule.init(params), params)
            moved = {path.split("/")[-1] for path, leaf in trees.flatten(updates).items() if np.abs(leaf).max() > 0}
            assert moved == touched


@pytest.mark.parametrize("kind", optim.KINDS)
def test_decay_is_decoupled_and_goes_with_the_rate(kind):
    """Without a gradient a parameter shrinks by lr * decay a step, with the schedule's rate of that step."""
    params = {"x": {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.full(4, 2.0)}, "y": {"kernel": jnp.full(2, 2.0)}}
    config = ADAM | {"kind": kind, "lr": 0.02, "schedule": "linear", "warmup": 2, "decay": 0.5, "clip": 1.0}
    config |= {"groups": {"own": {"match": "^y/", "lr": 0.004, "decay": 0.25}}}
    rule = optim.build(config, 6, params)
    rate = {name: optim.schedule(config | {"lr": lr}, 6) for name, lr in (("x", 0.02), ("y", 0.004))}
    still, opt = jax.tree.map(jnp.zeros_like, params), rule.init(params)
    for i in range(5):
        opt = optim.unpack(rule, params, optim.pack(opt))  # the count of the schedule travels with a checkpoint
        updates, opt = rule.update(still, opt, params)
        new = optax.apply_updates(params, updates)
        for name, decay in (("x", 0.5), ("y", 0.25)):
            want = params[name]["kernel"] * (1 - float(rate[name](i)) * decay)
            np.testing.assert_allclose(new[name]["kernel"], want, rtol=1e-6)
        assert tiny.same(new["x"]["bias"], params["x"]["bias"])
        params = new


def test_patterns_that_match_nothing_are_refused():
    params = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "b": {"norm": {"scale": jnp.ones(2)}}}

    def refused(**changes):
        with pytest.raises(UserError) as error:
            optim.build(ADAM | changes, 10, params)
        return str(error.value)

    slow = {"match": "^disc/", "lr": 0.1}
    assert "optim.groups.slow.match '^disc/' matches no trained parameter" in refused(groups={"slow": slow})
    assert "'a/kernel'" in refused(groups={"slow": slow})  # what a path looks like
    assert "optim.decay_on 'kernal$' matches no trained parameter" in refused(decay=0.1, decay_on="kernal$")
    own = {"match": "^a/", "decay": 0.1, "decay_on": "scale$"}  # there is one, in another group
    assert "optim.groups.own.decay_on 'scale$' matches no" in refused(groups={"own": own})
    assert "optim.groups.own.match is None" in refused(groups={"own": {"lr": 0.1}})
    assert "'rest'" in refused(groups={"rest": {"match": "^a/"}})
    assert "optim.decay_on '(' is not a regular expression" in refused(decay_on="(")
    assert "optim.groups.own.match '*' is not a regular expression" in refused(groups={"own": {"match": "*"}})
    bad = {"match": "^a/", "decay_on": "["}
    assert "optim.groups.own.decay_on '[' is not a regular" in refused(groups={"own": bad})

    optim.build(ADAM | {"decay_on": "kernal$"}, 10, params)  # nothing is to decay
    optim.build(ADAM | {"decay": 0.1, "groups": {"norms": {"match": "norm/"}}}, 10, params)  # no kernel there
    optim.build(ADAM | {"decay": 0.1, "groups": {"slow": slow}}, 10, {})  # an assembled model has nothing to train


def test_a_parameter_of_two_groups_is_refused():
    groups = {"one": {"match": "kernel$"}, "two": {"match": "^a/"}}
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    with pytest.raises(UserError, match="optim.groups: parameter 'a/kernel' matches two groups, one and two"):
        optim.build(ADAM | {"groups": groups}, 10, params)
    with pytest.raises(UserError, match="'sgd' is not one of adamw, adafactor"):
        optim.build(ADAM | {"kind": "sgd"}, 10, params)
    with pytest.raises(UserError, match="'sine' is not one of"):
        optim.build(ADAM | {"schedule": "sine"}, 10, params)


def test_schedules():
    group = ADAM | {"lr": 0.8, "warmup": 4, "final": 0.25}
    at = {
        name: [float(optim.schedule(group | {"schedule": name}, 12)(i)) for i in range(14)] for name in optim.SCHEDULES
    }
    for values in at.values():
        np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)  # the first update is not lost
    np.testing.assert_allclose(at["constant"][5:], 0.8, rtol=1e-6)
    np.testing.assert_allclose(at["linear"][8], 0.5, rtol=1e-6)  # half-way from 0.8 to 0.2
    np.testing.assert_allclose(at["cosine"][8], 0.5, rtol=1e-6)
    np.testing.assert_allclose(at["cosine"][6], 0.2 + 0.6 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)
    np.testing.assert_allclose([at["linear"][13], at["cosine"][13]], 0.2, rtol=1e-6)


def test_adafactor_learns_with_a_small_state():
    params = {"a": {"kernel": jnp.ones((256, 192)), "bias": jnp.ones(256)}}
    config = ADAM | {"kind": "adafactor", "lr": 0.05, "clip": 1.0}
    rule = optim.build(config, 50, params)
    opt = rule.init(params)
    assert nbytes(optim.pack(opt)) < 0.05 * nbytes(params)
    assert nbytes(optim.pack(optim.build(ADAM, 50, params).init(params))) > 1.9 * nbytes(params)

    def loss(params):
        return jnp.square(params["a"]["kernel"] - 0.5).mean() + jnp.square(params["a"]["bias"] + 1).mean()

    @jax.jit
    def step(params, packed):
        opt = optim.unpack(rule, params, packed)
        updates, opt = rule.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), optim.pack(opt)

    first, packed = loss(params), optim.pack(opt)
    for _ in range(40):
        params, packed = step(params, packed)
    assert loss(params) < 0.5 * first


# ---------------------------------------------------------------- Muon


def newton_schulz(matrix):
    """Five steps of Jordan's quintic iteration on a matrix [m, n], in float64."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    x, turned = (x.T, True) if x.shape[0] > x.shape[1] else (x, False)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def muon_by_hand(path, gradient):
    """Update of a kernel of one layer at the first step and rate 1: each of its matrices apart."""
    name = path.split("/")[-2]
    moves = {"qkv": (2, 0, 1, 3), "up": (1, 0, 2)}.get(name, range(gradient.ndim))  # what is stacked in front
    moved = gradient.transpose(*moves)
    split = {"qkv": 2, "up": 2, "out": 3, "conv_1": 3, "down": 1, "text_project": 1}[name]  # where the axes out begin
    stack = moved.reshape(-1, *moved.shape[1:]) if name in ("qkv", "up") else moved[None]
    ins = int(np.prod(stack.shape[1 : split + (name not in ("qkv", "up"))]))
    done = [newton_schulz(matrix.reshape(ins, -1)) for matrix in stack]
    done = [-0.2 * max(one.shape) ** 0.5 * one for one in done]
    back = np.stack([one.reshape(stack.shape[1:]) for one in done]).reshape(moved.shape)
    return back.transpose(*np.argsort(list(moves)))


BLOCK = {
    "attention/qkv/kernel": (12, 2, 4, 3),  # two queries a key head
    "attention/out/kernel": (2, 2, 3, 12),
    "mlp/up/kernel": (12, 2, 20),
    "mlp/down/kernel": (20, 12),
    "attention_norm/scale": (12,),
    "attention/qkv/bias": (2, 4, 3),
    "modulation/kernel": (12, 6, 12),
}
ALONE = {
    "text_project/kernel": (12, 8),
    "conv_1/kernel": (3, 3, 4, 6),
    "head/kernel": (12, 16),
    "tokens/table": (16, 12),
}


@pytest.mark.parametrize("layers", [0, 3])
def test_muon_takes_each_matrix_of_each_layer_apart(layers):
    """Stacked over layers or not, what stands before and behind the stack: the same as by hand, and AdamW elsewhere."""
    front = (layers,) if layers else ()
    shapes = {f"blocks/layers/{path}": (*front, *shape) for path, shape in BLOCK.items()} | ALONE
    params = trees.unflatten({path: jnp.ones(shape) for path, shape in shapes.items()})
    grads = gradients(params, 0)
    updates, rest = ({}, {})
    for kind, out in (("muon", updates), ("adamw", rest)):
        rule = optim.build(ADAM | {"kind": kind, "lr": 1.0}, 10, params)
        out |= trees.flatten(jax.jit(rule.update)(grads, rule.init(params), params)[0])
    muon = {path for path in shapes if not np.array_equal(updates[path], rest[path])}
    hidden = {f"blocks/layers/{path}" for path in BLOCK if path.endswith("kernel") and "modulation" not in path}
    assert muon == hidden | {"text_project/kernel", "conv_1/kernel"}
    for path in muon:
        gradient = np.asarray(trees.flatten(grads)[path], np.float64)
        stacked = layers and path in hidden
        want = [muon_by_hand(path, one) for one in (gradient if stacked else [gradient])]
        got = updates[path] if stacked else updates[path][None]
        np.testing.assert_allclose(got, np.stack(want), atol=2e-4)


def test_an_update_of_muon_is_as_large_as_one_of_adam():
    """Root mean square 0.2 lr, whatever the shape: what a run's `lr` was found for holds for both."""
    params = {"mlp": {"up": {"kernel": jnp.ones((2, 64, 2, 96))}, "down": {"kernel": jnp.ones((2, 96, 64))}}}
    for leaf in jax.tree.leaves(updates_of(ADAM | {"kind": "muon", "lr": 0.5}, params, 1)[0]):
        assert 0.7 < float(jnp.sqrt(jnp.mean(jnp.square(leaf)))) / (0.5 * optim.RMS) < 1.2


def test_muon_in_a_group_of_its_own():
    """Matrices of one subtree by Muon, another subtree by AdamW, each as if alone; and the state packs and unpacks."""
    params = {name: {"mlp": {"down": {"kernel": jnp.ones((6, 4))}}, "scale": jnp.ones(4)} for name in ("x", "y")}
    both = updates_of(ADAM | {"groups": {"own": {"match": "^y/", "kind": "muon", "decay": 0.1}}}, params)
    for name, config in (("x", ADAM), ("y", ADAM | {"kind": "muon", "decay": 0.1})):
        rule = optim.build(config, 10, {name: params[name]})
        opt = rule.init({name: params[name]})
        for i, got in enumerate(both):
            updates, opt = rule.update({name: gradients(params, i)[name]}, opt, {name: params[name]})
            assert tiny.same(updates[name], got[name])


@pytest.mark.slow
def test_muon_on_a_mesh():
    """Momenta are cut as their kernels, and the products of the iteration run over several devices: the same steps."""
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-5)):
        found = test_sharding.on("prior", dtype, 8, test_sharding.ONE, {"fsdp": 2, "tensor": 2}, optim__kind="muon")
        test_sharding.check(found, tolerance, tolerance)
        momenta = {path: share for path, share in test_sharding.cut(found[1], "opt/").items() if "/muon/" in path}
        kernels = [share for path, share in momenta.items() if path.endswith("kernel")]
        assert len(kernels) == 9 and max(kernels) <= 0.5
