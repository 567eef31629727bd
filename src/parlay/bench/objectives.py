"""What latency counts as good enough."""

from __future__ import annotations

import re
from collections.abc import Mapping

METRICS = ("ttft", "tpot", "e2e")
UNITS = {"ms": 0.001, "s": 1.0}


def parse_objectives(text: str) -> dict[str, float]:
    """Reads limits such as `ttft:500ms,tpot:50ms,e2e:2s` as seconds by metric.

    Raises:
        ValueError: with the accepted form, when `text` has another.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        form = re.fullmatch(rf"\s*({'|'.join(METRICS)}):(\d+(?:\.\d+)?)(ms|s)\s*", part)
        if form is None:
            raise ValueError(f"slo {part!r}: write METRIC:TIME of {', '.join(METRICS)}, as ttft:500ms,tpot:50ms")
        found[form[1]] = float(form[2]) * UNITS[form[3]]
    return found


def meets(measured: Mapping[str, float | None], objectives: Mapping[str, float]) -> bool:
    """Whether every metric is within its limit.

    An output of one token has no TPOT and keeps to any; one without text has no TTFT and misses every one.
    """
    return all(
        metric == "tpot" if (value := measured[metric]) is None else value <= limit
        for metric, limit in objectives.items()
    )
