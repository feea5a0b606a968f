"""Writes the goldens in this directory: what PyTorch computes in float64 for our networks.

    pip install torch==2.15.0 torchvision==0.29.2 timm==1.0.31 numpy==2.4.6      (Python 3.11)
    python torch_goldens.py [NAME..]

Parameters, running statistics, images and labels come from the counter-based generator of crates/engine/src/init.rs,
which is repeated here. So a file holds outputs only, and a checksum of every tensor that both sides start from.
Convolutions and classifier start as the recipe says; scales and shifts of normalisations are drawn too, also the
last scale of a block, which is 0 in the 2018 recipe: a branch whose scale is 0 would not be tested.

"rs" is timm's ResNet-RS: torchvision's recipe with a deep stem, a convolution instead of the max-pool, means in the
shortcuts, and squeeze and excitation of a quarter.

Where a value before a ReLU is so near to 0 that rounding decides its sign, the gradients of everything before it
jump, by 1e-3 to 1e-2. ResNet-50 has some of those in any batch. For ResNet-18 the seeds were chosen, looking at PyTorch
only, so that rounding switches no ReLU, not even after a change of all parameters by half a last bit; so those two
are sharp.

Each file is in the format of safetensors (an 8-byte length, a JSON header, little-endian arrays):

    network files                                                   steps and hundred-steps
    start      u64 [tensors]      checksums of initial values       the same
    inputs     u64 [2]            checksums of images and labels    the same
    logits     f32 [images, K]    evaluation mode, before the step  -
    loss       f64 [1]            training mode, smoothing 0.1      f64 [steps], one for each
    lr         -                                                    f64 [steps]
    norms      f64 [tensors]      Frobenius norms                   -
    samples    f32 [tensors, 64]  elements at `positions`           -
    yardstick  f64 [2 + tensors]  of logits, loss, each tensor      f64 [steps], of each loss
    autocast   f64 [2]            of logits, all gradients          -

where the tensors are the gradients of all parameters, and the running statistics after one training step; `names` in
the metadata lists them. The yardstick is the relative error (of norms) against float64 of PyTorch itself in float32,
the larger of its two memory formats: two samples of how large a rounding error may be. ResNet-50, and some steps of
any network, meet a switching ReLU sooner or later, so eight more samples come from nudged parameters. The yardstick of
the steps is the largest so far, because a drift does not go away but may change its sign. `autocast` is the same for bfloat16: the error of PyTorch under
torch.autocast, that of the gradients over all of them together, estimated from the samples.
"""

import copy
import functools
import json
import struct
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

SMOOTHING = 0.1
SAMPLES = 64
WEYL = np.uint64(0x9E3779B97F4A7C15)

# Depth, resolution, classes, images, recipe, seed.
NETWORKS = [
    (18, 64, 1000, 8, "torchvision", 1),
    (18, 64, 1000, 8, "tpu2018", 8),
    (50, 64, 1000, 8, "torchvision", 1),
    (50, 64, 1000, 8, "tpu2018", 1),
    (18, 64, 1000, 8, "rs", 1),
    (50, 64, 1000, 8, "rs", 1),
    (50, 224, 1000, 2, "torchvision", 1),
    (50, 224, 1000, 2, "tpu2018", 1),
]
# The same, then steps and batches, which take turns.
STEPS = {
    "steps": ((18, 32, 10, 16, "tpu2018", 1), 10, 1),
    "hundred-steps": ((18, 64, 10, 64, "tpu2018", 1), 100, 4),
}

# ---------------------------------------------------------------------------------------------------------------
# The generator of crates/engine/src/init.rs.


def mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fnv1a(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return np.array([h], np.uint64)


def uniform(seed, name, n):
    key = mix(mix(np.array([seed], np.uint64) + WEYL) ^ fnv1a(name))
    bits = mix(key + np.arange(n, dtype=np.uint64) * WEYL)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


# Wichura 1988, algorithm AS 241, PPND16: numerator and denominator, lowest power first.
CENTRE = (
    [3.3871328727963665, 133.14166789178438, 1971.5909503065513, 13731.69376550946,
     45921.95393154987, 67265.7709270087, 33430.57558358813, 2509.0809287301227],
    [1.0, 42.31333070160091, 687.1870074920579, 5394.196021424751,
     21213.794301586597, 39307.89580009271, 28729.085735721943, 5226.495278852545],
)
FLANK = (
    [1.4234371107496835, 4.630337846156546, 5.769497221460691, 3.6478483247632045,
     1.2704582524523684, 0.2417807251774506, 0.022723844989269184, 7.745450142783414e-4],
    [1.0, 2.053191626637759, 1.6763848301838038, 0.6897673349851,
     0.14810397642748008, 0.015198666563616457, 5.475938084995345e-4, 1.0507500716444169e-9],
)
TAIL = (
    [6.657904643501103, 5.463784911164114, 1.7848265399172913, 0.29656057182850487,
     0.026532189526576124, 0.0012426609473880784, 2.7115555687434876e-5, 2.0103343992922881e-7],
    [1.0, 0.599832206555888, 0.1369298809227358, 0.014875361290850615,
     7.868691311456133e-4, 1.8463183175100547e-5, 1.421511758316446e-7, 2.0442631033899398e-15],
)


def ratio(r, coefficients):
    def horner(c):
        total = np.zeros_like(r)
        for c in reversed(c):
            total = total * r + c
        return total

    return horner(coefficients[0]) / horner(coefficients[1])


def quantile(p):
    q = p - 0.5
    r = np.sqrt(-np.log(np.minimum(p, 1.0 - p)))
    tails = np.where(r <= 5.0, ratio(r - 1.6, FLANK), ratio(r - 5.0, TAIL))
    centre = q * ratio(0.180625 - q * q, CENTRE)
    return np.where(np.abs(q) <= 0.425, centre, np.where(q < 0.0, -tails, tails))


BELOW_TWO = 0.02275013194817921


def draw(seed, name, shape, kind, size):
    """Values of one tensor; the four kinds are `graph::Init`."""
    u = uniform(seed, name, int(np.prod(shape)))
    if kind == "constant":
        values = np.full_like(u, size)
    elif kind == "normal":
        values = size * quantile(u)
    elif kind == "truncated":
        values = size * quantile(BELOW_TWO + u * (1.0 - 2.0 * BELOW_TWO))
    else:
        values = size * (2.0 * u - 1.0)
    return values.astype(np.float32).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------
# Networks and their inputs.


def resnet_rs(depth, classes):
    block, layers = {
        18: (timm.models.resnet.BasicBlock, [2, 2, 2, 2]),
        50: (timm.models.resnet.Bottleneck, [3, 4, 6, 3]),
    }[depth]
    attention = functools.partial(timm.layers.get_attn("se"), rd_ratio=0.25)
    return timm.models.resnet.ResNet(
        block, layers, num_classes=classes, stem_width=32, stem_type="deep", replace_stem_pool=True, avg_down=True,
        block_args={"attn_layer": attention},
    )


def network(depth, classes, recipe):
    net = resnet_rs(depth, classes) if recipe == "rs" else getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    if recipe == "tpu2018":
        if depth < 50:
            # Every group begins with a projection.
            net.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
        # TensorFlow's SAME: one row and column more, at the bottom and on the right.
        net.maxpool = nn.Sequential(nn.ConstantPad2d((0, 1, 0, 1), -torch.inf), nn.MaxPool2d(3, 2, 0))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Our constants are f32.
            module.eps, module.momentum = float(np.float32(1e-5)), float(np.float32(0.1))
    return net


def initial(net, recipe, seed):
    """Initial values by name: parameters in the order of the network, then running statistics."""
    start = {}
    for name, p in net.named_parameters():
        shape = tuple(p.shape)
        if len(shape) == 4:
            out, inputs, window = shape[0], shape[1], float(shape[2] * shape[3])
            if recipe != "tpu2018":
                start[name] = draw(seed, name, shape, "normal", np.sqrt(2.0 / (window * out)))
            else:
                start[name] = draw(seed, name, shape, "truncated", np.sqrt(1.0 / (window * inputs)))
        elif name.startswith("fc."):
            if recipe != "tpu2018":
                start[name] = draw(seed, name, shape, "uniform", np.sqrt(1.0 / net.fc.in_features))
            else:
                kind, size = ("normal", 0.01) if name == "fc.weight" else ("constant", 0.0)
                start[name] = draw(seed, name, shape, kind, size)
        elif ".se." in name:
            fan_in = net.get_parameter(name.replace(".bias", ".weight")).shape[1]
            start[name] = draw(seed, name, shape, "uniform", np.sqrt(1.0 / fan_in))
        else:
            start[name] = draw(seed, name, shape, "uniform", 0.5) + np.float32(name.endswith(".weight"))
    for name, buffer in net.named_buffers():
        norm, _, statistic = name.rpartition(".")
        shape = tuple(buffer.shape)
        if statistic == "running_mean":
            start[name] = draw(seed, f"{norm}.running.bias", shape, "uniform", 0.5)
        elif statistic == "running_var":
            start[name] = draw(seed, f"{norm}.running.weight", shape, "uniform", 0.5) + np.float32(1)
    return start


def levels(seed, name, n, count):
    """n integers below count."""
    scaled = (draw(seed, name, (n,), "uniform", 1.0) + np.float32(1)) * np.float32(count / 2)
    return np.minimum(scaled, count - 1).astype(np.int64)


def inputs(side, classes, images, seed):
    pixels = levels(seed, "images.weight", images * side * side * 3, 256).astype(np.uint8)
    return pixels.reshape(images, side, side, 3), levels(seed, "labels.weight", images, classes)


def normalised(pixels, dtype):
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float32).to(dtype)
    std = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float32).to(dtype)
    return ((torch.from_numpy(pixels).to(dtype) - mean) / std).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------------
