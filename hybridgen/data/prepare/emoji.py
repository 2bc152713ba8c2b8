"""A folder of emoji pictures in two drawing styles, with names in English and Chinese, from four npm packages.

    python -m hybridgen.data.prepare.emoji --packages FOLDER --out emoji

FOLDER holds, unpacked (`npm pack NAME@VERSION`, then tar), each in a folder of its own, emoji-datasource-google and
emoji-datasource-twitter (16.0.0), cldr-annotations-full and cldr-annotations-derived-full (48.2.0). Nothing is
downloaded here. Licences: Noto Color Emoji is Apache-2.0, Twemoji CC-BY-4.0, the names of CLDR are Unicode-3.0.

Pictures are 64 x 64 on white; those with a skin tone are left out, and so are those without a name in both languages.
One concept in ten, by a hash, is in validation, in both styles. Lines of metadata are in the order of that hash, both
styles of a concept together: the first so many, which contact sheets show, are a mixture of everything.
configs/recipes/emoji.py trains on the folder.
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
from hybridgen.data.sources.folder import header_size

STYLES = {"noto": "google", "twemoji": "twitter"}  # by the name of the package that has them
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
LANGUAGES = ("en", "zh")
SIDE, VALIDATION_PART = 64, 10


def find_package(folder: Path, name: str) -> Path:
    """The unpacked package of that name below `folder`, wherever its package.json is."""
    for depth in ("", "*/", "*/*/"):
        for file in sorted(folder.glob(f"{depth}package.json")):
            about = read_json(file)
            if isinstance(about, dict) and about.get("name") == name:
                return file.parent
    raise UserError(f"no unpacked package {name!r} in {folder}")


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
    """(lines of metadata in the order of a hash of their concepts, folders of pictures by style)."""
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
    """The entry of a sequence of code points; CLDR leaves out the selector of the coloured form."""
    text = "".join(chr(int(point, 16)) for point in points)
    entry = known.get(text) or known.get(text.replace("\ufe0f", ""))
    return entry if entry and entry.get("tts") else None


def build(packages: Path, out: Path) -> int:
    """Writes the folder; the number of pictures."""
    try:
        lines, folders = records(packages)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"a package in {packages} is not what is expected: {type(error).__name__}: {error}") from None
    if not lines:
        raise UserError(f"the packages in {packages} have no pictures of {SIDE} x {SIDE} with names")
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
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    args: Any = parser.parse_args(argv)
    print(f"{build(args.packages, args.out)} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    command(main)
