#!/usr/bin/env python3
"""Compute the acceptance vectors of spec.md. Standard library only.

usage: generate.py [OUTPUT.json]     (default: vectors.json beside this file)

The f32 results imitate single-precision arithmetic step by step: every intermediate that the
reference keeps in float32 goes through f32(). Section numbers are those of spec.md.
"""
import json
import math
import os
import struct
import sys

TRAIN_IMAGES = 1_281_167
EVAL_IMAGES = 50_000


def f32(x):
    """Round to the nearest float32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bf16(x):
    """Round to the nearest bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


# ---------------------------------------------------------------- learning rate (6.1, 6.3, 6.4, 8)

STANDARD = [(1.0, 5), (0.1, 30), (0.01, 60), (0.001, 80)]  # (factor, epoch it starts)
FAST = [(1.0, 4), (0.1, 21), (0.01, 35), (0.001, 43)]
BATCHES = (256, 512, 1024, 2048, 4096, 8192, 32768)


def step_schedule(step, batch, phases=STANDARD, base_lr=0.1):
    """Linear warm-up to the first phase, then piecewise constant. Returns (epoch, lr)."""
    epoch = f32(f32(step) / f32(TRAIN_IMAGES / batch))
    peak = base_lr * batch / 256.0
    lr = f32(f32(f32(peak * phases[0][0]) * epoch) / f32(phases[0][1]))
    for factor, start in phases:
        if epoch >= f32(start):
            lr = f32(peak * factor)
    return epoch, lr


def phase_starts(batch, phases=STANDARD):
    """First step of each phase, with the epoch computed in float32."""
    out = []
    for _, start in phases:
        step = math.floor(start * TRAIN_IMAGES / batch) - 2
        while f32(f32(step) / f32(TRAIN_IMAGES / batch)) < f32(start):
            step += 1
        out.append((start, step))
    return out


def interesting_steps(batch):
    steps = {0, 1, 10, 100, 1000, 5000, 20000, int(2.5 * TRAIN_IMAGES / batch)}
    for _, s in phase_starts(batch):
        steps |= {s - 1, s}
    return sorted(steps)


def scaled_boundaries(train_steps, batch):
    """Later versions: phase starts scale with the run length."""
    epochs = train_steps / (TRAIN_IMAGES // batch)
    return [math.floor(k / 90 * epochs) for k in (5, 30, 60, 80)]


def lars_peak_2018(batch):
    if batch <= 16384:
        return 25.0, 5
    return (34.0, 12) if batch == 32768 else (41.0, 16)


def lars_peak_2020(batch):
    for limit, peak, warmup in ((16384, 10.0, 5), (32768, 25.0, 5), (65536, 32.0, 14)):
        if batch < limit:
            return peak, warmup
    return 35.6, 40


def lars_schedule(step, batch, train_steps, table):
    peak, warmup = table(batch)
    epoch = step / (TRAIN_IMAGES / batch)
    if epoch <= warmup:
        return peak * epoch / warmup
    warmup_steps = warmup * TRAIN_IMAGES // batch
    total = train_steps - warmup_steps + 1
    done = min(max(step - warmup_steps, 1), total)
    return (peak - 1e-4) * (1 - done / total) ** 2 + 1e-4


# ---------------------------------------------------------------- model size (4.2, 4.5)

LAYERS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
    270: ("bottleneck", (4, 29, 53, 4)),
    350: ("bottleneck", (4, 36, 72, 4)),
    420: ("bottleneck", (4, 44, 87, 4)),
}
WIDTHS = (64, 128, 256, 512)


