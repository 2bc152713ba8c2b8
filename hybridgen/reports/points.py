"""A table that compares several points, each a tokenizer and a prior on it, from the logs and reports of their runs.

A stage of a recipe: {"compare": {NAME: {"tokenizer": run, "prior": run, "pictures": (evaluations,)}}, "split": name}.
Nothing is computed again. Points without results are listed below the table.

The code size in bits is the number of tokens times log2 of the codebook size, or the mean KL divergence of a KL
autoencoder. The loss of a prior on tokens is given in nats per token and, since this depends on the number of tokens,
per image; in bits per image it can be compared with the code size. A prior on latents is a diffusion model, whose loss
is a squared error per value and cannot be compared with either.
"""

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError
from hybridgen.runs import folder as run_folder
from hybridgen.runs.reading import find_run

HEAD = ("point", "code, bits", "perplexity / codebook size", "PSNR", "correct, reconstructed", "prior's loss")
HEAD += ("nats per image", "bits per image", "correct, from captions", "by objects")


def runs(point: Any) -> tuple[str, ...]:
    """The paths that a point names: its runs, and the folders of its evaluations."""
    return (point.tokenizer, point.prior, *point.pictures)


def check(stage: Any, known: Collection[str]) -> None:
    """Raises UserError if a point names a stage that is not in `known`, the stages of the recipe."""
    for name, point in stage.compare.items():
        for other in (Path(path).name for path in runs(point)):
            if other not in known:
                raise UserError(f"point {name!r}: there is no stage {other!r}{config_lib.hint(other, known)}")


def stage(config: Any, place: Path) -> None:
    """Writes table.json and table.md into `place` and prints the table. Raises UserError if no point has results."""
    points, missing = {}, {}
    for name, point in config.compare.items():
        try:
            points[name] = measured(point, config.split, place)
        except UserError as error:
            missing[name] = str(error)
    if not points:
        raise UserError(f"no point has results yet: {next(iter(missing.values()), 'there are no points')}")
    points = dict(sorted(points.items(), key=lambda item: _size(item[1])))
    text = markdown(points, list(missing))
    if jax.process_index() == 0:
        run_folder.make(place)
        run_folder.write_report(place / "table.json", {"split": config.split, "points": points, "missing": missing})
        (place / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"table  {place / 'table.md'}")


def measured(point: Any, split: str, place: Path) -> dict[str, Any]:
    """The numbers of a point, from its runs. Raises UserError if a result is missing."""
    tokenizer, prior = (find_run(point[role], place) for role in ("tokenizer", "prior"))
    model = config_lib.read(prior / "config.json").model
    of_tokenizer, of_prior = last_evaluation(tokenizer), last_evaluation(prior)
    steps = {"tokenizer_step": of_tokenizer["step"], "prior_step": of_prior["step"]}
    if "vocab" in model:
        tokens = math.prod(model.grid)
        out = {"tokens": tokens, "codes": model.vocab, "code_bits": tokens * math.log2(model.vocab)}
        out |= {"nats_a_token": of_prior["eval/nll"], "nats_a_picture": tokens * of_prior["eval/nll"]}
        out |= {"bits_a_picture": out["nats_a_picture"] / math.log(2)}
    else:
        out = {"places": model.resolution**2, "values": model.channels, "error": of_prior["eval/loss"]}
        if "eval/divergence" in of_tokenizer:
            out["code_bits"] = of_tokenizer["eval/divergence"] / math.log(2)
    for path in point.pictures:
        out |= pictures(Path(os.path.normpath(place / path)), split)
    return out | steps


def _size(point: Mapping) -> tuple:
    """The sort key of rows: tokens before latents, then by number of positions, then by codes or channels."""
    return "error" in point, point.get("tokens", point.get("places")), point.get("codes", point.get("values"))


def last_evaluation(run: Path) -> dict[str, Any]:
    """The last evaluation in a run's log, with its step. Raises UserError if there is none."""
    log = run / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    for line in reversed([json.loads(line) for line in lines if '"eval/' in line]):
        return {name: value if name == "step" else float(value) for name, value in line.items()}
    raise UserError(f"{run} has logged no evaluation yet")


def pictures(folder: Path, split: str) -> dict[str, Any]:
    """Shares of correct images with their standard errors, PSNR and perplexity, from an evaluation's report."""
    file = folder / "report.json"
    if not file.is_file():
        raise UserError(f"{folder} has no report yet")
    report, out = run_folder.read_json(file), {}
    if split not in report["splits"]:
        raise UserError(f"the report in {folder} has no split {split!r}, only {', '.join(report['splits'])}")
    for kind, drawn in report["splits"][split].items():
        name = "drawn" if kind == "from captions" else "reconstructed"
        if "render" not in drawn:
            continue
        render = drawn["render"]
        if "psnr" in render:
            out["psnr"] = render["psnr"]
        if "judge" in render:
            shares = {group: means["all_right"] for group, means in render["judge"].items()}
            share, count = shares.pop("all"), render["judge"]["all"]["pictures"]
            out[name] = {"right": share, "standard_error": math.sqrt(share * (1 - share) / count), "pictures": count}
            out[name]["by_objects"] = shares
    if "codes" in report:
        out["perplexity"] = report["codes"]["perplexity"]
    return out


def markdown(points: Mapping[str, Mapping], missing: Sequence[str]) -> str:
    """The table in Markdown, with a list of the missing points."""
    lines = [_row(HEAD), _row(["---"] * len(HEAD))]
    for name, point in points.items():
        known = [
            (name, "{}"),
            (point.get("code_bits"), "{:.0f}"),
            (100 * point["perplexity"] if "perplexity" in point else None, "{:.0f} %"),
            (point.get("psnr"), "{:.1f}"),
            (point.get("reconstructed"), "{}"),
            *([(point["nats_a_token"], "{:.2f} per token")] if "codes" in point else [(point["error"], "({:.3f})")]),
            (point.get("nats_a_picture"), "{:.1f}"),
            (point.get("bits_a_picture"), "{:.1f}"),
            (point.get("drawn"), "{}"),
            (_by_objects(point.get("drawn", {})), "{}"),
        ]
        lines.append(_row("" if value is None else form.format(_share(value)) for value, form in known))
    if any("error" in point for point in points.values()):
        text = "In brackets: squared error per value of a diffusion model on latents, not comparable with nats."
        lines += ["", text]
    lines += ["", f"No results yet: {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, ""])


def _share(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return f"{100 * value['right']:.1f} % (s.e. {100 * value['standard_error']:.1f})"


def _by_objects(drawn: Mapping) -> str:
    return ", ".join(f"{number}: {100 * share:.1f} %" for number, share in drawn.get("by_objects", {}).items())


def _row(cells: Iterable) -> str:
    return f"| {' | '.join(map(str, cells))} |"
