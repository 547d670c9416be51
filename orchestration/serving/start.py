"""`chatray serve`: on Ray Serve, or with `runtime=local` in this process."""

from __future__ import annotations

import dataclasses
import tempfile

from orchestration.errors import RunError
from orchestration.serving.launch import Launch


def start(wanted: Launch) -> None:
    """Serve until interrupted.

    Raises:
        RunError: no cluster, or the service did not start.
    """
    if wanted.config.runtime == "local":
        from orchestration.serving.local import serve

        serve(wanted)
        return
    from orchestration.runtime.connection import connect, disconnect
    from orchestration.serving import deployments

    with tempfile.TemporaryDirectory(prefix="chatray-", ignore_cleanup_errors=True) as scratch:
        config = dataclasses.replace(wanted.config, run_dir=scratch)  # where Ray's workers start: it holds no packages that hide ours
        ours = connect(config, scratch)
        try:
            deployments.run(wanted)
        except RuntimeError as cause:
            raise RunError(f"the service did not start: {' '.join(str(cause).split())[:600]}") from cause
        finally:
            deployments.stop()
            if ours:
                disconnect()
