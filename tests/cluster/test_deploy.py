"""The deployment files: valid by the schemas of those who read them, and true to what Oneira has."""

from __future__ import annotations

import configparser
import gzip
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from oneira.cluster.deploy import Deployment, deployment_files
from oneira.platform.errors import ConfigError, UsageError

HERE = Path(__file__).parent
COMMITTED = Path(__file__).parents[2] / "cluster/deploy"
SETTINGS = {
    "default": {}, "gpus": {"gpus": 2, "workers": 1, "most_workers": 1, "image": "registry.example.org:5000/a/oneira@sha256"},
    "other": {"name": "x", "namespace": "ml", "preset": "doom-hour", "attempts": 1, "machines": ()},
}  # fmt: skip


def strict(schema):
    """A schema of Kubernetes as the API server applies it with strict validation: fields that it does not know are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def schema_of(kind):
    with gzip.open(HERE / "kuberay" / f"{kind}.json.gz") as file:
        whole = strict(json.load(file))
    whole["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return whole


@pytest.fixture(scope="module")
def schemas():
    return {"RayJob": schema_of("rayjobs"), "RayService": schema_of("rayservices")}


def documents(**settings):
    files = deployment_files(Deployment(**settings))
    return {name: yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")} | {"texts": files}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_kuberay_takes_them(schemas, settings):
    made = documents(**settings)
    for name in ("rayjob.yaml", "rayservice.yaml"):
        jsonschema.validate(made[name], schemas[made[name]["kind"]])


@pytest.mark.parametrize("wrong", ["entrypiont", "backoffLimit", "workerGroupSpecs"])
def test_the_schemas_find_mistakes(schemas, wrong):
    document = documents()["rayjob.yaml"]
    if wrong == "entrypiont":
        document["spec"][wrong] = "oneira"
    elif wrong == "backoffLimit":
        document["spec"][wrong] = "five"
    else:
        document["spec"]["rayClusterSpec"][wrong][0]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schemas["RayJob"])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ray_takes_the_rest(settings):
    import ray.autoscaler

    made = documents(**settings)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(made["ray-up.yaml"], schema)
    from ray.serve.schema import ServeDeploySchema

    serve = ServeDeploySchema.model_validate(yaml.safe_load(made["rayservice.yaml"]["spec"]["serveConfigV2"]))
    assert serve.applications[0].args["layout"] == "split"


def test_every_cluster_asks_for_a_token_and_the_server_for_a_key():
    made = documents()
    job, service = made["rayjob.yaml"]["spec"]["rayClusterSpec"], made["rayservice.yaml"]["spec"]["rayClusterConfig"]
    assert job["authOptions"] == service["authOptions"] == {"mode": "token"}
    for pod in (service["headGroupSpec"], *service["workerGroupSpecs"]):
        names = [entry["name"] for entry in pod["template"]["spec"]["containers"][0]["env"]]
        assert names == ["ONEIRA_API_KEY"] and pod["template"]["spec"]["securityContext"]["runAsNonRoot"]
    up = made["ray-up.yaml"]
    assert all("RAY_AUTH_MODE=token" in up[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in made["texts"]["Dockerfile"] and "--key-file" in made["texts"]["oneira.service"]


def test_what_they_name_is_there():
    from oneira.platform.presets import load_preset

    made = documents()
    words = made["rayjob.yaml"]["spec"]["entrypoint"].split()
    load_preset(words[2])
    serve = yaml.safe_load(made["rayservice.yaml"]["spec"]["serveConfigV2"])
    assert serve["applications"][0]["import_path"] == "oneira.cluster.serving.deployed:app"
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string(made["texts"]["oneira.service"])
    assert set(unit) >= {"Unit", "Service", "Install"}
    options = re.findall(r"--[a-z-]+", unit["Service"]["ExecStart"])
    import inspect

    from oneira.cluster.commands import serve as command

    assert {option[2:].replace("-", "_") for option in options} <= set(inspect.signature(command).parameters)


def test_the_committed_files_are_those_of_the_default_settings():
    for name, text in deployment_files(Deployment()).items():
        assert (COMMITTED / name).read_text() == text, f"{name} is old: oneira deploy --out cluster/deploy"


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "Oneira"}, {"name": "a" * 60}, {"preset": "x; rm -rf /"}, {"image": "a b"}, {"model": "$(x)"}, {"user": "a\nb"},
        {"workers": 0}, {"workers": 9}, {"gpus": -1}, {"cpus": 0}, {"machines": ("a b",)}, {"attempts": 0},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        Deployment(**settings)


def test_the_application_of_a_file_needs_a_key_and_a_model(monkeypatch):
    from oneira.cluster.serving.deployed import app

    monkeypatch.delenv("ONEIRA_API_KEY", raising=False)
    with pytest.raises(UsageError, match="ONEIRA_API_KEY"):
        app({"models": ["m"]})
    monkeypatch.setenv("ONEIRA_API_KEY", "k")
    for wrong, word in (
        ({"models": []}, "No model"),
        ({"models": ["m"], "layuot": "x"}, "layout"),
        ({"models": ["m"], "layout": "x"}, "layout"),
    ):
        with pytest.raises(UsageError, match=word):
            app(wrong)
    assert app({"models": ["m"], "layout": "split", "cpus": 8}) is not None
