#!/usr/bin/env python3
"""Start TensorBoard on a folder of runs, ask its HTTP API what its dashboards would show, and print that as JSON.

Tested with Python 3.11 and tensorboard 2.21.0:

    python3 -m venv venv && venv/bin/pip install tensorboard
    venv/bin/python crates/track/tests/boards.py runs

crates/track/tests/it/clients.rs runs this with the Python that the environment variable RUNNER_PYTHON names.
"""

import json
import logging
import sys
import time
import urllib.request

from tensorboard import program

logging.disable(logging.WARNING)


def main():
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", sys.argv[1], "--port", "0", "--host", "127.0.0.1", "--load_fast", "false"])
    url = server.launch()

    def get(path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(url + "data/" + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def read(path, body=None):
        return json.loads(get(path, body))

    runs = []
    for _ in range(300):  # it loads in the background
        runs = read("runs")
        if runs and all(read(f"plugin/{p}/tags") for p in ("scalars", "histograms", "images", "text")):
            break
        time.sleep(0.1)
    found = {"runs": runs}
    for plugin in ("scalars", "histograms", "images", "text"):
        found[plugin] = {run: sorted(tags) for run, tags in read(f"plugin/{plugin}/tags").items()}
    histograms = found["histograms"]
    found["buckets"] = {
        tag: read(f"plugin/histograms/histograms?run={run}&tag={urllib.request.quote(tag)}")
        for run, tags in histograms.items()
        for tag in tags[:1]
    }
    found["image"] = []
    for run in found["images"]:
        for image in read(f"plugin/images/images?run={run}&tag=train/images&sample=0"):
            pixels = get("plugin/images/individualImage?" + image["query"])
            size = [int.from_bytes(pixels[at : at + 4], "big") for at in (16, 20)]  # of the PNG's header
            found["image"].append([*size, list(pixels[:8])])
    found["words"] = {run: read(f"plugin/text/text?run={run}&tag=spec") for run in found["text"]}
    found["graph"] = {
        run: get(f"plugin/graphs/graph?run={run}&limit_attr_size=1024&large_attrs_key=_too_large_attrs").decode()
        for run, info in read("plugin/graphs/info").items()
        if info["run_graph"]
    }
    request = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "startIndex": 0,
        "sliceSize": 100,
        "colParams": [],
    }
    read("plugin/hparams/experiment", {"experimentName": ""})
    found["hparams"] = read("plugin/hparams/session_groups", request)["sessionGroups"]
    print(json.dumps(found))


main()
