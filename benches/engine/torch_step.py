"""Times one configuration of PyTorch and prints one line of JSON, with the names of `runner bench engine --json`.

A process times one configuration, because the peak of its memory is part of the result. compare.py calls this; by
hand: python torch_step.py --depth 50 --batch 16 --mode train --precision f32 --threads 2
"""

import argparse
import json
import math
import statistics
import time

import torch
import torchvision

WARM_UP_STEPS, TIMED_SECONDS = 2, 3.0
CLASSES = 1000


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mode", choices=["train", "infer"], default="train")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="bf16 is autocast")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, default=5, help="steps to time at least; they also fill 3 s")
    parser.add_argument("--fused-sgd", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile; for inference with frozen weights")
    return parser.parse_args()


def make_step(args):
    """The network, made-up images, and a function that does one step and returns a number of its result."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, f"resnet{args.depth}")(weights=None)
    network = network.to(memory_format=torch.channels_last)
    x = torch.randn(args.batch, 3, args.resolution, args.resolution).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (args.batch,))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16")

    if args.mode == "train":
        network.train()
        # The same update as `runner bench engine`.
        sgd = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=args.fused_sgd)
        loss_of = torch.nn.CrossEntropyLoss()
        forward = torch.compile(network) if args.compile else network

        def train():
            with autocast:
                loss = loss_of(forward(x).float(), y)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
            return loss.item()

        return train

    network.eval()
    forward = network
    if args.compile:
        import torch._inductor.config as inductor

        inductor.freezing = True  # folds the normalisations into the weights
        forward = torch.compile(network)
    # Freezing does nothing under inference_mode.
    without_gradients = torch.no_grad if args.compile else torch.inference_mode

    def infer():
        with without_gradients(), autocast:
            return forward(x)[0, 0].item()

    return infer


def peak_resident_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return None


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    step = make_step(args)
    for _ in range(WARM_UP_STEPS):
        step()
    seconds, since = [], time.perf_counter()
    while len(seconds) < args.steps or time.perf_counter() - since < TIMED_SECONDS:
        start = time.perf_counter()
        result = step()
        seconds.append(time.perf_counter() - start)
        assert math.isfinite(result), "the network computes numbers that are not finite"
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "steps": len(seconds),
                "images_per_s": {
                    "median": args.batch / statistics.median(seconds),
                    "min": args.batch / max(seconds),
                    "max": args.batch / min(seconds),
                },
                "peak_resident_bytes": peak_resident_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
