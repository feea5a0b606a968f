"""Writes updates.json: what PyTorch and NumPy make of given gradients and logits, in float64.

    pip install torch==2.15.0 numpy==2.4.6      (Python 3.11)
    python update_goldens.py

`updates` has, for each rule, the values after each of ten updates of one weight (8 x 3) and one bias (8), as a list of
32 numbers, the weight's rows first. Gradients are drawn; every other one is ten times as long, so that clipping acts on
some steps and not on others. SGD, clipping and the moving average are PyTorch's own (torch.optim.SGD,
clip_grad_norm_, AveragedModel); PyTorch has no LARS, which is written out here as the TPU reference defines it
(docs/reference/spec.md, section 5.1).

`losses` has soft targets: for logits of 6 images and 5 classes, two labels of each image, their proportion and the
smoothing, the mean loss of torch.nn.functional.cross_entropy with class probabilities and its gradient.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

LR, MOMENTUM, DECAY, CLIP, TRUST, AVERAGE, STEPS = 0.5, 0.9, 0.01, 1.5, 0.02, 0.8, 10


class Layer(torch.nn.Module):
    """One weight, which decays, and one bias, which does not."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.bias = torch.nn.Parameter(torch.tensor(bias))


def values(layer):
    return np.concatenate([layer.weight.detach().numpy().ravel(), layer.bias.detach().numpy()]).tolist()


def by_torch(start, grads, nesterov=False, clip=None, average=False):
    layer = Layer(*start)
    groups = [{"params": [layer.weight], "weight_decay": DECAY}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=nesterov)
    # The first call of update_parameters copies, so that the average starts at the initial values.
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    averaged.update_parameters(layer)
    out = []
    for weight, bias in grads:
        layer.weight.grad, layer.bias.grad = torch.tensor(weight), torch.tensor(bias)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), clip)
        optimizer.step()
        averaged.update_parameters(layer)
        out.append(values(averaged.module if average else layer))
    return out


def by_numpy(start, grads, is_2018):
    (w, b), (aw, ab) = [x.copy() for x in start], [np.zeros_like(x) for x in start]
    out = []
    for gw, gb in grads:
        total = gw + DECAY * w
        norm = np.linalg.norm(total if is_2018 else gw)
        rate = LR * TRUST * np.linalg.norm(w) / (norm + DECAY * np.linalg.norm(w))
        if is_2018:
            aw, ab = MOMENTUM * aw + total, MOMENTUM * ab + gb
            w, b = w - rate * aw, b - LR * ab
        else:
            aw, ab = MOMENTUM * aw + rate * total, MOMENTUM * ab + LR * gb
            w, b = w - aw, b - ab
        out.append(np.concatenate([w.ravel(), b]).tolist())
    return out


def losses(random):
    out = []
    for share, smoothing in [(1.0, 0.0), (0.3, 0.0), (0.5, 0.1), (0.9, 0.25)]:
        logits = torch.tensor(random.normal(size=(6, 5)) * 3, requires_grad=True)
        first, second = random.integers(5, size=6), random.integers(5, size=6)
        one_hot = [F.one_hot(torch.tensor(labels), 5).double() for labels in (first, second)]
        target = share * one_hot[0] + (1 - share) * one_hot[1]
        loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        loss.backward()
        out.append({
            "logits": logits.detach().numpy().ravel().tolist(),
            "first": first.tolist(),
            "second": second.tolist(),
            "share": share,
            "smoothing": smoothing,
            "loss": loss.item(),
            "gradient": logits.grad.numpy().ravel().tolist(),
        })
    return out


def main():
    random = np.random.default_rng(2018)
    start = (random.normal(size=(8, 3)), random.normal(size=8))
    grads = [
        [random.normal(size=shape) * (0.1 if step % 2 else 1.0) for shape in [(8, 3), (8,)]] for step in range(STEPS)
    ]
    flat = lambda pair: np.concatenate([pair[0].ravel(), pair[1]]).tolist()
    golden = {
        "lr": LR,
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "clip_norm": CLIP,
        "trust": TRUST,
        "average": AVERAGE,
        "start": flat(start),
        "gradients": [flat(pair) for pair in grads],
        "updates": {
            "sgd": by_torch(start, grads),
            "nesterov": by_torch(start, grads, nesterov=True),
            "clipped": by_torch(start, grads, clip=CLIP),
            "averaged": by_torch(start, grads, nesterov=True, average=True),
            "lars2018": by_numpy(start, grads, True),
            "lars": by_numpy(start, grads, False),
        },
        "losses": losses(random),
    }
    path = Path(__file__).with_name("updates.json")
    path.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")


main()
