"""Write components/observe/prometheus-rule.yaml: the alerts of deploy/prometheus/alerts.yml for the Prometheus operator.

Kustomize takes no file into a field of a resource, so there are two; a test holds that they say the same.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
ALERTS = HERE.parent / "prometheus" / "alerts.yml"
RULE = HERE / "components" / "observe" / "prometheus-rule.yaml"

_HEAD = """\
# Made of deploy/prometheus/alerts.yml by deploy/kubernetes/prometheus_rule.py: edit that one, and run this one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ome-tensor
  labels:
    app.kubernetes.io/name: ome-tensor
spec:
"""


def prometheus_rule(alerts: str) -> str:
    """The resource that says these alerts."""
    lines = (line for line in alerts.splitlines() if not line.startswith("#"))
    return _HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines)


if __name__ == "__main__":
    RULE.write_text(prometheus_rule(ALERTS.read_text()))
