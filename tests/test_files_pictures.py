"""Pictures that are handed in arrive as every viewer shows them."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sd3_infer
from sd3.mistakes import Mistake
from sd3.pixels import open_image

SIZE = (16, 12)


def upright() -> Image.Image:
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:, :8], pixels[:, 8:], pixels[:3] = (220, 20, 20), (20, 20, 220), (20, 200, 20)
    return Image.fromarray(pixels)


def opened(path, size=SIZE, flag="init_image") -> np.ndarray:
    return np.asarray(open_image(flag, str(path), *size))


STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp"])
def test_a_photo_is_turned_as_its_camera_says(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {"lossless": True} if kind == "webp" else {}
    upright().transpose(STORED[orientation]).save(tmp_path / f"a.{kind}", exif=exif, **options)
    difference = np.abs(opened(tmp_path / f"a.{kind}").astype(int) - np.asarray(upright()).astype(int))
    assert difference.max() <= (40 if kind == "jpg" else 0)
    assert difference.mean() < 3


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_turned_grey_picture(tmp_path, orientation, kind, dtype):
    values = np.asarray(upright().convert("L")).astype(dtype) * (257 if dtype is np.uint16 else 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).transpose(STORED[orientation]).save(tmp_path / f"a.{kind}", exif=exif)
    assert np.array_equal(opened(tmp_path / f"a.{kind}"), np.asarray(upright().convert("L").convert("RGB")))


@pytest.mark.parametrize("orientation", [0, 1, 9, 4000])
def test_an_orientation_of_no_meaning_is_none(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright().save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(opened(tmp_path / "a.png"), np.asarray(upright()))


GREYS = {0: 0, 257: 1, 32640: 127, 32896: 128, 65535: 255, 65280: 254}


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("wide", GREYS)
def test_sixteen_bits_of_grey(tmp_path, kind, wide):
    values = np.full((12, 16), wide, np.uint16)
    values[0, 0] = 65535
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    got = opened(tmp_path / f"a.{kind}")
    assert (got[6, 8] == GREYS[wide]).all()
    assert (got[0, 0] == 255).all()


def test_sixteen_bits_that_are_all_dark_stay_dark(tmp_path):
    Image.fromarray(np.full((12, 16), 200, np.uint16)).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").max() == 1


@pytest.mark.parametrize("values", [np.full((12, 16), 0.5, np.float32), np.full((12, 16), 2**30, np.int32)])
def test_grey_values_without_a_known_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(Mistake, match=r"^init_image .*32 bits; save it with 8 or 16"):
        opened(tmp_path / "a.tiff")


def see_through(kind: str) -> Image.Image:
    picture = upright().convert("RGBA")
    alpha = np.full((12, 16), 255, np.uint8)
    alpha[:, :4], alpha[:, 4:6] = 0, 128
    picture.putalpha(Image.fromarray(alpha))
    if kind == "LA":
        return picture.convert("LA")
    return picture


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L with a key", "RGB with a key", "I;16 with a key", "gif"])
def test_what_is_transparent_lies_over_white_and_is_said(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind in ("RGBA", "LA"):
        see_through(kind).save(path)
    elif kind == "P":
        palette = upright().quantize(8)
        palette.info["transparency"] = palette.getpixel((0, 11))
        palette.save(path)
    elif kind == "gif":
        path = tmp_path / "a.gif"
        palette = upright().quantize(8)
        palette.save(path, transparency=palette.getpixel((0, 11)))
    elif kind == "I;16 with a key":
        values = np.full((12, 16), 1000, np.uint16)
        values[:, :8] = 7
        Image.fromarray(values).save(path, transparency=7)
    else:
        picture = upright().convert(kind.split()[0])
        picture.save(path, transparency=picture.getpixel((0, 11)))
    with pytest.warns(UserWarning, match="is partly transparent; it is placed on white") as said:
        got = opened(path)
    assert len(said) == 1
    assert (got[11, 0] == 255).all()
    assert (got[11, 15] < 250).any()


def test_it_is_said_once_in_a_run(small_model, tmp_path, capsys):
    see_through("RGBA").save(tmp_path / "a.png")
    words = ["--model", str(small_model), "--steps", "1", "--prompt", "x", "--device", "cpu", "--num_images", "3"]
    words += ["--dtype", "float32", "--init_image", str(tmp_path / "a.png"), "--out_dir", str(tmp_path / "o")]
    assert sd3_infer.main(words) == 0
    assert capsys.readouterr().err.count("is partly transparent") == 1


def test_half_transparent_is_half_white(tmp_path):
    see_through("RGBA").save(tmp_path / "a.png")
    with pytest.warns(UserWarning):
        got = opened(tmp_path / "a.png")
    assert np.abs(got[11, 5].astype(int) - [237, 137, 137]).max() <= 1


def test_the_hidden_colour_does_not_bleed_into_a_smaller_size(tmp_path):
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[::2] = (0, 0, 0, 255)
    picture[1::2] = (255, 0, 0, 0)
    Image.fromarray(picture, "RGBA").save(tmp_path / "a.png")
    with pytest.warns(UserWarning):
        got = opened(tmp_path / "a.png", (16, 16))
    assert np.ptp(got.astype(int), axis=-1).max() == 0  # grey: black and white in turn, no red


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_picture_with_alpha_is_as_one_without(tmp_path, mode):
    upright().convert(mode).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = opened(tmp_path / "a.png")
    assert np.array_equal(got, np.asarray(upright().convert(mode[:-1]).convert("RGB")))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", SIZE, colour) for colour in ("blue", "red", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert (opened(tmp_path / f"a.{kind}") == (0, 0, 255)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_what_was_read_right_still_is(tmp_path, mode):
    kind = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    upright().convert(mode).save(tmp_path / f"a.{kind}")
    with Image.open(tmp_path / f"a.{kind}") as image:
        wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(opened(tmp_path / f"a.{kind}"), wanted)


@pytest.mark.parametrize("flag", ["init_image", "controlnet_cond_image"])
def test_pipes_and_devices_do_not_hang(tmp_path, flag):
    os.mkfifo(tmp_path / "p")
    for path in (tmp_path / "p", "/dev/zero"):
        with pytest.raises(Mistake, match=f"^{flag} {path}: is not a file"):
            opened(path, flag=flag)


def test_a_record_that_names_a_pipe_elsewhere_does_not_hang(small_model, tmp_path, capsys):
    upright().save(tmp_path / "start.png")
    words = ["--model", str(small_model), "--steps", "2", "--seed", "1", "--prompt", "x", "--device", "cpu"]
    words += [
        "--dtype",
        "float32",
        "--denoise",
        "0.5",
        "--init_image",
        str(tmp_path / "start.png"),
        "--out_dir",
        str(tmp_path / "o"),
    ]
    assert sd3_infer.main(words) == 0
    (picture,) = (tmp_path / "o").rglob("000000.png")
    (tmp_path / "start.png").unlink()
    os.mkfifo(tmp_path / "start.png")
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(picture), "--device", "cpu", "--out_dir", str(tmp_path / "o")]) == 2
    assert f"--init_image {tmp_path}/start.png: is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record",
    ["[" * 100_000, '{"settings": ' + '{"a":' * 100_000, "[]", "5", '{"settings": []}', "", '{"settings": {', "{}"],
)
def test_a_record_of_any_form_is_one_line(tmp_path, capsys, record):
    info = PngInfo()
    info.add_text("sd3_residual", record)
    upright().save(tmp_path / "a.png", pnginfo=info)
    os.mkfifo(tmp_path / "run.json")  # beside it: looked at, never waited for
    assert sd3_infer.main(["--replay", str(tmp_path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --replay {tmp_path}/a.png: its settings cannot be read")


def test_a_run_beside_it_whose_record_is_damaged_is_passed_over(small_model, tmp_path, capsys):
    words = ["--model", str(small_model), "--steps", "1", "--seed", "1", "--prompt", "x", "--device", "cpu"]
    assert sd3_infer.main([*words, "--dtype", "float32", "--out_dir", str(tmp_path / "o")]) == 0
    (picture,) = (tmp_path / "o").rglob("000000.png")
    for damage in ("[" * 100_000, "[]", "{", "\x00"):
        (picture.parent / "run.json").write_text(damage)
        capsys.readouterr()
        again = ["--replay", str(picture), "--device", "cpu", "--model", str(small_model)]
        again += ["--out_dir", str(tmp_path / "p")]
        assert sd3_infer.main(again) == 0
        assert "bit for bit" in capsys.readouterr().err
