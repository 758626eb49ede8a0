"""The images that `make_images` draws and divides: digits, letters in typefaces, emoji and flags.

Every kind of image is a function that gives rows: of the tasks (``"tasks"``), or of what the base is trained on
(``"base"``), which share no digit, no typeface, no emoji and no country. The same seed draws the same rows.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
SEED = 17
Part = Literal["tasks", "base"]

# ---- what there is ---------------------------------------------------------------------------------------------------

# Classes of emoji, and how emoji-datasource calls their categories.
GROUPS = {
    "smiley": "Smileys & Emotion",
    "person": "People & Body",
    "nature": "Animals & Nature",
    "food": "Food & Drink",
    "place": "Travel & Places",
    "activity": "Activities",
    "object": "Objects",
    "symbol": "Symbols",
}
VENDORS = ("google", "twitter")
# The animals of the tasks, as emoji-datasource calls them; the base has seen none of them.
ANIMALS = [
    *("bee", "butterfly", "camel", "crab", "duck", "eagle", "flamingo", "fox_face", "hamster", "horse", "kangaroo"),
    *("koala", "ladybug", "lion_face", "lizard", "octopus", "owl", "peacock", "scorpion", "shark", "snail", "squid"),
    *("swan", "wolf"),
]
# The countries of the tasks (ISO 3166-1); the base has seen others.
COUNTRIES = [
    *("AR", "AU", "BR", "CA", "CH", "CN", "CU", "DK", "FR", "GB", "GR", "IN"),
    *("IT", "JP", "KE", "KR", "NP", "SE", "TR", "US", "ZA", "UA", "JM", "ET"),
]
BASE_COUNTRIES = 60
# How Noto calls a script, and where its letters are in Unicode.
SCRIPTS = {
    "latin": ("", 0x41, 0x17F),
    "greek": ("", 0x391, 0x3C9),
    "cyrillic": ("", 0x410, 0x44F),
    "hebrew": ("Hebrew", 0x5D0, 0x5EA),
    "arabic": ("Arabic", 0x621, 0x64A),
    "devanagari": ("Devanagari", 0x905, 0x939),
    "bengali": ("Bengali", 0x985, 0x9B9),
    "tamil": ("Tamil", 0xB85, 0xBB9),
    "thai": ("Thai", 0xE01, 0xE2E),
    "georgian": ("Georgian", 0x10D0, 0x10F0),
    "armenian": ("Armenian", 0x531, 0x587),
    "ethiopic": ("Ethiopic", 0x1200, 0x1340),
}
STYLES = ("regular", "bold", "italic", "bold_italic")
_ALL_STYLES = ("Regular", "Bold", "Italic", "BoldItalic")
# Typefaces by how their files are called, in the order of `STYLES`; those of the base need not have them all.
FAMILIES: dict[Part, dict[str, tuple[str, ...]]] = {
    "tasks": {
        "Lato-{}.ttf": _ALL_STYLES,
        "LiberationSerif-{}.ttf": _ALL_STYLES,
        "LiberationMono-{}.ttf": _ALL_STYLES,
        "Caladea-{}.ttf": _ALL_STYLES,
        "Vollkorn-{}.ttf": _ALL_STYLES,
        "JetBrainsMono-{}.ttf": _ALL_STYLES,
        "Tuffy{}.ttf": ("", "_Bold", "_Italic", "_Bold_Italic"),
        "OpenSans-{}.ttf": _ALL_STYLES,
    },
    "base": {
        "Roboto-{}.ttf": _ALL_STYLES,
        "LiberationSans-{}.ttf": _ALL_STYLES,
        "Carlito-{}.ttf": _ALL_STYLES,
        "DejaVuSans{}.ttf": ("", "-Bold"),
        "DejaVuSerif{}.ttf": ("", "-Bold"),
        "EBGaramond12-{}.otf": ("Regular", "Bold"),
        "Gentium-{}.ttf": ("R", "I"),
        "Quicksand-{}.ttf": ("Regular", "Bold"),
        "Comfortaa-{}.ttf": ("Regular", "Bold"),
        "FiraCode-{}.ttf": ("Regular", "Bold"),
        "Play-{}.ttf": ("Regular", "Bold"),
        "Dosis-{}.otf": ("Medium", "Bold"),
    },
}


@dataclass(frozen=True)
class Row:
    """An image and its class; ``group`` are rows that must not be divided between splits."""

    image: Image.Image
    label: str
    group: str


def bucket(name: str, shares: dict[str, float]) -> str:
    """Which part a name belongs to, by its sha256, so that it is the same for ever."""
    place = int.from_bytes(hashlib.sha256(f"{SEED} {name}".encode()).digest()[:8]) / 2**64
    for part, share in shares.items():
        place -= share
        if place < 0:
            return part
    return part


# ---- digits ----------------------------------------------------------------------------------------------------------


def digits(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """Digits that a hand wrote, 8 x 8 as scikit-learn has them; all of them, whatever the count."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for index, (values, label) in enumerate(zip(found.images, found.target, strict=True)):
        if bucket(f"digit {index}", {"base": 0.15, "tasks": 0.85}) == part:
            image = Image.fromarray((values / 16 * 255).round().astype(np.uint8))
            yield Row(image, str(label), str(index))


