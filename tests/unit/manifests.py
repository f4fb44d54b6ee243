"""What must hold of deploy/kubernetes. Each check gives the problems it finds, so that tests can break manifests on purpose."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ome_tensor_server.budget import parse_size
from ome_tensor_server.settings import PREFIX, Settings, split_address

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")
operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")

Document = dict[str, Any]

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"

#: The oldest release that knows all that is used (unhealthyPodEvictionPolicy), and the newest that the validator knows.
RELEASES = ("1.27", kubernetes_validate.latest_version())

#: What the user brings, and the keys of it that are used; docs/clusters.md says how it is made.
BROUGHT = {
    "ome-tensor-tls": {"tls.crt", "tls.key", "ca.crt"},
    "ome-tensor-tokens": {"tokens.json"},
    "ome-tensor-training-token": {"token"},
    "ome-tensor-images": set[str](),
}


def kustomize() -> list[str] | None:
    """The command that renders a kustomization; its folder follows."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            return command
    return None


def rendered(folder: str) -> list[Document]:
    """What ``kubectl apply -k`` would apply."""
    return list(yaml.safe_load_all(_rendered(folder)))


@cache
def _rendered(folder: str) -> str:
    command = kustomize()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is here")
    said = subprocess.run([*command, KUBERNETES / folder], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    assert not said.stderr  # Warnings of what a later release takes away.
    return said.stdout


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Title and template of all that makes pods."""
    for document in of_kind(documents, "StatefulSet", "Job"):
        yield title(document), document["spec"]["template"]


def ports(template: Document) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in template["spec"]["containers"] for port in c.get("ports", ())}


def schema(documents: list[Document], *releases: str) -> Iterator[str]:
    """Kubernetes' schemas, strictly: no unknown fields. The operator's resources by models made of its own definitions."""
    for document in documents:
        if document["apiVersion"] == "monitoring.coreos.com/v1":
            yield from _operator_schema(document)
            continue
        for release in releases or RELEASES[-1:]:
            if problem := _schema(json.dumps(document), release):
                yield f"{title(document)}: {problem}"


@cache
def _schema(document: str, release: str) -> str:
    # Most of the time goes into reading the schemas, and overlays share most of their documents.
    try:
        kubernetes_validate.validate(json.loads(document), release, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return str(error.message)
    return ""


def _operator_schema(document: Document) -> Iterator[str]:
    try:
        model = getattr(operator, document["kind"]).model_validate(document)
    except ValueError as error:
        yield f"{title(document)}: {error}"
        return
    # The models pass over fields that they do not know: such a field is missing from what they give back.
    kept = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if kept != document:
        yield f"{title(document)}: unknown fields"


def selectors(documents: list[Document]) -> Iterator[str]:
    """Whoever picks pods, or Services, by label finds some; ports by name are there."""
    templates = [template for _, template in pods(documents)]

    def found(selector: Document) -> list[Document]:
        wanted = selector.items()
        return [template for template in templates if wanted <= template["metadata"]["labels"].items()]

    for document in documents:
        spec, picked = document.get("spec", {}), None
        match document["kind"]:
            case "Service":
                picked, names = found(spec["selector"]), [port["targetPort"] for port in spec["ports"]]
            case "PodDisruptionBudget":
                picked, names = found(spec["selector"]["matchLabels"]), []
            case "NetworkPolicy":
                picked = found(spec["podSelector"]["matchLabels"])
                names = [port["port"] for rule in spec.get("ingress", ()) for port in rule["ports"]]
            case "StatefulSet":
                picked, names = found(spec["selector"]["matchLabels"]), []
                for spread in spec["template"]["spec"]["topologySpreadConstraints"]:
                    if not found(spread["labelSelector"]["matchLabels"]):
                        yield f"{title(document)}: spreads no pods"
                heads = [x for x in of_kind(documents, "Service") if x["spec"].get("clusterIP") == "None"]
                if spec["serviceName"] not in [head["metadata"]["name"] for head in heads]:
                    yield f"{title(document)}: no headless Service {spec['serviceName']}"
            case "HorizontalPodAutoscaler":
                aim = spec["scaleTargetRef"]
                if not any(
                    (x["apiVersion"], x["kind"], x["metadata"]["name"]) == (aim["apiVersion"], aim["kind"], aim["name"])
                    for x in documents
                ):
                    yield f"{title(document)}: nothing to scale"
            case "ServiceMonitor":
                wanted = spec["selector"]["matchLabels"].items()
                services = [x for x in of_kind(documents, "Service") if wanted <= x["metadata"]["labels"].items()]
                # Two would count every server twice.
                if len(services) != 1:
                    yield f"{title(document)}: picks {len(services)} Services"
                for service in services:
                    known = {port["name"] for port in service["spec"]["ports"]}
                    yield from (f"{title(document)}: no port {x['port']}" for x in spec["endpoints"] if x["port"] not in known)
        if picked == []:
            yield f"{title(document)}: picks no pods"
        for template in picked or ():
            yield from (f"{title(document)}: no port {name}" for name in names if name not in ports(template))


def references(documents: list[Document]) -> Iterator[str]:
    """What a pod names is there: here, or brought by the user."""
    here = {(document["kind"], document["metadata"]["name"]) for document in documents}
    claims = {
        (title(document), claim["metadata"]["name"])
        for document in of_kind(documents, "StatefulSet")
        for claim in document["spec"]["volumeClaimTemplates"]
    }
    for owner, template in pods(documents):
        spec = template["spec"]
        account = spec.get("serviceAccountName")
        if account and ("ServiceAccount", account) not in here:
            yield f"{owner}: no ServiceAccount {account}"
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        made = {name for of, name in claims if of == owner}
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        yield from (f"{owner}: no volume {name}" for name in mounted - volumes.keys() - made)
        yield from (f"{owner}: volume {name} is not mounted" for name in (volumes.keys() | made) - mounted)
        for volume in volumes.values():
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"].get("items", ())}
                name = volume["secret"]["secretName"]
                if name not in BROUGHT or not keys <= BROUGHT[name]:
                    yield f"{owner}: nobody brings Secret {name} with {keys}"
            if "persistentVolumeClaim" in volume and volume["persistentVolumeClaim"]["claimName"] not in BROUGHT:
                yield f"{owner}: nobody brings the claim of {volume['name']}"
            if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in here:
                yield f"{owner}: no ConfigMap {volume['configMap']['name']}"
        for container in spec["containers"]:
            for source in container.get("envFrom", ()):
                if ("ConfigMap", source["configMapRef"]["name"]) not in here:
                    yield f"{owner}: no ConfigMap {source['configMapRef']['name']}"
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(name, {})
                port = probe.get("httpGet", probe.get("grpc", {})).get("port")
                if probe and port not in (ports(template).values() if "grpc" in probe else ports(template)):
                    yield f"{owner}: {name} asks port {port}"


def environment(documents: list[Document]) -> dict[str, str]:
    """What the server finds in its environment: what the image says, and over it what the manifests say."""
    image = dict(re.findall(rf"^ +({PREFIX}\w+)=(\S+)", (KUBERNETES.parents[1] / "Dockerfile").read_text(), re.MULTILINE))
    (maps,) = (document["data"] for document in of_kind(documents, "ConfigMap"))
    return image | maps


def settings(documents: list[Document]) -> Iterator[str]:
    """The server takes its settings, and they fit the pod."""
    (server,) = of_kind(documents, "StatefulSet")
    spec = server["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    variables = environment(documents)
    yield from (f"{name} is no setting" for name in variables if name.removeprefix(PREFIX).lower() not in Settings.__slots__)
    try:
        chosen = Settings.load({}, variables)
    except ValueError as error:
        yield str(error)
        return
    declared = ports(server["spec"]["template"])
    for name, address in (("grpc", chosen.listen), ("metrics", chosen.metrics)):
        if split_address(address) != ("0.0.0.0", declared.get(name)):
            yield f"{name} is declared as {declared.get(name)}, not {address}"
    probes_grpc = any("grpc" in container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe"))
    if probes_grpc and chosen.tls_cert:
        yield "the kubelet asks by gRPC, and speaks no TLS"
    if spec["terminationGracePeriodSeconds"] < chosen.grace_seconds + 10:
        yield "the pod is killed before the server has drained"
    yield from _memory(container, chosen)
    yield from _files(spec, container, chosen)


def _memory(container: Document, chosen: Settings) -> Iterator[str]:
    limit = _bytes(container["resources"]["limits"]["memory"])
    # docs/operations.md, "Sizing": the server, four readers, messages, streams.
    beside = (150 << 20) + 4 * (100 << 20) + chosen.max_bytes_in_flight + chosen.max_concurrent_reads * 300_000
    if parse_size(chosen.memory_limit, "memory_limit", limit) + max(beside, 1 << 30) > limit:
        yield "a full server would be killed for its memory"
    if container["resources"]["requests"]["memory"] != container["resources"]["limits"]["memory"]:
        yield "a full server would be evicted first"


def _files(spec: Document, container: Document, chosen: Settings) -> Iterator[str]:
    """Each file is one of a secret's, each folder lies in a volume that can be written."""
    secrets = {
        volume["name"]: {item["path"] for item in volume["secret"].get("items", ())} or BROUGHT[volume["secret"]["secretName"]]
        for volume in spec["volumes"]
        if "secret" in volume
    }
    readable = {f"{mount['mountPath']}/{key}" for mount in container["volumeMounts"] for key in secrets.get(mount["name"], ())}
    for path in (chosen.tls_cert, chosen.tls_key, chosen.tokens):
        if path and path not in readable:
            yield f"no secret is mounted at {path}"
    kept = [
        Path(mount["mountPath"])
        for mount in container["volumeMounts"]
        if mount["name"] not in {volume["name"] for volume in spec["volumes"]}
    ]
    # A store belongs to the server's user; of a volume the folder itself belongs to root.
    if not any(mount in Path(chosen.store).parents for mount in kept):
        yield f"the store {chosen.store} is not below a claim's folder"
    if chosen.uploads and not any(mount in (Path(chosen.uploads), *Path(chosen.uploads).parents) for mount in kept):
        yield f"uploads {chosen.uploads} are not kept"
    for path in container["args"][1:]:
        if not any(mount["mountPath"] == path and mount.get("readOnly") for mount in container["volumeMounts"]):
            yield f"{path} is not mounted, or can be written"


def _bytes(quantity: str) -> int:
    return parse_size(quantity.removesuffix("i"), "quantity", 0)


#: The volumes that the profile allows (https://kubernetes.io/docs/concepts/security/pod-security-standards/).
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SECCOMP = {"RuntimeDefault", "Localhost"}


def restricted(documents: list[Document]) -> Iterator[str]:
    """Pod Security's profile `restricted`, rule by rule, and what we ask for beside it."""
    for owner, template in pods(documents):
        spec = template["spec"]
        of_pod = spec.get("securityContext", {})
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(name):
                yield f"{owner}: {name}"
        for volume in spec["volumes"]:
            if not volume.keys() - {"name"} <= _VOLUMES:
                yield f"{owner}: volume {volume['name']} is of a kind that is not allowed"
        for annotation in template["metadata"].get("annotations", {}):
            if annotation.startswith("container.apparmor.security.beta.kubernetes.io/"):
                yield f"{owner}: {annotation}"
        for setting in ("seLinuxOptions", "sysctls", "windowsOptions", "appArmorProfile"):
            if of_pod.get(setting):
                yield f"{owner}: {setting}"
        for container in (*spec["containers"], *spec.get("initContainers", ()), *spec.get("ephemeralContainers", ())):
            own = container.get("securityContext", {})
            both = of_pod | own
            if own.get("privileged"):
                yield f"{owner}: privileged"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{owner}: allowPrivilegeEscalation"
            capabilities = own.get("capabilities", {})
            if capabilities.get("drop") != ["ALL"] or not set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"}:
                yield f"{owner}: capabilities"
            if both.get("runAsNonRoot") is not True:
                yield f"{owner}: runAsNonRoot"
            if both.get("runAsUser") == 0:
                yield f"{owner}: runAsUser"
            if both.get("seccompProfile", {}).get("type") not in _SECCOMP:
                yield f"{owner}: seccompProfile"
            if own.get("procMount", "Default") != "Default":
                yield f"{owner}: procMount"
            if any(port.get("hostPort") for port in container.get("ports", ())):
                yield f"{owner}: hostPort"
            if any("host" in probe.get("httpGet", {}) for name, probe in container.items() if name.endswith("Probe")):
                yield f"{owner}: a probe of another host"
            # Ours.
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{owner}: readOnlyRootFilesystem"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{owner}: automountServiceAccountToken"


def policies(documents: list[Document]) -> Iterator[str]:
    """Every port of the server is closed but to those who are named; it calls nobody."""
    open_to: dict[str, list[Any]] = {}
    kinds: set[str] = set()
    for policy in of_kind(documents, "NetworkPolicy"):
        kinds |= set(policy["spec"]["policyTypes"])
        if policy["spec"].get("egress"):
            yield f"{title(policy)}: lets the server call"
        for rule in policy["spec"]["ingress"]:
            if not rule.get("from"):
                yield f"{title(policy)}: lets everybody in"
            for port in rule.get("ports", [{"port": "every"}]):
                open_to.setdefault(port["port"], []).extend(rule.get("from", ()))
    if kinds != {"Ingress", "Egress"}:
        yield "something is open by default"
    if open_to.pop("grpc", None) != [{"podSelector": {"matchLabels": {"ome-tensor-client": "true"}}}]:
        yield "gRPC is open to others than clients"
    watcher = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    watched = [watcher] if of_kind(documents, "ServiceMonitor") else None
    if open_to.pop("metrics", None) != watched:
        yield "metrics are open to others than Prometheus"
    yield from (f"port {port} is open" for port in open_to)