def model_size(depth, classes=1000, image=224, resnet_d=False, se_ratio=None):
    """Parameter and multiply-add counts. resnet_d: D stem, conv instead of pool, D shortcut."""
    kind, blocks = LAYERS[depth]
    c = dict(conv=0, bn=0, se=0, macs=0, nconv=0, nbn=0)

    def conv(c_in, c_out, k, stride, side):
        out = -(-side // stride)
        c["conv"] += c_in * c_out * k * k
        c["macs"] += c_in * c_out * k * k * out * out
        c["nconv"] += 1
        return out

    def norm(channels):
        c["bn"] += 2 * channels
        c["nbn"] += 1

    def conv_norm(c_in, c_out, k, stride, side):
        side = conv(c_in, c_out, k, stride, side)
        norm(c_out)
        return side

    if resnet_d:
        side = conv_norm(3, 32, 3, 2, image)
        side = conv_norm(32, 32, 3, 1, side)
        side = conv_norm(32, 64, 3, 1, side)
        side = conv_norm(64, 64, 3, 2, side)
    else:
        side = conv_norm(3, 64, 7, 2, image)
        side = -(-side // 2)  # max-pool

    channels = 64
    for group, (width, count) in enumerate(zip(WIDTHS, blocks)):
        out = width * 4 if kind == "bottleneck" else width
        for block in range(count):
            stride = 2 if group > 0 and block == 0 else 1
            if block == 0:  # projection
                if resnet_d and stride == 2 and kind == "bottleneck":
                    conv_norm(channels, out, 1, 1, -(-side // 2))
                else:
                    conv_norm(channels, out, 1, stride, side)
            if kind == "bottleneck":
                conv_norm(channels, width, 1, 1, side)
                side = conv_norm(width, width, 3, stride, side)
                conv_norm(width, out, 1, 1, side)
                if se_ratio:
                    mid = max(1, int(out * se_ratio))
                    c["se"] += 2 * out * mid + mid + out
                    c["macs"] += 2 * out * mid
            else:
                side = conv_norm(channels, width, 3, stride, side)
                conv_norm(width, out, 3, 1, side)
            channels = out

    dense = channels * classes + classes
    c["macs"] += channels * classes
    return dict(
        total=c["conv"] + c["bn"] + c["se"] + dense,
        conv=c["conv"],
        bn=c["bn"],
        dense=dense,
        se=c["se"],
        nconv=c["nconv"],
        nbn=c["nbn"],
        decayed=c["conv"] + dense + c["se"],
        moving=c["bn"],
        macs=c["macs"],
        nvars=c["nconv"] + 2 * c["nbn"] + 2,
    )


TRUNCATION = 0.87962566103423978  # std of a unit normal cut at +-2


def expected_l2(depth, corrected, weight_decay=1e-4, classes=1000):
    """Expected value of weight_decay * sum(w^2) / 2 at initialisation.

    A convolution with variance 1/fan_in contributes its number of output channels."""
    kind, blocks = LAYERS[depth]
    out_channels = 64
    for width, count in zip(WIDTHS, blocks):
        out = width * 4 if kind == "bottleneck" else width
        per_block = 2 * width + out if kind == "bottleneck" else 2 * width
        out_channels += out + count * per_block
    features = 2048 if kind == "bottleneck" else 512
    variance = 1.0 if corrected else TRUNCATION**2
    return weight_decay * 0.5 * (out_channels * variance + features * classes * 1e-4)


# ---------------------------------------------------------------- images (3.2, 3.3, 3.4)

PHASES_PER_PIXEL = 1024
CUBIC_A = -0.75


def cubic(t):
    t = abs(t)
    if t <= 1:
        return (CUBIC_A + 2) * t**3 - (CUBIC_A + 3) * t**2 + 1
    return CUBIC_A * t**3 - 5 * CUBIC_A * t**2 + 8 * CUBIC_A * t - 4 * CUBIC_A


def bicubic_taps(scale, out_index, length):
    position = f32(f32(scale) * f32(out_index))
    base = int(position)
    phase = round(f32(position - base) * PHASES_PER_PIXEL) / PHASES_PER_PIXEL
    weights = [f32(cubic(d)) for d in (1 + phase, phase, 1 - phase, 2 - phase)]
    indices = [min(length - 1, max(0, base + k)) for k in (-1, 0, 1, 2)]
    return weights, indices


def bicubic_1d(values, n):
    out = []
    for i in range(n):
        acc = 0.0
        for w, k in zip(*bicubic_taps(len(values) / n, i, len(values))):
            acc = f32(acc + f32(w * f32(values[k])))
        out.append(acc)
    return out


def center_crop(h, w, size, padding=32):
    crop = int(f32(f32(size / (size + padding)) * f32(min(h, w))))
    return dict(h=h, w=w, size=size, crop=crop, off_h=(h - crop + 1) // 2, off_w=(w - crop + 1) // 2)


MEAN = [255 * m for m in (0.485, 0.456, 0.406)]
STD = [255 * s for s in (0.229, 0.224, 0.225)]


def normalise(pixel, rnd):
    return [rnd(rnd(rnd(pixel) - rnd(m)) / rnd(s)) for m, s in zip(MEAN, STD)]


# ---------------------------------------------------------------- records (2.1, 2.2)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked_crc(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def field(number, payload):
    """A length-delimited protobuf field; short payloads only."""
    return bytes([number << 3 | 2, len(payload)]) + payload


def example(features):
    body = b""
    for key, value in features:
        if isinstance(value, int):
            kind = field(3, field(1, bytes([value])))  # Int64List, packed
        else:
            kind = field(1, field(1, value))  # BytesList
        body += field(1, field(1, key.encode()) + field(2, kind))
    return field(1, body)


# ---------------------------------------------------------------- optimiser and loss (5, 6.5)


def nesterov(w, grads, lr, mu):
    acc, out = 0.0, []
    for g in grads:
        acc = mu * acc + g
        w = w - lr * (g + mu * acc)
        out.append(dict(accumulator=acc, w=w))
    return out


def lars_first_step(w, g, lr, weight_decay, eta, decay_in_update):
    norm_w, norm_g = math.hypot(*w), math.hypot(*g)
    trust = eta * norm_w / (norm_g + weight_decay * norm_w)
    used = [gi + weight_decay * wi if decay_in_update else gi for wi, gi in zip(w, g)]
    return dict(trust=trust, w=[wi - lr * trust * ui for wi, ui in zip(w, used)])


def smoothed_cross_entropy(logits, label, eps):
    log_sum = math.log(sum(math.exp(z) for z in logits))
    k = len(logits)
    target = [(1 - eps) * (i == label) + eps / k for i in range(k)]
    return sum(t * (log_sum - z) for t, z in zip(target, logits))


# ---------------------------------------------------------------- output


def main():
    v = {}
    v["lr_step_schedule"] = {
        str(b): [
            dict(zip(("step", "epoch", "lr"), (s, *step_schedule(s, b)))) for s in interesting_steps(b)
        ]
        for b in BATCHES
    }
    v["lr_boundaries"] = {str(b): phase_starts(b) for b in BATCHES}
    v["lr_fast_1024"] = {"boundaries": phase_starts(1024, FAST)}
    v["lr_scaled_boundaries"] = [
        dict(train_steps=s, batch=b, boundaries=scaled_boundaries(s, b))
        for s, b in (
            (112590, 1024), (113854, 1024), (28464, 4096), (225216, 1024),
            (109475, 4096), (22500, 1024), (1024, 1024),
        )
    ]
    v["lars"] = {
        name: [
            dict(batch=b, train_steps=n, step=s, lr=lars_schedule(s, b, n, table))
            for b, n in ((16384, 7116), (32768, 3558))
            for s in (0, 1, 100, 391, 469, 470, 547, 548, 1000, 2000, 3000, n - 1, n)
        ]
        for name, table in (("table_2018", lars_peak_2018), ("table_2020", lars_peak_2020))
    }
    v["params"] = {str(d): model_size(d) for d in LAYERS}
    v["params_10_classes"] = {str(d): model_size(d, 10)["total"] for d in LAYERS}
    v["macs_50_by_image"] = {
        str(s): model_size(50, image=s)["macs"] for s in (128, 160, 192, 224, 288, 320)
    }
    rs = [
        (50, 160), (101, 160), (101, 192), (152, 192), (152, 224), (152, 256),
        (200, 256), (270, 256), (350, 256), (350, 320), (420, 320),
    ]
    keys = ("total", "conv", "bn", "dense", "se", "nconv", "macs")
    v["resnet_rs"] = {
        f"{d}_i{s}": {
            k: x for k, x in model_size(d, image=s, resnet_d=True, se_ratio=0.25).items() if k in keys
        }
        for d, s in rs
    }
    v["center_crop_pad32"] = [
        center_crop(h, w, 224)
        for h, w in (
            (375, 500), (500, 375), (224, 224), (256, 256), (300, 401),
            (333, 500), (480, 640), (500, 500), (257, 256),
        )
    ]
    v["bicubic_legacy_1d"] = [
        dict(inp=i, n=n, out=bicubic_1d(i, n))
        for i, n in (
            ([0, 10, 20, 30], 8),
            ([0, 255, 0, 255], 8),
            ([0, 10, 20, 30, 40, 50, 60, 70], 4),
            ([10, 20, 40, 80, 160], 3),
            ([0, 100, 255], 5),
            ([1, 2, 4, 8, 16, 32], 4),
        )
    ]
    v["normalise"] = [
        dict(pixel=p, f32=normalise(p, f32), bf16=normalise(p, bf16)) for p in (0, 128, 255)
    ]
    v["tfrecord"] = {b.decode(): record(b).hex() for b in (b"", b"a", b"hello")}
    v["crc32c_123456789"] = dict(crc=f"{crc32c(b'123456789'):08x}", masked=f"{masked_crc(b'123456789'):08x}")
    v["tf_example_hex"] = example([("image/class/label", 7), ("image/encoded", b"\xff\xd8")]).hex()
    v["expected_l2_term_at_init"] = {
        str(d): {"trunc_uncorrected": expected_l2(d, False), "corrected": expected_l2(d, True)}
        for d in (18, 34, 50, 101, 152, 200)
    }
    v["nesterov"] = dict(w0=1.0, grad=0.5, lr=0.1, momentum=0.9, steps=nesterov(1.0, [0.5] * 3, 0.1, 0.9))
    v["lars_first_step"] = dict(
        w=[3, 4], grad=[0.6, 0.8], lr=10, weight_decay=1e-4, eta=1e-3,
        decay_in_loss=lars_first_step([3, 4], [0.6, 0.8], 10, 1e-4, 1e-3, False),
        decay_in_update=lars_first_step([3, 4], [0.6, 0.8], 10, 1e-4, 1e-3, True),
    )
    v["cross_entropy"] = [
        dict(logits=[2.0, 1.0, 0.1], label=0, smoothing=e, loss=smoothed_cross_entropy([2.0, 1.0, 0.1], 0, e))
        for e in (0.0, 0.1)
    ]
    v["ema_decay_0.9999"] = {
        str(t): min(0.9999, (1 + t) / (10 + t)) for t in (0, 1, 10, 100, 1000, 89990)
    }
    v["drop_connect_0.1_by_group"] = [0.1 * (g + 1) / 5 for g in (1, 2, 3, 4)]
    v["dropblock_keep_0.9_by_group"] = {
        str(r): [1 - (r * 0.1) / 4.0 ** (4 - g) for g in (1, 2, 3, 4)] for r in (0.5, 1.0)
    }
    v["eval_coverage"] = [
        dict(batch=b, steps=EVAL_IMAGES // b, used=EVAL_IMAGES // b * b, skipped=EVAL_IMAGES % b)
        for b in (1024, 1000, 512, 256, 200, 128)
    ]

    here = os.path.dirname(os.path.abspath(__file__))
    default = os.path.join(here, "vectors.json")
    with open(sys.argv[1] if len(sys.argv) > 1 else default, "w") as out:
        json.dump(v, out, indent=1)
        out.write("\n")


if __name__ == "__main__":
    main()
