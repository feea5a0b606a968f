#!/usr/bin/env python3
"""Read an MLflow store and TensorBoard's event files as their own programs do, and print what is there as JSON.

Tested with Python 3.11, mlflow 3.17.2 and tensorboard 2.21.0, in an environment of its own:

    python3 -m venv venv && venv/bin/pip install mlflow tensorboard
    venv/bin/python crates/track/tests/clients.py MLFLOW_DB RUN_ID EVENT_DIRECTORY

MLflow migrates the file to its own schema. crates/track/tests/it/clients.rs runs this with the Python that the
environment variable RUNNER_PYTHON names.
"""

import json
import math
import os
import pathlib
import sys

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

import mlflow
import tensorboard
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def number(value):
    """A number as JSON knows it, else a string."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def artifacts(client, run_id, folder=None):
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from artifacts(client, run_id, entry.path)
        else:
            path = client.download_artifacts(run_id, entry.path)
            yield entry.path, pathlib.Path(path).read_text()


def read_mlflow(db, run_id):
    client = MlflowClient(tracking_uri=f"sqlite:///{db}")
    run = client.get_run(run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    found = client.search_runs([experiment.experiment_id])
    history = {
        key: [[m.step, number(m.value), m.timestamp] for m in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    return {
        "experiment": {"id": experiment.experiment_id, "name": experiment.name, "stage": experiment.lifecycle_stage},
        "runs": sorted(r.info.run_id for r in found),
        "run": {
            "name": run.info.run_name,
            "user": run.info.user_id,
            "status": run.info.status,
            "stage": run.info.lifecycle_stage,
            "start_time": run.info.start_time,
            "end_time": run.info.end_time,
            "artifact_uri": run.info.artifact_uri,
        },
        "params": run.data.params,
        "tags": run.data.tags,
        "latest": {key: number(value) for key, value in run.data.metrics.items()},
        "history": history,
        "artifacts": dict(artifacts(client, run_id)),
    }


def read_tensorboard(folder):
    events = EventAccumulator(folder, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [[e.step, number(e.value), e.wall_time] for e in events.Scalars(tag)] for tag in tags}


def main():
    db, run_id, folder = sys.argv[1:]
    result = {
        "versions": {"mlflow": mlflow.__version__, "tensorboard": tensorboard.__version__},
        "mlflow": read_mlflow(db, run_id),
        "tensorboard": read_tensorboard(folder),
    }
    print(json.dumps(result, allow_nan=False))


main()
