"""Image files of every mode become RGB by one stated rule; value ranges and sizes change by known amounts."""

import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from cellflux_bridge import images
from cellflux_bridge.base.errors import UserError


def read_back(image: Image.Image, path, **options) -> np.ndarray:
    image.save(path, **options)
    rgb = images.read_rgb(path)
    assert rgb.dtype == np.uint8
    assert rgb.shape == (image.height, image.width, 3)
    assert images.read_size(path) == (image.height, image.width)
    return rgb


def row(*values, dtype=np.uint8) -> np.ndarray:
    return np.array([values], dtype)


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
def test_rgb_is_read_as_it_is(tmp_path, suffix):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_back(Image.fromarray(rgb), tmp_path / f"x.{suffix}"), rgb)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_every_mode_keeps_a_flat_colour(tmp_path, suffix, mode):
    image = Image.new("RGB", (16, 8), (200, 120, 160)).convert(mode)
    options = {"compression": "jpeg"} if suffix == "tif" else {}
    expected = np.asarray(image.convert("RGB")).astype(int)
    found = read_back(image, tmp_path / f"x.{suffix}", quality=95, **options)
    assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_and_one_bit_images_become_equal_channels(tmp_path, suffix):
    grey = read_back(Image.fromarray(row(0, 100, 255)), tmp_path / f"grey.{suffix}")
    assert grey.tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    bits = Image.fromarray(row(0, 255, 0)).convert("1")
    assert read_back(bits, tmp_path / f"bits.{suffix}").tolist() == [[[0] * 3, [255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_1_257(tmp_path, suffix):
    image = Image.fromarray(row(0, 257, 100 * 257, 200 * 257 + 129, 250 * 257, 65535, dtype=np.uint16))
    assert read_back(image, tmp_path / f"x.{suffix}")[0, :, 0].tolist() == [0, 1, 100, 201, 250, 255]


def png16(path, values: np.ndarray) -> None:
    """A PNG of 16-bit samples (H, W, C): grey, grey and alpha, RGB or RGBA. Pillow writes grey only."""
    height, width, channels = values.shape
    pixels = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    path.write_bytes(png(struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0), zlib.compress(pixels)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_sixteen_are_refused_and_sixteen_are_read(tmp_path, channels, bits):
    grey = np.array([[0, 60, 200, 255]], np.uint16)
    values = np.stack([grey] * channels, axis=-1) * 257
    low = values >> (16 - bits)
    if channels in (2, 4):  # transparent pixels become white, whatever the colours' range is
        values[..., -1] = low[..., -1] = 65535
        low[0, 0, -1] = 0
    png16(tmp_path / "whole.png", values)
    assert images.read_rgb(tmp_path / "whole.png").tolist() == [[[v] * 3 for v in (0, 60, 200, 255)]]
    png16(tmp_path / "low.png", low)
    with pytest.raises(images.UnreadableImage, match=r"low\.png: 16-bit integers .* which value is white"):
        images.read_rgb(tmp_path / "low.png")
    assert images.read_size(tmp_path / "low.png") == (1, 4)


def test_sixteen_bits_that_are_all_zero_are_black(tmp_path):
    assert read_back(Image.fromarray(np.zeros((2, 3), np.uint16)), tmp_path / "x.png").max() == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (row(0.0, 0.5, 1.0, dtype=np.float32), [0, 128, 255]),
        (row(0.0, 128.4, 255.0, dtype=np.float32), [0, 128, 255]),
        (row(0.0, 25700.0, 65535.0, dtype=np.float32), [0, 100, 255]),
        (row(0, 128, 255, dtype=np.int32), [0, 128, 255]),
        (row(0, 25700, 65535, dtype=np.int32), [0, 100, 255]),
        (row(-0.0009, 0.5, 1.0009, dtype=np.float32), [0, 128, 255]),
        (row(-0.2, 128.4, 255.2, dtype=np.float32), [0, 128, 255]),
        (row(0.0, 0.0, 0.0, dtype=np.float32), [0, 0, 0]),
    ],
)
def test_thirty_two_bit_grey_is_scaled_by_the_range_its_values_show(tmp_path, values, expected):
    assert read_back(Image.fromarray(values), tmp_path / "x.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (row(0.1, np.nan, dtype=np.float32), "NaN or infinite"),
        (row(0.1, -np.inf, dtype=np.float32), "NaN or infinite"),
        (row(-0.5, 0.5, dtype=np.float32), "floats from -0.5 to 0.5"),
        (row(0.0, 1.5, dtype=np.float32), "floats from 0 to 1.5, .* which value is white: 255"),
        (row(0.0, 4095.0, dtype=np.float32), "which value is white: 65535"),
        (row(-500, 25700, 65535, dtype=np.int32), "from -500 to 65535"),
        (row(0, 25700, 99999, dtype=np.int32), "from 0 to 99999"),
        (row(0, 4095, dtype=np.int32), "which value is white"),
    ],
)
def test_values_of_no_known_range_are_refused(tmp_path, values, reason):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(images.UnreadableImage, match=rf"x\.tif: .*{reason}"):
        images.read_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_transparency_is_laid_on_white(tmp_path, suffix):
    rgba = np.array([[[200, 0, 100, 255], [200, 0, 100, 0], [200, 0, 100, 51]]], np.uint8)
    found = read_back(Image.fromarray(rgba), tmp_path / f"rgba.{suffix}")
    assert found.tolist() == [[[200, 0, 100], [255, 255, 255], [244, 204, 224]]]
    grey = Image.merge("LA", [Image.fromarray(row(100, 100)), Image.fromarray(row(255, 0))])
    assert read_back(grey, tmp_path / f"la.{suffix}").tolist() == [[[100] * 3, [255] * 3]]


def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path):
    palette = Image.fromarray(row(0, 1, 2))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    plain = read_back(palette, tmp_path / "plain.png")
    assert plain.tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    keyed = read_back(palette, tmp_path / "keyed.png", transparency=1)
    assert keyed.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_a_transparent_colour_of_an_rgb_image_is_white(tmp_path):
    image = Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8))
    found = read_back(image, tmp_path / "x.png", transparency=(1, 2, 3))
    assert found.tolist() == [[[9, 9, 9], [255, 255, 255]]]


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), mode="CMYK")
    assert read_back(cmyk, tmp_path / "x.tif").tolist() == [[[255] * 3, [0, 255, 255], [0] * 3]]


