"""Runs as jobs of a Ray cluster that is reached over HTTP (Ray's job API).

    words     the command line
    wheel     the code that runs here, as a wheel
    client    the job API; the only file that imports `ray.job_submission`
    submit    check on the cluster, then submit
    watch     list, follow, stop

What a job runs there is `orchestration/on_cluster.py`.
"""
