"""Trains a model of any family from a config, or resumes its run.

    python -m hybridgen.train --config configs/ar/raster.py:tiny --workdir runs/raster
    python -m hybridgen.train --from RUN --config.path=FOLDER --workdir runs/tuned      # fine-tunes (runs/finetune.py)

The order of the loop is fixed: evaluate, save, load the next batch, step. Checkpoint N was saved after exactly N
batches. Batch N and the random numbers of step N are functions of (seed, N), so a resumed run is identical to an
uninterrupted one.

A bad step (a loss or gradient that is not finite, or a spike of the gradient norm) changes no parameters; it is only
counted. After several bad steps in a row, training restores the newest checkpoint before them and continues after the
bad batches (training/rollback.py): the run is a function of (seed, step, skipped intervals).
"""

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core import distributed, rng, trees
from hybridgen.core.errors import UserError
from hybridgen.cost import steps as step_costs
from hybridgen.data import sources
from hybridgen.models import contract
from hybridgen.models.contract import for_shape
from hybridgen.runs import checkpoint, finetune
from hybridgen.runs import folder as run_folder
from hybridgen.runs.drawing import sample_grid
from hybridgen.runs.experiment import Experiment, build
from hybridgen.runs.reading import inference_params
from hybridgen.training import batches as batch_stream
from hybridgen.training import console, gradients, logging, optim, profiling, resume, rollback
from hybridgen.training import state as state_lib
from hybridgen.training.shapes import shaped
from hybridgen.training.watchdog import Watchdog


class Rule(NamedTuple):
    """The static arguments of a training step."""

    family: Any
    model: Any
    optimiser: optax.GradientTransformation
    which: state_lib.Trainable
    seed: int
    accumulate: int
    spike: float  # a step with a gradient norm this many times the average is skipped
    shaped: bool = False  # images have several shapes, one per batch

    def fitted(self, batch: dict, parts: Any) -> tuple[Any, Any]:
        """Model and parts for a batch of this shape."""
        shape = self.shape(batch)
        return for_shape(self.family, self.model, parts, shape) if shape else (self.model, parts)

    def shape(self, batch: dict) -> tuple[int, int] | None:
        """(height, width) of a batch's images if batches differ in shape, else None."""
        return batch["image"].shape[1:3] if self.shaped else None


def train_step(rule: Rule, state: dict, batch: dict, parts: Any) -> tuple[dict, dict]:
    """(state, batch) -> (state, metrics). A bad step (see `check`) changes the counters only."""
    key = rng.step_key(jax.random.key(rule.seed), state["step"], "loss")
    trainable, frozen = rule.which.split(state["params"])
    model, parts = rule.fitted(batch, parts)

    def weighted_loss(trainable: Any, batch: dict) -> tuple[jax.Array, tuple]:
        out = rule.family.loss(
            model,
            trees.join(trainable, frozen),
            batch,
            key,
            parts=parts,
            extra=state["extra"],
            step=state["step"],
            train=True,
        )
        loss, aux = contract.returned(rule.family, "loss", out)
        weight = jax.lax.stop_gradient(aux["weight"])
        scaled = jax.tree.map(lambda x: x * weight, aux["metrics"] | {"loss": loss})
        return loss * weight, (weight, scaled, aux["extra"])

    grads, (weight, sums, extra_sums) = gradients.accumulate(weighted_loss, trainable, batch, rule.accumulate)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-9).astype(g.dtype), grads)
    report = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), sums)
    report["gradient_norm"] = optax.tree.norm(grads)
    good, health = check(report["loss"], report["gradient_norm"], state["health"], rule.spike)

    def apply(old: dict) -> dict:
        opt = optim.unpack(rule.optimiser, trainable, old["opt"])
        updates, opt = rule.optimiser.update(grads, opt, trainable)
        new = optax.apply_updates(trainable, updates)
        ema = optim.ema(old["ema"], rule.which.averaged(new), rule.which.decay, state["health"]["count"])
        extra = old["extra"]
        if merge := contract.optional(rule.family, "merge"):
            key = rng.step_key(jax.random.key(rule.seed), state["step"], "merge")
            extra = merge(model, extra, extra_sums, key, state["step"])
        return {"params": trees.join(new, frozen), "opt": optim.pack(opt), "ema": ema, "extra": extra}

    old = {name: state[name] for name in ("params", "opt", "ema", "extra")}
    # not lax.cond: its result would be copied, and a GPU would wait for the host
    new = jax.tree.map(functools.partial(jnp.where, good), apply(old), old)
    report |= {name: health[name].astype(jnp.float32) for name in ("skipped", "streak")}
    return new | {"step": state["step"] + 1, "health": health}, report


