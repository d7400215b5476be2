"""TIFF files: the image that is meant is read at full size and in the right range, or refused by name."""

import re
from contextlib import suppress

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellflux_bridge import images

YY, XX = np.mgrid[:40, :56]
PICTURE = np.stack([120 + 100 * np.sin(YY / 7), 90 + 2.5 * XX, 255 - 5 * YY], axis=-1).clip(0, 255).astype(np.uint8)
PICTURE[0, 0], PICTURE[-1, -1] = 0, 255
PLANES, GREY = PICTURE.transpose(2, 0, 1), PICTURE[..., 1]
WIDE = PICTURE.astype(np.uint16)
OPACITY = (4 * XX).clip(0, 255).astype(np.uint8)[..., None]
SHARE = OPACITY / 255
ON_WHITE = np.rint(PICTURE * SHARE + 255 * (1 - SHARE)).astype(np.uint8)
RGBA = np.dstack([PICTURE, OPACITY])
RGB, MINISBLACK = {"photometric": "rgb"}, {"photometric": "minisblack"}
SEPARATE = {**RGB, "planarconfig": "separate"}
SMALL = (PICTURE[::4, ::4], {**RGB, "subfiletype": 1})
WHOLE = (PICTURE, RGB)


def scaled(values: np.ndarray, bits: int) -> np.ndarray:
    """Bytes as a camera of so many bits would give them, in uint16."""
    return np.rint(values / 255 * (2**bits - 1)).astype(np.uint16)


def ome(axes: str, **metadata) -> dict:
    return {**MINISBLACK, "ome": True, "metadata": {"axes": axes, **metadata}}


def imagej(axes: str) -> dict:
    return {"imagej": True, "metadata": {"axes": axes, "mode": "composite"}}


def white(value: int, *, tag: int = 341, channels: int = 1) -> dict:
    """The tag SMaxSampleValue, or MaxSampleValue (281), for every channel."""
    return {"extratags": [(tag, 3, channels, (value,) * channels if channels > 1 else value, True)]}


def write(path, *pages, **file) -> None:
    """Pages (array, options) of one file; "ome" and "imagej" among the options are the file's."""
    file |= {key: options[key] for _, options in pages for key in ("ome", "imagej") if key in options}
    with tifffile.TiffWriter(path, **file) as writer:
        for values, options in pages:
            writer.write(values, **{key: value for key, value in options.items() if key not in ("ome", "imagej")})


READ = {
    "tiled planes": [(PLANES, {**SEPARATE, "tile": (16, 16)})],
    "deflate with predictor": [(WIDE * 257, {**RGB, "compression": "zlib", "predictor": True})],
    "16-bit planes": [(PLANES.astype(np.uint16) * 257, SEPARATE)],
    "16-bit planes, deflate": [(PLANES.astype(np.uint16) * 257, {**SEPARATE, "compression": "zlib"})],
    "12 of 16 bits by tag": [(scaled(PICTURE, 12), {**RGB, **white(4095, channels=3)})],
    "14 of 16 bits by largest value": [(scaled(PICTURE, 14), {**RGB, **white(16000, channels=3, tag=281)})],
    "10 of 16 bits by OME": [(scaled(PLANES, 10), ome("CYX", SignificantBits=10))],
    "float": [(PICTURE.astype(np.float32) / 255, RGB)],
    "float planes of 64 bits": [(PLANES / 255, SEPARATE)],
    "float to 255": [(PICTURE.astype(np.float32), RGB)],
    "uint32": [(PICTURE.astype(np.uint32) * 257, RGB)],
    "ImageJ channels": [(PLANES, imagej("CYX"))],
    "ImageJ float channels": [(PLANES.astype(np.float32) / 255, imagej("CYX"))],
    **{f"OME {axes}": [(PLANES.reshape(shape), ome(axes))] for axes, shape in {
        "CYX": (3, 40, 56), "ZCYX": (1, 3, 40, 56), "TCYX": (1, 3, 40, 56), "CZYX": (3, 1, 40, 56),
        "TZCYX": (1, 1, 3, 40, 56),
    }.items()},
    "OME YXS": [(PICTURE, {**ome("YXS"), **RGB})],
    "three samples called grey": [(PICTURE, {**MINISBLACK, "planarconfig": "contig"})],
    "an unnamed fourth sample": [(RGBA, {**RGB, "extrasamples": ["unspecified"]})],
    "thumbnail first": [SMALL, WHOLE],
    "thumbnail last": [WHOLE, SMALL],
    "unmarked thumbnail first": [(PICTURE[::3, ::3], RGB), WHOLE],
    "mask": [WHOLE, (GREY > 100, {**MINISBLACK, "subfiletype": 4})],
    "label and macro image": [WHOLE, *((PICTURE[:20, :20], {**RGB, "subfiletype": kind}) for kind in (1, 9))],
    "pyramid": [(PICTURE, {**RGB, "subifds": 1}), (PICTURE[::2, ::2], {**RGB, "subfiletype": 1})],
    "full size in a sub-IFD": [(PICTURE[::2, ::2], {**RGB, "subifds": 1}), WHOLE],
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_the_picture_is_read(tmp_path, case):
    write(tmp_path / "x.tif", *READ[case])
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "x.tif"), PICTURE)
    assert images.read_size(tmp_path / "x.tif") == (40, 56)


