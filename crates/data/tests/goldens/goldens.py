#!/usr/bin/env python3
"""Write the goldens of the data crate: resized images, decoded JPEGs, statistics of TensorFlow's crop sampler.

Versions used: Python 3.11.7, Pillow 12.0.0 (with libjpeg-turbo 3.1.2), tensorflow-cpu 2.21.0, numpy 2.4.6.
Command, in a Python environment of its own (Pillow 13 resizes tall images vertically first, which rounds differently;
all versions before it begin with the rows):

    pip install Pillow==12.0.0 tensorflow-cpu==2.21.0 numpy==2.4.6
    python3 crates/data/tests/goldens/goldens.py

It writes beside itself (numbers are little-endian; images are H, W, RGB):

    pillow.u8    each case of CASES resized by Pillow's BICUBIC, one after another
    tf.f32       by tf.image.resize(method="bicubic", antialias=False)
    tf1.f32      by TensorFlow 1's resize_bicubic (align_corners=False, no half-pixel centres)
    *.jpg, *.u8  JPEGs, and what Pillow decodes them to as RGB
    sampler.txt  height, width, then mean and standard deviation of the crop's x, y, w, h and share of the image
                 over DRAWS draws of tf.image.stateless_sample_distorted_bounding_box, seeds (0, 0), (1, 0), ...
                 with the reference's arguments
"""

import os
import pathlib

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import numpy as np
import tensorflow as tf
from PIL import Image

HERE = pathlib.Path(__file__).parent

# Image width, height, shift of its formula; crop x, y, width, height; output side. golden.rs has the same table.
CASES = [
    (37, 23, 0, 0, 0, 37, 23, 32),
    (37, 23, 4, 0, 0, 37, 23, 8),
    (64, 48, 3, 5, 3, 41, 37, 32),
    (9, 7, 0, 0, 0, 9, 7, 32),
    (100, 75, 5, 1, 2, 98, 70, 16),
    (32, 32, 2, 0, 0, 32, 32, 32),
    (1, 1, 0, 0, 0, 1, 1, 8),
    (2, 3, 0, 0, 0, 2, 3, 16),
    (5, 200, 0, 0, 0, 5, 200, 24),
]
SAMPLER_SIZES = [(375, 500), (32, 32), (20, 31), (300, 100), (7, 5)]
DRAWS = 100_000


def formula(width, height, shift):
    """A picture from a formula: noise at shift 0, smoother with a larger one."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    value = (x * x * 7 + y * y * 13 + x * y * 5 + x * 31 + y * 17 + c * 91) >> shift
    return (value & 255).astype(np.uint8)


def resizes():
    pillow, tf2, tf1 = [], [], []
    for width, height, shift, x, y, w, h, size in CASES:
        crop = np.ascontiguousarray(formula(width, height, shift)[y : y + h, x : x + w])
        pillow.append(np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC)))
        tf2.append(tf.image.resize(crop, (size, size), method="bicubic", antialias=False).numpy())
        legacy = tf.raw_ops.ResizeBicubic(
            images=crop[None], size=(size, size), align_corners=False, half_pixel_centers=False
        )
        tf1.append(legacy.numpy()[0])
    for name, images, dtype in [("pillow.u8", pillow, "u1"), ("tf.f32", tf2, "<f4"), ("tf1.f32", tf1, "<f4")]:
        (HERE / name).write_bytes(b"".join(image.astype(dtype).tobytes() for image in images))


def jpegs():
    colour = Image.fromarray(formula(41, 30, 4))
    grey = Image.fromarray(formula(21, 14, 3)[:, :, 0])
    for name, image, options in [
        ("colour420", colour, {"quality": 90, "subsampling": "4:2:0"}),
        ("progressive", colour, {"quality": 90, "subsampling": "4:4:4", "progressive": True}),
        ("grey", grey, {"quality": 90}),
    ]:
        path = HERE / f"{name}.jpg"
        image.save(path, **options)
        (HERE / f"{name}.u8").write_bytes(np.asarray(Image.open(path).convert("RGB")).tobytes())


@tf.function
def crops(size):
    def draw(i):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            size,
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=tf.stack([i, 0]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.stack([begin[1], begin[0], extent[1], extent[0]])

    return tf.map_fn(draw, tf.range(DRAWS), fn_output_signature=tf.int32, parallel_iterations=2)


def sampler():
    lines = []
    for height, width in SAMPLER_SIZES:
        # A whole image comes back as the extent -1.
        drawn = crops(tf.constant([height, width, 3])).numpy().astype(np.float64)
        drawn[:, 2] = np.where(drawn[:, 2] < 0, width, drawn[:, 2])
        drawn[:, 3] = np.where(drawn[:, 3] < 0, height, drawn[:, 3])
        share = drawn[:, 2] * drawn[:, 3] / (width * height)
        columns = [*drawn.T, share]
        numbers = " ".join(f"{c.mean():.6f} {c.std():.6f}" for c in columns)
        lines.append(f"{height} {width} {numbers}\n")
    (HERE / "sampler.txt").write_text("".join(lines))


if __name__ == "__main__":
    resizes()
    jpegs()
    sampler()
