"""How long `/health` takes at most while one client sends its worst, request by request, each five times.

    python -m tests.benchmarks.worst_requests

The requests are those of `tests/unit/serving/test_worst_requests.py`; the app is in this process, without HAProxy and Ray.
"""

from __future__ import annotations

import tempfile

from orchestration.serving.app import create_app
from orchestration.serving.prompts import hidden_prompt
from orchestration.serving.store.store import Store
from tests.benchmarks import report
from tests.serving_stand_ins import ScriptedEngine, listening, service
from tests.unit.serving.test_worst_requests import WORST, longest_wait

TRIES, SHOWN = 5, 5


def main() -> None:
    waits = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{folder}/store.db")
        hidden = hidden_prompt("Be brief and kind to everybody who asks.", "Answer in one sentence.", 4)
        made = service(ScriptedEngine(lambda _: "yes"), store, moderated=True, hidden=hidden, context=2048)
        with listening(create_app(made)) as url:
            for name, (path, body) in WORST.items():
                waits[name] = max(longest_wait(url, path, body.encode())[0] for _ in range(TRIES))
        store.close()
    worst = sorted(waits, key=lambda name: -waits[name])[:SHOWN]
    print(f"{len(waits)} requests, {TRIES} times each, on {report.machine()}; the {SHOWN} that held it longest:\n")
    print(report.table(["request", "/health took at most, ms"], [[name, f"{1000 * waits[name]:.0f}"] for name in worst]))


if __name__ == "__main__":
    main()