# How a picture is stored that tag 274 of this number turns back, by numpy alone.
STORED = {
    1: lambda shown: shown,
    2: np.fliplr,
    3: lambda shown: np.rot90(shown, 2),
    4: np.flipud,
    5: lambda shown: np.rot90(np.fliplr(shown), 1),
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: np.rot90(np.fliplr(shown), -1),
    8: lambda shown: np.rot90(shown, -1),
}


@pytest.mark.parametrize("orientation", [0, *STORED, 9])
@pytest.mark.parametrize("file", ["x.png", "late.png", "x.jpg", "x.tif", "lzw.tif", "16.tif"])
def test_an_image_is_turned_once_as_its_orientation_says(tmp_path, file, orientation):
    """`late.png` has its EXIF data after the pixels, `16.tif` planes of 16 bits."""
    shown = np.zeros((16, 24, 3), np.uint8)
    shown[:8, :8], shown[8:, 16:] = (255, 0, 0), (0, 0, 255)
    stored = np.ascontiguousarray(STORED.get(orientation, STORED[1])(shown))
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / file
    if file == "16.tif":
        planes, tag = stored.transpose(2, 0, 1).astype(np.uint16) * 257, (274, 3, 1, orientation, True)
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", extratags=[tag])
    elif file.endswith("tif"):
        options = {"compression": "tiff_lzw"} if file == "lzw.tif" else {}
        tags = {274: orientation} if orientation in STORED or not options else {}  # libtiff writes no other
        Image.fromarray(stored).save(path, tiffinfo=tags, **options)
    elif file == "late.png":
        Image.fromarray(stored).save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + whole[-12:])
    else:
        Image.fromarray(stored).save(path, exif=exif, **({"quality": 95, "subsampling": 0} if file == "x.jpg" else {}))
    found = images.read_rgb(path).astype(int)
    assert images.read_size(path) == found.shape[:2] == (16, 24)
    assert np.abs(found - shown).mean() <= (3 if file == "x.jpg" else 0)


def test_what_a_file_is_and_not_what_it_is_called_decides(tmp_path):
    image = Image.new("RGB", (16, 8), (200, 120, 160))
    for format_ in ("JPEG", "TIFF", "PNG"):
        image.save(tmp_path / "x.png", format=format_)
        assert np.abs(images.read_rgb(tmp_path / "x.png").astype(int) - (200, 120, 160)).max() <= 3
    for format_ in ("BMP", "GIF", "WEBP", "PPM", "ICO", "TGA"):
        image.save(tmp_path / "x.png", format=format_)
        for read in (images.read_rgb, images.read_size):
            with pytest.raises(images.UnreadableImage, match=r"x\.png: truncated,? or not"):
                read(tmp_path / "x.png")
    image.save(tmp_path / "x.png", save_all=True, append_images=[Image.new("RGB", (16, 8))])
    with pytest.raises(images.UnreadableImage, match="animated PNG of 2 images"):
        images.read_rgb(tmp_path / "x.png")


