#!/usr/bin/env bash
# Runs a command as N processes of one JAX program on this machine.
#
#   launch/local_processes.sh N [--devices=K | --gpus=GPUS] [--restarts=R] [--log_dir=DIR] -- COMMAND...
#
#   launch/local_processes.sh 2 --devices=4 -- python -m inranker_jax.train --gin_file=gin/small_synth.gin
#   launch/local_processes.sh 8 --gpus=all --restarts=3 --log_dir=logs -- python -m inranker_jax.train ...
#
# Each process gets JAX_COORDINATOR_ADDRESS (a free port of 127.0.0.1), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
# When one fails, the others are stopped and its status is returned: the first failing one. SIGTERM and Ctrl-C go
# to all, which save and leave.
#
#   --devices=K       K virtual CPU devices in each process
#   --gpus=GPUS       GPUs, divided evenly: a number, a list such as 0,1,4,5, or all. A number and all are of those
#                     in CUDA_VISIBLE_DEVICES, where it is set
#   --restarts=R      start all again up to R times after a crash (default 0); never after status 0, after 2 (bad
#                     input), nor after a signal that this script handed on
#   --log_dir=DIR     write DIR/process_0.log ... instead of lines that begin with "0| "; a rerun appends
#   --grace=S         seconds from a crash until the others get SIGTERM, and from there to SIGKILL (default 10)
#   --save_grace=S    the same when the first to leave was stopped by a signal: the others are saving (default 300)
#   --port=P          the coordinator's port (default: a free one)
#   --env=NAME=VALUE  a variable for all of them; may be given several times
#   --dry_run         print the N commands and run nothing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Job control: each process is the leader of a group of its own, so Ctrl-C reaches it through this script only,
# and once: a second Ctrl-C would end it before it has saved.
set -m

LIST_env=()
PIDS=()
READERS=()
declare -A STATUS=() # by process index
FORWARDED=""         # number of the signal that was handed on