# What is kept.


def checksum(array):
    """Sum of bits times odd numbers, modulo 2^64; depends on every bit and every place."""
    bits = np.ascontiguousarray(array).reshape(-1)
    bits = bits.view(np.uint32) if bits.dtype == np.float32 else bits
    return np.sum(bits.astype(np.uint64) * (np.arange(bits.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)))


def positions(n):
    """Where samples are taken: multiples of the golden ratio, modulo 1, times n."""
    fractions = (np.arange(SAMPLES, dtype=np.uint64) * WEYL) >> np.uint64(32)
    return ((fractions * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def error(value, truth):
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    return np.linalg.norm(value - truth) / np.linalg.norm(truth)


def write(name, metadata, arrays):
    kinds = {"uint64": "U64", "float64": "F64", "float32": "F32"}
    header, data = {"__metadata__": metadata}, b""
    # The reader wants aligned data, so wide types come first.
    for key, array in sorted(arrays.items(), key=lambda item: -np.asarray(item[1]).itemsize):
        array = np.ascontiguousarray(array)
        place = [len(data), len(data) + array.nbytes]
        header[key] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape), "data_offsets": place}
        data += array.astype(array.dtype.newbyteorder("<")).tobytes()
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    path = Path(__file__).parent / f"{name}.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    print(f"{path.name}: {path.stat().st_size} bytes", flush=True)


def metadata(golden, start):
    depth, side, classes, images, recipe, seed = golden
    made = f"torch_goldens.py, torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, numpy {np.__version__}"
    values = dict(depth=depth, resolution=side, classes=classes, images=images, recipe=recipe, seed=seed, made=made)
    return {key: str(value) for key, value in values.items()} | {"names": "\n".join(start)}


def variants(net):
    """The network in float64, and in float32 in both memory formats."""
    yield copy.deepcopy(net).double(), torch.float64, torch.contiguous_format
    yield copy.deepcopy(net).float(), torch.float32, torch.contiguous_format
    yield copy.deepcopy(net).float().to(memory_format=torch.channels_last), torch.float32, torch.channels_last


def begin(golden):
    """Network, initial values, images and labels."""
    depth, side, classes, images, recipe, seed = golden
    net = network(depth, classes, recipe)
    start = initial(net, recipe, seed)
    loaded = net.load_state_dict({name: torch.from_numpy(values) for name, values in start.items()}, strict=False)
    assert not loaded.unexpected_keys and all("num_batches" in key for key in loaded.missing_keys), loaded
    return net, start, *inputs(side, classes, images, seed)


def logits_of(net, pixels, dtype, layout):
    net.eval()
    with torch.no_grad():
        return net(normalised(pixels, dtype).contiguous(memory_format=layout)).double().numpy()


def checksums(start, pixels, labels):
    return {
        "start": np.array([checksum(values) for values in start.values()], np.uint64),
        "inputs": np.array([checksum(pixels), checksum(labels)], np.uint64),
    }


def nudged(net, seed):
    """The network with every parameter changed by up to half a last bit of float32, before it is rounded to that."""
    net, generator = copy.deepcopy(net).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + (torch.rand(p.shape, generator=generator, dtype=p.dtype) - 0.5) * 2**-23)
    return net.float(), torch.float32, torch.contiguous_format


def sampled_error_of_all(pairs):
    """Relative error of all tensors together; each one's square is that of its samples times what a sample stands for."""
    gap = sum(((a - b)[positions(b.size)] ** 2).sum() * b.size / len(positions(b.size)) for a, b in pairs)
    return float(np.sqrt(gap / sum((b**2).sum() for _, b in pairs)))


