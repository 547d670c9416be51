"""A checkpoint behind `ray.serve.llm`, Ray's own OpenAI server, with vLLM on a CPU, for `serving_load.py` to measure.

    python -m tests.benchmarks.serve_llm CHECKPOINT PORT MODEL

It serves until it is interrupted.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from pathlib import Path

from tests.benchmarks.vllm_words import ENGINE


def main(checkpoint: str, port: str, model: str) -> None:
    from orchestration.serving.start import hasten

    hasten(Path(tempfile.mkdtemp(prefix="chatray-")), "127.0.0.1", needed=False)  # HAProxy and gRPC, as for ours
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": model, "model_source": checkpoint},
        accelerator_config={"kind": "cpu"},
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}},
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs=ENGINE | {"stream_interval": 1, "disable_log_stats": True},
        log_engine_metrics=False,
        experimental_configs={"stream_batching_interval_ms": 20},
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build_openai_app({"llm_configs": [config]}))
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
