"""The command line: a table of verbs.

    chatray run experiment=quickstart [stage=… from=… any.setting=value …]
    chatray sweep sweep=ppo experiment=… [sweep.setting=value … any.setting=value …] (many runs of PPO; then chatray run @…/best.yaml)
    chatray report run=runs/NAME
    chatray chat run=runs/NAME [stage=ppo] | url=http://… [model=NAME] (on the terminal; a run's model, or a served one)
    chatray serve run=runs/NAME [stage=ppo,sft] | checkpoint=PATH [serving.…=… any setting] [--yaml] (an OpenAI-compatible service)
    chatray key name=NAME [file=keys.yaml] (a new API key)
    chatray config experiment=… (the resolved configuration)
    chatray doctor [ray.address=…] [--json] (what this machine or cluster has, and what is wrong with it)
    chatray plan [any.setting=value …] [--json] (does it fit, and where; exit code 1: it does not)
    chatray submit --address URL [--follow] [--folder DIR] [--secret NAME] run experiment=… (the same as a job of a Ray cluster)
    chatray jobs [list | status ID | follow ID | stop ID] --address URL
    chatray data show experiment=… [set=demonstrations|held_out|prompts|comparisons|texts] [index=0]
    chatray moderation train data=PATH out=FILE.safetensors [harmless=world,instructions:PATH,…] [seed=0]
    chatray moderation evaluate data=PATH [model=default]
    chatray feedback export store=URL out=DIR (what people said of answers, as rows for data=feedback)

`@file.yaml` among the words stands for those that the file lists.
Exit codes: 0 done, 1 the run failed (or would not fit), 2 the request was wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.devices import hide_gpus
from orchestration.errors import RequestError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """The `chatray` command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0
    try:
        _refuse_other_code()
        if words[0] not in VERBS:
            raise RequestError(f"{words[0]}: no such command; choose from {', '.join(VERBS)}")
        VERBS[words[0]](_with_files(words[1:]))
        return 0
    except RequestError as error:
        for mistake in error.mistakes:
            print(f"chatray: {mistake}", file=sys.stderr)
        return 2
    except RunError as error:
        error.say()
        return 1
    except KeyboardInterrupt:
        print("chatray: stopped; the same command goes on from the last commit", file=sys.stderr)
        return 1


def _refuse_other_code() -> None:
    """`conf` and `actors` are common names: make sure that those imported are chatray's own, beside this file.

    Raises:
        RequestError: another folder of that name stands first on the path.
    """
    import actors
    import conf

    home = Path(__file__).resolve().parent.parent
    for package in (actors, conf):
        found = Path(package.__file__ or "").resolve().parent
        if found.parent != home:
            raise RequestError(
                f"the package {package.__name__!r} was found in {found}, not beside chatray's own code in {home}; "
                "start chatray from another folder, or clear PYTHONPATH"
            )


