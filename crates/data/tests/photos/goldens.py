#!/usr/bin/env python3
"""Write what Pillow and TensorFlow make of the photographs: decoded, cropped as for evaluation, resized.

Versions used: Python 3.11.7, Pillow 12.0.0 (with libjpeg-turbo 3.1.2), tensorflow-cpu 2.21.0, numpy 2.4.6. No seed:
nothing is random. Command, in a Python environment of its own:

    pip install Pillow==12.0.0 tensorflow-cpu==2.21.0 numpy==2.4.6
    python3 crates/data/tests/photos/goldens.py

It writes beside itself (photographs by name, each at 224 and then at 64; numbers are little-endian):

    pillow.u8   256 values of Image.resize(.., BICUBIC), which is antialiased
    tf.f32      256 of tf.image.resize(method="bicubic", antialias=False)
    tf1.f32     256 of TensorFlow 1's resize_bicubic (align_corners=False, no half-pixel centres)
    photos.txt  name, width, height, FNV-1a of the RGB that Pillow and TensorFlow decode, then the mean of the whole
                resized image by pillow, tf and tf1 at 224, and by the same at 64

Value i of 256 is number (7919 i + 11) mod n of the n in the image (H, W, RGB).
"""

import os
import pathlib

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import numpy as np
import tensorflow as tf
from PIL import Image

HERE = pathlib.Path(__file__).parent
RATIO = 0.875


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def decode(path):
    """By Pillow and by TensorFlow.

    TensorFlow's default is libjpeg's fast inverse DCT. Asked for the accurate one, which Pillow uses, it agrees with
    Pillow to the bit, but for the rounding of CMYK to RGB.
    """
    image = Image.open(path)
    by_pillow = np.asarray(image.convert("RGB"))
    accurate, default = (
        tf.image.decode_jpeg(path.read_bytes(), channels=3, dct_method=dct).numpy() for dct in ("INTEGER_ACCURATE", "")
    )
    worst = np.abs(by_pillow.astype(int) - accurate).max()
    assert worst <= (1 if image.mode == "CMYK" else 0), (path, worst)
    return by_pillow, default


def centre(pixels):
    """The reference's crop of evaluation: notes in crop.rs."""
    height, width = pixels.shape[:2]
    shorter = min(width, height)
    side = min(max(int(np.float32(RATIO) * np.float32(shorter)), 1), shorter)
    y, x = (height - side + 1) // 2, (width - side + 1) // 2
    return np.ascontiguousarray(pixels[y : y + side, x : x + side])


def samples(image):
    flat = image.reshape(-1)
    return flat[(7919 * np.arange(256) + 11) % flat.size]


def main():
    files = {"pillow.u8": b"", "tf.f32": b"", "tf1.f32": b""}
    lines = []
    for path in sorted(HERE.glob("*.jpg"), key=lambda path: path.stem):
        by_pillow, by_tf = decode(path)
        means = []
        for size in (224, 64):
            shape = (size, size)
            pillow = Image.fromarray(centre(by_pillow)).resize(shape, Image.Resampling.BICUBIC)
            tf2 = tf.image.resize(centre(by_tf), shape, method="bicubic", antialias=False)
            tf1 = tf.raw_ops.ResizeBicubic(
                images=centre(by_tf)[None], size=shape, align_corners=False, half_pixel_centers=False
            )[0]
            for name, image, dtype in [
                ("pillow.u8", np.asarray(pillow), "u1"),
                ("tf.f32", tf2.numpy(), "<f4"),
                ("tf1.f32", tf1.numpy(), "<f4"),
            ]:
                files[name] += samples(image).astype(dtype).tobytes()
                means.append(f"{image.astype(np.float64).mean():.6f}")
        height, width = by_tf.shape[:2]
        hashes = " ".join(f"{fnv1a(pixels.tobytes()):016x}" for pixels in (by_pillow, by_tf))
        lines.append(f"{path.stem} {width} {height} {hashes} {' '.join(means)}\n")
    for name, data in files.items():
        (HERE / name).write_bytes(data)
    (HERE / "photos.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
