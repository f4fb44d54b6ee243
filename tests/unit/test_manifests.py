"""The manifests of deploy/kubernetes are valid, whole and restricted; and the checks that say so find what is broken."""

from __future__ import annotations

import copy
import re
import runpy
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit import manifests
from tests.unit.manifests import BROUGHT, KUBERNETES, RELEASES, Document, of_kind, rendered, yaml

from ome_tensor_client.health import check_health
from ome_tensor_server.meters import Meters, MetricsPage
from ome_tensor_server.testing import running_server

ROOT = KUBERNETES.parents[1]
OVERLAYS = ("base", "overlays/trial", "overlays/lab", "overlays/training")
EXAMPLE = "examples/training"
PODS = "ome-tensor-pods"
PARTS = sorted(
    path
    for path in KUBERNETES.rglob("*.yaml")
    # Patches, and what is no resource, are no manifests by themselves.
    if path.name not in ("kustomization.yaml", "prometheus-adapter-rules.yaml")
    and path.parent.name not in ("plain-text", "uploads")
)


@pytest.fixture(scope="module")
def base() -> list[Document]:
    return rendered("base")


@pytest.fixture(scope="module")
def training() -> list[Document]:
    """The overlay in which there is most."""
    return rendered("overlays/training")


def problems(documents: list[Document]) -> Iterator[str]:
    """All that is wrong with a server's manifests."""
    yield from manifests.schema(documents, *RELEASES)
    for check in (manifests.selectors, manifests.references, manifests.settings, manifests.restricted, manifests.policies):
        yield from check(documents)


def only(documents: list[Document], kind: str, name: str = "") -> Document:
    (found,) = (document for document in of_kind(documents, kind) if document["metadata"]["name"].startswith(name))
    return found


def test_each_overlay_is_looked_at() -> None:
    folders = {str(path.parent.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("kustomization.yaml")}
    assert {folder for folder in folders if not folder.startswith("components/")} == {*OVERLAYS, EXAMPLE}
    used = {
        component.removeprefix("../../")
        for folder in OVERLAYS
        for component in yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text()).get("components", ())
    }
    assert {folder for folder in folders if folder.startswith("components/")} == used


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_each_manifest_is_valid_as_it_lies(path: Path) -> None:
    """Without kustomize, too."""
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    assert not list(manifests.schema(documents, *RELEASES))


@pytest.mark.parametrize("folder", OVERLAYS)
def test_each_overlay_holds_together(folder: str) -> None:
    assert not list(problems(rendered(folder)))


def test_overlays_are_what_they_say() -> None:
    by_name = {folder: rendered(folder) for folder in OVERLAYS}
    kinds = {folder: {document["kind"] for document in documents} for folder, documents in by_name.items()}
    servers = {folder: only(documents, "StatefulSet")["spec"] for folder, documents in by_name.items()}
    assert {folder: server.get("replicas") for folder, server in servers.items()} == {
        "base": 2,
        "overlays/trial": 1,
        "overlays/lab": 1,  # An upload is there on one server alone.
        "overlays/training": None,  # The autoscaler's to say.
    }
    assert {folder for folder in OVERLAYS if "HorizontalPodAutoscaler" in kinds[folder]} == {"overlays/training"}
    for folder, documents in by_name.items():
        variables = manifests.environment(documents)
        assert bool(variables["OME_TENSOR_TLS_CERT"]) == bool(variables["OME_TENSOR_TOKENS"]) == (folder != "overlays/trial")
        assert bool(variables["OME_TENSOR_UPLOADS"]) == (folder == "overlays/lab")
        claims = [claim["metadata"]["name"] for claim in servers[folder]["volumeClaimTemplates"]]
        assert claims == (["store", "uploads"] if folder == "overlays/lab" else ["store"])


def test_the_image_is_this_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    for folder in (*OVERLAYS, EXAMPLE):
        for owner, template in manifests.pods(rendered(folder)):
            (container,) = template["spec"]["containers"]
            assert container["image"] == ("ome-tensor-client-torch" if "Job" in owner else "ome-tensor") + f":{version}"
            context = template["spec"]["securityContext"]
            assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
            assert context["fsGroup"] == context["runAsGroup"]