REFUSED = {
    "which value is white": {
        "12 of 16 bits": [(WIDE << 4, RGB)],
        "8 of 16 bits": [(WIDE, RGB)],
        "10 of 16 bits, grey": [(WIDE[..., 1] << 2, MINISBLACK)],
        "14 of 16 bits, planes": [(PLANES.astype(np.uint16) << 6, SEPARATE)],
        "12 bits as float": [(PICTURE.astype(np.float32) * 16, RGB)],
        "palette of 8 of 16 bits": [(GREY, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256) % 256})],  # noqa: E501
    },
    "expected 0 to 255": {"more than the file states": [(WIDE[..., 1] << 4, {**MINISBLACK, **white(255)})]},
    "signed integers": {"int16": [(PICTURE.astype(np.int16) * 100, RGB)], "int8": [((GREY // 2).astype(np.int8), {})]},
    "samples of type complex64": {"complex": [(GREY.astype(np.complex64), {})]},
    "a z-stack": {
        "ImageJ": [(np.stack([GREY] * 5), imagej("ZYX"))],
        "OME": [(np.stack([PLANES] * 2), ome("ZCYX"))],
        "three slices": [(PLANES, ome("ZYX"))],
    },
    "a time series": {"ImageJ": [(np.stack([GREY] * 5), imagej("TYX"))]},
    "not called channels": {
        "three pages": [(PLANES, MINISBLACK)],
        "RGB pages": [(np.stack([PICTURE] * 4), RGB)],
    },
    "5 channels": {"ImageJ": [(np.stack([GREY] * 5), imagej("CYX"))]},
    "2 channels": {"OME": [(PLANES[:2], ome("CYX"))], "samples": [(PICTURE[..., :2], {**MINISBLACK, "planarconfig": "contig"})]},  # noqa: E501
    "2 images": {
        "of one size": [WHOLE, (PICTURE[::-1], RGB)],
        "of two sizes": [WHOLE, (PICTURE[:30, :50], RGB)],
        "grey and RGB": [(GREY, MINISBLACK), WHOLE],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason, cases in REFUSED.items() for case in cases], ids=str
)
def test_what_is_not_one_grey_or_rgb_image_is_refused(tmp_path, reason, case):
    write(tmp_path / "x.tif", *REFUSED[reason][case])
    with pytest.raises(images.UnreadableImage, match=rf"x\.tif: .*{reason}"):
        images.read_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RGBA, "unassalpha"),
        (np.dstack([np.rint(PICTURE * SHARE).astype(np.uint8), OPACITY]), "assocalpha"),
        (RGBA.astype(np.uint16) * 257, "unassalpha"),
        ((RGBA / 255).astype(np.float32), "unassalpha"),
    ],
    ids=["8 bits", "premultiplied", "16 bits", "float"],
)
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_transparency_of_any_depth_is_laid_on_white(tmp_path, values, kind, planarconfig):
    values = values if planarconfig == "contig" else values.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb", planarconfig=planarconfig, extrasamples=[kind])
    assert np.abs(images.read_rgb(tmp_path / "x.tif").astype(int) - ON_WHITE).max() <= 1


@pytest.mark.parametrize("values", [255 - GREY, 65535 - GREY.astype(np.uint16) * 257], ids=["8 bits", "16 bits"])
def test_grey_whose_zero_is_white_is_turned_round(tmp_path, values):
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="miniswhite")
    assert (images.read_rgb(tmp_path / "x.tif") == GREY[..., None]).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_deflate"])
def test_compressed_samples_of_every_depth_are_read(tmp_path, compression):
    for values in (GREY, GREY.astype(np.uint16) * 257, GREY.astype(np.float32) / 255):
        Image.fromarray(values).save(tmp_path / "x.tif", compression=compression)
        assert (images.read_rgb(tmp_path / "x.tif") == GREY[..., None]).all()
    Image.fromarray(WIDE[..., 1] << 4).save(tmp_path / "x.tif", compression=compression)
    with pytest.raises(images.UnreadableImage, match="which value is white"):
        images.read_rgb(tmp_path / "x.tif")


def rewritten(path, *, code: int, value: int) -> None:
    """A file whose tag `code` holds another value."""
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags[code].overwrite(value)


def test_declared_sizes_are_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "x.tif"
    for code, value, reason in ((257, 2**31, "pixels, more than"), (257, 4000, "truncated"), (278, 1, "")):
        tifffile.imwrite(path, WIDE * 257, photometric="rgb", compression="zlib")
        rewritten(path, code=code, value=value)
        with pytest.raises(images.UnreadableImage, match=rf"x\.tif: .*{reason}"):
            images.read_rgb(path)
    packed = tmp_path / "bomb.tif"
    tifffile.imwrite(packed, np.full((4000, 4000), 65535, np.uint16), compression="zlib", rowsperstrip=4000)
    rewritten(packed, code=257, value=8)
    rewritten(packed, code=278, value=8)
    with pytest.raises(images.UnreadableImage, match="decompression bomb"):
        images.read_rgb(packed)


@pytest.mark.parametrize("absolute", [False, True])
def test_other_files_that_ome_names_stay_closed(tmp_path, monkeypatch, absolute):
    secret = tmp_path / "secret.tif"
    tifffile.imwrite(secret, PLANES, photometric="minisblack")
    write(tmp_path / "x.tif", (PLANES, ome("CYX")))
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        named = f'<UUID FileName="{secret if absolute else secret.name}">urn:uuid:0-0-0-0-1</UUID></TiffData>'
        text = re.sub(r"(<TiffData[^>]*)/>", rf"\1>{named}", file.ome_metadata)
        assert named in text
    tifffile.imwrite(tmp_path / "y.tif", GREY, description=text, metadata=None)
    opened, plainly = [], open

    def recorded(file, *args, **options):
        opened.append(str(file))
        return plainly(file, *args, **options)

    monkeypatch.setattr("builtins.open", recorded)
    with suppress(images.UnreadableImage):
        images.read_rgb(tmp_path / "y.tif")
    assert opened == [str(tmp_path / "y.tif")]
