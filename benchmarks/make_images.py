"""Make the pocket image suite and the small ViT that its experts start from; run once, both are committed.

    python benchmarks/make_images.py SOURCES tasks          # pave_lightning/tasks/pocket_images/TASK/SPLIT.parquet
    python benchmarks/make_images.py SOURCES base FOLDER    # the base, trained on rows that no task has

SOURCES is a folder with what these packages hold, unpacked (``npm pack``, ``apt-get download`` and ``dpkg -x``):
``emoji-datasource-google`` and ``emoji-datasource-twitter`` from npm, and in ``fonts`` the Debian packages that
`FAMILIES` and ``fonts-noto-core`` belong to. The digits come with scikit-learn.

The base has seen digits, letters, emoji and flags, in other rows, other typefaces, other emoji and other countries than
the tasks, and never a script other than Latin nor a question about weight and slant.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
SEED = 17
SUITE = Path(__file__).parents[1] / "pave_lightning" / "tasks" / "pocket_images"
SPLITS = {"train": 1000, "validation": 200, "test": 500}
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
COUNTRIES = [
    "AR",
    "AU",
    "BR",
    "CA",
    "CH",
    "CN",
    "CU",
    "DK",
    "FR",
    "GB",
    "GR",
    "IN",
    "IT",
    "JP",
    "KE",
    "KR",
    "NP",
    "SE",
    "TR",
    "US",
    "ZA",
    "UA",
    "JM",
    "ET",
]
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
# Typefaces with all four styles, by how their files are called; those of the tasks and those of the base.
FAMILIES = {
    "tasks": {
        "Lato-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "LiberationSerif-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "LiberationMono-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "Caladea-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "Vollkorn-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "JetBrainsMono-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "Tuffy{}.ttf": ("", "_Bold", "_Italic", "_Bold_Italic"),
        "OpenSans-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
    },
    "base": {
        "Roboto-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "LiberationSans-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
        "Carlito-{}.ttf": ("Regular", "Bold", "Italic", "BoldItalic"),
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
STYLES = ("regular", "bold", "italic", "bold_italic")


@dataclass(frozen=True)
class Row:
    """An image and its class; ``group`` are rows that must not be divided between splits."""

    image: Image.Image
    label: str
    group: str


# ---- drawing ---------------------------------------------------------------------------------------------------------


@cache
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


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


def waving(drawn: random.Random, image: Image.Image) -> Image.Image:
    """A flag seen at a slant, partly, blurred and with noise."""
    image = on_background(drawn, image, 14, 0.75)
    cut = [drawn.randint(0, 6) for _ in range(2)] + [SIZE - drawn.randint(0, 6) for _ in range(2)]
    image = image.crop(cut).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(drawn.uniform(0, 1.1)))
    tint = np.asarray([drawn.uniform(0.75, 1.15) for _ in range(3)])
    noise = np.random.default_rng(drawn.getrandbits(32)).normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) * tint + noise, 0, 255).astype(np.uint8))


# ---- sources ---------------------------------------------------------------------------------------------------------


def bucket(name: str, shares: dict[str, float]) -> str:
    """Which part a name belongs to, by its sha256, so that it is the same for ever."""
    place = int.from_bytes(hashlib.sha256(f"{SEED} {name}".encode()).digest()[:8]) / 2**64
    for part, share in shares.items():
        place -= share
        if place < 0:
            return part
    return part


def fonts_of(sources: Path, which: str) -> dict[str, list[Path]]:
    """Fonts by style."""
    found: dict[str, list[Path]] = {style: [] for style in STYLES}
    for pattern, names in FAMILIES[which].items():
        for style, name in zip(STYLES, names, strict=False):
            found[style].append(next((sources / "fonts").rglob(pattern.format(name))))
    return found


@cache
def letters_of(path: Path, first: int, last: int) -> tuple[str, ...]:
    """The letters of a range that a font has."""
    from fontTools.ttLib import TTFont

    known = TTFont(path, lazy=True).getBestCmap()
    return tuple(
        chr(code) for code in range(first, last + 1) if code in known and unicodedata.category(chr(code))[0] == "L"
    )


def digits(sources: Path, which: str, count: int, seed: int) -> Iterator[Row]:
    from sklearn.datasets import load_digits

    found = load_digits()
    for index, (values, label) in enumerate(zip(found.images, found.target, strict=True)):
        if (bucket(f"digit {index}", {"base": 0.15, "tasks": 0.85}) == "base") == (which == "base"):
            image = Image.fromarray((values / 16 * 255).round().astype(np.uint8))
            yield Row(image, str(label), str(index))


def letters(sources: Path, which: str, count: int, seed: int) -> Iterator[Row]:
    drawn = random.Random(f"letters {seed}")
    paths = [path for style in fonts_of(sources, which).values() for path in style]
    for index in range(count):
        letter = chr(ord("A") + index % 26)
        path = drawn.choice(paths)
        yield Row(drawn_text(drawn, path, letter if drawn.random() < 0.5 else letter.lower()), letter, str(index))


def styles(sources: Path, which: str, count: int, seed: int) -> Iterator[Row]:
    drawn = random.Random(f"styles {seed}")
    paths = fonts_of(sources, which)
    for index in range(count):
        style = STYLES[index % len(STYLES)]
        text = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=2))
        yield Row(drawn_text(drawn, drawn.choice(paths[style]), text), style, str(index))


def scripts(sources: Path, which: str, count: int, seed: int) -> Iterator[Row]:
    drawn = random.Random(f"scripts {seed}")
    folder = sources / "fonts"
    for index in range(count):
        name, (noto, first, last) = list(SCRIPTS.items())[index % len(SCRIPTS)]
        kinds = [f"Noto{kind}{noto}-{weight}.ttf" for kind in ("Sans", "Serif") for weight in ("Regular", "Bold")]
        paths = sorted({path for kind in kinds for path in folder.rglob(kind)})
        path = drawn.choice(paths)
        text = "".join(drawn.choices(letters_of(path, first, last), k=2))
        yield Row(drawn_text(drawn, path, text), name, str(index))


def emoji_list(sources: Path) -> list[dict[str, str]]:
    return json.loads((sources / "emoji-datasource-google" / "emoji.json").read_text())


def emoji_image(sources: Path, vendor: str, one: dict[str, str]) -> Image.Image:
    return Image.open(sources / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / one["image"])


def emoji(sources: Path, which: str, count: int, seed: int) -> Iterator[Row]:
    drawn = random.Random(f"emoji {seed}")
    names = {category: name for name, category in GROUPS.items()}
    mine = [
        (one, vendor)
        for one in emoji_list(sources)
        for vendor in VENDORS
        if one["category"] in names
        and one[f"has_img_{vendor}"]
        and bucket(one["unified"], {"base": 0.4, "tasks": 0.6}) == which
    ]
    repeats = max(1, count // len(mine)) if which == "base" else 1
    for one, vendor in mine * repeats:
        yield Row(
            on_background(drawn, emoji_image(sources, vendor, one), 4, 0.8), names[one["category"]], one["unified"]
        )


def flags(sources: Path, which: str, count: int, seed: int) -> Iterator[Row]:
    drawn = random.Random(f"flags {seed}")
    found: dict[str, dict[str, str]] = {}
    for one in emoji_list(sources):
        codes = one["unified"].split("-")
        if (
            one["category"] == "Flags"
            and len(codes) == 2
            and one["short_name"].startswith(
                ("flag-", "cn", "fr", "us", "gb", "it", "jp", "kr", "de", "es", "ru", "uk")
            )
        ):
            found["".join(chr(int(code, 16) - 0x1F1E6 + ord("A")) for code in codes)] = one
    own = [code for code in sorted(found) if (code in COUNTRIES) == (which == "tasks")]
    own = [code for code in own if all(found[code][f"has_img_{vendor}"] for vendor in VENDORS)]
    own = own if which == "tasks" else own[:: max(1, len(own) // 60)][:60]
    for index in range(count):
        code = own[index % len(own)]
        image = emoji_image(sources, drawn.choice(VENDORS), found[code])
        yield Row(waving(drawn, image), code.lower(), str(index))


MAKERS: dict[str, Callable[[Path, str, int, int], Iterator[Row]]] = {
    "digit": digits,
    "letter": letters,
    "style": styles,
    "script": scripts,
    "emoji": emoji,
    "flag": flags,
}


# ---- the suite -------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image) -> bytes:
    """Grey images as PNG, coloured ones as JPEG, which is a third of the size."""
    stream = io.BytesIO()
    if image.mode == "L":
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def write_tasks(sources: Path, folder: Path) -> None:
    total = sum(SPLITS.values())
    for name, maker in MAKERS.items():
        rows = list(maker(sources, "tasks", total, SEED))
        parts = {split: count / total for split, count in SPLITS.items()}
        divided: dict[str, list[Row]] = {split: [] for split in SPLITS}
        seen: set[bytes] = set()
        for row in rows:
            if (content := row.image.tobytes()) not in seen:
                divided[bucket(f"{name} {row.group}", parts)].append(row)
                seen.add(content)
        for split, found in divided.items():
            order = random.Random(f"{name} {split} {SEED}").sample(found, min(len(found), SPLITS[split]))
            (folder / name).mkdir(parents=True, exist_ok=True)
            images = [{"bytes": encoded(row.image), "path": None} for row in order]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"image": pa.array(images, kind), "label": [row.label for row in order]})
            pq.write_table(table, folder / name / f"{split}.parquet", compression="zstd", use_dictionary=["label"])
            size = (folder / name / f"{split}.parquet").stat().st_size
            print(f"{name} {split}: {len(order)} rows, {len({row.label for row in order})} classes, {size:,} bytes")


# ---- the base --------------------------------------------------------------------------------------------------------

BASE_ROWS = {"letter": 6000, "emoji": 4000, "flag": 4000, "digit": 0}


def train_base(sources: Path, folder: Path, minutes: float) -> None:  # noqa: PLR0915
    import torch
    from torch import nn
    from torch.nn import functional
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    pixels, labels, sizes, owner = [], [], [], []
    for place, (name, count) in enumerate(BASE_ROWS.items()):
        rows = list(MAKERS[name](sources, "base", count, SEED + 1))
        rows *= max(1, 1500 // len(rows))
        known = sorted({row.label for row in rows})
        sizes.append(len(known))
        print(f"{name}: {len(rows)} rows, {len(known)} classes")
        for row in rows:
            image = row.image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            pixels.append(np.asarray(image).transpose(2, 0, 1))
            labels.append(known.index(row.label))
            owner.append(place)
    images = torch.from_numpy(np.stack(pixels))
    target, source = torch.tensor(labels), torch.tensor(owner)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=384,
    )
    model = ViTModel(config, add_pooling_layer=False)
    heads = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in sizes)
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, 1.5e-3, weight_decay=0.05, fused=True)
    held_out = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.03
    train = (~held_out).nonzero()[:, 0]
    start, size, step = time.time(), 128, 0
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * max(0.02, 1 - done)
        chosen = train[torch.randint(len(train), (size,))]
        batch = images[chosen].float()
        shift = torch.randint(-3, 4, (2,)).tolist()
        batch = torch.roll(batch, shift, (2, 3)) * (0.75 + 0.5 * torch.rand(size, 1, 1, 1))
        invert = (torch.rand(size) < 0.3) & (source[chosen] == 0)
        batch = torch.where(invert[:, None, None, None], 255 - batch, batch) + 6 * torch.randn(batch.shape)
        states = model((batch.clamp(0, 255) / 255 - 0.5) / 0.5).last_hidden_state[:, 0]
        loss = sum(
            functional.cross_entropy(head(states[mine]), target[chosen][mine], reduction="sum", label_smoothing=0.05)
            for place, head in enumerate(heads)
            if (mine := source[chosen] == place).any()
        )
        (loss / size).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}: loss {float(loss) / size:.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        states = torch.cat(
            [model((part.float() / 255 - 0.5) / 0.5).last_hidden_state[:, 0] for part in images[held_out].split(256)]
        )
        for place, (name, head) in enumerate(zip(BASE_ROWS, heads, strict=True)):
            mine = source[held_out] == place
            right = (head(states[mine]).argmax(-1) == target[held_out][mine]).double().mean()
            print(f"{name}: {float(right):.3f} of {int(mine.sum())} held-out rows")
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("what", choices=("tasks", "base"))
    parser.add_argument("folder", type=Path, nargs="?", default=SUITE)
    parser.add_argument("--minutes", type=float, default=20, help="how long the base is trained")
    given = parser.parse_args()
    if given.what == "tasks":
        write_tasks(given.sources, given.folder)
    else:
        train_base(given.sources, given.folder, given.minutes)
