#!/usr/bin/env python3
"""Read all runs of experiments from an MLflow server as MLflow's own client does, and print them as JSON.

Tested with Python 3.11 and mlflow 3.17.2:

    python3 -m venv venv && venv/bin/pip install mlflow
    venv/bin/python crates/track/tests/served.py http://127.0.0.1:5000 EXPERIMENT...

MLflow's environment variables (MLFLOW_TRACKING_USERNAME, ..) count. crates/track/tests/it/rest.rs runs this with the
Python that the environment variable RUNNER_PYTHON names.
"""

import hashlib
import json
import math
import os
import pathlib
import sys

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

import mlflow
from mlflow import MlflowClient
from mlflow.models import Model


def number(value):
    """A number as JSON knows it, else a string."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def digest(path):
    path = pathlib.Path(path)
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def artifacts(client, run_id):
    return {
        entry.path: digest(client.download_artifacts(run_id, entry.path))
        for entry in client.list_artifacts(run_id)
        if not entry.is_dir
    }


def models(client, run):
    found = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'")
    for model in found:
        folder = pathlib.Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model.model_id}"))
        loaded = Model.load(str(folder))
        yield {
            "name": model.name,
            "status": str(model.status),
            # MLflow's client notes beside what it downloads which version that is.
            "files": sorted(p.name for p in folder.iterdir() if p.name != "registered_model_meta"),
            "flavors": loaded.flavors,
            "run_id": loaded.run_id,
            "checkpoint": digest(folder / loaded.flavors["runner"]["checkpoint"]),
            "versions": [
                {"name": v.name, "version": v.version, "status": v.status}
                for v in client.search_model_versions(f"run_id = '{run.info.run_id}'")
                if v.model_id in (None, model.model_id)
            ],
        }


def read(client, run):
    run_id = run.info.run_id
    return {
        "id": run_id,
        "name": run.info.run_name,
        "user": run.info.user_id,
        "status": run.info.status,
        "start_time": run.info.start_time,
        "end_time": run.info.end_time,
        "params": run.data.params,
        "tags": run.data.tags,
        "history": {
            key: [[m.step, number(m.value), m.timestamp] for m in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "latest": {key: number(value) for key, value in run.data.metrics.items()},
        "datasets": [
            {
                "name": i.dataset.name,
                "digest": i.dataset.digest,
                "source": i.dataset.source,
                "profile": i.dataset.profile,
                "tags": {t.key: t.value for t in i.tags},
            }
            for i in run.inputs.dataset_inputs
        ],
        "artifacts": artifacts(client, run_id),
        "models": list(models(client, run)),
    }


def main():
    url, *names = sys.argv[1:]
    mlflow.set_tracking_uri(url)
    client = MlflowClient(tracking_uri=url, registry_uri=url)
    found = {}
    for name in names:
        experiment = client.get_experiment_by_name(name)
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
        found[name] = [read(client, run) for run in runs]
    print(json.dumps(found, allow_nan=False))


main()