def check(loss: jax.Array, norm: jax.Array, health: dict, spike: float) -> tuple[jax.Array, dict]:
    """(whether the step is good, the health counters after it). Spikes are detected after 20 good steps."""
    log_norm = jnp.log(norm + 1e-12)
    usual = health["norm"] / (1 - 0.95 ** jnp.maximum(health["count"], 1))  # bias-corrected moving average
    spiked = (health["count"] >= 20) & (log_norm > usual + jnp.log(spike)) if spike else False
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~jnp.asarray(spiked)
    return good, {
        "skipped": health["skipped"] + ~good,
        "streak": jnp.where(good, 0, health["streak"] + 1),
        "norm": jnp.where(good, 0.95 * health["norm"] + 0.05 * log_norm, health["norm"]),
        "count": health["count"] + good,
    }


def eval_step(rule: Rule, state: dict, batch: dict, parts: Any) -> dict:
    """Weighted sums of the metrics of one batch, with EMA parameters if there are any."""
    params = inference_params(state["params"], state["ema"])
    key = rng.step_key(jax.random.key(rule.seed), 0, "eval")
    model, parts = rule.fitted(batch, parts)
    options = {"parts": parts, "extra": state["extra"], "step": state["step"], "train": False}
    loss, aux = contract.returned(rule.family, "loss", rule.family.loss(model, params, batch, key, **options))
    return jax.tree.map(lambda x: x * aux["weight"], aux["metrics"] | {"loss": loss, "weight": 1.0})


def program(experiment: Experiment, specs: dict) -> tuple[Rule, Any, Any, Any]:
    """(rule, jitted `train_step`, abstract state with its shardings, function that creates the state of step 0)."""
    config, built = experiment.config, []

    def rule_of(trainable: Any) -> optax.GradientTransformation:
        built[:] = [optim.build(config.optim, max(config.steps, 1), trainable)]
        return built[0]

    shaped = bool(config.data.get("options", {}).get(sources.BUCKETS))
    if shaped:  # initialize with the square shape: position tables have its size, whatever the first batch's shape
        image, side = specs["image"], config.data.resolution
        specs = specs | {"image": jax.ShapeDtypeStruct((image.shape[0], side, side, 3), image.dtype)}
    with jax.set_mesh(experiment.mesh):
        abstract, make = state_lib.create(experiment, config.seed, specs, rule_of)
    which = state_lib.trainable_of(config)
    options = built[0], which, config.seed, config.accumulate, config.health.spike, shaped
    rule = Rule(experiment.family, experiment.model, *options)
    places = jax.tree.map(lambda s: s.sharding, abstract)
    step = jax.jit(functools.partial(train_step, rule), donate_argnums=0, out_shardings=(places, None))
    return rule, step, abstract, make


class Job(NamedTuple):
    """What the training loop works with."""

    experiment: Experiment
    step: Callable  # compiled train step
    jump: Callable  # (state, step) -> state
    evaluate: Callable  # state -> {metric: number}
    batches: Callable  # start step -> prefetched iterator
    state_at: Callable  # step of a checkpoint, or None for the start -> state
    saved: checkpoint.Checkpointer
    writer: logging.Writer
    compile: Callable  # (state, batch, parts): compiles the step
    work: Callable  # batch -> what a step on it does, for the rates in the log
    grid: Callable | None  # (params, extra) -> image of a sample grid
    skipped: list  # intervals [first, end) of batches that are skipped
    watchdog: Watchdog
    signals: run_folder.Signals

    @contextlib.contextmanager
    def doing(self, step: int, what: str) -> Iterator[None]:
        """Adds the time spent inside to `what`, and signals the watchdog."""
        self.watchdog.beat(step, what)
        with self.writer.time(what):
            yield

    def ready(self, step: int, state: dict, batch: dict) -> None:
        """Compiles the training step."""
        with self.doing(step, "compile"), self.writer.waiting(step, "compiling the training step", first=0):
            self.compile(state, batch, self.experiment.parts)


LAG = 2  # steps in flight: the loop reads the report of a step this many steps later


