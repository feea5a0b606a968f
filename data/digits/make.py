#!/usr/bin/env python3
"""Write the UCI handwritten digits as TFRecord shards of JPEG images.

Purpose: a small, real, freely licensed image data set in the layout that the
ImageNet TFRecord converter writes, so that the input pipeline can be tested
and a small classifier can be trained from files that lie in the repository.

Source: "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, DOI 10.24432/C50P49, licensed
CC BY 4.0; its test part of 1,797 images, as scikit-learn's load_digits()
gives it (the images come inside the scikit-learn package; nothing is
downloaded here).

Changes made: each 8x8 image of values 0..16 is scaled to 0..255, upsampled
to 32x32 (bicubic), copied to three channels and compressed as a JPEG.

The TFRecord framing, its CRC-32C and the tf.Example protocol buffer are
written by hand, so TensorFlow is not needed. The output has the same bytes on
every run with the same versions; the JPEG bytes may differ with another
version of Pillow's JPEG library.

Versions used: Python 3.11.7, scikit-learn 1.9.1, numpy 2.4.6,
Pillow 13.0.0 (with libjpeg-turbo 3.2.0).

Command, from the root of the repository, in a Python environment of its own:

    pip install scikit-learn==1.9.1 numpy==2.4.6 Pillow==13.0.0
    python3 data/digits/make.py

It writes the shards and labels.txt beside this file, or to the folder given
with --out.
"""

import argparse
import io
import pathlib
import random
import struct

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SEED = 0
CLASSES = 10
SIDE = 32
JPEG_QUALITY = 95
SHARDS = {"train": 4, "validation": 2}


# ---- TFRecord framing ----------------------------------------------------

def crc32c_table():
    """Return the byte table of CRC-32C (Castagnoli, reflected)."""
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


CRC32C_TABLE = crc32c_table()


def crc32c(data):
    """Return the CRC-32C of some bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data):
    """Return the CRC-32C, rotated and offset as TFRecord files store it."""
    crc = crc32c(data)
    rotated = (crc >> 15) | (crc << 17)
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def tfrecord(payload):
    """Return one framed record: length, its CRC, payload, its CRC."""
    length = struct.pack("<Q", len(payload))
    return b"".join([
        length,
        struct.pack("<I", masked_crc32c(length)),
        payload,
        struct.pack("<I", masked_crc32c(payload)),
    ])


# ---- tf.Example as a protocol buffer -------------------------------------

def varint(value):
    """Return a non-negative integer as a base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, data):
    """Return a length-delimited field (wire type 2)."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(value):
    """Return a tf Feature: an int64 list of one, or a bytes list of one."""
    if isinstance(value, int):
        # Feature.int64_list = 3; Int64List.value = 1, packed.
        return field(3, field(1, varint(value)))
    if isinstance(value, str):
        value = value.encode("utf-8")
    # Feature.bytes_list = 1; BytesList.value = 1.
    return field(1, field(1, value))


def example(features):
    """Return a tf.Example of a dict of features, its keys sorted."""
    entries = []
    for key in sorted(features):
        # A map entry is a message: key = 1, value = 2.
        entry = field(1, key.encode("utf-8"))
        entry += field(2, feature(features[key]))
        entries.append(field(1, entry))
    return field(1, b"".join(entries))


# ---- images and records --------------------------------------------------

def jpeg(image):
    """Return an 8x8 array of values 0..16 as the bytes of an RGB JPEG."""
    grey = np.rint(image * (255.0 / 16.0)).astype(np.uint8)
    picture = Image.fromarray(grey)
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    picture.convert("RGB").save(
        out,
        format="JPEG",
        quality=JPEG_QUALITY,
        subsampling=0,  # 4:4:4
        optimize=True,
    )
    return out.getvalue()


def record(index, image, digit):
    """Return the framed tf.Example of one image."""
    return tfrecord(example({
        "image/height": SIDE,
        "image/width": SIDE,
        "image/channels": 3,
        "image/colorspace": "RGB",
        "image/format": "JPEG",
        "image/filename": f"digit-{index:04d}.jpeg",
        "image/class/label": digit + 1,  # 1-based; 0 is left for background
        "image/class/text": str(digit),
        "image/encoded": jpeg(image),
    }))


def split(digits):
    """Return the indices of each split, 80/20 in each class."""
    rng = random.Random(SEED)
    train, validation = [], []
    for digit in range(CLASSES):
        indices = [i for i, d in enumerate(digits) if d == digit]
        rng.shuffle(indices)
        cut = (8 * len(indices) + 5) // 10  # 80 %, rounded to nearest
        train += indices[:cut]
        validation += indices[cut:]
    rng.shuffle(train)
    validation.sort()
    return {"train": train, "validation": validation}


def main():
    """Write the shards and labels.txt, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).resolve().parent,
        help="folder to write to (default: the folder of this file)",
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    data = load_digits()
    digits = [int(digit) for digit in data.target]
    labels = "".join(f"{digit}\n" for digit in range(CLASSES))
    (out / "labels.txt").write_bytes(labels.encode("ascii"))

    total = 0
    for name, indices in split(digits).items():
        shards = SHARDS[name]
        for shard in range(shards):
            begin = len(indices) * shard // shards
            end = len(indices) * (shard + 1) // shards
            content = b"".join(
                record(i, data.images[i], digits[i])
                for i in indices[begin:end]
            )
            path = out / f"{name}-{shard:05d}-of-{shards:05d}"
            path.write_bytes(content)
            total += len(content)
            print(f"{path.name}: {end - begin} records, "
                  f"{len(content)} bytes")
        counts = [0] * CLASSES
        for i in indices:
            counts[digits[i]] += 1
        per_class = ", ".join(f"{d}: {n}" for d, n in enumerate(counts))
        print(f"{name}: {len(indices)} images ({per_class})")
    print(f"total: {total} bytes")


if __name__ == "__main__":
    main()
