"""Images as other people have them: every mode and container, broken files, and columns and folders that hold them."""

import io
import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pave_lightning import Task
from pave_lightning.errors import PaveError
from pave_lightning.tasks.data import check_task, load_split, split_fingerprint
from pave_lightning.tasks.images import folder_rows, image_findings, open_image, open_images
from pave_lightning.tasks.json_rows import read_json
from pave_lightning.tasks.rows import ColumnForm, Rows, UnreadableError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def flat(mode, colour, size=(3, 2)):
    return Image.new(mode, size, colour)


def deep_grey(value):
    return Image.fromarray(np.full((2, 3), value, np.uint16))


def palette():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([*BLUE, *RED])
    return image


KINDS = {
    "grey": (saved(flat("L", 77)), (77, 77, 77)),
    "bilevel": (saved(flat("1", 1)), (255, 255, 255)),
    "palette": (saved(palette()), RED),
    "transparent palette": (saved(palette(), transparency=1), RED),
    "alpha": (saved(flat("RGBA", (9, 8, 7, 0))), (9, 8, 7)),
    "grey with alpha": (saved(flat("LA", (50, 0))), (50, 50, 50)),
    "16 bits, white": (saved(deep_grey(65535)), (255, 255, 255)),
    "16 bits, half": (saved(deep_grey(128 * 257)), (128, 128, 128)),
    "16 bits of which 8 are used": (saved(deep_grey(200)), (200, 200, 200)),
    "32 bits": (saved(Image.fromarray(np.full((2, 3), 128 * 257, np.int32)), "TIFF"), (128, 128, 128)),
    "floats to 1": (saved(Image.fromarray(np.full((2, 3), 0.4, np.float32)), "TIFF"), (102, 102, 102)),
    "CMYK": (saved(flat("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "GIF of several frames": (saved(flat("RGB", RED), "GIF", save_all=True, append_images=[flat("RGB", BLUE)]), RED),
    "WebP of several frames": (
        saved(flat("RGB", RED), "WEBP", save_all=True, append_images=[flat("RGB", BLUE)], lossless=True),
        RED,
    ),
    "PNG of several frames": (saved(flat("RGB", RED), save_all=True, append_images=[flat("RGB", BLUE)]), RED),
    "BMP": (saved(flat("RGB", RED), "BMP"), RED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_becomes_colours_of_eight_bits(kind):
    content, colour = KINDS[kind]
    image = open_image(content)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert {tuple(pixel) for row in np.asarray(image) for pixel in row} == {colour}


def test_grey_is_kept_for_processors_of_one_channel():
    image = open_image(saved(flat("RGBA", (90, 90, 90, 0))), "L")
    assert np.array_equal(np.asarray(image), np.full((2, 3), 90))


@pytest.mark.parametrize(("turned", "corner"), [(1, (0, 0)), (3, (2, 1)), (6, (1, 0)), (8, (0, 2))])
def test_images_are_turned_upright(turned, corner):
    """What stands in the file's first pixel comes to the corner that the EXIF orientation says."""
    image = flat("RGB", (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = turned
    found = open_image(saved(image, exif=exif))
    assert found.size == ((3, 2) if turned in (1, 3) else (2, 3))
    assert found.getpixel(corner) == (255, 255, 255)


def test_damaged_exif_does_not_matter():
    assert open_image(saved(flat("RGB", RED), "JPEG", exif=b"Exif\0\0neither head nor tail")).size == (3, 2)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_any_size_is_an_image(size):
    assert open_image(saved(flat("RGB", RED, size))).size == size


JPEG = saved(Image.effect_noise((64, 64), 80), "JPEG")
BROKEN = {
    "a.jpg": (JPEG[: len(JPEG) // 2], "runcated"),
    "b.png": (b"only words", "not an image"),
    "c.png": (b"", "the file is empty"),
    "d.jpg": (b"<html>404 Not Found</html>", "not an image"),
    "e.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "f.webp": (KINDS["WebP of several frames"][0][:60], "decoder"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("as_file", [True, False])
def test_broken_images_say_what_they_are(name, as_file, tmp_path):
    content, told = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PaveError, match=told):
        open_image(str(tmp_path / name) if as_file else content)


def test_folders_and_missing_files_are_not_images(tmp_path):
    with pytest.raises(PaveError, match="a folder, not a file"):
        open_image(str(tmp_path))
    with pytest.raises(PaveError, match=r"^no such file$"):
        open_image(str(tmp_path / "a.png"))
    with pytest.raises(PaveError, match="folders are told apart by /"):
        open_image(str(tmp_path / "a\\b.png"))
    with pytest.raises(PaveError, match="an address; download"):
        open_image("https://example.org/a.png")


def test_filters_of_warnings_are_as_before():
    """Threads share them, so none of the threads may change them."""
    before = list(warnings.filters)
    open_images([KINDS["alpha"][0]] * 200)
    assert list(warnings.filters) == before


# ---- columns ---------------------------------------------------------------------------------------------------------


def rows_of(column):
    return Rows({"image": pa.chunked_array([column])}, len(column), ["image"])


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_broken_images_of_a_column_are_named_and_counted():
    good = KINDS["grey"][0]
    contents = [good, *(content for content, _ in BROKEN.values()), good]
    (problem,), remarks = image_findings(rows_of(pa.array(contents)), "image")
    assert "column 'image': 6 of 8 images cannot be read: row 1 (counted from 0)" in problem
    assert "row 3 (counted from 0) (the file is empty) and 3 more" in problem
    assert remarks == []


def test_what_is_left_out_of_images_is_told_and_counted():
    names = ["alpha", "transparent palette", "16 bits, white", "GIF of several frames", "grey"]
    problems, remarks = image_findings(rows_of(pa.array([KINDS[name][0] for name in names])), "image")
    assert problems == []
    assert [remark.split("column 'image' has ")[1].split(",")[0] for remark in remarks] == [
        "2 images with transparency",
        "1 image with more than 8 bits a channel",
        "1 image with several frames",
    ]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT, pa.struct([("bytes", pa.large_binary())])],
    ids=str,
)
def test_contents_of_every_type_are_images(kind):
    contents = [KINDS["grey"][0], KINDS["palette"][0]]
    if pa.types.is_struct(kind):
        contents = [{"bytes": content, "path": "name-of-once.png"} for content in contents]
    assert image_findings(rows_of(pa.array(contents, kind)), "image") == ([], [])


def test_rows_without_content_and_without_a_file_are_told_apart(tmp_path):
    (tmp_path / "there.png").write_bytes(KINDS["grey"][0])
    content = {"bytes": KINDS["grey"][0], "path": None}
    there = {"bytes": None, "path": str(tmp_path / "there.png")}
    absent = {"bytes": None, "path": str(tmp_path / "absent.png")}
    assert image_findings(rows_of(pa.array([content, there], STRUCT)), "image") == ([], [])
    (problem,), _ = image_findings(rows_of(pa.array([content, there, absent], STRUCT)), "image")
    assert "1 image cannot be read" in problem
    assert "absent.png (no such file)" in problem
    for empty in (None, {"bytes": None, "path": None}):
        (problem,), _ = image_findings(rows_of(pa.array([content, empty], STRUCT)), "image")
        assert "has no image in row 1" in problem


@pytest.mark.parametrize("column", [[1, 2], [[1.0], [2.0]], [[{"bytes": b"x"}]]], ids=["numbers", "arrays", "lists"])
def test_other_columns_are_refused(column):
    (problem,), _ = image_findings(rows_of(pa.array(column)), "image")
    assert "must hold images" in problem


def test_encoded_contents_in_place_of_paths_do_not_fill_the_screen():
    (problem,), _ = image_findings(rows_of(pa.array(["A" * 5000])), "image")
    assert len(problem) < 400


def test_json_holds_paths_or_objects_with_a_path():
    columns = {"image": ColumnForm.IMAGE, "label": ColumnForm.LABEL}
    images = ["a.png", {"path": "b.png"}, {"path": "c.png", "bytes": None}, None]
    content = "".join(json.dumps({"image": image, "label": 0}) + "\n" for image in images).encode()
    assert read_json(content, columns).columns["image"].to_pylist() == ["a.png", "b.png", "c.png", None]
    rows = read_json(b'{"image": {"bytes": "iVBO"}, "label": 0}\n', columns)
    assert "must hold paths of images, but holds an object in row 0" in rows.faults["image"]


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_as_it_comes_from_somewhere(tmp_path):
    """Hidden files, notes and folders of other programs are no images; inner folders belong to their class."""
    good = KINDS["grey"][0]
    files = {
        "cat/1.PNG": good,
        "cat/.DS_Store": b"x",
        "cat/Thumbs.db": b"x",
        "cat/report.pdf": b"%PDF-1.4",
        "cat/README": b"some words",
        "dog/left/far/2.jpeg": JPEG,
        "dog/3": good,
        "empty/.gitkeep": b"",
        "__MACOSX/._1.PNG": b"x",
        ".cache/4.png": good,
        "5.png": good,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    rows = folder_rows(tmp_path, "image", "label")
    found = {
        path.removeprefix(f"{tmp_path}/"): label
        for path, label in zip(rows.columns["image"].to_pylist(), rows.columns["label"].to_pylist(), strict=True)
    }
    assert found == {"cat/1.PNG": "cat", "dog/left/far/2.jpeg": "dog", "dog/3": "dog"}
    others, empty = rows.remarks
    assert others == "3 files are not images and left out: cat/README, cat/Thumbs.db, cat/report.pdf"
    assert empty == "no image in __MACOSX, empty"


def test_a_folder_without_classes_or_without_images_is_refused(tmp_path):
    with pytest.raises(UnreadableError, match="has no sub-folders"):
        folder_rows(tmp_path, "image", "label")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UnreadableError, match="there is no image in the sub-folders"):
        folder_rows(tmp_path, "image", "label")


# ---- tasks -----------------------------------------------------------------------------------------------------------


def task_over(data, **options):
    """A task of which all splits are the same rows."""
    data = data if isinstance(data, dict) else dict.fromkeys(("train", "validation", "test"), str(data))
    return Task.model_validate(
        {"name": "mine", "kind": "image_classification", "data": data, "classes": ["grey", "red"], **options}
    )


@pytest.fixture
def problems_of(tmp_path):
    return lambda task: "\n".join(check_task(task, seed=0, cache_dir=tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """A folder with img/0.png, grey, and img/1.png, red."""
    (tmp_path / "img").mkdir()
    for index, kind in enumerate(("grey", "palette")):
        (tmp_path / "img" / f"{index}.png").write_bytes(KINDS[kind][0])
    return tmp_path


@pytest.mark.parametrize("inside", [True, False], ids=["contents", "paths"])
def test_parquet_as_datasets_writes_it(inside, pictures, problems_of):
    """Its classes are read by name, not by number."""
    import datasets

    files = [pictures / "img" / f"{index}.png" for index in (0, 1)]
    images = [{"bytes": file.read_bytes(), "path": file.name} if inside else str(file) for file in files]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "grey"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features=features)
    rows.to_parquet(pictures / "rows.parquet")
    kept = pq.read_table(pictures / "rows.parquet").column("image").to_pylist()
    assert (kept[0]["bytes"] is not None) == inside
    task = task_over(pictures / "rows.parquet")
    assert problems_of(task) == ""
    assert load_split(task, "test", seed=0, cache_dir=pictures / "cache").column("label").to_pylist() == ["grey", "red"]


@pytest.mark.parametrize("first", ["img/0.png", "{folder}/img/0.png", " img/0.png "])
def test_paths_in_csv_are_whole_or_begin_at_its_folder(first, pictures, problems_of):
    (pictures / "rows.csv").write_text(f"image,label\n{first.format(folder=pictures)},grey\nimg/1.png,red\n")
    task = task_over(pictures / "rows.csv")
    assert problems_of(task) == ""
    sources = load_split(task, "train", seed=0, cache_dir=pictures / "cache").column("image").to_pylist()
    assert sources == [str(pictures / "img" / "0.png"), str(pictures / "img" / "1.png")]


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("img/7.png", "img/7.png (no such file)"),
        ("https://example.org/0.png", "https://example.org/0.png (an address; download the images"),
        ("img", "img (a folder, not a file)"),
        ("x" * 5000, "... (File name too long)"),
        ("", "column 'image' has no image in row 0 (counted from 0), line 2"),
    ],
)
def test_paths_that_lead_nowhere_are_named(first, told, pictures, problems_of):
    (pictures / "rows.csv").write_text(f"image,label\n{first},grey\nimg/1.png,red\n")
    assert told in problems_of(task_over(pictures / "rows.csv"))


def test_labels_may_be_numbers(pictures, problems_of):
    (pictures / "metadata.csv").write_text("file_name,label\nimg/0.png,0\nimg/1.png,1\n")
    task = task_over(pictures / "metadata.csv", image="file_name")
    assert problems_of(task) == ""
    rows = load_split(task, "train", seed=0, cache_dir=pictures / "cache")
    assert task.row_labels({"label": rows.column("label").to_pylist()}).tolist() == [0, 1]


@pytest.fixture
def split_folders(tmp_path):
    """train, val and test with a folder for each class."""
    for split in ("train", "val", "test"):
        for label, kind in (("grey", "grey"), ("red", "palette")):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            (tmp_path / "set" / split / label / f"{split}.png").write_bytes(KINDS[kind][0])
    return tmp_path / "set"


def test_a_folder_of_splits_of_classes(split_folders, problems_of):
    """The other name of a split is found, and parts of one are refused."""
    task = task_over({"folder": str(split_folders)})
    assert problems_of(task) == ""
    rows = load_split(task, "validation", seed=0, cache_dir=split_folders / "cache")
    assert rows.column("image").to_pylist()[0].endswith("val/grey/val.png")
    task = task_over({"folder": str(split_folders), "train": "train[:50%]"})
    assert "'train[:50%]' would leave whole classes out; name 'train'" in problems_of(task)


def test_a_table_beside_a_folder_of_its_images_comes_first(split_folders, problems_of):
    for split in ("train", "val", "test"):
        rows = [f"{split}/{label}/{split}.png,{other}" for label, other in (("grey", "red"), ("red", "grey"))]
        (split_folders / f"{split}.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    task = task_over({"folder": str(split_folders)})
    assert problems_of(task) == ""
    rows = load_split(task, "validation", seed=0, cache_dir=split_folders / "cache").to_pylist()
    assert rows[0] == {"image": str(split_folders / "val" / "grey" / "val.png"), "label": "red"}


def test_images_that_change_are_other_rows(split_folders):
    """Copies of rows are told by the images' contents, not by their names alone."""
    task = task_over({"folder": str(split_folders)})
    before = split_fingerprint(task, "train")
    file = split_folders / "train" / "red" / "train.png"
    file.write_bytes(KINDS["BMP"][0])
    assert split_fingerprint(task, "train") != before


def test_classes_without_images_are_told_and_unknown_ones_refused(split_folders, problems_of, caplog):
    task = task_over({"folder": str(split_folders)}, classes=["grey", "red", "blue"])
    assert problems_of(task) == ""
    assert "no image of the class blue" in caplog.text
    assert "must hold one of the classes red, blue, but holds 'grey'" in problems_of(
        task_over({"folder": str(split_folders)}, classes=["red", "blue"])
    )