def train_loop(job: Job, state: dict, start: int) -> tuple[dict, bool]:
    """Trains from `start` to the config's steps, without skipped batches; (state, whether a signal stopped it)."""
    config, folder = job.experiment.config, job.writer.folder
    agreement = distributed.Agreement(job.experiment.mesh)
    step = entered = start  # the loop does not evaluate or save at the step where it starts or to which it jumps
    flight, stop = collections.deque(), False  # steps whose reports have not been read yet
    compiled = False

    def due(every: int) -> bool:
        return bool(every) and step > entered and (step % every == 0 or step == config.steps)

    window = profiling.ProfileWindow(folder / "profile", start + config.profile.start, config.profile.steps)
    with batch_stream.Feed(job.batches) as feed, window:
        while True:
            stop = stop or (agreement.alone and job.signals.requested)
            beyond, last = rollback.end_of_skip(job.skipped, step, config.steps), step >= config.steps
            saves = due(config.checkpoint.every) or last
            looks = due(config.eval.every) or due(config.sample.every)
            # evaluating, saving and returning wait for the step anyway: read all reports first, so that none is undone
            bad_at = None
            while bad_at is None and len(flight) > (0 if last or stop or saves or looks or beyond else LAG):
                behind, report, stopping = flight.popleft()
                with job.doing(step, "step"):  # waits for that step, so that at most LAG are in flight
                    bad_at = behind if int(report["streak"]) >= config.health.streak else None
                    stop = stop or bool(stopping)
                    job.writer.ended(behind, report)
            if bad_at is not None:
                del state
                state, step = rollback.roll_back(job, bad_at)
                entered = step
                flight.clear()
                continue

            look(job, state, step, due)
            if saves or stop:
                with job.doing(step, "save"):
                    save(job, step, state)
            if last or stop:
                return state, stop and not last
            if beyond:
                with job.doing(step, "skip"):
                    state, step = job.jump(state, jnp.int32(beyond)), beyond
                entered = step
                continue

            with job.doing(step, "profile") if config.profile.steps else contextlib.nullcontext():
                window.at(step, state["step"])
            with job.doing(step, "data"):
                batch = feed.at(step)
            if not compiled:
                job.ready(step, state, batch)
                compiled = True
            with job.doing(step, "step"):
                state, report = job.step(state, batch, job.experiment.parts)
                step += 1
                flight.append((step, report, agreement.most_of(int(job.signals.requested))))
                job.writer.count(step, job.work(batch))
                job.writer.step(step, report)


def look(job: Job, state: dict, step: int, due: Callable[[int], bool]) -> None:
    """Evaluates and writes a sample grid, if due."""
    config, writer = job.experiment.config, job.writer
    if due(config.eval.every):
        with job.doing(step, "eval"), writer.waiting(step, "evaluating"):
            writer.scalars(step, {f"eval/{name}": value for name, value in job.evaluate(state).items()})
    if job.grid and due(config.sample.every):
        with job.doing(step, "sample"), writer.waiting(step, "generating samples"):
            params = inference_params(state["params"], state["ema"])
            writer.image(step, "samples", job.grid(params, state["extra"]))


def save(job: Job, step: int, state: dict) -> None:
    """Starts saving. A failed save is logged and training continues: the next save may find free space on the disk."""
    for _ in range(2):  # the first attempt may raise the error of the previous save
        try:
            sound = int(state["health"]["streak"]) == 0  # a checkpoint between bad steps is not restored on rollback
            job.saved.save(step, state, meta={"parts": job.experiment.digests}, sound=sound)
            job.writer.timer.mark("step", step)
            return
        except checkpoint.SaveError as error:
            job.writer.note(step, "save failed", str(error))


