#!/usr/bin/env bash
# What tpu_pod.sh runs on each host of a pod, copied there by its setup. Everything lies in ~/inranker_jax:
# venv/ (the package), work/ (the run's working directory), run/ (pid, log, status of the run).
#
#   worker.sh install PYTHON REQUIREMENT   makes the virtual environment; does nothing where it is made already
#   worker.sh start [NAME=VALUE...] -- COMMAND...   starts a detached run; does nothing where it runs already
#   worker.sh wait SECONDS     waits for its end, SECONDS at most, and prints "launch-status: HOST STATUS"
#   worker.sh log LINES [follow]   the end of its log
#   worker.sh signal NAME      sends it a signal: INT saves and leaves with status 130, USR1 traces the next steps
#
# STATUS is the exit status of the command, "running", "none" (nothing was started) or "lost" (it is gone and left
# no status: the host was restarted, or the kernel killed it).
set -euo pipefail

ROOT=${INRANKER_JAX_HOME:-$HOME/inranker_jax}
RUN=$ROOT/run

# fail STATUS MESSAGE: 2 is for bad input, 1 for what may go better next time.
fail() {
  echo "$(hostname): error: ${*:2}" >&2
  exit "$1"
}

# The first interpreter that can run the package and make virtual environments. Ubuntu 22.04, which the TPU images
# are, has 3.10 only.
find_python() {
  local candidate
  for candidate in "$@"; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
}

make_venv() {
  local wanted=$1 python
  if [[ $wanted == auto ]]; then
    python=$(find_python python3.12 python3.13 python3.11 python3)
    if [[ -z $python ]]; then
      echo "$(hostname): no Python 3.11 to 3.13 here; uv fetches one"
      python3 -m pip install --quiet --user uv ||
        fail 1 "no Python 3.11 to 3.13, and uv could not be installed. Install one, and set up with --python=PATH."
      python3 -m uv venv --quiet --seed --clear --python 3.12 "$ROOT/venv" ||
        fail 1 "uv could not fetch Python 3.12. Install 3.11 to 3.13, and set up with --python=PATH."
      return
    fi
  else
    python=$(find_python "$wanted")
    [[ -n $python ]] || fail 2 "$wanted is no Python 3.11 to 3.13 with venv. Give another --python."
  fi
  "$python" -m venv --clear "$ROOT/venv"
}

install() {
  local wanted=$1 requirement=$2 stamp file
  mkdir -p "$ROOT/work" "$RUN"
  exec 9> "$ROOT/lock"
  flock 9 # a second setup waits for the first
  stamp="$wanted $requirement"
  file=${requirement%%.whl\[*}.whl
  [[ -f $file ]] || file=${requirement%%.tar.gz\[*}.tar.gz
  [[ ! -f $file ]] || stamp+=" $(cksum < "$file")"
  if [[ -f $ROOT/venv/installed && $(< "$ROOT/venv/installed") == "$stamp" ]]; then
    echo "$(hostname): $requirement is installed already"
    return
  fi
  [[ $(status) != running ]] || fail 2 "a run is going on here. Stop it before another version is installed."
  make_venv "$wanted"
  "$ROOT/venv/bin/python" -m pip install --quiet --upgrade pip ||
    fail 3 "pip cannot reach its index. A pod without external addresses needs Cloud NAT or a mirror."
  "$ROOT/venv/bin/python" -m pip install --quiet "$requirement" || fail 3 "pip could not install $requirement."
  printf '%s' "$stamp" > "$ROOT/venv/installed"
  echo "$(hostname): installed $requirement"
}

boot() { cat /proc/sys/kernel/random/boot_id; }

# Process ids mean nothing after a reboot.
alive() {
  local file
  [[ -s $RUN/boot && $(< "$RUN/boot") == "$(boot)" ]] || return 1
  for file in "$RUN/supervisor" "$RUN/child"; do
    if [[ -s $file ]] && kill -0 "$(< "$file")" 2> /dev/null; then return 0; fi
  done
  return 1
}

status() {
  if [[ -s $RUN/status ]]; then
    cat "$RUN/status"
  elif alive; then
    echo running
  elif [[ -s $RUN/command ]]; then
    echo lost
  else
    echo none
  fi
}

start() {
  local wanted
  [[ -f $ROOT/venv/installed ]] || fail 2 "the package is not installed here. Run setup first."
  mkdir -p "$RUN" "$ROOT/work"
  exec 9> "$ROOT/lock"
  flock 9
  wanted=$(printf '%q ' "$@")
  if alive && [[ ! -s $RUN/status ]]; then
    [[ $(< "$RUN/command") == "$wanted" ]] || fail 2 "another command is running here. Stop it first."
    echo "$(hostname): it is running already"
    return
  fi
  rm -f "$RUN/status" "$RUN/supervisor" "$RUN/child"
  printf '%s' "$wanted" > "$RUN/command"
  boot > "$RUN/boot"
  set -m # a background job without job control could never be interrupted again: it inherits an ignored SIGINT
  nohup setsid bash "${BASH_SOURCE[0]}" supervise "$@" < /dev/null >> "$RUN/log" 2>&1 9>&- &
  for _ in {1..100}; do
    [[ ! -s $RUN/child && ! -s $RUN/status ]] || break
    sleep 0.1
  done
  [[ -s $RUN/child || -s $RUN/status ]] || fail 1 "the command did not start. See $RUN/log."
  echo "$(hostname): started; log in $RUN/log"
}

# Outlives the ssh session that started it, and keeps the command's exit status.
supervise() {
  local variables=() status=0 child
  echo "$$" > "$RUN/supervisor"
  while (($#)) && [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  cd "$ROOT/work"
  export PATH="$ROOT/venv/bin:$PATH" VIRTUAL_ENV="$ROOT/venv" PYTHONUNBUFFERED=1
  trap : TERM INT HUP USR1 # the command gets the signal and saves; this one stays to note its status
  set -m
  echo "launch: $(date -u +%FT%TZ) $(hostname): $(printf '%q ' "$@")"
  env "${variables[@]}" "$@" &
  child=$!
  echo "$child" > "$RUN/child"
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2> /dev/null || break # wait returns early when a signal arrives here
  done
  echo "launch: $(date -u +%FT%TZ) $(hostname): ended with status $status"
  echo "$status" > "$RUN/status.part"
  mv "$RUN/status.part" "$RUN/status"
}

wait_for_end() {
  local deadline=$((SECONDS + $1))
  while [[ $(status) == running ]] && ((SECONDS < deadline)); do sleep 1; done
  echo "launch-status: $(hostname) $(status)"
}

show_log() {
  local lines=$1 follow=${2-}
  [[ -f $RUN/log ]] || fail 2 "there is no log: nothing was started here."
  if [[ $follow == follow ]] && alive; then
    exec tail -n "$lines" --pid="$(< "$RUN/supervisor")" -F "$RUN/log"
  fi
  exec tail -n "$lines" "$RUN/log"
}

send() {
  if [[ $(status) != running ]]; then
    echo "$(hostname): nothing is running"
    return
  fi
  kill -s "$1" "$(< "$RUN/child")"
  echo "$(hostname): sent SIG$1"
}

main() {
  case ${1-} in
    install) install "$2" "$3" ;;
    start) start "${@:2}" ;;
    supervise) supervise "${@:2}" ;;
    signal) send "$2" ;;
    wait) wait_for_end "$2" ;;
    log) show_log "${@:2}" ;;
    *) fail 2 "worker.sh is run by tpu_pod.sh; see its --help." ;;
  esac
}

# One line: bash reads no further in this file, which a later setup may replace while it runs.
main "$@"; exit
