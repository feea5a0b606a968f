#!/usr/bin/env python3
"""Write augment.u8: what Pillow makes of a small image by each operation of src/augment.rs.

Versions used: Python 3.11, Pillow 12.0.0, numpy 2.4.6. Command, in a Python environment of its own:

    pip install Pillow==12.0.0 numpy==2.4.6
    python3 crates/data/tests/goldens/augment.py

The file holds the images (SIDE x SIDE, RGB), then for each of them the outcomes of CASES in their order, and last 4096
pixels with their hues turned, one after another. The tests of src/augment.rs have the same tables.
"""

import pathlib

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

SIDE = 17
GREY = (128, 128, 128)


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


CASES = (
    [ImageOps.autocontrast, ImageOps.equalize, ImageOps.invert]
    + [lambda im, d=d: im.rotate(d, Image.Resampling.NEAREST, fillcolor=GREY) for d in (12.0, -27.0, 90.0)]
    + [lambda im, b=b: ImageOps.posterize(im, b) for b in (1, 4, 8)]
    + [lambda im, t=t: ImageOps.solarize(im, t) for t in (0, 77, 256)]
    + [lambda im, e=e, f=f: e(im).enhance(f)
       for e in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
       for f in (0.1, 0.64, 1.0, 1.9)]
    + [lambda im, m=m: affine(im, m) for m in (
        (1, 0.12, 0, 0, 1, 0), (1, -0.3, 0, 0, 1, 0), (1, 0, 0, 0.27, 1, 0),
        (1, 0, 3.7, 0, 1, 0), (1, 0, -2.2, 0, 1, 0), (1, 0, 0, 0, 1, 5.0), (1, 0, 0, 0, 1, -40.0))]
)


def hue(pixels, turn):
    """torchvision's adjust_hue on a PIL image (torchvision 0.29, _functional_pil.py, has the same steps)."""
    h, s, v = Image.fromarray(pixels, "RGB").convert("HSV").split()
    turned = (np.asarray(h).astype(np.int64) + int(turn * 255)) % 256
    h = Image.fromarray(turned.astype(np.uint8), "L")
    return np.asarray(Image.merge("HSV", (h, s, v)).convert("RGB"))


def main():
    random = np.random.default_rng(7)
    noise = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    smooth = np.stack([40 + 7 * x, 200 - 5 * y - 2 * x, 90 + (x * y) % 50], -1).astype(np.uint8)
    flat = np.full((SIDE, SIDE, 3), (3, 130, 130), np.uint8)
    out = []
    images = [noise, smooth, flat]
    out += images
    for pixels in images:
        for case in CASES:
            out.append(np.asarray(case(Image.fromarray(pixels, "RGB"))))
    colours = random.integers(0, 256, (64, 64, 3), np.uint8)
    colours[:8] = colours[:8] // 86 * 85  # edges of the cube, and greys
    out += [colours, hue(colours, 0.3), hue(colours, -0.45)]
    name = pathlib.Path(__file__).parent / "augment.u8"
    name.write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in out))
    print(f"{name}: {name.stat().st_size} bytes, {len(CASES)} cases")


main()
