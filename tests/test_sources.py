"""Every source through one door; what hostile input gets, kept as a table (`python tests/test_sources.py` remakes it)."""

import io
import json
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from test_data import claims, folder_config, image

from sfumato.training.config import schema
from sfumato.training.config.load import load_config
from sfumato.training.data import prepare, records
from sfumato.training.data.cached import cached_texts
from sfumato.training.data.sources import registry
from sfumato.training.models.text import train_tokenizer

TABLE = Path(__file__).parent / "hostile_inputs.md"


def encoded(image, kind="png", **save):
    body = io.BytesIO()
    image.save(body, kind, **save)
    return body.getvalue()


RED = encoded(Image.new("RGB", (20, 30), "red"))


def tar(path, members, mode="w"):
    """Write an archive of (name, body) or ready TarInfo members."""
    with tarfile.open(path, mode) as archive:
        for name, body in members:
            if isinstance(body, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
            else:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = body
                archive.addfile(info)
    return path


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def images_and_captions():
    """name -> (image's bytes, caption as it stands in metadata.jsonl) of inputs that no trainer likes."""
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    jpeg = encoded(noise, "jpeg")
    animated = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(
        animated, "gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")], duration=50
    )
    deep = encoded(Image.fromarray(np.full((20, 20), 32768, np.uint16)))
    return {
        "PNG that claims 50,000 x 50,000 pixels": (claims(50_000, 50_000), "x"),
        "PNG that claims 8,000 x 5,000 pixels": (claims(8_000, 5_000), "x"),
        "truncated JPEG": (jpeg[: len(jpeg) // 2], "x"),
        "truncated PNG": (encoded(noise)[:2000], "x"),
        "empty file": (b"", "x"),
        "text file named .png": (b"no image", "x"),
        "1 x 1 pixel": (encoded(Image.new("RGB", (1, 1), "red")), "x"),
        "CMYK JPEG": (encoded(Image.new("CMYK", (20, 20)), "jpeg"), "x"),
        "16-bit PNG": (deep, "x"),
        "palette PNG": (encoded(Image.new("P", (20, 20), 3)), "x"),
        "transparent PNG": (encoded(Image.new("RGBA", (20, 20))), "x"),
        "animated GIF": (animated.getvalue(), "x"),
        "EXIF-rotated PNG": (encoded(noise, exif=exif(6)), "x"),
        "EPS named .png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n", "x"),
        "empty caption": (RED, "  "),
        "null caption": (RED, None),
        "caption of 100 KB": (RED, "word " * 20_000),
        "caption that is not UTF-8": (RED, "caf\udce9"),
        "caption with NUL and emoji": (RED, "a \0 ❤"),
        "caption that is a number": (RED, 7),
    }


def outcome(prepared, name):
    """What a record got: `skipped: reason`, or `used` with what was unusual."""
    for reason, names in prepared.skipped.items():
        if any(name in entry for entry in names):
            return f"skipped: {reason}"
    assert any(name in record["id"] for record in prepared), name
    return "; ".join(["used", *prepared.noted])


def outcomes(folder: Path) -> dict[str, str]:
    """Each input beside one good image, so that what was noted is its own."""
    table = {}
    config = dict(resolution=16, cache_dir=str(folder / "cache"), max_bad_share=0.9)

    def judge(label, source, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                table[label] = outcome(prepare.prepare(schema.DataConfig(name=str(source), **config)), name)
            except ValueError as error:
                table[label] = f"stops: {error}".replace(f"{source}/", "")

    for number, (label, (body, caption)) in enumerate(images_and_captions().items()):
        source = folder / f"f{number}"
        source.mkdir()
        (source / "good.png").write_bytes(RED)
        (source / "odd.png").write_bytes(body)
        rows = [{"file_name": "good.png", "text": "good"}, {"file_name": "odd.png", "text": caption}]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (source / "metadata.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
        judge(label, source, "odd.png")
    names = {
        "file name ../outside.png": "../outside.png",
        "file name of a missing file": "gone.png",
        "file name of 5,000 letters": "n" * 5000,
        "file name with a lone surrogate": "\ud800.png",
    }
    for label, name in names.items():
        source = folder / f"n{len(label)}"
        image(source / "good.png")
        image(folder / "outside.png")
        rows = [{"file_name": "good.png", "text": "good"}, {"file_name": name, "text": "x"}]
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        judge(label, source, name.encode("utf-8", "replace").decode())
    source = folder / "link"
    image(source / "good.png")
    (source / "good.txt").write_text("good")
    image(source / "odd.png")
    (folder / "secret.txt").write_text("secret")
    (source / "odd.txt").symlink_to(folder / "secret.txt")
    judge("caption file that is a link to outside the folder", source, "odd.png")
    source = folder / "csv"
    image(source / "good.png")
    (source / "metadata.csv").write_text("file_name,text\ngood.png,good\nodd.png," + "x" * 11_000_000 + "\n")
    judge("CSV cell of 11 MB", source, "line 2")
    source = folder / "line"
    image(source / "good.png")
    (source / "metadata.jsonl").write_text('{"file_name": "good.png", "text": "good"}\n{"file_name": \n{"text": "x"}\n')
    judge("metadata line that is not JSON", source, "line 2")
    judge("metadata line without a file name", source, "line 3")
    good = [("good.png", RED), ("good.txt", b"good")]
    for number, (label, odd) in enumerate(
        {
            "tar member ../odd.png": ("../odd.png", RED),
            "tar member with an absolute path": ("/odd.png", RED),
            "tar member that is a symbolic link": ("odd.png", (tarfile.SYMTYPE, "/etc/passwd")),
            "tar member that is a hard link": ("odd.png", (tarfile.LNKTYPE, "good.png")),
            "tar member that is a device": ("odd.png", (tarfile.CHRTYPE, "")),
            "tar member without a caption": ("odd.png", RED),
            "tar member that is a decompression bomb": ("odd.png", claims(50_000, 50_000)),
        }.items()
    ):
        members = [*good, odd] + ([("odd.txt", b"x")] if "bomb" in label else [])
        judge(label, tar(folder / f"{number}.tar", members), "odd" if label.endswith(("caption", "bomb")) else odd[0])
    whole = tar(folder / "whole.tar", [*good, ("later.png", RED * 50), ("later.txt", b"x")])
    (folder / "cut.tar").write_bytes(whole.read_bytes()[:4000])
    judge("truncated tar", folder / "cut.tar", "cut.tar")
    for label, odd in parquet_rows().items():
        source = folder / label.replace(" ", "-")
        source.mkdir()
        write_parquet(source / "0.parquet", [(RED, b"good"), odd])
        judge(label, source, "row 1")
    source = folder / "parquets"
    source.mkdir()
    write_parquet(source / "0.parquet", [(RED, b"good")])
    (source / "1.parquet").write_bytes(b"PAR1 and no more")
    judge("second parquet file damaged", source, "1.parquet")
    return table


def parquet_rows():
    """name -> (image, caption) of a row; a caption that is not UTF-8 lies about its type."""
    return {
        "parquet row whose caption is not UTF-8": (RED, b"caf\xe9"),
        "parquet row without an image": (None, b"x"),
        "parquet row without a caption": (RED, None),
        "parquet row with a decompression bomb": (claims(50_000, 50_000), b"x"),
    }


def write_parquet(path, rows):
    """Rows of bare bytes, as tools other than `datasets` write them, and of captions that are declared to be text."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images, captions = zip(*rows)
    binary = pa.array(captions, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())
    parquet.write_table(pa.table({"image": pa.array(images, pa.binary()), "text": text}), path, write_batch_size=16)


def as_markdown(table: dict[str, str]) -> str:
    rows = "".join(f"| {label} | {got} |\n" for label, got in table.items())
    return f"| input | result |\n|---|---|\n{rows}"


def test_hostile_input_gets_what_the_table_says(tmp_path):
    assert as_markdown(outcomes(tmp_path)) == TABLE.read_text(encoding="utf-8")


def test_tars_are_read_without_extracting(tmp_path):
    (tmp_path / "set").mkdir()
    tar(tmp_path / "set" / "0.tar", [("a.png", RED), ("a.txt", b"red thing"), ("b.jpg", RED), ("b.json", b'{"text": "two"}')])
    tar(tmp_path / "set" / "1.tar.gz", [("c.png", RED), ("c.cls", b"three")], "w:gz")
    before = sorted(tmp_path.rglob("*"))
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "set"))
    assert [record["captions"] for record in prepared] == [["red thing"], ["two"], ["three"]]
    assert tuple(prepared.image(2)[8, 8]) == (255, 0, 0)
    assert [p for p in sorted(tmp_path.rglob("*")) if "cache" not in str(p)] == before


@pytest.fixture
def parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "photo": [
            {"bytes": RED, "path": None},
            {"bytes": None, "path": "/etc/hostname"},
            {"bytes": RED, "path": "x.png"},
        ],
        "says": [["one", "eins"], ["two"], ["three", None]],
        "kind": [0, 1, 1],
    }
    features = datasets.Features(
        photo=datasets.Image(decode=False),
        says=datasets.List(datasets.Value("string")),
        kind=datasets.ClassLabel(names=["sea_lion", "cat"]),
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "rows.parquet")
    return tmp_path / "set"


@pytest.mark.filterwarnings("ignore:skipped")
def test_parquet_columns_lists_and_labels(tmp_path, parquet):
    more = {"image_column": "photo", "max_bad_share": 0.5}
    lists = prepare.prepare(folder_config(tmp_path, parquet, caption_column="says", **more))
    assert [record["captions"] for record in lists] == [["one", "eins"], ["three"]]
    # A path of this machine in a stranger's table is not followed.
    assert [(reason.partition(",")[0], names) for reason, names in lists.skipped.items()] == [("image is a path", ["row 1"])]
    labels = prepare.prepare(folder_config(tmp_path, parquet / "rows.parquet", caption_column="kind", **more))
    assert [record["captions"] for record in labels] == [["sea lion"], ["cat"]]
    with pytest.raises(ValueError, match="no column image and text; it has photo, says, kind"):
        prepare.prepare(folder_config(tmp_path, parquet))


def test_only_a_few_rows_of_a_large_row_group_are_held(tmp_path):
    pa = pytest.importorskip("pyarrow")
    body = RED + bytes(100_000)  # 200 MB in one row group
    write_parquet(tmp_path / "1.parquet", [(body[:-1] + bytes([i % 256]), b"x") for i in range(2000)])
    records = registry.open_source(folder_config(tmp_path, tmp_path / "1.parquet"))
    held = [pa.total_allocated_bytes() for _ in records]
    assert len(held) == 2000 and max(held) < 100_000_000


def test_a_column_that_a_later_file_lacks_is_told_before_training(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "0.parquet", [(RED, b"good")])
    parquet.write_table(pa.table({"image": [RED], "caption": ["x"]}), tmp_path / "set" / "1.parquet")
    with pytest.raises(ValueError, match="1.parquet must have one column text; it has image, caption"):
        prepare.prepare(folder_config(tmp_path, tmp_path / "set"))


@pytest.mark.parametrize(
    "cell, expected",
    [
        (b"a cat", (["a cat"], None)),
        (b"caf\xe9", ([], "caption is not UTF-8")),
        ({"en": "a"}, ([], "caption is not text")),
        (float("nan"), ([], "caption is not text")),
        (["a", None, " b "], (["a", "b"], None)),
        (7, (["7"], None)),
    ],
)
def test_what_a_caption_cell_may_be(cell, expected):
    assert records.captions_of(cell) == expected


def test_a_stricter_share_judges_what_is_prepared_already(tmp_path):
    for i in range(9):
        image(tmp_path / "f" / "cat" / f"{i}.png")
    (tmp_path / "f" / "cat" / "9.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 1 of 10"):
        first = prepare.prepare(folder_config(tmp_path, tmp_path / "f", max_bad_share=0.2))
    assert prepare.prepare(folder_config(tmp_path, tmp_path / "f", max_bad_share=0.3)).fingerprint == first.fingerprint
    with pytest.raises(ValueError, match="1 of 10 images"):
        prepare.prepare(folder_config(tmp_path, tmp_path / "f", max_bad_share=0.05))


def test_a_caption_is_drawn_from_the_list_on_each_visit(tmp_path, parquet):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        prepared = prepare.prepare(
            folder_config(tmp_path, parquet, image_column="photo", caption_column="says", max_bad_share=0.5)
        )
    stream = tiny.samples(prepared, caption_dropout=0.0)
    drawn = [stream[i] for i in range(40)]
    assert {prepared[sample.index]["captions"][sample.caption] for sample in drawn} == {"one", "eins", "three"}


@pytest.mark.parametrize("channels, colour", [(1, (76,)), (3, (255, 0, 0)), (4, (255, 0, 0, 128))])
def test_grey_rgb_and_rgba(tmp_path, channels, colour):
    image(
        tmp_path / "f" / "cat" / "1.png", (255, 0, 0, 128) if channels == 4 else "red", mode="RGBA" if channels == 4 else "RGB"
    )
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "f", channels=channels))
    assert tuple(prepared.image(0)[8, 8]) == colour


def test_a_folder_of_image_sets_is_told_to_be_one(tmp_path):
    """Hugging Face's usual layout would otherwise train on the captions "train" and "test"."""
    for name in ("train/cats/1.png", "train/dogs/2.png", "test/cats/3.png"):
        image(tmp_path / "split" / name)
    image(tmp_path / "described" / "part" / "1.png")
    (tmp_path / "described" / "part" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}')
    for folder, inner in (("split", "test, train"), ("described", "part")):
        with pytest.raises(ValueError, match=f"separate image sets: {inner}; name one"):
            prepare.prepare(folder_config(tmp_path, tmp_path / folder))
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "split" / "train"))
    assert [prepared[i]["captions"] for i in range(2)] == [["cats"], ["dogs"]]
    image(tmp_path / "vehicles" / "bus" / "1.png")
    image(tmp_path / "vehicles" / "train" / "2.png")
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "vehicles"))
    assert [prepared[i]["captions"] for i in range(2)] == [["bus"], ["train"]], "a class, with others beside"