def one_step(name, golden):
    net, start, pixels, labels = begin(golden)

    def run(variant, dtype, layout, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = logits_of(variant, pixels, dtype, layout)
            variant.train()
            x = normalised(pixels, dtype).contiguous(memory_format=layout)
            outputs = variant(x)
        outputs = outputs.float() if autocast else outputs
        loss = F.cross_entropy(outputs, torch.from_numpy(labels), label_smoothing=SMOOTHING)
        loss.backward()
        tensors = {key: p.grad for key, p in variant.named_parameters()}
        tensors |= {key: b for key, b in variant.named_buffers() if "running" in key}
        # In a channels-last tensor too, reshape goes by index and not by place in memory.
        return logits, loss.item(), [tensors[key].double().reshape(-1).numpy() for key in start]

    (logits, loss, truth), *rounded = [run(*variant) for variant in variants(net)]
    if net.fc.in_features > 512:
        rounded += [run(*nudged(net, seed)) for seed in range(8)]
    yardstick = [max(error(run[0], logits) for run in rounded), max(error(run[1], loss) for run in rounded)]
    yardstick += [max(error(run[2][i], t) for run in rounded) for i, t in enumerate(truth)]
    gradients = [i for i, key in enumerate(start) if "running" not in key]
    halves = run(copy.deepcopy(net).float().to(memory_format=torch.channels_last), torch.float32, torch.channels_last, True)
    autocast = [error(halves[0], logits), sampled_error_of_all([(halves[2][i], truth[i]) for i in gradients])]
    print(f"autocast: logits {autocast[0]:.1e}, gradients {autocast[1]:.1e}")
    write(name, metadata(golden, start), checksums(start, pixels, labels) | {
        "logits": logits.astype(np.float32),
        "loss": np.array([loss]),
        "norms": np.array([np.linalg.norm(t) for t in truth]),
        "samples": np.array([t[positions(t.size)] for t in truth], np.float32),
        "yardstick": np.array(yardstick),
        "autocast": np.array(autocast),
    })
    print(f"yardstick: logits {yardstick[0]:.1e}, loss {yardstick[1]:.1e}, tensors {max(yardstick[2:]):.1e} at most")
    if net.fc.in_features == 512:
        others = [run(*nudged(net, seed))[2] for seed in range(8)]
        print(f"nudged: tensors {max(error(a, b) for other in others for a, b in zip(other, truth)):.1e} at most")


def several_steps(name, golden, steps, batches):
    """Steps on parts of the images in turn. The decay is strong, so that the losses show where it acts."""
    net, start, pixels, labels = begin(golden)
    lrs = [0.005 * min(1.0, (step + 1) / 5) for step in range(steps)]
    parts = [slice(i * len(labels) // batches, (i + 1) * len(labels) // batches) for i in range(batches)]
    runs = []
    for variant, dtype, layout in [*variants(net), *(nudged(net, seed) for seed in range(8))]:
        norms = {key for key, module in variant.named_modules() if isinstance(module, nn.BatchNorm2d)}
        groups = [{"params": [], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
        for key, p in variant.named_parameters():
            groups[key.rpartition(".")[0] in norms]["params"].append(p)
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
        losses = []
        variant.train()
        for step, lr in enumerate(lrs):
            part = parts[step % batches]
            for group in sgd.param_groups:
                group["lr"] = lr
            x = normalised(pixels[part], dtype).contiguous(memory_format=layout)
            loss = F.cross_entropy(variant(x), torch.from_numpy(labels[part]), label_smoothing=SMOOTHING)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        runs.append(np.array(losses))
    losses, *rounded = runs
    drift = np.abs(np.array(rounded) / losses - 1)
    print(f"losses {losses}\ndrift\n{drift.max(0)}")
    write(name, metadata(golden, start) | {"batches": str(batches)}, checksums(start, pixels, labels) | {
        "loss": losses,
        "lr": np.array(lrs),
        "yardstick": np.maximum.accumulate(drift.max(0)),
    })


if __name__ == "__main__":
    for golden in NETWORKS:
        depth, side, _, _, recipe, _ = golden
        name = f"resnet{depth}-{side}-{recipe}"
        if name in sys.argv[1:] or not sys.argv[1:]:
            one_step(name, golden)
    for name, arguments in STEPS.items():
        if name in sys.argv[1:] or not sys.argv[1:]:
            several_steps(name, *arguments)
