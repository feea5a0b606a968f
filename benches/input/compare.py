#!/usr/bin/env python3
"""Our input pipeline and tf.data in turn, on the same shards. Prints a table; see README.md."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))


def last_json(command):
    """What the command printed: one JSON document, or lines of which the last is one."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", required=True, help="the release binary")
    parser.add_argument("--data", required=True, help="glob of the shards")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="file for a line of JSON for each process")
    args = parser.parse_args()

    common = ["--data", args.data, "--resolution", str(args.resolution), "--batch", str(args.batch)]
    ours = [args.runner, "bench", "input", *common, "--json"]
    theirs = [sys.executable, os.path.join(HERE, "tfdata.py"), *common]
    index = tempfile.TemporaryDirectory()
    last_json([args.runner, "data", "index", args.data, index.name, "--json"])
    variants = {
        "ours, fast": ours,
        "ours, fast, index": [*ours, "--index", index.name],
        "tf.data": theirs,
        "ours, exact": [*ours, "--decode", "exact"],
        "tf.data, antialias": [*theirs, "--antialias"],
    }
    runs = {}
    for number in range(args.rounds):
        for threads in args.threads:
            for name, command in variants.items():
                report = last_json([*command, "--threads", str(threads)])
                runs.setdefault((threads, name), []).append(report)
                line = json.dumps({"round": number, "threads": threads, "variant": name, **report})
                print(line[:160], file=sys.stderr)
                if args.out:
                    with open(args.out, "a") as out:
                        out.write(line + "\n")

    def cell(values):
        return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"

    print("| threads | pipeline | images/CPU-s | images/s | to tf.data, CPU | to tf.data, wall |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (threads, name), reports in runs.items():
        cpu = [report["images_per_cpu_s"] for report in reports]
        wall = [report["images_per_s"] for report in reports]
        base = runs[threads, "tf.data"]
        ratio = [
            statistics.median(mine) / statistics.median(report[key] for report in base)
            for mine, key in ((cpu, "images_per_cpu_s"), (wall, "images_per_s"))
        ]
        print(f"| {threads} | {name} | {cell(cpu)} | {cell(wall)} | {ratio[0]:.2f} | {ratio[1]:.2f} |")


if __name__ == "__main__":
    main()
