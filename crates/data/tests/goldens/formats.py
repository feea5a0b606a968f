#!/usr/bin/env python3
"""Write small PNG and WebP files, and what Pillow decodes the lossy one to (lossy.u8).

Versions used: Python 3.11, Pillow 12.0.0 (with libwebp 1.6.0), numpy 2.4.6. Command, in a Python environment of its own:

    pip install Pillow==12.0.0 numpy==2.4.6
    python3 crates/data/tests/goldens/formats.py

The pixels are formulas, which the tests of src/picture.rs have too.
"""

import io
import pathlib

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent
y, x = np.mgrid[0:14, 0:23]
rgb = np.stack([11 * x, 18 * y, 5 * x + 9 * y], -1).astype(np.uint8)
alpha = (7 * x + 3 * y).astype(np.uint8)
grey = rgb[..., 2]


def save(name, image, **options):
    image.save(HERE / name, **options)


colour = Image.fromarray(rgb)
clear = Image.fromarray(np.dstack([rgb, alpha]))
save("rgb.png", colour)
save("rgba.png", clear)
save("grey.png", Image.fromarray(grey))
save("grey-alpha.png", Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))))
save("grey16.png", Image.fromarray(grey.astype(np.uint16) * 256 + 200))
palette = Image.fromarray(((x + y) % 3).astype(np.uint8), "P")
palette.putpalette([0, 0, 0, 255, 0, 0, 9, 99, 199])
save("palette.png", palette)
save("palette-clear.png", palette, transparency=1)
save("bit.png", Image.fromarray(np.where((x + y) % 2 == 0, 255, 0).astype(np.uint8)).convert("1"))
save("lossless.webp", colour, lossless=True)
save("lossless-alpha.webp", clear, lossless=True, exact=True)
lossy = io.BytesIO()
colour.save(lossy, "WEBP", quality=90)
(HERE / "lossy.webp").write_bytes(lossy.getvalue())
(HERE / "lossy.u8").write_bytes(np.asarray(Image.open(io.BytesIO(lossy.getvalue())).convert("RGB")).tobytes())