# ---- typefaces -------------------------------------------------------------------------------------------------------


@cache
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A typeface, opened once."""
    return ImageFont.truetype(str(path), size)


@cache
def font_file(sources: Path, name: str) -> Path:
    """Where a font is; several packages may have the same one."""
    found = sorted((sources / "fonts").rglob(name))
    if not found:
        raise SystemExit(f"there is no {name} below {sources / 'fonts'}; unpack the Debian package that has it there")
    return found[0]


def fonts_of(sources: Path, part: Part) -> dict[str, list[Path]]:
    """Fonts by style."""
    found: dict[str, list[Path]] = {style: [] for style in STYLES}
    for pattern, names in FAMILIES[part].items():
        for style, name in zip(STYLES, names, strict=False):
            found[style].append(font_file(sources, pattern.format(name)))
    return found


@cache
def letters_of(path: Path, first: int, last: int) -> tuple[str, ...]:
    """The letters of a range that a font has."""
    from fontTools.ttLib import TTFont

    known = TTFont(path, lazy=True).getBestCmap()
    return tuple(
        chr(code) for code in range(first, last + 1) if code in known and unicodedata.category(chr(code))[0] == "L"
    )


@cache
def noto_fonts(sources: Path, script: str) -> list[Path]:
    """Noto's fonts of a script that there are, with and without serifs, regular and bold."""
    names = [f"Noto{kind}{script}-{weight}.ttf" for kind in ("Sans", "Serif") for weight in ("Regular", "Bold")]
    found = sorted({path for name in names for path in (sources / "fonts").rglob(name)})
    if not found:
        raise SystemExit(f"there is no {names[0]} below {sources / 'fonts'}; unpack Debian's fonts-noto-core there")
    return found


def drawn_text(drawn: random.Random, path: Path, text: str) -> Image.Image:
    """A text in the middle of a grey image, turned and moved a little, dark on bright or bright on dark, with noise."""
    large = 4 * SIZE
    canvas = Image.new("L", (large, large), 0)
    pen, face = ImageDraw.Draw(canvas), font(path, 72)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=face)
    if right > left and bottom > top:
        ink = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8), 0)
        ImageDraw.Draw(ink).text((4 - left, 4 - top), text, font=face, fill=255)
        share = drawn.uniform(0.55, 0.8) * large / max(ink.size)
        ink = ink.resize([max(1, round(side * share)) for side in ink.size], Image.Resampling.BILINEAR)
        free = [large - side for side in ink.size]
        canvas.paste(ink, tuple(round(room / 2 + drawn.uniform(-0.07, 0.07) * large) for room in free))
    canvas = canvas.rotate(drawn.gauss(0, 5), Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BOX)
    low, high = drawn.uniform(0, 0.35), drawn.uniform(0.65, 1)
    low, high = (low, high) if drawn.random() < 0.5 else (high, low)
    noise = np.random.default_rng(drawn.getrandbits(32)).normal(0, 0.04, (SIZE, SIZE))
    values = low + (high - low) * np.asarray(canvas) / 255 + noise
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def letters(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """One letter, capital or small, in some typeface and style."""
    drawn = random.Random(f"letters {seed}")
    paths = [path for style in fonts_of(sources, part).values() for path in style]
    for index in range(count):
        letter = chr(ord("A") + index % 26)
        path = drawn.choice(paths)
        yield Row(drawn_text(drawn, path, letter if drawn.random() < 0.5 else letter.lower()), letter, str(index))


def styles(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """Two letters in some typeface; the class is their style."""
    drawn = random.Random(f"styles {seed}")
    paths = fonts_of(sources, part)
    for index in range(count):
        style = STYLES[index % len(STYLES)]
        text = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=2))
        yield Row(drawn_text(drawn, drawn.choice(paths[style]), text), style, str(index))


