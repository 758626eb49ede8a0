"""Make the pocket image suite and the small ViT that its experts start from; run once, both are committed.

    python benchmarks/make_images.py SOURCES tasks          # pave_lightning/tasks/pocket_images/TASK/SPLIT.parquet
    python benchmarks/make_images.py SOURCES base FOLDER    # the base, trained on rows that no task has

SOURCES is a folder with what these packages hold, made in it on Debian 12 by::

    for vendor in google twitter; do
      npm pack emoji-datasource-$vendor@16.0.0 && mkdir emoji-datasource-$vendor
      tar xzf emoji-datasource-$vendor-16.0.0.tgz -C emoji-datasource-$vendor --strip-components=1
    done
    apt-get download fonts-{lato,liberation2,crosextra-caladea,vollkorn,jetbrains-mono,tuffy,open-sans,noto-core}
    apt-get download fonts-{roboto-unhinted,crosextra-carlito,dejavu-core,ebgaramond,sil-gentium}        # for the base
    apt-get download fonts-{quicksand,comfortaa,firacode,play,dosis}                                     # for the base
    for package in *.deb; do dpkg -x $package fonts; done

The digits come with scikit-learn; fontTools says which letters a font has. The same packages and the same Pillow (13.0
here, with its own FreeType and libwebp) give the same bytes.

The base has seen digits, letters, emoji and flags, in other rows, other typefaces, other emoji and other countries than
the tasks, and never a script other than Latin nor a question about weight and slant.
"""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from image_sources import MAKERS, SEED, SIZE, Row, bucket
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor, nn

SUITE = Path(__file__).parents[1] / "pave_lightning" / "tasks" / "pocket_images"
SPLITS = {"train": 1000, "validation": 200, "test": 500}
# Drawn texts need more rows until a model sees through them, and there is no end of them.
TRAIN_ROWS = {"letter": 3000, "style": 3000, "script": 3000}
BASE_ROWS = {"letter": 6000, "emoji": 4000, "flag": 4000, "digit": 0}
LEAST_BASE_ROWS = 1500
BASE_STEPS = 1530
BATCH = 128
PEAK_RATE = 1.5e-3

# ---- the suite -------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image) -> bytes:
    """WebP, which is the smallest; the digits, which are smaller still, without loss as PNG."""
    stream = io.BytesIO()
    if image.width < SIZE:
        image.save(stream, "PNG", optimize=True)
    else:
        image.save(stream, "WEBP", quality=80, method=6)
    return stream.getvalue()


def rows_of(sources: Path, name: str) -> dict[str, list[Row]]:
    """The rows of a task by split: no image twice, and no group in two splits."""
    sizes = {**SPLITS, "train": TRAIN_ROWS.get(name, SPLITS["train"])}
    total = sum(sizes.values())
    shares = {split: count / total for split, count in sizes.items()}
    found: dict[str, list[Row]] = {split: [] for split in sizes}
    seen: set[bytes] = set()
    for row in MAKERS[name](sources, "tasks", total, SEED):
        if (content := row.image.tobytes()) not in seen:
            found[bucket(f"{name} {row.group}", shares)].append(row)
            seen.add(content)
    return {
        split: random.Random(f"{name} {split} {SEED}").sample(own, min(len(own), sizes[split]))
        for split, own in found.items()
    }