def test_what_people_do_to_caption_files(tmp_path):
    """An unquoted comma would cut a caption; Windows begins a text with a mark; tools leave hidden files and archives."""
    for name in ("1.png", "2.png", "._1.png", ".ipynb_checkpoints/1.png"):
        image(tmp_path / "f" / name)
    table = tmp_path / "f" / "metadata.csv"
    table.write_text('file_name,text\n1.png,a red, round ball\n2.png,"a red, round ball"\n')
    with pytest.raises(ValueError, match="more cells than columns; put a caption that has commas in quotes"):
        prepare.prepare(folder_config(tmp_path, tmp_path / "f"))
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "f", max_bad_share=1.0))
    assert [record["captions"] for record in prepared] == [["a red, round ball"]]
    table.write_text("image,caption\n1.png,a ball\n")
    with pytest.raises(ValueError, match="data.image_column and data.caption_column"):
        prepare.prepare(folder_config(tmp_path, tmp_path / "f"))
    table.unlink()
    for name in ("1", "2"):
        (tmp_path / "f" / f"{name}.txt").write_text(f"ball {name}\n", encoding="utf-8-sig")
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "f"))
    assert [record["captions"] for record in prepared] == [["ball 1"], ["ball 2"]]
    (tmp_path / "f" / "backup.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="both images and backup.tar"):
        prepare.prepare(folder_config(tmp_path, tmp_path / "f"))


def test_resize_policies(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (0, 0, 8, 20))
    (tmp_path / "f" / "cat").mkdir(parents=True)
    wide.save(tmp_path / "f" / "cat" / "1.png")
    corner = {}
    for resize in ("crop", "pad", "stretch"):
        shown = prepare.prepare(folder_config(tmp_path, tmp_path / "f", resize=resize)).image(0)
        corner[resize] = [tuple(255 * int(c > 128) for c in shown[y, 1]) for y in (1, 8)]
    assert corner == {
        "crop": [(255, 0, 0)] * 2,  # the blue edge is cut off
        "pad": [(255, 255, 255), (0, 0, 255)],
        "stretch": [(0, 0, 255)] * 2,
    }


def test_buckets_keep_each_batch_to_one_size_and_show_every_image(tmp_path):
    sizes = {"tall": (20, 40), "wide": (40, 20), "square": (30, 30)}
    for kind, size in sizes.items():
        for i in range(5):
            image(tmp_path / "f" / kind / f"{i}.png", size=size)
    prepared = prepare.prepare(folder_config(tmp_path, tmp_path / "f", buckets=[[16, 16], [24, 12], [12, 24]]))
    assert {record["captions"][0]: prepared.image(i).shape for i, record in enumerate(prepared)} == {
        "square": (16, 16, 3), "tall": (24, 12, 3), "wide": (12, 24, 3),
    }  # fmt: skip
    stream = tiny.samples(prepared, caption_dropout=0.0, block=4)
    assert stream.length % 4 == 0
    for epoch in range(2):
        order = stream.order(epoch)
        assert set(order) == set(prepared.select("train"))
        assert all(len({prepared.image(int(i)).shape for i in block}) == 1 for block in order.reshape(-1, 4))


@pytest.mark.filterwarnings("ignore:.*captions are longer")
def test_buckets_and_flips_train_and_the_first_bucket_is_drawn(tmp_path):
    from diffusers import DiffusionPipeline

    from sfumato.pipelines import SfumatoPipeline
    from sfumato.training.train import main

    for kind, size in {"tall": (20, 40), "wide": (40, 20)}.items():
        for i in range(5):
            image(tmp_path / "f" / kind / f"{i}.png", size=size)
    data = {"name": str(tmp_path / "f"), "buckets": [[24, 16], [16, 24]], "random_flip": True}
    assert main([str(tiny.config_file(tmp_path, data=data))]) == 0
    model = tmp_path / "run" / "pipeline"
    assert DiffusionPipeline.from_pretrained(model)("tall", num_inference_steps=2).images[0].size == (16, 24)
    assert SfumatoPipeline.from_pretrained(model)("tall", num_inference_steps=2).images[0].size == (16, 24)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_models_open_with_stock_diffusers(tmp_path, channels):
    from diffusers import DiffusionPipeline

    from sfumato.training.train import main

    for i in range(4):
        image(
            tmp_path / "f" / "cat" / f"{i}.png",
            mode="RGBA" if channels == 4 else "L",
            colour=(9,) * channels if channels > 1 else 9,
        )
    path = tiny.config_file(tmp_path, data={"name": str(tmp_path / "f"), "channels": channels})
    assert main([str(path)]) == 0
    drawn = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")("cat", num_inference_steps=2).images[0]
    assert drawn.mode == {1: "L", 4: "RGBA"}[channels]


def test_a_random_flip_mirrors_half_of_the_visits(tmp_path):
    half = Image.new("RGB", (16, 16), "red")
    half.paste("blue", (8, 0, 16, 16))
    (tmp_path / "f" / "cat").mkdir(parents=True)
    half.save(tmp_path / "f" / "cat" / "1.png")
    path = tiny.config_file(tmp_path, data={"name": str(tmp_path / "f"), "random_flip": True}, train={"batch_size": 200})
    config = load_config(path)
    prepared = prepare.prepare(config.data)
    tokenizer = train_tokenizer(["cat"], 600, 20)
    texts = cached_texts(prepared, tokenizer, None, tmp_path)
    left_is_red = next(tiny.batches(prepared, config, texts))["pixel_values"][:, 0, 8, 2] > 0
    assert 70 < left_is_red.sum() < 130


if __name__ == "__main__":
    TABLE.write_text(as_markdown(outcomes(Path(tempfile.mkdtemp()))), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"), file=sys.stderr)
