"""Runs `runner bench engine` and PyTorch in turn and prints a table of both, in Markdown.

    python benches/engine/compare.py --runner target/release/runner
    python benches/engine/compare.py --runner target/release/runner --only train-f32 --only infer-f32 --rounds 5

The Python that runs this also runs PyTorch, so it needs what requirements.txt says; this file itself needs nothing.
Every measurement is a process of its own. They take turns (ours, each variant of PyTorch, ours, ..), so that a slow
minute of the machine hits all of them. The README beside this file says what is compared, and how.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What both sides compute; the names are those of the arguments of `runner bench engine`."""

    mode: str
    precision: str
    batch: int = 16
    depth: int = 50
    resolution: int = 224

    def arguments(self):
        return [word for key, value in dataclasses.asdict(self).items() for word in (f"--{key}", str(value))]

    def title(self):
        verb = {"train": "training", "infer": "inference"}[self.mode]
        return f"ResNet-{self.depth} {verb}, {self.precision}, batch {self.batch}, {self.resolution} px"


CONFIGURATIONS = {
    "train-f32": Configuration("train", "f32"),
    "train-bf16": Configuration("train", "bf16"),
    "infer-f32": Configuration("infer", "f32"),
    "infer-bf16": Configuration("infer", "bf16"),
    "infer1-f32": Configuration("infer", "f32", batch=1),
    "train18-f32": Configuration("train", "f32", depth=18),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run PyTorch; channels_last in any case."""

    modes: tuple
    arguments: tuple = ()
    environment: tuple = ()


# The allocator keeps what it has, in huge pages where the kernel gives them, instead of mapping and clearing every
# large tensor anew.
TUNED = (
    (
        "GLIBC_TUNABLES",
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=34359738368"
        ":glibc.malloc.trim_threshold=34359738368:glibc.malloc.mmap_max=0",
    ),
)
OURS = "runner"
VARIANTS = {
    "eager": Variant(("train", "infer")),
    "eager, tuned malloc": Variant(("train", "infer"), environment=TUNED),
    "eager, tuned malloc, fused SGD": Variant(("train",), ("--fused-sgd",), TUNED),
    "compiled and frozen, tuned malloc": Variant(("infer",), ("--compile",), TUNED),
}

# What a shell may have set for other programs, and what would change how either side allocates or computes.
UNSET = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "GLIBC_TUNABLES", "LD_PRELOAD", "ONEDNN_VERBOSE", "DNNL_VERBOSE"}
UNSET_PREFIXES = ("MALLOC_", "TCMALLOC_", "JEMALLOC_", "MIMALLOC_", "_RJEM_")


def environment(extra=()):
    def stays(name):
        return name not in UNSET and not name.startswith(UNSET_PREFIXES)

    return {name: value for name, value in os.environ.items() if stays(name)} | dict(extra)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", required=True, type=pathlib.Path, help="the binary, built with --release")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side [default: 3]")
    parser.add_argument(
        "--only",
        action="append",
        choices=CONFIGURATIONS,
        metavar="NAME",
        help=f"only this configuration; may be given often: {', '.join(CONFIGURATIONS)}",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[default: all cores]")
    parser.add_argument("--steps", type=int, default=5, help="steps of a measurement, at least; it also fills 3 s")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="also write table.md and runs.jsonl there")
    args = parser.parse_args()
    if not args.runner.is_file():
        parser.error(f"--runner {args.runner}: no such file; cargo build --release makes target/release/runner")
    if min(args.rounds, args.threads, args.steps) < 1:
        parser.error("--rounds, --threads and --steps are 1 or more")
    return args


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def machine(args):
    said = subprocess.run([args.runner, "--version"], capture_output=True, text=True, check=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "system": f"{platform.system()} {platform.release()}",
        "runner": said.stdout.strip(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def busy_seconds():
    """CPU seconds that the whole machine has worked; None where the system does not say."""
    try:
        first = pathlib.Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def child_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command, variables):
    """Runs a command to its end: (what it printed as JSON or None, why not, share of the cores that others used)."""
    busy, own, start = busy_seconds(), child_seconds(), time.monotonic()
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    wall, own = time.monotonic() - start, child_seconds() - own
    others = None
    if busy is not None:
        others = round(max(0.0, busy_seconds() - busy - own) / wall / os.cpu_count(), 3)
    if process.returncode != 0:
        said = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return None, said[0] if command[0] != sys.executable else said[-1], others
    return json.loads(process.stdout), None, others


def sides(configuration, args):
    """Every command that measures a configuration, ours first: name, command, environment."""
    common = configuration.arguments() + ["--threads", str(args.threads), "--steps", str(args.steps)]
    yield OURS, [str(args.runner), "bench", "engine", "--json", *common], environment()
    for name, variant in VARIANTS.items():
        if configuration.mode in variant.modes:
            command = [sys.executable, str(HERE / "torch_step.py"), *common, *variant.arguments]
            yield name, command, environment(variant.environment)


def compare(name, configuration, args, record):
    """All rounds of a configuration: the results of each side."""
    results, failed = {}, set()
    for turn in range(args.rounds):
        for side, command, variables in sides(configuration, args):
            if side in failed:
                continue
            if "--compile" in command and not (os.environ.get("CXX") or shutil.which("g++")):
                failed.add(side)
                print(f"{name}: {side}: skipped: torch.compile needs a C++ compiler (g++)", file=sys.stderr)
                continue
            load = os.getloadavg()[0]
            result, why, others = measure(command, variables)
            record({"configuration": name, "round": turn, "side": side, "load": load, "others_cpu_share": others}
                   | ({"result": result} if result else {"error": why}))
            if result is None:
                failed.add(side)
                print(f"{name}: {side}: skipped: {why}", file=sys.stderr)
                continue
            results.setdefault(side, []).append(result)
            rate = result["images_per_s"]["median"]
            print(f"{name}, round {turn + 1}: {side}: {rate:.2f} images/s", file=sys.stderr)
    return results


def rates(results):
    return [result["images_per_s"]["median"] for result in results]


def memory(results):
    """The median peak over the rounds, bytes; None where the system does not say."""
    peaks = [result["peak_resident_bytes"] for result in results]
    return None if None in peaks else statistics.median(peaks)


def row(name, results):
    """A line of the table, cell by cell."""

    def rate(side):
        if side not in results:
            return "-"
        all_rates = rates(results[side])
        text = f"{statistics.median(all_rates):.2f}"
        return text if len(all_rates) == 1 else f"{text} ({min(all_rates):.2f}-{max(all_rates):.2f})"

    def mib(n_bytes):
        return "-" if n_bytes is None else f"{n_bytes / 2**20:.0f}"

    peers = {side: statistics.median(rates(found)) for side, found in results.items() if side != OURS}
    ours = results.get(OURS)
    ratio = memory_ratio = fraction = "-"
    our_peak = memory(ours) if ours else None
    their_peak = min(filter(None, (memory(results[side]) for side in peers)), default=None)
    if ours:
        fraction = f"{100 * statistics.median(result['fraction_of_peak'] for result in ours):.0f} %"
    if ours and peers:
        ratio = f"**{statistics.median(rates(ours)) / max(peers.values()):.2f}**"
    if our_peak and their_peak:
        memory_ratio = f"{our_peak / their_peak:.2f}"
    return [name, rate(OURS), fraction, *map(rate, VARIANTS), ratio, mib(our_peak), mib(their_peak), memory_ratio]


HEADER = ["", OURS, "of peak", *VARIANTS, "ratio to the best PyTorch", "MiB", "least MiB of PyTorch", "memory ratio"]


def table(header, all_results):
    """The whole report, in Markdown."""
    described = ", ".join(f"{key} {value}" for key, value in header.items() if key != "load")
    lines = [f"{described}, load {header['load']:.2f} at the start.", ""]
    lines += [f"- {name}: {CONFIGURATIONS[name].title()}" for name in all_results]
    legend = "images/s: the median over the rounds of each process's median, and their range. Memory: peak resident."
    lines += ["", legend, ""]
    lines += ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(row(name, results)) + " |" for name, results in all_results.items()]
    return "\n".join(lines) + "\n"


def main():
    args = arguments()
    header = machine(args)
    runs = None
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        runs = open(args.out / "runs.jsonl", "w")

    def record(entry):
        if runs:
            print(json.dumps(entry), file=runs, flush=True)

    record(header)
    all_results = {}
    for name in args.only or CONFIGURATIONS:
        all_results[name] = compare(name, CONFIGURATIONS[name], args, record)
    text = table(header, all_results)
    print(text, end="")
    if args.out:
        (args.out / "table.md").write_text(text)
    if not all(OURS in results and len(results) > 1 for results in all_results.values()):
        sys.exit("compare.py: not every configuration has both sides; see above")


if __name__ == "__main__":
    main()
