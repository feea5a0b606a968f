"""Compares the losses of runs with Winograd's transforms and without, seed by seed, and of different seeds.

    python curves.py DIR      where DIR has SEED-true and SEED-false, the run directories
"""

import itertools
import json
import math
import pathlib
import sys

STEPS, WINDOW = 200, 20


def curve(run):
    """log of the loss, smoothed over WINDOW steps; and the last evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [math.log(line["train/loss"]) for line in lines if "train/loss" in line][:STEPS]
    smooth = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
    evaluations = [line["eval/top1"] for line in lines if "eval/top1" in line]
    return smooth, evaluations[-1], max(evaluations)


def gap(a, b):
    """Mean and largest distance of two curves."""
    distances = [abs(x - y) for x, y in zip(a[0], b[0], strict=True)]
    return sum(distances) / len(distances), max(distances)


def main():
    runs = {path.name: curve(path) for path in sorted(pathlib.Path(sys.argv[1]).iterdir())}
    for name, (_, last, best) in runs.items():
        print(f"{name:10}  last top1 {last:.4f}  best {best:.4f}")
    seeds = sorted({name.split("-")[0] for name in runs})
    for seed in seeds:
        mean, most = gap(runs[f"{seed}-true"], runs[f"{seed}-false"])
        print(f"on and off, seed {seed}: mean {mean:.3f}, at most {most:.3f}")
    for kind in ("true", "false"):
        for a, b in itertools.combinations(seeds, 2):
            mean, most = gap(runs[f"{a}-{kind}"], runs[f"{b}-{kind}"])
            print(f"seeds {a} and {b}, {kind}: mean {mean:.3f}, at most {most:.3f}")


if __name__ == "__main__":
    main()