def _with_files(words: Sequence[str]) -> list[str]:
    """The words, with those that a file lists in place of its name: `@runs/NAME/best.yaml`.

    Raises:
        RequestError: it cannot be read, or is no list of words.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith("@"):
            found.append(word)
            continue
        import yaml

        try:
            listed = yaml.safe_load(Path(word[1:]).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
            raise RequestError(f"{word}: not a readable YAML file ({' '.join(str(cause).split())[:200]})") from cause
        if not isinstance(listed, list) or not all(isinstance(line, str) and "=" in line for line in listed):
            raise RequestError(f"{word}: it must be a YAML list of words of the form key=value, as a sweep's best.yaml is")
        found += listed
    return found


def _sweep(words: Sequence[str]) -> None:
    _quiet()
    from orchestration.sweep.run import run

    run(words)


def _run(words: Sequence[str]) -> None:
    from orchestration import config as configuration

    config = configuration.load(words)
    _quiet()
    if config.runtime == "local" and not config.placement.policy.gpus:  # all roles are in this process, and have none: it is checked
        hide_gpus()
    from orchestration import recipe, report, stopping

    stopping.listen()
    recipe.run(config)
    report.show(Path(config.run_dir), config.evaluate.conversations, config.seed)
    if (Path(config.run_dir) / "round_01" / "ppo" / "checkpoint").exists():
        print(f"Talk to it: chatray chat run={os.path.relpath(config.run_dir, os.environ.get('PWD', '.'))}")


def _config(words: Sequence[str]) -> None:
    from orchestration import config as configuration

    print(configuration.as_yaml(configuration.load(words)), end="")


def _plan(words: Sequence[str]) -> None:
    _quiet()
    import dataclasses
    import json

    from orchestration.planner import show
    from orchestration.planner.choices import settled
    from orchestration.planner.plan import as_dict, plan
    from orchestration.planner.remedies import with_remedies
    from orchestration.runtime.facts import live_nodes

    config, nodes, chosen = settled([word for word in words if word != "--json"], live_nodes)
    found = with_remedies(config, plan(config, nodes))
    found = dataclasses.replace(found, notes=[*chosen, *found.notes])
    if "--json" in words:
        print(json.dumps(as_dict(found)))
    else:
        show.show(found)
    if not found.fits:
        raise RunError(f"it does not fit on cluster={config.cluster.name}: {found.reasons[0]}")


def _report(words: Sequence[str]) -> None:
    options = _options(words, {"run": None, "conversations": "4", "seed": "0"})
    from orchestration import report

    report.show(Path(options["run"]).resolve(), _whole(options, "conversations"), _whole(options, "seed"))


def _chat(words: Sequence[str]) -> None:
    served = any(word.startswith("url=") for word in words)
    options = _options(
        words, {"url": None, "model": "first", "temperature": "1.0"} if served
        else {"run": None, "stage": "ppo", "temperature": "1.0", "seed": "0"},
    )  # fmt: skip
    try:
        temperature = float(options["temperature"])
    except ValueError as cause:
        raise RequestError(f"temperature={options['temperature']}: not a number") from cause
    if served:
        from orchestration.serving.terminal import talk_to

        talk_to(options["url"], None if options["model"] == "first" else options["model"], temperature)
        return
    _quiet()
    from orchestration.talk import talk

    if options["stage"] not in ("sft", "ppo"):
        raise RequestError(f"stage={options['stage']}: makes no language model; choose sft or ppo")
    talk(Path(options["run"]).resolve(), options["stage"], temperature, _whole(options, "seed"))


def _serve(words: Sequence[str]) -> None:
    from orchestration.serving.launch import as_yaml, launch

    wanted = launch([word for word in words if word != "--yaml"])
    if "--yaml" in words:
        print(as_yaml(wanted), end="")
        return
    _quiet()
    from orchestration.serving.start import start

    start(wanted)


def _key(words: Sequence[str]) -> None:
    options = _options(words, {"name": None, "file": "keys.yaml"})
    from orchestration.serving.keys import make_key

    key = make_key(Path(options["file"]), options["name"])
    print(f"{options['name']}: {key}\nIt is stored nowhere and cannot be shown again; {options['file']} has its SHA-256.")


def _doctor(words: Sequence[str]) -> None:
    from orchestration import config as configuration

    config = configuration.load([word for word in words if word != "--json"])
    _quiet()
    from orchestration import doctor

    if not doctor.show(config, as_json="--json" in words):
        raise RunError("doctor: something that every run needs is wrong; see the lines above")


def _data(words: Sequence[str]) -> None:
    if words[:1] != ["show"]:
        raise RequestError(f"data {' '.join(words[:1])}: no such command; there is: chatray data show [set=…] [index=…] [any setting]")
    own = [word for word in words[1:] if word.partition("=")[0] in ("set", "index")]
    options = _options(own, {"set": "demonstrations", "index": "0"})
    index = _whole(options, "index")
    from orchestration import config as configuration

    config = configuration.load([word for word in words[1:] if word not in own])
    _quiet()
    from orchestration.show import show

    show(config, options["set"], index)


def _submit(words: Sequence[str]) -> None:
    from orchestration.jobs.submit import submit
    from orchestration.jobs.words import submission

    submit(submission(words))


def _jobs(words: Sequence[str]) -> None:
    from orchestration.jobs.watch import answer
    from orchestration.jobs.words import ask

    answer(ask(words))


def _moderation(words: Sequence[str]) -> None:
    if words[:1] not in (["train"], ["evaluate"]):
        raise RequestError(
            f"moderation {' '.join(words[:1])}: no such command; there are: chatray moderation train, chatray moderation evaluate"
        )
    defaults: dict[str, str | None] = {"data": None, "model": "default"}
    if words[0] == "train":
        defaults = {"data": None, "out": None, "harmless": "none", "seed": "0"}
    options = _options(words[1:], defaults)
    _quiet()
    from orchestration.serving.moderation import measuring

    if words[0] == "evaluate":
        measuring.evaluate_and_show(options["model"], options["data"])
    else:
        harmless = "" if options["harmless"] == "none" else options["harmless"]
        measuring.train_and_show(options["data"], options["out"], harmless, _whole(options, "seed"))


def _feedback(words: Sequence[str]) -> None:
    if words[:1] != ["export"]:
        raise RequestError(f"feedback {' '.join(words[:1])}: no such command; there is: chatray feedback export store=URL out=DIR")
    options = _options(words[1:], {"store": None, "out": None})
    from orchestration.serving.store.export import export_and_show

    export_and_show(options["store"], Path(options["out"]))


def _whole(options: dict[str, str], name: str) -> int:
    if not options[name].isdigit():
        raise RequestError(f"{name}={options[name]}: not a whole number")
    return int(options[name])


def _options(words: Sequence[str], defaults: dict[str, str | None]) -> dict[str, str]:
    """`key=value` words over defaults; None marks one that must be given.

    Raises:
        RequestError: an unknown or missing key.
    """
    from orchestration.config import nearest

    found = dict(defaults)
    mistakes = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in defaults:
            mistakes.append(f"{word}: no such option; did you mean {nearest(key, defaults)[0]}=?")
        found[key] = value
    mistakes += [f"{key}=: needed" for key, value in found.items() if not value]
    if mistakes:
        raise RequestError(mistakes)
    return {key: value for key, value in found.items() if value is not None}


def _quiet() -> None:
    """Keep libraries from writing between the lines of the progress display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _run, "report": _report, "chat": _chat, "config": _config, "plan": _plan, "doctor": _doctor, "data": _data,
    "submit": _submit, "jobs": _jobs, "sweep": _sweep,
    "moderation": _moderation, "feedback": _feedback, "serve": _serve, "key": _key,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