def write_split(rows: list[Row], file: Path) -> None:
    """Images as `datasets` keeps them, and the names of their classes."""
    images = [{"bytes": encoded(row.image), "path": None} for row in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": [row.label for row in rows]})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, compression="zstd", use_dictionary=["label"])


def write_tasks(sources: Path, folder: Path) -> None:
    """All splits of all tasks."""
    for name in MAKERS:
        for split, rows in rows_of(sources, name).items():
            file = folder / name / f"{split}.parquet"
            write_split(rows, file)
            classes = len({row.label for row in rows})
            print(f"{name} {split}: {len(rows)} rows, {classes} classes, {file.stat().st_size:,} bytes")


# ---- the base --------------------------------------------------------------------------------------------------------


def base_rows(sources: Path) -> tuple[Tensor, Tensor, Tensor, dict[str, list[str]]]:
    """What the base is trained on.

    Returns:
        uint8 images of shape ``(n, 3, SIZE, SIZE)``; int64 classes of shape ``(n,)``, counted within their question;
        int64 of shape ``(n,)``, which question that is; and the classes of each question.
    """
    import torch

    pixels, labels, asked = [], [], []
    classes: dict[str, list[str]] = {}
    for place, (name, count) in enumerate(BASE_ROWS.items()):
        rows = list(MAKERS[name](sources, "base", count, SEED + 1))
        rows *= max(1, LEAST_BASE_ROWS // len(rows))
        classes[name] = sorted({row.label for row in rows})
        print(f"{name}: {len(rows)} rows, {len(classes[name])} classes")
        for row in rows:
            image = row.image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            pixels.append(np.asarray(image).transpose(2, 0, 1))
            labels.append(classes[name].index(row.label))
            asked.append(place)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels), torch.tensor(asked), classes


def small_vit() -> nn.Module:
    """A ViT of 1.2 million random parameters."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=384,
    )
    return ViTModel(config, add_pooling_layer=False)


def states(model: nn.Module, images: Tensor) -> Tensor:
    """What the model makes of the class token, ``(n, width)``, of images with values from 0 to 255."""
    found: Tensor = model((images / 255 - 0.5) / 0.5).last_hidden_state[:, 0]
    return found


def varied(images: Tensor, letters: Tensor) -> Tensor:
    """Images moved, of other brightness and with noise; some of the letters with bright and dark exchanged."""
    import torch

    count = len(images)
    shift = torch.randint(-3, 4, (2,)).tolist()
    images = torch.roll(images.float(), shift, (2, 3)) * (0.75 + 0.5 * torch.rand(count, 1, 1, 1))
    invert = (torch.rand(count) < 0.3) & letters
    images = torch.where(invert[:, None, None, None], 255 - images, images) + 6 * torch.randn(images.shape)
    return images.clamp(0, 255)


def train_base(sources: Path, folder: Path, steps: int) -> None:
    """A ViT with one head a question, on all questions at once; kept is the ViT alone."""
    import torch
    from torch import nn
    from torch.nn import functional
    from transformers import ViTImageProcessor

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # so that sums are added up in the same order wherever it runs
    images, target, asked, classes = base_rows(sources)
    model = small_vit()
    heads = nn.ModuleList(nn.Linear(model.config.hidden_size, len(names)) for names in classes.values())
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, PEAK_RATE, weight_decay=0.05, fused=True)
    held_out = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.03
    train = (~held_out).nonzero()[:, 0]
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / 100) * max(0.02, 1 - step / steps)
        chosen = train[torch.randint(len(train), (BATCH,))]
        seen = states(model, varied(images[chosen], asked[chosen] == 0))
        losses = [
            functional.cross_entropy(head(seen[mine]), target[chosen][mine], reduction="sum", label_smoothing=0.05)
            for place, head in enumerate(heads)
            if (mine := asked[chosen] == place).any()
        ]
        loss = torch.stack(losses).sum() / BATCH
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        seen = torch.cat([states(model, part.float()) for part in images[held_out].split(256)])
        for place, (name, head) in enumerate(zip(classes, heads, strict=True)):
            mine = asked[held_out] == place
            right = (head(seen[mine]).argmax(-1) == target[held_out][mine]).double().mean()
            print(f"{name}: {float(right):.3f} of {int(mine.sum())} held-out rows")
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("what", choices=("tasks", "base"))
    parser.add_argument("folder", type=Path, nargs="?", default=SUITE)
    parser.add_argument("--steps", type=int, default=BASE_STEPS, help="how long the base is trained")
    given = parser.parse_args()
    if given.what == "tasks":
        write_tasks(given.sources, given.folder)
    else:
        train_base(given.sources, given.folder, given.steps)
