"""The launch scripts: what they would call, with a `gcloud` that only writes down its arguments."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from tiny_run import TESTS

LAUNCH = TESTS.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# From its wheel, beside this interpreter, or the system's.
PLACES = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
SHELLCHECK = shutil.which("shellcheck", path=PLACES)
VM = {
    "NAME": "seal",
    "ZONE": "us-west4-a",
    "TYPE": "v5litepod-16",
    "VERSION": "v2-alpha-tpuv5-lite",
}
TRAIN = ["--config", "configs/my config.py", "--workdir", "gs://bucket/runs/a"]
# Answers `describe` and `storage ls` with the next line of a file for each; the rest succeeds.
GCLOUD = """#!/usr/bin/env bash
for argument in "$@"; do printf '%q ' "$argument"; done >> "$RECORD"
echo >> "$RECORD"
for argument in "$@"; do
  case $argument in
    --metadata-from-file=startup-script=*) cp "${argument##*=}" "$RECORD.startup" ;;
    *.bundle) [ ! -f "$argument" ] || cp "$argument" "$RECORD.bundle" ;;
  esac
done
next() { head -n 1 "$RECORD.$1"; sed -i 1d "$RECORD.$1"; }
case "$*" in
  *" describe "*) next states ;;
  *"storage ls"*/failed/*) [ "$(next failed)" = yes ] ;;
  *"storage ls"*) [ "$(next done)" = yes ] ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """Return a clean Git repository with the scripts; `gcloud` is first on its PATH."""
    clone = tmp_path / "clone"
    shutil.copytree(LAUNCH, clone / "launch")
    git = [
        "git",
        "-C",
        clone,
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "init.defaultBranch=a",
    ]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "code"], check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcloud").write_text(GCLOUD)
    (tmp_path / "bin/gcloud").chmod(0o755)
    return clone


def bash(clone, script, *arguments, states=(), done=(), failed=(), **variables):
    """Run a script from a foreign folder; returns the process and what `gcloud` was called with."""
    record = clone.parent / "record"
    record.write_text("")
    for name, answers in {"states": states, "done": done, "failed": failed}.items():
        (clone.parent / f"record.{name}").write_text("".join(f"{word}\n" for word in answers))
    own = {key: os.environ[key] for key in ("HOME", "TMPDIR") if key in os.environ}
    path = f"{clone.parent / 'bin'}:/usr/bin:/bin"
    result = subprocess.run(
        ["bash", clone / "launch" / script, *arguments],
        env={**own, "PATH": path, "RECORD": str(record), **variables},
        cwd=clone.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result, [shlex.split(line) for line in record.read_text().splitlines()]


def head(clone):
    command = ["git", "-C", clone, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_strict_and_bash_reads_it(script):
    assert script.name == "code.sh" or "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck_has_no_complaint():
    scripts = [*(f"launch/{path.name}" for path in SCRIPTS), "tests/run.sh"]
    command = [SHELLCHECK, "--severity=warning", "-x", *scripts]
    result = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_install_knows_the_extras_of_setup_py():
    setup = (LAUNCH.parent / "setup.py").read_text().partition("extras_require={")[2]
    extras = set(re.findall(r'^        "(\w+)": \[', setup, re.MULTILINE))
    command = ["bash", LAUNCH / "install.sh", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert set(result.stderr.partition("there are ")[2].strip().split(", ")) == extras


@pytest.mark.parametrize("script", ["cpu.sh", "gpu.sh", "tpu_worker.sh"])
def test_a_dry_run_ends_in_train_with_the_arguments_as_they_were(clone, script):
    arguments = ["--config", "a b.py", "--workdir", "runs/$x"]
    first = () if script == "tpu_worker.sh" else ("--dry-run",)
    result, calls = bash(clone, script, *first, *arguments, DRY_RUN="1" if not first else "")
    assert (result.returncode, calls) == (0, []), result.stderr
    last = shlex.split(result.stdout.splitlines()[-1])
    assert last == ["exec", "seal-jax", "train", *arguments]


def test_a_slurm_task_does_not_install(clone):
    result, _ = bash(clone, "gpu.sh", "--config", "a.py", SLURM_NTASKS="8")
    assert result.returncode == 2 and "once, before srun" in result.stderr
    result, _ = bash(clone, "gpu.sh", "--dry-run", "--config", "a.py", SLURM_NTASKS="8")
    assert "install" not in result.stdout


def test_a_bucket_is_mounted_and_its_paths_follow(clone):
    result, _ = bash(clone, "tpu_worker.sh", *TRAIN, DRY_RUN="1", HOME="/home/x y")
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert lines[-2][0] == "gcsfuse" and lines[-2][-2:] == ["bucket", "/home/x y/gcs/bucket"]
    assert lines[-1][3:] == [*TRAIN[:3], "/home/x y/gcs/bucket/runs/a"]


def test_a_tpu_vm_is_created_and_deleted(clone):
    _, (call,) = bash(clone, "tpu_vm.sh", "create", **VM, SPOT="1")
    assert call[:5] == ["compute", "tpus", "tpu-vm", "create", "seal"]
    for flag in ("--zone=us-west4-a", "--accelerator-type=v5litepod-16", "--spot"):
        assert flag in call
    assert "--version=v2-alpha-tpuv5-lite" in call
    _, (call,) = bash(clone, "tpu_vm.sh", "create", **VM)
    assert "--spot" not in call
    _, (call,) = bash(clone, "tpu_vm.sh", "delete", **VM)
    assert call[3:] == ["delete", "seal", "--quiet", "--zone=us-west4-a"]


def test_setup_brings_every_worker_to_this_commit(clone):
    result, (copy, setup) = bash(clone, "tpu_vm.sh", "setup", **VM)
    assert result.returncode == 0, result.stderr
    assert copy[3] == "scp" and copy[5:7] == ["seal:", "--worker=all"]
    assert "--worker=all" in setup
    # What the workers are told to do, done here with the bundle that was copied.
    command = next(word for word in setup if word.startswith("--command=")).removeprefix(
        "--command="
    )
    unpack, _, rest = command.rpartition(" && ")
    assert rest == "bash seal_jax/launch/tpu_setup.sh"
    worker = clone.parent / "worker"
    worker.mkdir()
    shutil.copy(clone.parent / "record.bundle", worker / "seal_jax.bundle")
    for _ in range(2):  # again, it does nothing
        subprocess.run(["bash", "-euc", unpack], cwd=worker, check=True)
        assert head(worker / "seal_jax") == head(clone)
    assert (worker / "seal_jax/launch/tpu_worker.sh").exists()


def test_what_is_not_committed_is_refused(clone):
    (clone / "launch/cpu.sh").write_text("changed")
    for script, arguments in (("tpu_vm.sh", ["setup"]), ("queued_resource.sh", TRAIN)):
        result, calls = bash(clone, script, *arguments, **VM, BUCKET="bucket")
        assert result.returncode == 2 and "not committed" in result.stderr
        assert calls == []


def test_run_quotes_its_arguments_for_every_worker(clone):
    cache = {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache"}
    _, (call,) = bash(clone, "tpu_vm.sh", "run", *TRAIN, **VM, **cache)
    assert call[3:6] == ["ssh", "seal", "--worker=all"]
    words = shlex.split(call[6].removeprefix("--command="))
    assert words[:3] == ["nohup", "env", "JAX_COMPILATION_CACHE_DIR=gs://bucket/cache"]
    assert words[3 : 5 + len(TRAIN)] == ["bash", "seal_jax/launch/tpu_worker.sh", *TRAIN]


@pytest.mark.parametrize("command", ["create", "setup", "run", "logs", "status", "stop", "delete"])
def test_a_dry_run_of_a_tpu_vm_calls_nobody(clone, command):
    result, calls = bash(clone, "tpu_vm.sh", "--dry-run", command, *TRAIN, **VM)
    assert (result.returncode, calls) == (0, []), result.stderr
    assert "gcloud compute tpus tpu-vm" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "missing", "words"),
    [
        (["frobnicate"], (), "no command 'frobnicate'; there are create"),
        ([], (), "no command ''"),
        (["create"], ("TYPE",), "set TYPE"),
        (["delete"], ("NAME",), "set NAME"),
    ],
)
def test_a_wrong_call_of_tpu_vm_says_what_is_missing(clone, arguments, missing, words):
    variables = {key: value for key, value in VM.items() if key not in missing}
    result, calls = bash(clone, "tpu_vm.sh", *arguments, **variables)
    assert result.returncode == 2 and calls == []
    assert f"launch/tpu_vm.sh: {words}" in result.stderr


def queue(clone, *arguments, **variables):
    variables = {**VM, "BUCKET": "bucket", "POLL": "0", **variables}
    return bash(clone, "queued_resource.sh", *arguments, **variables)


def test_a_queued_resource_runs_this_commit_and_is_deleted_in_the_end(clone):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    result, calls = queue(clone, *TRAIN, states=states, done=["no", "no", "no", "yes"])
    assert result.returncode == 0, result.stderr
    upload, create = calls[:2]
    bundle = f"gs://bucket/seal_jax/{head(clone)}.bundle"
    assert upload[:2] == ["storage", "cp"] and upload[-1] == bundle
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "seal"]
    for flag in ("--node-id=seal", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"):
        assert flag in create
    assert calls[-1][3:7] == ["delete", "seal", "--force", "--quiet"]
    startup = (clone.parent / "record.startup").read_text()
    subprocess.run(["bash", "-n"], input=startup, text=True, check=True)
    lines = [shlex.split(line) for line in startup.replace("\\\n", "").splitlines()]
    assert ["gcloud", "storage", "cp", bundle, "seal_jax.bundle"] in lines
    assert head(clone) in startup
    (train,) = (line for line in lines if "seal_jax/launch/tpu_worker.sh" in line)
    after = train.index("seal_jax/launch/tpu_worker.sh") + 1
    assert train[after : after + len(TRAIN)] == TRAIN


@pytest.mark.parametrize("code", [0, 3])
def test_a_worker_that_fails_leaves_its_log_in_the_bucket(clone, code):
    queue(clone, *TRAIN, done=["yes"])
    startup = (clone.parent / "record.startup").read_text().splitlines()
    begin = next(i for i, line in enumerate(startup) if "tpu_worker.sh" in line)
    home = clone.parent / "root"
    (home / "seal_jax/launch").mkdir(parents=True)
    (home / "seal_jax/launch/tpu_setup.sh").write_text("echo set up")
    (home / "seal_jax/launch/tpu_worker.sh").write_text(f'echo "got $4"; exit {code}')
    (clone.parent / "record").write_text("")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(startup[begin:])],
        env={"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "RECORD": f"{clone.parent}/record"},
        cwd=home,
    )
    assert result.returncode == (1 if code else 0)
    assert (home / "seal_jax.log").read_text() == f"set up\ngot {TRAIN[3]}\n"
    call = shlex.split((clone.parent / "record").read_text())
    assert bool(call) == bool(code)
    if code:
        assert call[:3] == ["storage", "cp", "seal_jax.log"]
        assert call[3].startswith("gs://bucket/seal_jax/failed/seal-") and call[3].endswith(".log")


def test_a_run_that_ended_with_an_error_is_not_waited_for(clone):
    result, calls = queue(
        clone, *TRAIN, states=["ACTIVE"] * 3, done=["no"] * 9, failed=["no", "yes", "yes"]
    )
    assert result.returncode == 2 and calls[-1][3:5] == ["delete", "seal"]
    (place,) = {call[2] for call in calls if "/failed/" in call[2]}
    assert f"ended with an error: see the logs in {place}" in result.stderr


def test_workers_that_fail_because_their_slice_goes_do_not_end_the_run(clone):
    result, calls = queue(
        clone,
        *TRAIN,
        states=["ACTIVE", "SUSPENDED", "ACTIVE", "ACTIVE"],
        done=["no"] * 4 + ["yes"],
        failed=["yes", "yes", "no"],
    )
    assert result.returncode == 0, result.stderr
    assert sum("create" in call for call in calls) == 2
    assert len({call[2] for call in calls if "/failed/" in call[2]}) == 2  # one for each slice


def test_a_slice_that_was_taken_away_is_asked_for_again(clone):
    states = ["ACTIVE", "SUSPENDED", "FAILED", "ACTIVE"]
    result, calls = queue(clone, *TRAIN, states=states, done=["no"] * 4 + ["yes"])
    assert result.returncode == 0, result.stderr
    verbs = [call[3] for call in calls if call[2] == "queued-resources" and call[3] != "describe"]
    assert verbs == ["create", "delete", "create", "delete", "create", "delete"]


def test_retries_have_an_end(clone):
    result, calls = queue(clone, *TRAIN, states=["FAILED"] * 9, done=["no"] * 9, RETRIES="2")
    assert result.returncode == 2 and "lost the TPUs 3 times" in result.stderr
    assert sum("create" in call for call in calls) == 3


def test_a_workdir_on_the_tpus_themselves_is_refused(clone):
    result, calls = queue(clone, "--config", "a.py", "--workdir", "runs/a")
    assert result.returncode == 2 and calls == []
    assert "'runs/a'" in result.stderr and "gs://BUCKET/PATH" in result.stderr


def test_a_dry_run_of_the_queue_shows_the_startup_script(clone):
    result, calls = queue(clone, "--dry-run", *TRAIN)
    assert (result.returncode, calls) == (0, []), result.stderr
    assert "bash seal_jax/launch/tpu_worker.sh --config" in result.stdout


def test_a_jobset_has_a_pod_for_each_machine_of_its_slice():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == int(rows) * int(columns) // chips
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["JAX_PLATFORMS"] == "tpu,cpu" and environment["SEAL_JAX_DISTRIBUTED"] == "1"
    workdir = container["args"][container["args"].index("--workdir") + 1]
    (mount,) = container["volumeMounts"]
    assert workdir.startswith(mount["mountPath"] + "/")
    assert (LAUNCH.parent / container["args"][1]).exists()


RUN = """#!/bin/sh
trap 'touch told; exit 0' TERM
[ "$1 $2" = "train --config" ] && [ -f summary.json ] && exit 0
echo ready
while :; do read line < fifo; done
"""


def test_a_pod_that_is_told_to_end_tells_its_run_and_has_failed_until_the_run_is_done(tmp_path):
    """Kubernetes tells the first process alone: the shell."""
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    workdir = container["args"][container["args"].index("--workdir") + 1]
    command = [word.replace(workdir, str(tmp_path)) for word in container["command"]]
    (tmp_path / "seal-jax").write_text(RUN)
    (tmp_path / "seal-jax").chmod(0o755)
    os.mkfifo(tmp_path / "fifo")
    path = f"{tmp_path}:{os.environ['PATH']}"
    start = functools.partial(
        subprocess.Popen, [*command, *container["args"]], cwd=tmp_path, text=True
    )
    with start(env={**os.environ, "PATH": path}, stdout=subprocess.PIPE) as shell:
        assert shell.stdout.readline() == "ready\n"
        shell.terminate()
        assert shell.wait() == 1 and (tmp_path / "told").exists()
    (tmp_path / "summary.json").touch()
    assert start(env={**os.environ, "PATH": path}).wait() == 0


def test_skypilot_ends_in_the_same_script():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["run"].splitlines()[-1] == "bash launch/tpu_worker.sh $ARGS"
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_image_ends_in_train_and_knows_its_commit():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert lines[-1] == 'ENTRYPOINT ["seal-jax", "train"]'
    assert "ENV SEAL_JAX_COMMIT=$COMMIT" in lines
