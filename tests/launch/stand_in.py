"""A recording stand-in for gcloud, kubectl, xpk, sbatch and the like. Run under their names from the PATH.

Each call appends {"program", "argv", "stdin"} as a JSON line to $STAND_IN/calls.jsonl and is answered from
`$STAND_IN/script.json`: {"cloud": ...} answers as `gcloud` in `cloud.py` would; a list under "PROGRAM WORD..." holds
answers {"out", "error", "status"}, used one after another, the last one again and again.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import subprocess
import sys

HOME = pathlib.Path(os.environ["STAND_IN"])


def answer_of(program: str, argv: list[str], script: dict) -> dict:
    """The next scripted answer whose words begin this call (flags left out, then the remote command)."""
    plain = [word for word in argv if not word.startswith("-")]
    remote = [word.partition("=")[2] for word in argv if word.startswith("--command=")]
    words = " ".join([program, *plain, *remote])
    fitting = [key for key in script if words.startswith(key) and isinstance(script[key], list)]
    if not fitting:
        return {}
    answers = script[max(fitting, key=len)]
    return answers.pop(0) if len(answers) > 1 else answers[0]


def run_remotely(argv: list[str], hosts: int) -> dict:
    """Runs the command of `gcloud ... ssh` on this machine, in the home folder of each pretended host."""
    node = argv[argv.index("ssh") + 1]
    flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))
    workers = range(hosts) if flags["worker"] == "all" else [int(flags["worker"])]
    status = 0
    for worker in workers:
        home = HOME / "hosts" / f"{node}-w{worker}"
        home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["sh", "-c", flags["command"]],
            cwd=home,
            env={**os.environ, "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            check=False,
        )
        status = status or done.returncode
    return {"status": status}


def copy_remotely(argv: list[str], hosts: int) -> dict:
    """`gcloud ... scp FILE... NODE:FOLDER --worker=all`."""
    words = [word for word in argv[argv.index("scp") + 1 :] if not word.startswith("--")]
    node, _, folder = words[-1].partition(":")
    for worker in range(hosts):
        target = HOME / "hosts" / f"{node}-w{worker}" / folder
        done = subprocess.run(["cp", "-r", *words[:-1], str(target)], check=False)
        if done.returncode:
            return {"status": done.returncode}
    return {}


def queued_resource(argv: list[str], script: dict) -> dict:
    """`gcloud ... queued-resources create|describe|delete`, with a state that moves on at each look.

    `script["cloud"]["lives"]` lists the states of each life, from its creation on.
    """
    cloud = script["cloud"]
    verb = next(word for word in argv if word in ("create", "describe", "delete"))
    if verb == "create":
        if cloud["now"] is not None:
            return {"error": "ERROR: (gcloud) ALREADY_EXISTS: it exists", "status": 1}
        cloud["now"] = cloud["lives"].pop(0)
        return {}
    if cloud["now"] is None:
        return {"error": "ERROR: (gcloud) NOT_FOUND: Resource was not found", "status": 1}
    if verb == "delete":
        cloud["now"] = None
        return {}
    if "failedData" in " ".join(argv):
        return {"out": "no more capacity in the zone\n"}
    state = cloud["now"].pop(0) if len(cloud["now"]) > 1 else cloud["now"][0]
    if state == "NONE":  # somebody else deleted it
        cloud["now"] = None
        return {"error": "ERROR: (gcloud) NOT_FOUND: Resource was not found", "status": 1}
    return {"out": f"{state}\n"}


def main() -> int:
    program, argv = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
    stdin = "" if sys.stdin is None or sys.stdin.isatty() or "-" not in argv else sys.stdin.read()
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(HOME / "calls.jsonl", "a") as calls:
            print(json.dumps({"program": program, "argv": argv, "stdin": stdin}), file=calls)
        script = json.loads((HOME / "script.json").read_text())
        answer = answer_of(program, argv, script)
        if not answer and "queued-resources" in argv and "cloud" in script:
            answer = queued_resource(argv, script)
        (HOME / "script.json").write_text(json.dumps(script))
    if not answer and script.get("hosts"):
        if "ssh" in argv:
            answer = run_remotely(argv, script["hosts"])
        elif "scp" in argv:
            answer = copy_remotely(argv, script["hosts"])
    sys.stdout.write(answer.get("out", ""))
    sys.stderr.write(answer.get("error", ""))
    return answer.get("status", 0)


if __name__ == "__main__":
    sys.exit(main())
