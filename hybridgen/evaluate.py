"""Evaluates a run: caption accuracy of generated images, PSNR and SSIM of reconstructions, FID, and image grids.

    python -m hybridgen.evaluate --run runs/shapes/cascade --splits validation,holdout --count 256

Writes report.json, report.md and an image grid per split. Data with scenes (the source "shapes") is also evaluated for
caption accuracy, by an exact evaluator (evals/alignment.py), and the grid shows its verdict under each image. Other
data, such as a folder of images, has PSNR and SSIM of reconstructions and the grid. If the images are generated from
captions or classes, the report also says how much likelier the prior finds an image given its own caption than given
another one.

With a feature network, imported by `hybridgen convert`, the report also has Fréchet and kernel distance, precision and
recall of all generated images, and of as many real images, to a reference (see reports/distances.py):

    ... --features runs/efficientnet_lite0 --reference train       # or a folder, or a reference file of ADM
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core import distributed, meshes, placement
from hybridgen.core.errors import UserError
from hybridgen.core.progress import progress
from hybridgen.data import pipeline, sources
from hybridgen.evals import alignment, png, recon
from hybridgen.evals.finite import finite, message
from hybridgen.evals.sheet import sheet
from hybridgen.reports import distances
from hybridgen.runs import drawing
from hybridgen.runs import folder as run_folder
from hybridgen.runs.reading import find_run
from hybridgen.runs.restore import Loaded, check_draws, restore

CALLED = (("image", "render"), ("draft", "draft"))
OTHERS = ("distances", "captions")  # entries of a split that are not kinds of images
SHOWN = 48  # captions in a grid


def evaluate(
    loaded: Loaded,
    splits: tuple[str, ...],
    count: int,
    batch: int,
    seed: int,
    folder: Path,
    compare: distances.Comparison | None = None,
) -> dict:
    """Evaluates a run on `count` captions of each split; writes the report into `folder` and returns it.

    `batch`: images generated at a time; `compare`: distances on features. Raises UserError for a split that is too
    small, for a run without images, for records without images, and, after the report is written, for images or
    parameters that are not finite.
    """
    check_draws(loaded)
    data = {split: sources.build(loaded.config.data, split) for split in splits}
    for split, source in data.items():
        if compare and len(source) < distances.LEAST:
            raise UserError(f"distances need at least {distances.LEAST} images, the split {split!r} has {len(source)}")
    run_folder.make(folder)
    report: dict[str, Any] = {"family": loaded.config.family, "step": loaded.step, "seed": seed, "splits": {}}
    report["options"] = config_lib.plain(loaded.config.sample.options)
    with jax.set_mesh(loaded.mesh):
        for split, source in data.items():
            items = pipeline.examples(source, range(min(count, len(source))))
            picture = folder / f"{split}.png"
            report["splits"][split] = measure(loaded, items, batch, seed, picture, split, compare)
        codes = code_use(loaded, batch)
    if codes:
        report["codes"] = codes
    if compare:
        report["distances"] = compare.about
    if jax.process_index() == 0:
        run_folder.write_report(folder / "report.json", report)
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    if problems := [*not_finite(report["splits"]), *loaded.faults]:
        raise UserError(f"{'; '.join(problems)} (report: {folder / 'report.md'})")
    return report


def not_finite(splits: dict) -> list[str]:
    """One line for each set of images in a report of which some are not finite."""
    sets = [(split, kind, entries) for split, kinds in splits.items() for kind, entries in kinds.items()]
    return [
        f"{split}, {kind}, {called}: {message(entries[called]['not_finite'], entries[called]['pictures'])}"
        for split, kind, entries in sets
        for _, called in CALLED
        if kind not in OTHERS and "not_finite" in entries.get(called, ())
    ]


def measure(
    loaded: Loaded, items: list[dict], batch: int, seed: int, picture: Path, label: str, compare: Any = None
) -> dict:
    """Caption accuracy, PSNR and distances of the images ("image", "draft") generated for `items`; saves the grid."""
    if "image" not in items[0]:
        raise UserError("these records hold no images to compare with: cache them with --pictures")
    true = np.stack([item["image"] for item in items]).astype(np.float32) / 127.5 - 1  # b H W 3
    captions = captions_of(items, loaded.config.data.get("class_names", ()))
    scenes = [item["scene"] for item in items] if "scene" in items[0] else None
    cond = {"image": true}
    if loaded.text is not None:
        ids, masks = zip(*(loaded.text.encode(item["text"]) for item in items), strict=True)
        cond |= {"text": np.stack(ids), "text_mask": np.stack(masks)}
    if "label" in items[0]:
        cond["label"] = np.asarray([item["label"] for item in items], np.int32)
    out: dict[str, Any] = {}
    sets = {}
    if loaded.generates:
        given = {name: value for name, value in cond.items() if name != "image"}
        drawn = sets["from captions"] = draw(loaded, given, seed, batch, label)
        out["from captions"] = judge_pictures(drawn, scenes, None)
        if loaded.plans and loaded.tokenizer:
            given = cond | {"tokens": loaded.tokens(true, batch)}
            sets["from true tokens"] = draw(loaded, given, seed, batch, f"{label}, true tokens")
            out["from true tokens"] = judge_pictures(sets["from true tokens"], scenes, true)
            if found := caption_likelihood(loaded, given, batch):
                out["captions"] = found
    else:
        drawn = sets["reconstructed"] = draw(loaded, cond, seed, batch, label)
        out["reconstructed"] = judge_pictures(drawn, scenes, true)
    if compare:
        out["distances"] = compared(compare, sets, true, label)
    if jax.process_index():
        return out
    shown = slice(0, SHOWN)
    strips = {name: one[shown] for name, one in drawing.panels(drawn, true).items()}
    pairs = zip(drawn["image"][shown], scenes[shown], strict=True) if scenes else ()
    verdicts = [alignment.judge(*pair) for pair in pairs] or None
    title = f"{label}: {len(captions[shown])} of {len(captions)} images"
    grid = sheet(strips, captions[shown], verdicts, cell=64 * len(strips), title=title)
    about = {"split": label, "prompts": json.dumps(captions[shown], ensure_ascii=False)}
    png.save(grid, picture, about | loaded.about(seed))
    return out


def captions_of(items: list[dict], names: Sequence) -> list[str]:
    """The caption of each record: its text, and its class if it has one, with the name in `names` if it has one."""
    found = []
    for item in items:
        label = item.get("label")
        known = label is not None and label < len(names) and names[label] != label
        kind = label is not None and f"class {label}{f' {names[label]}' if known else ''}"
        found.append(", ".join(filter(None, (item["text"], kind))))
    return found


def caption_likelihood(loaded: Loaded, given: dict, batch: int) -> dict | None:
    """How much likelier the prior finds an image's tokens given its own caption (or class) than given another one.

    given: captions, labels and tokens of the images. Each image is paired with the next one of another caption. Returns
    {"nll", "nll_other" in nats per token, "own_likelier", the share of images, "pictures"}; None if there are no two.
    """
    names = [name for name in ("text", "text_mask", "label") if name in given]
    if loaded.nll is None or not names:
        return None
    asks = [tuple(given[name][row].tobytes() for name in names) for row in range(len(given["tokens"]))]
    count = len(asks)
    gaps = [next((n for n in range(1, count) if asks[(row + n) % count] != asks[row]), 0) for row in range(count)]
    other = (np.arange(count) + gaps) % count
    if not any(gaps):
        return None
    own = {name: given[name] for name in (*names, "tokens")}
    wrong = {name: given[name][other] for name in names} | {"tokens": given["tokens"]}
    nll, nll_other = (
        np.concatenate(list(placement.by_batches(loaded.nll, one, min(batch, 16), loaded.mesh))) for one in (own, wrong)
    )
    means = {"nll": float(nll.mean()), "nll_other": float(nll_other.mean())}
    return means | {"own_likelier": float((nll < nll_other).mean()), "pictures": count}


def compared(compare: distances.Comparison, sets: dict[str, dict], true: np.ndarray, label: str) -> dict:
    """{"true pictures": distances, "from captions, render": ..}: of real images (the floor) and of generated ones.

    A set with images that are not finite has no distances, only their number.
    """
    named = {"true pictures": true}
    for kind, drawn in sets.items():
        named |= {f"{kind}, {called}": drawn[name] for name, called in CALLED if name in drawn}
    out = {}
    for name, images in named.items():
        bad = int((~finite(images)).sum())
        out[name] = {"pictures": len(images), "not_finite": bad} if bad else compare(images, f"{label}, {name}")
    return out


def draw(loaded: Loaded, cond: dict, seed: int, batch: int, label: str) -> dict[str, np.ndarray]:
    """All images that a run generates for `cond`, as numpy arrays by name ("image", "draft", "tokens")."""
    batch = meshes.padded(loaded.mesh, batch)
    pieces = drawing.draw_all(loaded.draw, cond, seed, batch, loaded.put)
    total = -(-len(next(iter(cond.values()))) // batch)
    pieces = list(progress(pieces, total=total, label=f"generating {label}"))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def judge_pictures(drawn: dict, scenes: Any, true: np.ndarray | None) -> dict:
    """{"render" and "draft": {"pictures", "psnr", "ssim", "judge": {group: {attribute: share}}}} of generated images.

    If there are both, also "paired": render against draft of the same tokens, see `paired`. If images are not finite,
    also "not_finite", their number; such an image is not correct.
    """
    out: dict[str, Any] = {}
    each: dict[str, dict] = {}
    for name, called in CALLED:
        if name not in drawn:
            continue
        good = finite(drawn[name])
        entry, each[called] = {"pictures": len(good)}, {}
        if not good.all():
            entry["not_finite"] = int((~good).sum())
        if true is not None:
            psnr, ssim = recon.psnr(drawn[name], true), recon.ssim(drawn[name], true)  # b
            entry |= {"psnr": float(psnr.mean()), "ssim": float(ssim.mean())}
            each[called]["psnr"] = psnr
        if scenes is not None:
            table = alignment.judge_batch(drawn[name], scenes)
            # -1 remains: the caption does not state it
            table |= {key: np.where(column > 0, good, column) for key, column in table.items() if key != "objects"}
            entry["judge"] = alignment.summary(table)
            each[called]["right"] = table["all_right"] == 1
        out[called] = entry
    if len(each) == 2 and each["draft"]:
        out["paired"] = paired(each["render"], each["draft"])
    return out


def paired(render: dict, draft: dict) -> dict:
    """Render against draft, image by image: how many are correct in one of them only; the difference in PSNR."""
    out = {}
    if "right" in render:
        out |= {"only_render_right": int((render["right"] & ~draft["right"]).sum())}
        out |= {"only_draft_right": int((draft["right"] & ~render["right"]).sum())}
    if "psnr" in render:
        gain = render["psnr"] - draft["psnr"]  # b
        error = float(gain.std() / len(gain) ** 0.5)
        out |= {"psnr_gain": float(gain.mean()), "standard_error": error, "psnr_higher": float((gain > 0).mean())}
    return out


def code_use(loaded: Loaded, batch: int, count: int = 4096) -> dict | None:
    """Share of codes in use, and perplexity divided by the vocabulary size, on `count` training images."""
    tokenizer = loaded.tokenizer
    if tokenizer is None or not tokenizer.model.vocab:
        return None
    source = sources.build(loaded.config.data, "train")
    items = pipeline.examples(source, range(min(count, len(source))))
    if "image" not in items[0]:
        return None
    images = np.stack([item["image"] for item in items]).astype(np.float32) / 127.5 - 1
    uses = np.bincount(loaded.tokens(images, batch).reshape(-1), minlength=tokenizer.model.vocab)
    p = uses[uses > 0] / uses.sum()
    vocab, perplexity = tokenizer.model.vocab, float(np.exp(-(p * np.log(p)).sum()))
    usage = float((uses > 0).mean())
    return {"codes": vocab, "usage": usage, "perplexity": perplexity / vocab, "tokens": int(uses.sum())}


HEAD = ("images", "count", "objects", "all right", "by attribute", "PSNR", "SSIM")


def _rows(drawn: dict) -> Iterator[list]:
    """The cells of the table of a split."""
    for kind, entries in drawn.items():
        for name, entry in entries.items():
            if name == "paired":
                continue
            scenes = "judge" in entry
            for group, means in entry.get("judge", {"all": {}}).items():
                known = entry if group == "all" else {}  # PSNR and SSIM are over all groups
                psnr, ssim = (f"{known[key]:.2f}" if key in known else "" for key in ("psnr", "ssim"))
                rest = {k: v for k, v in means.items() if k not in ("all_right", "pictures")}
                parts = ", ".join(f"{k} {100 * v:.0f}" for k, v in rest.items())
                right = f"{100 * means['all_right']:.1f} %" if means else ""
                objects = group if scenes else ""
                yield [f"{kind}, {name}", means.get("pictures", entry["pictures"]), objects, right, parts, psnr, ssim]


def markdown(report: dict) -> str:
    """The report as Markdown tables."""
    lines = [f"# {report['family']}, step {report['step']}", ""]
    for split, kinds in report["splits"].items():
        drawn = {kind: entries for kind, entries in kinds.items() if kind not in OTHERS}
        rows = list(_rows(drawn))
        filled = [i for i, name in enumerate(HEAD) if i == 0 or any(row[i] != "" for row in rows)]  # no empty columns
        lines += [f"## {split}", ""]
        if rows:
            lines += [_row(HEAD[i] for i in filled), _row(["---"] * len(filled))]
            lines += [_row(row[i] for i in filled) for row in rows]
        both = {kind: entries["paired"] for kind, entries in drawn.items() if "paired" in entries}
        lines += ["", *(_paired_line(kind, pair) for kind, pair in both.items())]
        lines += [_caption_line(kinds["captions"]), ""] if "captions" in kinds else [""]
    lines += distances.table(report)
    if "codes" in report:
        codes = report["codes"]
        lines += [
            f"Codebook of {codes['codes']} codes: {100 * codes['usage']:.1f} % in use, perplexity "
            f"{100 * codes['perplexity']:.1f} % of its size, over {codes['tokens']:,} tokens.",
            "",
        ]
    return "\n".join(lines)


def _paired_line(kind: str, pair: dict) -> str:
    parts = []
    if "only_render_right" in pair:
        parts.append(f"correct in the render only: {pair['only_render_right']}, draft only: {pair['only_draft_right']}")
    if "psnr_gain" in pair:
        gain, error = pair["psnr_gain"], pair["standard_error"]
        share = f"higher in {100 * pair['psnr_higher']:.0f} % of the images"
        parts.append(f"PSNR {gain:+.3f} dB (standard error {error:.3f}), {share}")
    return f"- {kind}, render against draft of the same tokens: {'; '.join(parts)}"


def _caption_line(found: dict) -> str:
    own, other, share = found["nll"], found["nll_other"], 100 * found["own_likelier"]
    return (
        f"- captions: the tokens of an image have {own:.3f} nats each given its own caption and {other:.3f} given "
        f"another one; its own is the likelier one for {share:.1f} % of {found['pictures']} images"
    )


def _row(cells: Iterable) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("evaluate")
    args, changes = drawing.parse(parser, argv)
    drawing.check_arguments(args)
    for name in ("reference", "reference_count"):
        if getattr(args, name) is not None and args.features is None:
            raise UserError(f"--{name.replace('_', '-')} needs --features, the run of a feature network")
    distributed.start(args)
    folder = find_run(args.run, None)
    loaded = restore(folder, changes, args.checkpoint)
    check_draws(loaded)
    out = args.out or folder / "evaluation"
    splits = tuple(args.splits.split(","))
    compare = None
    if args.features is not None:
        about = (splits, args.count, args.batch, args.seed)
        compare = distances.build(loaded, args.features, *about, args.reference, args.reference_count)
    report = evaluate(loaded, splits, args.count, args.batch, args.seed, out, compare)
    print(markdown(report))
    print(f"report {out / 'report.md'}, grids {', '.join(str(out / f'{s}.png') for s in report['splits'])}")
    return 0


if __name__ == "__main__":
    command(main)
