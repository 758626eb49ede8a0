"""The twenty image tasks on which CLIP models are merged: where the data are, and what their classes are called.

Prompts and classes are those of the models that others publish, since an expert was trained against these very texts:
CLIP's own (github.com/openai/CLIP, data/prompts.md), as FusionBench has them (github.com/tanganke/fusion_bench,
fusion_bench/tasks/clip_classification), which also names the data sets. Where no classes stand here, they have the
names that the data set gives them, whose spelling may be another.
"""

from __future__ import annotations

from typing import Any

DIGITS = [str(digit) for digit in range(10)]
_PHOTO = ["a photo of a {}.", "a photo of the {}."]
_KINDS = ["photo", "blurry photo", "black and white photo", "low contrast photo", "high contrast photo"]
_KINDS += ["bad photo", "good photo"]
_CIFAR = [
    template
    for article in ("a", "the")
    for template in (
        *(f"a {kind} of {article} {{}}." for kind in _KINDS),
        f"a photo of {article} small {{}}.",
        f"a photo of {article} big {{}}.",
    )
]
_VIEWS = [f"{seen} {view}" for view in ("imagery", "photo", "view") for seen in ("satellite", "aerial")]

_RESISC45 = """airplane, airport, baseball diamond, basketball court, beach, bridge, chaparral, church,
circular farmland, cloud, commercial area, dense residential, desert, forest, freeway, golf course, ground track field,
harbor, industrial area, intersection, island, lake, meadow, medium residential, mobile home park, mountain, overpass,
palace, parking lot, railway, railway station, rectangular farmland, river, roundabout, runway, sea ice, ship, snowberg,
sparse residential, stadium, storage tank, tennis court, terrace, thermal power station, wetland"""
_DTD = """banded, blotchy, braided, bubbly, bumpy, chequered, cobwebbed, cracked, crosshatched, crystalline, dotted,
fibrous, flecked, freckled, frilly, gauzy, grid, grooved, honeycombed, interlaced, knitted, lacelike, lined, marbled,
matted, meshed, paisley, perforated, pitted, pleated, polka-dotted, porous, potholed, scaly, smeared, spiralled,
sprinkled, stained, stratified, striped, studded, swirly, veined, waffled, woven, wrinkled, zigzagged"""
_WARNINGS = """with exclamation mark, with black left curve approaching, with black right curve approaching,
with black double curve approaching, rough / bumpy road, car skidding / slipping, with merging / narrow lanes,
with person digging / construction / road work, with traffic light approaching, with person walking,
with child and person walking, with bicyle, with snowflake / ice, with deer"""
_ARROWS = """white right turn arrow, white left turn arrow, white forward arrow, white forward or right turn arrow,
white forward or left turn arrow, white keep right arrow, white keep left arrow"""


def _names(written: str) -> list[str]:
    return " ".join(written.split()).split(", ")


def _limits(*speeds: int) -> list[str]:
    return [f"red and white circle {speed} kph speed limit" for speed in speeds]