def prepare(
    config: Any,
    folder: Path,
    allow: tuple[str, ...],
    timer: logging.Timer,
    label: str,
    watchdog: Watchdog,
    signals: run_folder.Signals,
) -> tuple[Job, Any, int]:
    """Builds the model, data and programs, restores the newest valid checkpoint; returns (job, state, first step)."""
    source, skipped = resume.checked(config, folder=folder), rollback.intervals(config, folder)
    with timer.time("build"):
        experiment = build(config, folder, source)
    resolved, fingerprint = resume.described(config, experiment, source)
    with contextlib.ExitStack() as undo:  # closes what was opened if an error follows
        keep = {"keep": config.checkpoint.keep, "keep_every": config.checkpoint.keep_every}
        saved = checkpoint.Checkpointer(folder / "checkpoints", fingerprint=fingerprint, **keep)
        undo.enter_context(saved)
        start = saved.newest_good(report=print)
        if start is not None:
            saved.check_fingerprint(start, allow=allow)
        read, put = batch_stream.reader(experiment)
        specs = batch_stream.specs_of(next(read(source, 0)), config.batch)
        rule, step, abstract, make = program(experiment, specs)
        places = jax.tree.map(lambda s: s.sharding, abstract)
        grid = sample_grid(experiment, config.sample.count) if config.sample.every else None
        state_at = functools.partial(resume.beginning, experiment, folder, saved, rule.which, abstract, make, timer)
        if jax.process_index() == 0:  # only after all checks above
            run_folder.write_json(folder / "config.json", resolved)
            if experiment.text is not None:
                run_folder.write_json(folder / "text.json", experiment.text.to_json())
        state = state_at(start)
        power = step_costs.peak(config.model, experiment.mesh.devices)
        writer = logging.opened(experiment, folder, start or 0, label, timer, resolved, power)
        if hasattr(source, "summary"):
            writer.line(f"{label}: data: {source.summary()}")
        shapes = source.occurring(config.batch, True) if rule.shaped else None
        work = step_costs.counted(rule, abstract, specs, experiment, shapes, power > 0)
        beat = functools.partial(watchdog.beat, start or 0, "compile")
        programs = shaped(config, source, (step, jax.jit(functools.partial(eval_step, rule))), beat, writer.line)
        undo.pop_all()
    step, evaluate, compile_step = programs
    job = Job(
        experiment,
        step,
        jax.jit(rollback.jump, donate_argnums=0, out_shardings=places),
        batch_stream.evaluation(evaluate, experiment, read, put),
        batch_stream.training(read, put, source, writer),
        state_at,
        saved,
        writer,
        compile_step,
        lambda batch: work[rule.shape(batch)],
        grid,
        skipped,
        watchdog,
        signals,
    )
    return job, state, start or 0


def run(config: Any, folder: Path, *, allow: tuple[str, ...] = (), label: str = "train") -> bool:
    """Trains `config` in `folder`, from its newest valid checkpoint if it has one. False if a signal stopped it.

    `allow`: config keys that may differ from the checkpoint's; `label`: first word of the log lines. Raises UserError
    for a config that is invalid or differs from the checkpoint's, and if the last state cannot be saved.
    """
    timer = logging.Timer()
    run_folder.make(folder)
    watchdog = Watchdog(config.health.hang)
    with run_folder.lock(folder), run_folder.Signals() as signals, watchdog:
        with console.Console().waiting(f"{label}: preparing {config.family} in {folder}", first=0):
            job, state, start = prepare(config, folder, allow, timer, label, watchdog, signals)
        job.writer.line(
            f"{label}: {config.family}, {trees.count(state['params']):,} parameters, "
            f"mesh {dict(job.experiment.mesh.shape)}, steps {start} to {config.steps}, folder {folder}"
        )
        try:
            with jax.set_mesh(job.experiment.mesh):
                state, stopped = train_loop(job, state, start)
            step = int(state["step"])
            with job.doing(step, "save"):
                job.saved.wait_until_saved()
            if not job.saved.holds(step):
                raise UserError(f"the last step, {step}, was not saved: see the lines above")
            if not stopped:
                rollback.require_good(state, step)
        except checkpoint.SaveError as error:
            raise UserError(f"training has finished, but its last state was not saved: {error}") from error
        finally:
            with timer.time("save"), contextlib.suppress(checkpoint.SaveError):  # reported above
                job.saved.close()
            writer, job, state = job.writer, None, None  # freed before the timer stops: freeing programs takes time
            writer.close()
    if stopped:
        print(f"stopped at step {step}; run the same command again to resume", file=sys.stderr)
    return not stopped


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("train")
    args, overrides = config_lib.parse(parser, argv)
    config = (
        finetune.one(args.start, overrides, args.workdir) if args.start else config_lib.load(args.config, overrides)
    )
    if "family" not in config:
        raise UserError(f"--config {args.config} has no `family`; if it is a recipe, use hybridgen recipe")
    allow = resume.allowed(args.allow, [(config, args.workdir)])
    distributed.start(args)
    done = run(config, args.workdir, allow=allow)
    return 0 if done else 130


if __name__ == "__main__":
    command(main)