parse() {
  define value devices
  define value gpus
  define value restarts 0
  define value log_dir
  define value grace 10
  define value save_grace 300
  define value port
  define list env
  define switch dry_run
  parse_flags "$@"
  require_command
  ((${#POSITIONAL[@]} == 1)) || die "expected one number of processes before --, got '${POSITIONAL[*]-}'."
  COUNT=${POSITIONAL[0]}
  [[ $COUNT =~ ^[1-9][0-9]{0,3}$ ]] ||
    die "'$COUNT' processes: expected a whole number of at least 1, before the --."
  check_whole restarts
  check_whole grace
  check_whole save_grace
  [[ -z ${FLAG[devices]} ]] || check_whole devices 1
  [[ -z ${FLAG[port]} ]] || check_whole port 1 65535
  [[ -z ${FLAG[devices]} || -z ${FLAG[gpus]} ]] || die "--devices and --gpus: give one of them."
  DRY_RUN=${FLAG[dry_run]:-0}
  check_variables "${LIST_env[@]}"
  find_gpus
}

# A GPU in a list is a number, or a name as nvidia-smi -L prints it. Two processes on one GPU would take each
# other's memory, so each stands there once.
check_gpus() {
  local gpu known=" "
  for gpu in "${GPUS[@]}"; do
    [[ ! $gpu =~ ^[0-9]{1,4}$ ]] || gpu=$((10#$gpu))
    [[ $gpu =~ ^(0|[1-9][0-9]{0,3}|(GPU|MIG)-[A-Za-z0-9/-]+)$ ]] ||
      die "$1: '$gpu' is no GPU. Expected a number of GPUs, a list such as 0,1,4,5, or all."
    [[ $known != *" $gpu "* ]] || die "$1: GPU $gpu stands there twice. Name each once."
    known+="$gpu "
  done
}

find_gpus() {
  GPUS=()
  local gpus=${FLAG[gpus]// /} visible i
  local -a seen
  [[ -n $gpus ]] || return 0
  if [[ $gpus != all && ! $gpus =~ ^[0-9]+$ ]]; then
    IFS=, read -r -a GPUS <<< "$gpus"
    check_gpus "--gpus=$gpus"
  else # all, and a number, are of those that this shell may use
    visible=${CUDA_VISIBLE_DEVICES-}
    IFS=, read -r -a seen <<< "${visible// /}"
    [[ -z ${CUDA_VISIBLE_DEVICES+set} || ${seen[0]--1} != -1 ]] ||
      die "--gpus=$gpus: CUDA_VISIBLE_DEVICES='$visible' lets this shell use no GPUs. Unset it, or name them by --gpus=LIST."
    visible=${#seen[@]}
    if [[ $gpus == all ]]; then
      gpus=$visible
      if ((visible == 0)); then
        command -v nvidia-smi > /dev/null || die "--gpus=all: nvidia-smi is not there. Give a number or a list."
        gpus=$(nvidia-smi --list-gpus | wc -l)
      fi
    fi
    [[ $gpus =~ ^[0-9]{1,4}$ ]] || die "--gpus=$gpus: so many GPUs no machine has. Give another number or a list."
    gpus=$((10#$gpus)) # 08 is no octal number
    if ((visible)); then
      ((gpus <= visible)) || die "--gpus=$gpus: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has $visible. Give another number or a list."
      GPUS=("${seen[@]:0:gpus}")
      check_gpus "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
    else
      for ((i = 0; i < gpus; i++)); do GPUS+=("$i"); done
    fi
  fi
  ((${#GPUS[@]} > 0 && ${#GPUS[@]} % COUNT == 0)) ||
    die "${#GPUS[@]} GPUs cannot be divided among $COUNT processes. Choose a divisor, or name others by --gpus=LIST."
}

# A port without a listener, below the range from which the kernel takes ports for outgoing connections.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
    if ! (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
      echo "$port"
      return
    fi
  done
  die "no free port between 20000 and 32000. Give --port=P."
}

# environment INDEX PORT: fills VARIABLES with NAME=VALUE for one process.
environment() {
  local share=$((${#GPUS[@]} / COUNT)) ids="0" i
  VARIABLES=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$COUNT" "JAX_PROCESS_ID=$1")
  if [[ -n ${FLAG[devices]} ]]; then
    VARIABLES+=("JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=${FLAG[devices]}")
  elif ((share)); then
    local mine=("${GPUS[@]:$1 * share:share}")
    for ((i = 1; i < share; i++)); do ids+=",$i"; done
    # With its local devices told, JAX does not guess them from a cluster around this machine (one per process).
    VARIABLES+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")" "JAX_LOCAL_DEVICE_IDS=$ids")
  fi
  VARIABLES+=("${LIST_env[@]}")
}

log_of() { printf '%s/process_%s.log' "${FLAG[log_dir]}" "$1"; }

start_one() {
  local index=$1 out
  environment "$index" "$2"
  if [[ -n ${FLAG[log_dir]} ]]; then
    exec {out}>> "$(log_of "$index")"
  else
    # The reader outlives the signals of a terminal: without it the process would die of writing.
    exec {out}> >(trap '' INT TERM HUP; exec sed -u "s/^/$index| /")
    READERS+=("$!")
  fi
  env "${VARIABLES[@]}" "${COMMAND[@]}" < /dev/null >&"$out" 2>&1 {out}>&- &
  PIDS[index]=$!
  exec {out}>&-
}

forward() {
  FORWARDED=$2
  say "SIG$1: handed on to all; waiting for them to save and leave. Ctrl-C ends them at once."
  signal_running "$1"
}

# Fills RUNNING with the indices of the processes that are alive.
find_running() {
  local alive index
  alive=" $(jobs -rp | tr '\n' ' ')"
  RUNNING=()
  for index in "${!PIDS[@]}"; do
    [[ $alive != *" ${PIDS[index]} "* ]] || RUNNING+=("$index")
  done
}

signal_running() {
  local index
  find_running
  for index in "${RUNNING[@]}"; do
    # It may have ended since; its status is read either way.
    kill -s "$1" "${PIDS[index]}" 2> /dev/null || true
  done
}

kill_groups() {
  local pid
  for pid in "${PIDS[@]}"; do
    # Groups that are empty by now are no error.
    kill -s "$1" -- "-$pid" 2> /dev/null || true
  done
}

# Collects the statuses of processes that ended since the last look; the first failing one is FIRST.
collect() {
  local index status
  find_running
  for index in "${!PIDS[@]}"; do
    [[ -z ${STATUS[$index]-} && " ${RUNNING[*]-} " != *" $index "* ]] || continue
    status=0
    wait "${PIDS[index]}" || status=$?
    STATUS[$index]=$status
    if ((status != 0 && FIRST == 0)); then
      FIRST=$status
      FAILED=$index
      FAILED_AT=$SECONDS
    fi
  done
}

# One attempt: starts all, waits for all, and leaves the first failing status in FIRST.
attempt() {
  local port index grace terminated=""
  port=${FLAG[port]:-$(free_port)}
  PIDS=() READERS=() STATUS=() FIRST=0 FAILED="" FAILED_AT=0
  for ((index = 0; index < COUNT; index++)); do start_one "$index" "$port"; done
  while collect && ((${#RUNNING[@]})); do
    if ((FIRST)); then
      grace=${FLAG[grace]}
      ((FIRST != 143 && FIRST != 130)) || grace=${FLAG[save_grace]}
      if [[ -z $terminated ]] && ((SECONDS - FAILED_AT >= grace)); then
        say "process $FAILED ended with status $FIRST; stopping ${#RUNNING[@]} others."
        signal_running TERM
        terminated=$SECONDS
      elif [[ -n $terminated ]] && ((SECONDS - terminated >= FLAG[grace])); then
        kill_groups KILL
      fi
    fi
    sleep 0.1
  done
  kill_groups KILL # children that a process left behind, which would hold its output open
  for index in "${READERS[@]}"; do wait "$index" || true; done # the last lines
}

show_failure() {
  if [[ -n $FORWARDED ]] && ((FIRST == 128 + FORWARDED)); then
    say "all have left after the signal."
    return
  fi
  say "process $FAILED of $COUNT failed first, with status $FIRST."
  [[ -n ${FLAG[log_dir]} ]] || return 0
  say "the end of $(log_of "$FAILED"):"
  tail -n 20 "$(log_of "$FAILED")" >&2
}

# Whether to start again: not after success, bad input, or a signal that was handed on.
restart_helps() {
  local index
  ((FIRST != 0)) && [[ -z $FORWARDED ]] || return 1
  for index in "${!STATUS[@]}"; do
    ((STATUS[$index] != 2 && STATUS[$index] != 130)) || return 1
  done
}

main() {
  local restarts=0 index
  parse "$@"
  if ((DRY_RUN)); then
    for ((index = 0; index < COUNT; index++)); do
      environment "$index" "${FLAG[port]:-PORT}"
      run env "${VARIABLES[@]}" "${COMMAND[@]}"
    done
    return
  fi
  command -v "${COMMAND[0]}" > /dev/null || die "${COMMAND[0]}: no such command. Check it, and the PATH."
  if [[ -n ${FLAG[log_dir]} ]]; then
    mkdir -p "${FLAG[log_dir]}" || die "--log_dir=${FLAG[log_dir]}: cannot make this folder."
    say "output of the $COUNT processes: ${FLAG[log_dir]}/process_*.log"
  fi
  trap 'forward TERM 15' TERM
  trap 'forward TERM 15' HUP
  trap 'forward INT 2' INT
  trap 'signal_running USR1' USR1 # a trace of the next steps
  while attempt && ((FIRST)); do
    show_failure
    restart_helps && ((restarts < FLAG[restarts])) || exit "$FIRST"
    restarts=$((restarts + 1))
    say "restart $restarts of ${FLAG[restarts]}"
  done
}

main "$@"