@pytest.mark.parametrize("folder", ["base", "overlays/trial"])
def test_a_server_answers_the_probes(folder: str) -> None:
    """Once it serves; by HTTP, and in plain text by gRPC."""
    probes = {name: probe for name, probe in container(rendered(folder)).items() if name.endswith("Probe")}
    assert probes.keys() == {"startupProbe", "readinessProbe", "livenessProbe"}
    with running_server([], metrics="127.0.0.1:0") as server:
        for probe in probes.values():
            if "grpc" in probe:
                assert check_health(server.target, service=probe["grpc"].get("service", "")) == "SERVING"
            else:
                address = f"http://{server.server.metrics_address}{probe['httpGet']['path']}"
                with urllib.request.urlopen(address, timeout=10) as answer:
                    assert answer.status == 200
        server.server._service.drain()
        ready = probes["readinessProbe"]
        # By gRPC it turns when a server is stopped, which tests of health are about.
        if "httpGet" in ready:
            with pytest.raises(urllib.error.HTTPError, match="503") as raised:
                urllib.request.urlopen(f"http://{server.server.metrics_address}{ready['httpGet']['path']}", timeout=10)
            raised.value.close()


def test_the_example_fits_the_servers(base: list[Document]) -> None:
    example = rendered(EXAMPLE)
    for check in (manifests.references, manifests.restricted):
        assert not list(check(example))
    assert not list(manifests.schema(example, *RELEASES))
    job, server = only(example, "Job")["spec"], only(base, "StatefulSet")
    clients = only(base, "NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert clients.items() <= job["template"]["metadata"]["labels"].items()
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    pods, port = server["spec"]["serviceName"], manifests.ports(server["spec"]["template"])["grpc"]
    assert variables["SERVERS"].split(",") == [
        f"{server['metadata']['name']}-{number}.{pods}.$(NAMESPACE).svc:{port}" for number in range(server["spec"]["replicas"])
    ]
    # Kubernetes puts in what was named before.
    names = [variable["name"] for variable in container["env"]]
    assert names.index("NAMESPACE") < names.index("SERVERS")
    assert int(variables["RANKS"]) == job["completions"] == job["parallelism"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    for name in ("CA", "TOKEN_FILE"):
        folder, _, file = variables[name].rpartition("/")
        # And nothing beside: the secret with the authority's certificate has the server's key in it.
        assert [item["path"] for item in volumes[mounts[folder]]["secret"]["items"]] == [file]
    folder, _, script = container["command"][1].rpartition("/")
    assert script in only(example, "ConfigMap", volumes[mounts[folder]]["configMap"]["name"])["data"]


def test_alerts_are_those_of_prometheus() -> None:
    made = runpy.run_path(str(KUBERNETES / "prometheus_rule.py"))
    alerts, rule = made["ALERTS"].read_text(), made["RULE"].read_text()
    assert rule == made["prometheus_rule"](alerts), "run deploy/kubernetes/prometheus_rule.py"
    assert yaml.safe_load(rule)["spec"] == yaml.safe_load(alerts)


def test_the_operators_job_is_the_alerts_job(training: list[Document]) -> None:
    """A target's label `job` is its Service's name."""
    selector = only(training, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    (service,) = (x for x in of_kind(training, "Service") if selector <= x["metadata"]["labels"].items())
    jobs = re.findall(r'job=~"([^"]+)"', (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert jobs
    assert all(re.fullmatch(job, service["metadata"]["name"]) for job in jobs)


def test_the_autoscalers_metric_is_one_that_servers_tell(training: list[Document]) -> None:
    (metric,) = only(training, "HorizontalPodAutoscaler")["spec"]["metrics"]
    (rule,) = yaml.safe_load((KUBERNETES / "components" / "autoscale" / "prometheus-adapter-rules.yaml").read_text())
    series = rule["seriesQuery"].partition("{")[0]
    told = MetricsPage(Meters(), lambda: ()).text().decode()
    assert re.search(rf"^{series} 0\.0$", told, re.MULTILINE)
    # As the adapter does, which is written in Go.
    name = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("${1}", r"\1"), series)
    assert name == metric["pods"]["metric"]["name"]
    assert f"rate({series}" in rule["metricsQuery"].replace("<<.Series>>", series)


def test_the_guide_names_what_there_is() -> None:
    guide = (ROOT / "docs" / "clusters.md").read_text()
    for name, keys in BROUGHT.items():
        assert all(f"`{word}`" in guide or f"={word}" in guide or f" {word}" in guide for word in (name, *keys))
    for folder in KUBERNETES.glob("*/*/kustomization.yaml"):
        assert f"`{folder.parent.relative_to(KUBERNETES)}`" in guide


# --- each kind of mistake is found -------------------------------------------------------------------------------------


def pod(documents: list[Document]) -> Document:
    found: Document = only(documents, "StatefulSet")["spec"]["template"]["spec"]
    return found


def container(documents: list[Document]) -> Document:
    found: Document = pod(documents)["containers"][0]
    return found


def volume(documents: list[Document], name: str) -> Document:
    (found,) = (volume for volume in pod(documents)["volumes"] if volume["name"] == name)
    return found


def policy(documents: list[Document], field: str) -> Any:
    return only(documents, "NetworkPolicy", "ome-tensor-metrics")["spec"][field]


def say(name: str, value: str) -> Callable[[list[Document]], object]:
    return lambda documents: only(documents, "ConfigMap")["data"].update({f"OME_TENSOR_{name}": value})


Mistake = tuple[Callable[[list[Document]], object], str]

#: By the check that is to find it: what is done to the manifests, and what the check says.
MISTAKES: dict[str, dict[str, Mistake]] = {
    "schema": {
        "a field that there is not": (lambda x: pod(x).update(restart="Always"), r"'restart' was unexpected"),
        "a type": (lambda x: only(x, "StatefulSet")["spec"].update(serviceName=7), r"7 is not of type"),
        "a version": (lambda x: only(x, "PodDisruptionBudget").update(apiVersion="policy/v1beta1"), r"PodDisruptionBudget"),
        "an interval": (lambda x: only(x, "ServiceMonitor")["spec"]["endpoints"][0].update(interval="often"), r"interval"),
        "an endpoint": (lambda x: only(x, "ServiceMonitor")["spec"]["endpoints"][0].update(prt="x"), r"unknown fields"),
        "an alert": (
            lambda x: only(x, "PrometheusRule")["spec"]["groups"][0]["rules"][0].update(fore="1m"),
            r"unknown fields",
        ),
    },
    "selectors": {
        "a Service": (lambda x: only(x, "Service", PODS)["spec"]["selector"].update(a="b"), rf"{PODS}: picks no pods"),
        "its port": (lambda x: only(x, "Service", PODS)["spec"]["ports"][0].update(targetPort="grcp"), r"no port grcp"),
        "a budget": (
            lambda x: only(x, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].update(a="b"),
            r"Budget ome-tensor: picks no pods",
        ),
        "a policy": (lambda x: policy(x, "podSelector")["matchLabels"].update(a="b"), r"ome-tensor-metrics: picks no pods"),
        "its ports": (lambda x: policy(x, "ingress")[0]["ports"][0].update(port="metric"), r"no port metric"),
        "labels": (
            lambda x: only(x, "StatefulSet")["spec"]["template"]["metadata"].update(labels={"app": "x"}),
            r"StatefulSet ome-tensor: picks no pods",
        ),
        "spreading": (
            lambda x: pod(x)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"].update(a="b"),
            r"spreads no pods",
        ),
        "no headless Service": (
            lambda x: only(x, "StatefulSet")["spec"].update(serviceName="ome-tensor"),
            r"no headless Service",
        ),
        "scaling": (lambda x: only(x, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"].update(name="x"), r"nothing to scale"),
        "watching": (
            lambda x: only(x, "ServiceMonitor")["spec"]["selector"]["matchLabels"].pop("app.kubernetes.io/component"),
            r"picks 2 Services",
        ),
        "a port": (lambda x: only(x, "ServiceMonitor")["spec"]["endpoints"][0].update(port="metric"), r"no port metric"),
    },
    "references": {
        "the account": (lambda x: x.remove(only(x, "ServiceAccount")), r"no ServiceAccount"),
        "the settings": (lambda x: container(x)["envFrom"][0]["configMapRef"].update(name="settings"), r"no ConfigMap"),
        "a secret": (lambda x: volume(x, "tokens")["secret"].update(secretName="x"), r"nobody brings Secret x"),
        "its key": (lambda x: volume(x, "tls")["secret"]["items"][0].update(key="tls.pem"), r"nobody brings Secret"),
        "images": (lambda x: volume(x, "images")["persistentVolumeClaim"].update(claimName="x"), r"nobody brings the claim"),
        "a volume": (lambda x: pod(x)["volumes"].remove(volume(x, "tmp")), r"no volume tmp"),
        "a claim": (lambda x: only(x, "StatefulSet")["spec"].update(volumeClaimTemplates=[]), r"no volume store"),
        "a mount": (lambda x: container(x)["volumeMounts"].pop(), r"volume tmp is not mounted"),
        "a probe": (lambda x: container(x)["livenessProbe"]["httpGet"].update(port="http"), r"livenessProbe asks port http"),
        "a gRPC probe": (lambda x: container(x).update(readinessProbe={"grpc": {"port": 1}}), r"readinessProbe asks port 1"),
    },
    "settings": {
        "a name": (say("LOG_FORMATT", "json"), r"LOG_FORMATT is no setting"),
        "a value": (say("MEMORY_LIMIT", "lots"), r"MEMORY_LIMIT must be a size"),
        "plain text": (lambda x: (say("TLS_CERT", "")(x), say("TLS_KEY", "")(x)), r"in plain text"),
        "no tokens": (say("TOKENS", ""), r"for anybody"),
        "a gRPC probe": (lambda x: container(x).update(readinessProbe={"grpc": {"port": 50051}}), r"speaks no TLS"),
        "a file": (say("TOKENS", "/run/secrets/tokens.json"), r"no secret is mounted at /run/secrets/tokens.json"),
        "a port": (say("LISTEN", "0.0.0.0:50052"), r"grpc is declared as 50051"),
        "an address": (say("METRICS", "127.0.0.1:9464"), r"metrics is declared as 9464"),
        "the volume as store": (say("STORE", "/var/lib/ome-tensor/store"), r"is not below a claim's folder"),
        "uploads into nothing": (say("UPLOADS", "/uploads"), r"uploads /uploads are not kept"),
        "uploads that the image asks for": (
            lambda x: only(x, "ConfigMap")["data"].pop("OME_TENSOR_UPLOADS"),
            r"uploads /var/lib/ome-tensor/uploads are not kept",
        ),
        "too much memory": (say("MEMORY_LIMIT", "7.5G"), r"killed for its memory"),
        "little memory": (lambda x: container(x)["resources"]["requests"].update(memory="1Gi"), r"evicted first"),
        "little time": (say("GRACE_SECONDS", "40"), r"killed before the server has drained"),
        "images that can be written": (lambda x: container(x)["volumeMounts"][0].pop("readOnly"), r"/data is not mounted, or"),
    },
    "restricted": {
        "root": (lambda x: pod(x)["securityContext"].update(runAsUser=0), r"runAsUser"),
        "perhaps root": (lambda x: pod(x)["securityContext"].pop("runAsNonRoot"), r"runAsNonRoot"),
        "perhaps root here": (lambda x: container(x)["securityContext"].update(runAsNonRoot=False), r"runAsNonRoot"),
        "no seccomp": (lambda x: pod(x)["securityContext"]["seccompProfile"].update(type="Unconfined"), r"seccompProfile"),
        "sysctls": (lambda x: pod(x)["securityContext"].update(sysctls=[{"name": "a", "value": "1"}]), r"sysctls"),
        "network": (lambda x: pod(x).update(hostNetwork=True), r"hostNetwork"),
        "files": (lambda x: volume(x, "images").update(hostPath={"path": "/"}), r"of a kind that is not allowed"),
        "a port": (lambda x: container(x)["ports"][0].update(hostPort=50051), r"hostPort"),
        "a probe": (lambda x: container(x)["livenessProbe"]["httpGet"].update(host="10.0.0.1"), r"another host"),
        "privileged": (lambda x: container(x)["securityContext"].update(privileged=True), r": privileged"),
        "capabilities": (lambda x: container(x)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]), r"capabilities"),
        "capabilities kept": (lambda x: container(x)["securityContext"].pop("capabilities"), r"capabilities"),
        "escalation": (lambda x: container(x)["securityContext"].pop("allowPrivilegeEscalation"), r"allowPrivilegeEscalation"),
        "proc": (lambda x: container(x)["securityContext"].update(procMount="Unmasked"), r"procMount"),
        "a second container": (lambda x: pod(x).update(initContainers=[{"name": "x"}]), r"readOnlyRootFilesystem"),
        "a root to write": (lambda x: container(x)["securityContext"].pop("readOnlyRootFilesystem"), r"readOnlyRootFilesystem"),
        "a token": (lambda x: pod(x).pop("automountServiceAccountToken"), r"automountServiceAccountToken"),
    },
    "policies": {
        "metrics for all": (lambda x: policy(x, "ingress")[0].pop("from"), r"ome-tensor-metrics: lets everybody in"),
        "another port": (lambda x: policy(x, "ingress")[0]["ports"].append({"port": 22}), r"port 22 is open"),
        "every port": (lambda x: policy(x, "ingress")[0].pop("ports"), r"port every is open"),
        "gRPC for all pods": (
            lambda x: of_kind(x, "NetworkPolicy")[0]["spec"]["ingress"][0]["from"][0].update(podSelector={}),
            r"gRPC is open to others",
        ),
        "calls": (lambda x: of_kind(x, "NetworkPolicy")[0]["spec"].update(egress=[{}]), r"lets the server call"),
        "calls by default": (
            lambda x: of_kind(x, "NetworkPolicy")[0]["spec"].update(policyTypes=["Ingress"]),
            r"open by default",
        ),
    },
}


@pytest.mark.parametrize(
    "check, mistake", [pytest.param(check, mistake, id=f"{check}-{mistake}") for check in MISTAKES for mistake in MISTAKES[check]]
)
def test_a_mistake_is_found(check: str, mistake: str, training: list[Document]) -> None:
    broken = copy.deepcopy(training)
    make, words = MISTAKES[check][mistake]
    make(broken)
    assert broken != training
    found = list(getattr(manifests, check)(broken))
    assert any(re.search(words, problem) for problem in found), found
