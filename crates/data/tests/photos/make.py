#!/usr/bin/env python3
"""Write the photographs: crops of public-domain and CC0 pictures, encoded in every way that a JPEG may be found.

Versions used: Python 3.11.7, scikit-image 0.26.0 (its pictures), Pillow 12.0.0 and simplejpeg 1.9.0 (both with
libjpeg-turbo 3.1.2), numpy 2.4.6. No seed: nothing is random. Command, in a Python environment of its own:

    pip install scikit-image==0.26.0 Pillow==12.0.0 simplejpeg==1.9.0 numpy==2.4.6
    python3 crates/data/tests/photos/make.py

It writes the *.jpg beside itself; goldens.py then writes what Pillow and TensorFlow make of them. README.md says where
the pictures come from.
"""

import pathlib

import numpy as np
import simplejpeg
import skimage.data
from PIL import Image

HERE = pathlib.Path(__file__).parent


def crop(name, x, y, width, height, shrink=1):
    """A part of a picture, in its own pixels, made smaller by a whole number."""
    picture = Image.fromarray(getattr(skimage.data, name)())
    box = (x, y, x + width * shrink, y + height * shrink)
    return picture.crop(box).resize((width, height), Image.Resampling.BOX)


def cmyk(image):
    """Inks, with half of the darkness that the colours share in black."""
    inks = 255 - np.asarray(image).astype(int)
    black = inks.min(axis=2, keepdims=True) // 2
    colours = (inks - black) * 255 // np.maximum(255 - black, 1)
    return Image.fromarray(np.concatenate([colours, black], axis=2).astype(np.uint8), "CMYK")


def pillow(name, image, **options):
    image.save(HERE / f"{name}.jpg", **options)


def simple(name, image, colorspace="RGB", **options):
    pixels = np.ascontiguousarray(image)
    if pixels.shape[2] == 4:
        pixels = 255 - pixels  # as Adobe has it
    encoded = simplejpeg.encode_jpeg(pixels, colorspace=colorspace, **options)
    (HERE / f"{name}.jpg").write_bytes(encoded)


def main():
    pillow("420-500x375", crop("coffee", 60, 20, 500, 375), quality=92, subsampling="4:2:0")
    pillow("420-quality20", crop("astronaut", 60, 0, 320, 320), quality=20, subsampling="4:2:0")
    pillow("420-optimised", crop("astronaut", 0, 100, 333, 251), quality=85, subsampling="4:2:0", optimize=True)
    pillow(
        "420-restart-rows", crop("hubble_deep_field", 100, 100, 203, 301, 2),
        quality=85, subsampling="4:2:0", restart_marker_rows=1,
    )
    pillow("422", crop("rocket", 140, 0, 375, 300), quality=90, subsampling="4:2:2")
    pillow(
        "422-restart-blocks", crop("chelsea", 101, 40, 239, 180),
        quality=80, subsampling="4:2:2", restart_marker_blocks=3, optimize=True,
    )
    pillow("444", crop("chelsea", 50, 0, 299, 300), quality=92, subsampling="4:4:4")
    pillow("444-quality100", crop("gravel", 0, 0, 150, 113).convert("RGB"), quality=100, subsampling="4:4:4")
    simple("440", crop("astronaut", 150, 20, 241, 319), quality=90, colorsubsampling="440")
    simple("411", crop("coffee", 100, 60, 317, 225), quality=90, colorsubsampling="411")
    pillow("progressive-420", crop("retina", 250, 300, 373, 281, 2), quality=88, subsampling="4:2:0", progressive=True)
    pillow(
        "progressive-444-restart", crop("coffee", 200, 100, 250, 203),
        quality=90, subsampling="4:4:4", progressive=True, restart_marker_rows=2,
    )
    pillow("grey", crop("camera", 100, 50, 301, 250), quality=90)
    pillow("grey-progressive", crop("camera", 180, 80, 129, 187), quality=85, progressive=True)
    pillow("cmyk", cmyk(crop("rocket", 200, 30, 200, 203)), quality=85)
    simple("ycck-420", cmyk(crop("astronaut", 120, 0, 211, 200)), "CMYK", quality=85, colorsubsampling="420")
    pillow("rgb", crop("chelsea", 130, 80, 160, 121), quality=85, keep_rgb=True)
    pillow("420-17x33", crop("astronaut", 210, 60, 17, 33, 4), quality=90, subsampling="4:2:0")
    pillow("420-1x1", crop("coffee", 100, 100, 1, 1, 50), quality=90, subsampling="4:2:0")
    pillow("422-3x40", crop("rocket", 320, 60, 3, 40, 5), quality=90, subsampling="4:2:2")
    pillow("422-1x300", crop("coffee", 300, 50, 1, 300), quality=90, subsampling="4:2:2")
    pillow("420-300x1", crop("coffee", 100, 200, 300, 1), quality=90, subsampling="4:2:0")


if __name__ == "__main__":
    main()
