"""The manifests of examples/gke: their commands exist, and their times and numbers fit each other."""

import json
import math
from pathlib import Path

import pytest
import yaml

from dbrx_jax.cli.commands import PROGRAM
from dbrx_jax.config import configs_folder

FOLDER = Path(__file__).parents[2] / "examples" / "gke"
DOCUMENTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in FOLDER.glob("*.yaml")}


def pods(name):
    """The specs of the pods of a file, that of the listening process first, and the number of hosts of a replica."""
    spec = DOCUMENTS[name][0]["spec"]
    if name == "one-host.yaml":
        return [spec["template"]], 1
    group = spec["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]], group["size"]


def command(template, num_hosts):
    """The command of a pod as dbrx-jax reads it, in a worker of a LeaderWorkerSet."""
    variables = {"LWS_LEADER_ADDRESS": "dbrx-0.dbrx", "LWS_GROUP_SIZE": num_hosts, "LWS_WORKER_INDEX": 1}
    program, *words = template["spec"]["containers"][0]["command"]
    assert program == "dbrx-jax"
    for name, value in variables.items():
        words = [word.replace(f"$({name})", str(value)) for word in words]
    return PROGRAM.parse(words)


def test_every_file_is_a_manifest():
    assert DOCUMENTS.keys() == {"one-host.yaml", "slice.yaml", "gateway.yaml"}
    for document in (document for some in DOCUMENTS.values() for document in some):
        assert {"apiVersion", "kind", "metadata", "spec"} == document.keys()


@pytest.mark.parametrize("name", ["one-host.yaml", "slice.yaml"])
def test_commands_and_times(name):
    templates, num_hosts = pods(name)
    commands = [command(template, num_hosts) for template in templates]
    assert all(one == commands[0] for one in commands)
    serve = commands[0]
    serve._check()
    assert (serve.checkpoint, serve.host, serve.api_key_file) == (
        "gs://BUCKET/dbrx-orbax",
        "0.0.0.0",
        Path("/keys/keys.txt"),
    )
    assert serve.distributed == (num_hosts > 1)
    mesh = json.loads((configs_folder() / "meshes" / f"{serve.mesh}.json").read_text())
    for template in templates:
        spec, container = template["spec"], template["spec"]["containers"][0]
        chips = num_hosts * container["resources"]["limits"]["google.com/tpu"]
        assert chips == math.prod(mesh["axes"].values())
        assert chips == math.prod(map(int, spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
        waits = container["lifecycle"]["preStop"]["sleep"]["seconds"] + serve.drain_seconds
        assert spec["terminationGracePeriodSeconds"] >= waits + 20
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("name", ["one-host.yaml", "slice.yaml"])
def test_probes_and_service(name):
    templates, num_hosts = pods(name)
    template = templates[0]
    serve, container = command(template, num_hosts), template["spec"]["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": serve.port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > serve.drain_seconds
    service = DOCUMENTS[name][1]["spec"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    if name == "slice.yaml":
        assert not service["selector"].items() <= templates[1]["metadata"]["labels"].items()


def test_gateway_reaches_the_servers():
    pool, _, route = DOCUMENTS["gateway.yaml"]
    template = pods("one-host.yaml")[0][0]
    assert pool["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert pool["spec"]["targetPorts"] == [{"number": template["spec"]["containers"][0]["ports"][0]["containerPort"]}]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