_GTSRB = [
    *_limits(20, 30, 50, 60, 70, 80),
    "end / de-restriction of 80 kph speed limit",
    *_limits(100, 120),
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    "red and white triangle road intersection warning",
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    *(f"red and white triangle {warned} warning" for warned in _names(_WARNINGS)),
    "white circle with gray strike bar no speed limit",
    *(f"blue circle with {arrow} mandatory" for arrow in _names(_ARROWS)),
    "blue circle with white arrows indicating a traffic circle",
    "white circle with gray strike bar indicating no passing for cars has ended",
    "white circle with gray strike bar indicating no passing for trucks has ended",
]
_EUROSAT = ["annual crop land", "forest", "brushland or shrubland", "highway or road"]
_EUROSAT += ["industrial buildings or commercial buildings", "pasture land", "permanent crop land"]
_EUROSAT += ["residential buildings or homes or apartments", "river", "lake or sea"]
_CARS = [*_PHOTO, "a photo of my {}.", "i love my {}!"]
_CARS += [f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")]

# In the order in which suites of 8, 14 and 20 tasks take them.
CLIP_TASKS: dict[str, dict[str, Any]] = {
    "sun397": {"data": {"hub": "tanganke/sun397"}, "templates": _PHOTO},
    "stanford_cars": {"data": {"hub": "tanganke/stanford_cars"}, "templates": _CARS},
    "resisc45": {
        "data": {"hub": "tanganke/resisc45"},
        "classes": _names(_RESISC45),
        "templates": [f"{view} of {article}{{}}." for article in ("", "a ", "the ") for view in _VIEWS],
    },
    "eurosat": {
        "data": {"hub": "tanganke/eurosat"},
        "classes": _EUROSAT,
        "templates": [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")],
    },
    "svhn": {
        "data": {"hub": "ufldl-stanford/svhn", "config": "cropped_digits"},
        "classes": DIGITS,
        "templates": ['a photo of the number: "{}".'],
    },
    "gtsrb": {
        "data": {"hub": "tanganke/gtsrb"},
        "classes": _GTSRB,
        "templates": [f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up")],
    },
    "mnist": {
        "data": {"hub": "ylecun/mnist"},
        "classes": DIGITS,
        "templates": ['a photo of the number: "{}".'],
    },
    "dtd": {
        "data": {"hub": "tanganke/dtd"},
        "classes": _names(_DTD),
        "templates": [
            f"a photo of {article} {{}} {what}."
            for article in ("a", "the")
            for what in ("texture", "pattern", "thing", "object")
        ],
    },
    "oxford_flowers102": {
        "data": {"hub": "dpdl-benchmark/oxford_flowers102"},
        "templates": ["a photo of a {}, a type of flower."],
    },
    "pcam": {
        "data": {"hub": "1aurent/PatchCamelyon"},
        "classes": ["lymph node", "lymph node containing metastatic tumor tissue"],
        "templates": ["this is a photo of {}"],
    },
    "fer2013": {
        "data": {"hub": "clip-benchmark/wds_fer2013"},
        "image": "jpg",
        "label": "cls",
        "classes": ["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"],
        "templates": [
            "a photo of a {} looking face.",
            "a photo of a face showing the emotion: {}.",
            "a photo of a face looking {}.",
            "a face that looks {}.",
            "they look {}.",
            "look at how {} they are.",
        ],
    },
    "oxford_iiit_pet": {
        "data": {"hub": "timm/oxford-iiit-pet"},
        "templates": ["a photo of a {}, a type of pet."],
    },
    "stl10": {
        "data": {"hub": "tanganke/stl10"},
        "classes": ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
        "templates": _PHOTO,
    },
    "cifar100": {"data": {"hub": "tanganke/cifar100"}, "templates": _CIFAR},
    "cifar10": {
        "data": {"hub": "tanganke/cifar10"},
        "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        "templates": _CIFAR,
    },
    "food101": {
        "data": {"hub": "ethz/food101", "test": "validation"},
        "templates": ["a photo of {}, a type of food."],
    },
    "fashion_mnist": {
        "data": {"hub": "zalando-datasets/fashion_mnist"},
        "classes": [
            *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ],
        "templates": _PHOTO,
    },
    "emnist_letters": {
        "data": {"hub": "tanganke/emnist_letters"},
        "classes": [chr(ord("A") + index) for index in range(26)],
        "templates": ['a photo of the digit character: "{}".'],
    },
    "kmnist": {
        "data": {"hub": "tanganke/kmnist"},
        "classes": list("おきすつなはまやれを"),
        "templates": ["a photo of the character {}."],
    },
    "rendered_sst2": {
        "data": {"hub": "nateraw/rendered-sst2"},
        "classes": ["negative", "positive"],
        "templates": ["a {} review of a movie."],
    },
}
