"""Captions of a `shapes` scene in English and Chinese, from a closed vocabulary and without punctuation.

A caption is a pure function of (scene, language, template number). It always states colour, shape and the number of
objects, and, as given by `scene["stated"]`, size, position, relation and background. Units of the vocabulary (`units`,
`vocabulary`) are English words and single Chinese characters.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

SHAPE_WORDS = {  # name: (English plural, Chinese)
    "circle": ("circles", "圆形"),
    "square": ("squares", "正方形"),
    "triangle": ("triangles", "三角形"),
    "star": ("stars", "星形"),
    "cross": ("crosses", "十字形"),
    "diamond": ("diamonds", "菱形"),
    "heart": ("hearts", "心形"),
    "ring": ("rings", "圆环"),
    "crescent": ("crescents", "月牙形"),
}
COLOUR_WORDS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "orange": "橙色",
    "purple": "紫色",
    "cyan": "青色",
    "pink": "粉色",
}
BACKGROUND_WORDS = {"white": "白色", "black": "黑色", "grey": "灰色"}
SIZE_WORDS = {"small": "小的", "medium": "中等的", "large": "大的"}
POSITION_WORDS = {  # name: (English phrase, Chinese)
    "top left": ("in the top left", "左上角"),
    "top": ("at the top", "顶部"),
    "top right": ("in the top right", "右上角"),
    "left": ("on the left", "左侧"),
    "centre": ("in the centre", "中央"),
    "right": ("on the right", "右侧"),
    "bottom left": ("in the bottom left", "左下角"),
    "bottom": ("at the bottom", "底部"),
    "bottom right": ("in the bottom right", "右下角"),
}
RELATION_WORDS = {  # name: (English phrase, phrase after the other object, inverse relation, Chinese)
    "left of": ("to the left of", "on its left", "right of", "左边"),
    "right of": ("to the right of", "on its right", "left of", "右边"),
    "above": ("above", "above it", "below", "上面"),
    "below": ("below", "below it", "above", "下面"),
}
COUNT_WORDS = {1: ("one", "一"), 2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四")}

# {a} {b} noun phrases, {n} the list of all objects, {at} position; {rel} relation of a to b, {its} the same as seen
# from b, {inv} the relation of b to a. The first template of each list is the simplest.
TEMPLATES = {
    "en": {
        "plain": ("{n}", "a picture of {n}", "there {is} {n}", "{n} can be seen"),
        "place": (
            "{a} {at}",
            "{at} there is {a}",
            "a picture of {a} {at}",
            "{at} is {a}",
            "there is {a} {at}",
        ),
        "relation": (
            "{a} {rel} {b}",
            "{b} with {a} {its}",
            "{b} {inv} {a}",
            "there is {a} {long} {b}",
            "a picture of {a} {rel} {b}",
        ),
        "background": "{text} on a {background} background",
    },
    "zh": {
        "plain": ("{n}", "画面里有{n}", "一张有{n}的图"),
        "place": ("{a}在{at}", "{at}有{a}", "画面{at}有{a}", "{a}位于画面{at}"),
        "relation": ("{a}在{b}{rel}", "{b}{rel}有{a}", "{b}在{a}{inv}", "画面里{a}在{b}的{rel}"),
        "background": "{background}背景上{text}",
    },
}
LANGUAGES = tuple(TEMPLATES)


def kind(scene: Mapping[str, Any]) -> str:
    """The list of templates for a scene: "relation", "place" or "plain"."""
    stated = scene["stated"]
    return "relation" if stated["relation"] else "place" if stated["position"] else "plain"


def template_count(scene: Mapping[str, Any], language: str = "en") -> int:
    """The number of paraphrases for a scene."""
    return len(TEMPLATES[language][kind(scene)])


def _noun(obj, stated, language, number=1):
    """The noun phrase of an object: "a small red circle", "three small red circles"."""
    size, colour, (plural, chinese) = obj["size"], obj["colour"], SHAPE_WORDS[obj["shape"]]
    if language == "zh":
        return f"{COUNT_WORDS[number][1]}个{SIZE_WORDS[size] if stated['size'] else ''}{COLOUR_WORDS[colour]}{chinese}"
    words = f"{size} {colour}" if stated["size"] else colour
    if number > 1:
        return f"{COUNT_WORDS[number][0]} {words} {plural}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {obj['shape']}"


def caption(scene: Mapping[str, Any], language: str = "en", template: int = 0) -> str:
    """The caption of a scene by paraphrase number `template`, modulo the number of paraphrases."""
    stated, objects, table = scene["stated"], scene["objects"], TEMPLATES[language]
    which = kind(scene)
    form = table[which][template % len(table[which])]
    zh = language == "zh"
    if which == "relation":
        long, its, inverse, chinese = RELATION_WORDS[stated["relation"]]
        a, b = (_noun(obj, stated, language) for obj in objects)
        if zh:
            text = form.format(a=a, b=b, rel=chinese, inv=RELATION_WORDS[inverse][3])
        else:
            text = form.format(a=a, b=b, rel=stated["relation"], long=long, its=its, inv=inverse)
    elif which == "place":
        text = form.format(a=_noun(objects[0], stated, language), at=POSITION_WORDS[stated["position"]][zh])
    else:
        same = stated["same"]
        nouns = (
            [_noun(objects[0], stated, language, len(objects))]
            if same
            else [_noun(obj, stated, language) for obj in objects]
        )
        text = form.format(n=("和" if zh else " and ").join(nouns), **({} if zh else {"is": "are" if same else "is"}))
    if stated["background"]:
        name = BACKGROUND_WORDS[scene["background"]] if zh else scene["background"]
        text = table["background"].format(text=text, background=name)
    return text


def units(text: str) -> list[str]:
    """The units of a caption: ASCII words and single Chinese characters."""
    return re.findall(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]", text)


def vocabulary(languages: Iterable[str] = LANGUAGES) -> list[str]:
    """All units of captions in these languages, without repetition, in a fixed order.

    The order does not depend on other options, so that a model trained on a few shapes can be continued on all.
    """
    english, chinese = [], []
    for name, (plural, zh) in SHAPE_WORDS.items():
        english += [name, plural]
        chinese.append(zh)
    for table in (COLOUR_WORDS, BACKGROUND_WORDS, SIZE_WORDS):
        english += table.keys()
        chinese += table.values()
    for phrase, zh in POSITION_WORDS.values():
        english.append(phrase)
        chinese.append(zh)
    for name, (long, its, inverse, zh) in RELATION_WORDS.items():
        english += [name, long, its, inverse]
        chinese.append(zh)
    for word, zh in list(COUNT_WORDS.values())[1:]:
        english.append(word)
        chinese.append(zh)
    english += ["a", "an", "and", "is", "are"]
    chinese += ["一个和"]
    for language, words in (("en", english), ("zh", chinese)):
        for forms in TEMPLATES[language].values():
            words += [re.sub(r"\{\w+\}", " ", form) for form in ([forms] if isinstance(forms, str) else forms)]
    parts = {"en": english, "zh": chinese}
    return list(dict.fromkeys(unit for language in languages for words in parts[language] for unit in units(words)))
