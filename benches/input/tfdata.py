#!/usr/bin/env python3
"""tf.data on TFRecord shards: parse, random crop, decode_and_crop_jpeg, bicubic, flip, batches of uint8.

One JSON line: images per second, and per second of the process's CPU time. Needs tensorflow-cpu (requirements.txt).
"""

import argparse
import glob
import json
import os
import resource
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="glob of the shards")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5, help="count batches at least this long")
    parser.add_argument("--antialias", action="store_true", help="the filter of Pillow, which is more work")
    args = parser.parse_args()

    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    size = [args.resolution, args.resolution]
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }

    def image(record):
        example = tf.io.parse_single_example(record, features)
        encoded = example["image/encoded"]
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        crop = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        pixels = tf.image.decode_and_crop_jpeg(encoded, crop, channels=3)
        pixels = tf.image.resize(pixels, size, method="bicubic", antialias=args.antialias)
        pixels = tf.image.random_flip_left_right(pixels)
        pixels = tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)
        pixels.set_shape(size + [3])
        return pixels, example["image/class/label"]

    shards = sorted(p for p in glob.glob(args.data) if os.path.isfile(p))
    data = tf.data.Dataset.from_tensor_slices(shards).repeat()
    data = data.interleave(tf.data.TFRecordDataset, cycle_length=min(64, len(shards)))
    data = data.shuffle(64 * len(shards))
    data = data.map(image, num_parallel_calls=args.threads, deterministic=False)
    data = data.batch(args.batch, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = args.threads
    options.threading.max_intra_op_parallelism = 1
    batches = iter(data.with_options(options))

    def cpu():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    for _ in range(3):
        next(batches)
    images, start, start_cpu = 0, time.perf_counter(), cpu()
    while time.perf_counter() - start < args.seconds:
        images += next(batches)[0].shape[0]
    wall, used = time.perf_counter() - start, cpu() - start_cpu
    report = {"images_per_s": images / wall, "images_per_cpu_s": images / used, "version": tf.__version__}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