def scripts(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """Two letters of some script in Noto; for the tasks alone."""
    drawn = random.Random(f"scripts {seed}")
    for index in range(count):
        name, (noto, first, last) = list(SCRIPTS.items())[index % len(SCRIPTS)]
        path = drawn.choice(noto_fonts(sources, noto))
        text = "".join(drawn.choices(letters_of(path, first, last), k=2))
        yield Row(drawn_text(drawn, path, text), name, str(index))


# ---- emoji and flags -------------------------------------------------------------------------------------------------


def on_background(drawn: random.Random, image: Image.Image, turn: float, share: float) -> Image.Image:
    """A picture with transparency on one colour, turned and moved a little, and of other brightness."""
    image = image.convert("RGBA")
    colour = tuple(drawn.randint(150, 255) for _ in range(3))
    side = round(SIZE * drawn.uniform(share, 1))
    image = image.rotate(drawn.gauss(0, turn), Image.Resampling.BICUBIC, expand=True)
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), (*colour, 255))
    canvas.alpha_composite(image, tuple(drawn.randint(0, SIZE - side) for _ in range(2)))
    values = np.asarray(canvas.convert("RGB")).astype(np.float64) * drawn.uniform(0.7, 1.1)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def seen_badly(drawn: random.Random, image: Image.Image) -> Image.Image:
    """A picture seen at a slant, partly, blurred and with noise."""
    image = on_background(drawn, image, 14, 0.75)
    cut = [drawn.randint(0, 6) for _ in range(2)] + [SIZE - drawn.randint(0, 6) for _ in range(2)]
    image = image.crop(cut).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(drawn.uniform(0, 1.1)))
    tint = np.asarray([drawn.uniform(0.75, 1.15) for _ in range(3)])
    noise = np.random.default_rng(drawn.getrandbits(32)).normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) * tint + noise, 0, 255).astype(np.uint8))


def emoji_list(sources: Path) -> list[dict[str, str]]:
    """What emoji-datasource says of each emoji."""
    found: list[dict[str, str]] = json.loads((sources / "emoji-datasource-google" / "emoji.json").read_text())
    return found


def emoji_image(sources: Path, vendor: str, one: dict[str, str]) -> Image.Image:
    """An emoji as a vendor draws it, 64 x 64."""
    return Image.open(sources / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / one["image"])


def emoji_part(one: dict[str, str]) -> str:
    """Whether an emoji is seen in tasks or by the base."""
    return bucket(one["unified"], {"base": 0.4, "tasks": 0.6})


def emoji(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """Every emoji by every vendor; the class is its group. All for the tasks, and for the base about the count."""
    drawn = random.Random(f"emoji {seed}")
    names = {category: name for name, category in GROUPS.items()}
    mine = [
        (one, vendor)
        for one in emoji_list(sources)
        for vendor in VENDORS
        if one["category"] in names and one[f"has_img_{vendor}"] and emoji_part(one) == part
    ]
    for one, vendor in mine * (max(1, count // len(mine)) if part == "base" else 1):
        image = on_background(drawn, emoji_image(sources, vendor, one), 4, 0.8)
        yield Row(image, names[one["category"]], one["unified"])


def animals(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """An animal by some vendor; for the tasks alone."""
    drawn = random.Random(f"animals {seed}")
    found = {one["short_name"]: one for one in emoji_list(sources) if emoji_part(one) == part}
    for index in range(count):
        name = ANIMALS[index % len(ANIMALS)]
        image = emoji_image(sources, drawn.choice(VENDORS), found[name])
        yield Row(seen_badly(drawn, image), name.removesuffix("_face"), str(index))


def country_flags(sources: Path) -> dict[str, dict[str, str]]:
    """The flags that all vendors draw, by the country's two letters, which are what their code points spell."""
    flags = [one for one in emoji_list(sources) if one["subcategory"] == "country-flag"]
    spelt = {
        "".join(chr(int(code, 16) - 0x1F1E6 + ord("A")) for code in one["unified"].split("-")): one for one in flags
    }
    return {code: spelt[code] for code in sorted(spelt) if all(spelt[code][f"has_img_{vendor}"] for vendor in VENDORS)}


def flags(sources: Path, part: Part, count: int, seed: int) -> Iterator[Row]:
    """A country's flag by some vendor; the class is the country."""
    drawn = random.Random(f"flags {seed}")
    found = country_flags(sources)
    own = [code for code in found if (code in COUNTRIES) == (part == "tasks")]
    own = own if part == "tasks" else own[:: max(1, len(own) // BASE_COUNTRIES)][:BASE_COUNTRIES]
    for index in range(count):
        code = own[index % len(own)]
        image = emoji_image(sources, drawn.choice(VENDORS), found[code])
        yield Row(seen_badly(drawn, image), code.lower(), str(index))


MAKERS: dict[str, Callable[[Path, Part, int, int], Iterator[Row]]] = {
    "digit": digits,
    "letter": letters,
    "style": styles,
    "script": scripts,
    "emoji": emoji,
    "animal": animals,
    "flag": flags,
}
