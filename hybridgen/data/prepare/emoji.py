"""Makes a folder of emoji images in two drawing styles, with names in English and Chinese, from four npm packages.

    python -m hybridgen.data.prepare.emoji --packages FOLDER --out emoji

FOLDER must have the unpacked packages (`npm pack NAME@VERSION`, then tar), each in a folder of its own:
emoji-datasource-google and emoji-datasource-twitter (16.0.0), cldr-annotations-full and cldr-annotations-derived-full
(48.2.0). This command downloads nothing. Licences: Noto Color Emoji is Apache-2.0, Twemoji CC-BY-4.0, the names of CLDR
are Unicode-3.0.

Images are 64 x 64 on white. Emoji with a skin tone, and those without a name in both languages, are left out. One
concept in ten, by a hash, is in validation, in both styles. The metadata is sorted by that hash, with the two styles of
a concept together, so that the first lines, which image grids show, are a random selection. configs/recipes/emoji.py
trains on the folder.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from hybridgen.cli import command, make_parser
from hybridgen.core.errors import UserError
from hybridgen.data import transforms
from hybridgen.data.files import read_json, whole_folder
from hybridgen.data.sources.headers import header_size

STYLES = {"noto": "google", "twemoji": "twitter"}  # style: suffix of its package's name
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
LANGUAGES = ("en", "zh")
SIDE, VALIDATION_PART = 64, 10


def find_package(folder: Path, name: str) -> Path:
    """The folder of an unpacked package, up to two levels below `folder`. Raises UserError if there is none."""
    for depth in ("", "*/", "*/*/"):
        for file in sorted(folder.glob(f"{depth}package.json")):
            about = read_json(file)
            if isinstance(about, dict) and about.get("name") == name:
                return file.parent
    raise UserError(f"--packages: {folder} has no unpacked package {name!r}")


def names(packages: Path, language: str) -> dict[str, dict]:
    """{characters: {"tts": [name], "default": [keyword, ...]}} of a language."""
    found = {}
    for package, kind in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        content = read_json(find_package(packages, package) / kind / language / "annotations.json")
        found |= content[kind]["annotations"]
    return found


def records(packages: Path) -> tuple[list[dict], dict[str, Path]]:
    """(lines of metadata, sorted by a hash of their concepts; folders of images by style)."""
    folders = {
        style: find_package(packages, f"emoji-datasource-{vendor}") / "img" / vendor / str(SIDE)
        for style, vendor in STYLES.items()
    }
    drawn = [{path.stem for path in folder.glob("*.png")} for folder in folders.values()]
    known = {language: names(packages, language) for language in LANGUAGES}
    lines = []
    for concept in set.intersection(*drawn):
        points = concept.split("-")
        each = [_named(known[language], points) for language in LANGUAGES]
        if TONES & set(points) or not all(each):
            continue
        split = int(_hash(concept), 16) % VALIDATION_PART
        for style in STYLES:
            lines.append(
                {
                    "file_name": f"images/{style}-{concept}.png",
                    "text": each[0]["tts"][0],
                    "text_zh": each[1]["tts"][0],
                    "keywords": each[0].get("default", []),
                    "style": style,
                    "concept": concept,
                    "split": "train" if split else "validation",
                }
            )
    return sorted(lines, key=lambda line: (_hash(line["concept"]), line["style"])), folders


def _hash(concept: str) -> str:
    return hashlib.sha256(concept.encode()).hexdigest()


def _named(known: dict[str, dict], points: list[str]) -> dict | None:
    """The entry of a sequence of code points; CLDR omits the variation selector U+FE0F."""
    text = "".join(chr(int(point, 16)) for point in points)
    entry = known.get(text) or known.get(text.replace("\ufe0f", ""))
    return entry if entry and entry.get("tts") else None


def build(packages: Path, out: Path) -> int:
    """Writes the folder; returns the number of images. Raises UserError if the packages are missing or unexpected."""
    try:
        lines, folders = records(packages)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise UserError(f"--packages: a package in {packages} has unexpected content: {text}") from None
    if not lines:
        raise UserError(f"--packages: the packages in {packages} have no {SIDE} x {SIDE} images with names")
    with whole_folder(out) as temporary:
        (temporary / "images").mkdir()
        for line in lines:
            source = folders[line["style"]] / f"{line['concept']}.png"
            if header_size(source.read_bytes()[:64]) != (SIDE, SIDE):
                raise UserError(f"{source} is not {SIDE} x {SIDE}")
            with Image.open(source, formats=("PNG",)) as image:
                transforms.flatten(image).save(temporary / line["file_name"])
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (temporary / "metadata.jsonl").write_text(text, encoding="utf-8")
    return len(lines)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("data.prepare.emoji", __doc__)
    parser.add_argument("--packages", required=True, type=Path, help="folder with the four unpacked packages")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    args: Any = parser.parse_args(argv)
    print(f"wrote {build(args.packages, args.out)} images to {args.out}")
    return 0


if __name__ == "__main__":
    command(main)
