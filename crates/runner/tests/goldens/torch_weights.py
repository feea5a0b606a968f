"""Weights between torch and runner, in both directions.

    pip install torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 pillow==13.0.0
    python torch_weights.py small                 writes small.pth, the golden of src/weights.rs
    python torch_weights.py check RUNNER          proves import and export with the binary RUNNER

`check` draws random weights and running statistics for torchvision's ResNet-18 and ResNet-50 with 10 classes, saves
them by torch.save, imports them, and compares what `runner predict` says of the digits' images with torch's softmax in
float64, within 3 times the error of torch itself in float32, or 1e-6. Then it exports the checkpoint, loads it with
strict=True and compares every bit. The images are 32 x 32 and are looked at whole, so that nothing is resampled.
"""

import io
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parents[4]


def small():
    """One tensor of each kind that state dicts have: formats, views, parameters, counters, a module's prefix."""
    base = torch.arange(12, dtype=torch.float32) / 8
    tensors = {
        "module.f32": base.reshape(3, 4),
        "transposed": base.reshape(3, 4).t(),
        "tail": base[5:],
        "parameter": torch.nn.Parameter(torch.tensor([1.5, -2.5])),
        "f64": torch.tensor([0.1, -0.2], dtype=torch.float64),
        "f16": torch.tensor([0.5, 65504.0], dtype=torch.float16),
        "bf16": torch.tensor([0.5, 3.0e38], dtype=torch.bfloat16),
        "scalar": torch.tensor(7.25),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    module = torch.nn.Linear(1, 1)
    state = module.state_dict()  # an OrderedDict with _metadata
    state.clear()
    state.update(tensors)
    torch.save({"epoch": 3, "lr": 0.1, "done": False, "state_dict": state}, Path(__file__).with_name("small.pth"))


def images():
    """The first eight validation images as JPEG files and as what the network gets."""
    shard = sorted((ROOT / "data/digits").glob("validation-*"))[0].read_bytes()
    files, at = [], 0
    while len(files) < 8:
        (length,) = struct.unpack_from("<Q", shard, at)
        record = shard[at + 12 : at + 12 + length]
        begin, end = record.find(b"\xff\xd8\xff"), record.rfind(b"\xff\xd9") + 2
        files.append(record[begin:end])
        at += 12 + length + 4
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
    assert pixels.shape == (8, 32, 32, 3), pixels.shape
    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    return files, torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2).copy())


def safetensors(path):
    """What a file of safetensors holds."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    kinds = {"F32": torch.float32, "I64": torch.int64}
    state = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + o for o in entry["data_offsets"])
            tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=kinds[entry["dtype"]])
            state[name] = tensor.reshape(entry["shape"])
    return state


def check(runner):
    files, pixels = images()
    for depth in (18, 50):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            make = getattr(torchvision.models, f"resnet{depth}")
            torch.manual_seed(depth)
            net = make(num_classes=10).eval()
            with torch.no_grad():
                for name, tensor in net.state_dict().items():
                    if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                        tensor.uniform_(0.5, 1.5)
                    elif name.endswith(("running_mean", "bias")):
                        tensor.normal_(0, 0.2)
            torch.save(net.state_dict(), folder / "in.pth")
            with torch.no_grad():
                f32 = net(pixels.float()).double().softmax(1)
                exact = net.double()(pixels).softmax(1)
            error = (f32 - exact).abs().max().item()

            def run(*args):
                return subprocess.run([runner, *map(str, args)], cwd=ROOT, check=True, capture_output=True, text=True).stdout

            sets = [f"model.depth={depth}", "model.recipe=torchvision", "train.bn_batch=8", "train.batch_size=8"]
            sets = [part for key in sets for part in ("--set", key)]
            run("import", folder / "in.pth", "configs/quickstart.toml", "--out", folder / "a.safetensors", *sets)
            for i, file in enumerate(files):
                (folder / f"{i}.jpg").write_bytes(file)
            names = [folder / f"{i}.jpg" for i in range(8)]
            lines = run("predict", folder / "a.safetensors", *names, "--json", "--top", 10).splitlines()
            worst = 0.0
            for i, line in enumerate(lines):
                for entry in json.loads(line)["top"]:
                    worst = max(worst, abs(entry["probability"] - exact[i, entry["class"]].item()))
            print(f"resnet{depth}: probabilities off by {worst:.2e}; torch in f32 by {error:.2e}")
            assert len(lines) == 8 and worst <= max(3 * error, 1e-6)

            run("export", folder / "a.safetensors", "--out", folder / "b.safetensors")
            other = make(num_classes=10)
            state = safetensors(folder / "b.safetensors")
            print(f"resnet{depth}:", other.load_state_dict(state, strict=True))
            for name, tensor in torch.load(folder / "in.pth").items():
                assert torch.equal(tensor, other.state_dict()[name]), name
            print(f"resnet{depth}: exported and loaded, {len(state)} tensors are equal in every bit")


if __name__ == "__main__":
    torch.set_num_threads(1)
    small() if sys.argv[1] == "small" else check(str(Path(sys.argv[2]).resolve()))