def test_arrays_of_bytes_are_images_and_nothing_is_unpickled(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "x.npy"
    for stored, expected in ((rgb, rgb), (np.asfortranarray(rgb), rgb), (rgb[..., 0], rgb[..., :1].repeat(3, 2))):
        np.save(path, stored)
        np.testing.assert_array_equal(images.read_rgb(path), expected)
        assert images.read_size(path) == (5, 7)
    for other in (rgb / 255, rgb.transpose(2, 0, 1), rgb[:0], rgb[0, 0], np.array([[{}]], object)):
        np.save(path, other)
        for read in (images.read_rgb, images.read_size):
            with pytest.raises(images.UnreadableImage, match=r"x\.npy: "):
                read(path)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(header: bytes, packed: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises `width` x `height` pixels."""
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 64))


@pytest.mark.parametrize("side", [8193, 20_000, 60_000])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    for read in (images.read_rgb, images.read_size):
        with pytest.raises(images.UnreadableImage, match=r"bomb\.png: .*(pixels|bomb)"):
            read(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", {}),
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
    ],
)
def test_a_truncated_file_is_refused_by_name_and_other_damage_raises_nothing_else(tmp_path, suffix, options):
    rng = np.random.default_rng(0)
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(whole, **options)
    data = whole.read_bytes()
    for cut in np.linspace(0, len(data) // 2, 12).astype(int):
        path.write_bytes(data[:cut])
        with pytest.raises(images.UnreadableImage, match=rf"damaged\.{suffix}: "):
            images.read_rgb(path)
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(images.UnreadableImage):
            assert images.read_rgb(path).dtype == np.uint8


def test_what_is_no_image_file_is_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png", "missing.png", "."):
        with pytest.raises(UserError, match=str(tmp_path)):
            images.read_rgb(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        images.read_rgb(tmp_path / "missing.png")


def test_encode_and_decode_are_inverse_on_every_byte():
    values = torch.arange(256, dtype=torch.uint8)
    encoded = images.encode(values)
    assert (encoded.min().item(), encoded.max().item(), encoded.dtype) == (-1.0, 1.0, torch.float32)
    assert torch.equal(images.decode(encoded), values)
    assert images.decode(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_shrinking_averages_areas_and_growing_keeps_a_flat_colour():
    rgb = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mean = rgb.reshape(2, 4, 3, 4, 3).mean(axis=(1, 3))
    assert np.abs(images.resize(rgb, 2, 3) - mean).max() <= 1
    flat = np.full((4, 4, 3), 77, np.uint8)
    assert (images.resize(flat, 9, 11) == 77).all()
    assert images.resize(rgb, 8, 12) is rgb


def test_the_middle_of_an_image_is_cut_out():
    rgb = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    np.testing.assert_array_equal(images.centre_crop(rgb, 3, 2), rgb[1:4, 2:4])


def test_a_written_png_reads_back_and_leaves_no_temporary_file(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    images.write_png(tmp_path / "x.png", rgb)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "x.png"), rgb)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_sheet_lays_tiles_in_rows_on_white():
    tiles = [[np.full((2, 3, 3), value, np.uint8) for value in values] for values in ((10, 20), (30,))]
    sheet = images.sheet(tiles, gap=1, scale=2)
    assert sheet.shape == (10, 14, 3)
    assert [sheet[y, x, 0] for y, x in ((0, 0), (3, 5), (0, 8), (6, 0), (6, 8), (4, 0), (0, 6))] == [
        10, 10, 20, 30, 255, 255, 255,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([7], [7, 7, 7]),
        ([7, 9], [7, 9, 7]),
        ([7, 8, 9], [7, 8, 9]),
        ([7, 8, 9, 10], [9, 13, 12]),
        ([1, 2, 4, 8, 16, 32, 64], [28, 22, 77]),
        ([200, 0, 0, 100, 0, 0, 60, 50, 3], [3, 100, 255]),
    ],
)
def test_any_number_of_channels_has_an_rgb_view(channels, expected):
    """Blue, green, red, half cyan, magenta and yellow, and blue again; sums stop at 255."""
    rgb = images.to_rgb(np.tile(np.array(channels, np.uint8), (2, 3, 1)))
    assert rgb.shape == (2, 3, 3)
    assert rgb.dtype == np.uint8
    assert (rgb == expected).all()
