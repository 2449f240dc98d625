#!/usr/bin/env bash
# Runs a command on every host of a Cloud TPU slice, or of several slices, through queued resources.
#
#   launch/tpu_pod.sh create  --name=N --zone=Z --project=P --accelerator_type=v5litepod-16 [--spot]
#   launch/tpu_pod.sh setup   --name=N ... --package=git+https://HOST/REPOSITORY@TAG | dist/FILE.whl
#   launch/tpu_pod.sh run     --name=N ... [--detach] -- python -m inranker_jax.train --gin_file=G --output_dir=gs://B/D
#   launch/tpu_pod.sh logs    --name=N ... [--follow] [--worker=0]
#   launch/tpu_pod.sh status  --name=N ...
#   launch/tpu_pod.sh trace   --name=N ...      an xprof trace of the run's next steps, on every host
#   launch/tpu_pod.sh stop    --name=N ...      ends the run: it saves, and can be started again
#   launch/tpu_pod.sh resume  --name=N ... --accelerator_type=T --package=S -- COMMAND...
#   launch/tpu_pod.sh delete  --name=N ...      ends the costs
#
# resume is all of it in a loop: it creates what is missing, waits until it is ACTIVE, sets up, runs, follows; a
# preempted resource is deleted and made anew, and the same command goes on from its newest checkpoint. Commands
# may be repeated: what is there is kept, what runs is left running. The run outlives this machine's connection.
#
# Flags, and in brackets the variables that stand in for them:
#   --name=N [INRANKER_NAME]   queued resource, and prefix of its nodes. resume and delete take it from the flag only
#   --zone=Z [INRANKER_ZONE, CLOUDSDK_COMPUTE_ZONE]    --project=P [INRANKER_PROJECT, CLOUDSDK_CORE_PROJECT]
#   --slices=S [INRANKER_SLICES]   slices of that type that train together (default 1)
#   --accelerator_type=T [INRANKER_ACCELERATOR_TYPE]   such as v4-128, v5litepod-16, v5p-32, v6e-64
#   --runtime_version=V   the hosts' image (default: the one for that type)
#   --spot | --reserved | --reservation=NAME   what is paid for (default: on demand)
#   --valid_until=DURATION   give up waiting after that, such as 6h
#   --create_arg=ARG   handed to gcloud's create, such as --create_arg=--network=N; may be repeated
#   --package=S [INRANKER_PACKAGE]   what setup installs: git+https://..., or a wheel or sdist on this machine
#   --extras=E   its extras (default train,tpu)    --python=PATH   interpreter on the hosts (default: one is found)
#   --copy=PATH   file or folder for the run's working directory; may be repeated
#   --env=NAME=VALUE   variable for the command; may be repeated
#   --max_restarts=R   resume: restarts of all kinds (default 50)
#   --max_crashes=C    resume: crashes in a row, none of which came after an hour's work (default 3)
#   --delete_when_done resume: delete the resource when the command has ended well
#   --poll_seconds=S   pause between two looks (default 30)
#   --lines=L --follow --worker=W --slice=I   logs: how much, and whose (default 100 lines of worker 0 of slice 0);
#                      W is a host's number or all, I a number
#   --detach           run: do not follow
#   --internal_ip      reach the hosts by their internal addresses
#   --dry_run          print the commands, touch nothing
#
# Exit status: that of the command (2 bad input, 130 stopped), 75 when restarts are used up, 2 for a bad flag.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SUBCOMMANDS=(create setup run logs status trace stop resume delete)
REMOTE=inranker_jax # in the home directory of each host; see worker.sh
GIVE_UP=75          # EX_TEMPFAIL of sysexits.h
LIST_env=() LIST_copy=() LIST_create_arg=()

declare_flags() {
  define value name "" INRANKER_NAME
  define value zone "" INRANKER_ZONE CLOUDSDK_COMPUTE_ZONE
  define value project "" INRANKER_PROJECT CLOUDSDK_CORE_PROJECT
  define value slices 1 INRANKER_SLICES
  define value accelerator_type "" INRANKER_ACCELERATOR_TYPE
  define value runtime_version "" INRANKER_RUNTIME_VERSION
  define switch spot
  define switch reserved
  define value reservation
  define value valid_until
  define list create_arg
  define value package "" INRANKER_PACKAGE
  define value extras train,tpu
  define value python auto
  define list copy
  define list env
  define value max_restarts 50
  define value max_crashes 3
  define switch delete_when_done
  define value poll_seconds 30
  define value lines 100
  define switch follow
  define value worker 0
  define value slice 0
  define switch detach
  define switch internal_ip
  define switch dry_run
}

check_flags() {
  require name zone project
  check_name name "${FLAG[name]}"
  check_whole slices 1
  local flag
  for flag in max_restarts max_crashes poll_seconds lines slice; do check_whole "$flag"; done
  # gcloud is given it as it is.
  [[ ${FLAG[worker]} == all || ${FLAG[worker]} =~ ^[0-9]{1,4}$ ]] ||
    die "--worker=${FLAG[worker]}: expected the number of a host in its slice, from 0, or all."
  ((FLAG[slice] < FLAG[slices])) || die "--slice=${FLAG[slice]} of --slices=${FLAG[slices]}: they count from 0."
  check_variables "${LIST_env[@]}"
  DRY_RUN=${FLAG[dry_run]:-0}
  PLACE=("--project=${FLAG[project]}" "--zone=${FLAG[zone]}")
  NODES=("${FLAG[name]}")
  if ((FLAG[slices] > 1)); then
    NODES=()
    for ((flag = 0; flag < FLAG[slices]; flag++)); do NODES+=("${FLAG[name]}-$flag"); done
  fi
  need gcloud "Install the Google Cloud CLI and run: gcloud auth login"
}

# ---- the queued resource ------------------------------------------------------------------------------------

queued() { gcloud compute tpus queued-resources "$1" "${FLAG[name]}" "${PLACE[@]}" "${@:2}"; }

# Prints the state of the queued resource, or NONE. Only gcloud's own word that it is not there counts as NONE:
# a failed look must not lead to a second, paid resource.
state_of() {
  local answer attempt
  for attempt in {1..5}; do
    # Among gcloud's notices, whatever their place, the state is the line of one word in capitals.
    if answer=$(queued describe "--format=value(state.state)" 2>&1) && grep -Exm 1 '[A-Z_]+' <<< "$answer"; then
      return
    fi
    if [[ $answer == *NOT_FOUND* ]]; then
      echo NONE
      return
    fi
    ((attempt == 5)) || sleep "${FLAG[poll_seconds]}"
  done
  die "gcloud could not describe ${FLAG[name]} in ${FLAG[zone]}: ${answer//$'\n'/ }"
}

# Sets STATE. Leaves when it cannot be known: nothing may be created or deleted on a guess.
look() { STATE=$(state_of) || exit; }

default_runtime() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "--accelerator_type=$1: its image is not known here. Give --runtime_version too." ;;
  esac
}

# Google may rent more than is known here, so this only warns. v4 and v5p count cores, two of each chip.
warn_of_size() {
  local size=${1##*-} sizes
  case $1 in
    v5litepod-* | v6e-*) sizes="1, 4, 8, 16, 32, 64, 128, 256" ;;
    v4-* | v5p-*) sizes="8, 16, 32, 64, and multiples of 128" ;;
    *) return 0 ;;
  esac
  [[ ", $sizes," != *", $size,"* ]] || return 0
  [[ $sizes != *128 || ! $size =~ ^[1-9][0-9]{0,5}$ ]] || ((size % 128)) || return 0
  say "warning: --accelerator_type=$1: no size of ${1%-*} that is known here: $sizes."
}

creation_arguments() {
  local kind=${FLAG[accelerator_type]} version=${FLAG[runtime_version]}
  require accelerator_type
  [[ $kind != v5e-* ]] || die "--accelerator_type=$kind: Cloud TPU calls it v5litepod-${kind#v5e-}."
  [[ -n $version ]] || version=$(default_runtime "$kind")
  warn_of_size "$kind"
  CREATION=("--accelerator-type=$kind" "--runtime-version=$version")
  if ((FLAG[slices] > 1)); then
    CREATION+=("--node-count=${FLAG[slices]}" "--node-prefix=${FLAG[name]}")
  else
    CREATION+=("--node-id=${FLAG[name]}")
  fi
  local tier=()
  [[ -z ${FLAG[spot]} ]] || tier+=(--spot)
  [[ -z ${FLAG[reserved]} ]] || tier+=(--reserved)
  [[ -z ${FLAG[reservation]} ]] || tier+=("--reservation=${FLAG[reservation]}")
  ((${#tier[@]} <= 1)) || die "${tier[*]}: give one of them."
  CREATION+=("${tier[@]}")
  [[ -z ${FLAG[valid_until]} ]] || CREATION+=("--valid-until-duration=${FLAG[valid_until]}")
  CREATION+=("${LIST_create_arg[@]}" --quiet)
}

make_resource() {
  local track=() answer
  [[ -z ${FLAG[reservation]} ]] || track=(alpha) # the flag --reservation is in gcloud's alpha track only
  local -a line=(gcloud "${track[@]}" compute tpus queued-resources create "${FLAG[name]}" "${PLACE[@]}" "${CREATION[@]}")
  if ((DRY_RUN)); then
    run "${line[@]}"
  elif ! answer=$("${line[@]}" 2>&1); then
    [[ $answer == *ALREADY_EXISTS* ]] || die "gcloud could not create ${FLAG[name]}: ${answer//$'\n'/ }"
  fi
}

create() {
  creation_arguments
  STATE=NONE
  ((DRY_RUN)) || look
  case $STATE in
    NONE)
      make_resource
      ((DRY_RUN)) || say "requested ${FLAG[name]}: ${FLAG[slices]} x ${FLAG[accelerator_type]}. See status; it costs from ACTIVE on."
      ;;
    FAILED | SUSPENDED | SUSPENDING | DELETING)
      die "${FLAG[name]} exists and is $STATE. Delete it, or let resume make it anew."
      ;;
    *) say "${FLAG[name]} exists already and is $STATE." ;;
  esac
}

delete() {
  require_explicit_name delete
  if ((!DRY_RUN)); then
    look
    if [[ $STATE == NONE ]]; then
      say "${FLAG[name]} is not there: nothing to delete."
      return
    fi
  fi
  run gcloud compute tpus queued-resources delete "${FLAG[name]}" "${PLACE[@]}" --force --quiet
}

# ---- its hosts ----------------------------------------------------------------------------------------------

# on_node NODE WORKERS COMMAND...: runs a command on hosts of one slice. The words arrive as they are here.
on_node() {
  local internal=()
  [[ -z ${FLAG[internal_ip]} ]] || internal=(--internal-ip)
  run gcloud compute tpus tpu-vm ssh "$1" "--worker=$2" "${PLACE[@]}" --quiet "${internal[@]}" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=3 "--command=$(quote "${@:3}")" < /dev/null
}

# for_nodes FUNCTION ARGUMENT...: calls FUNCTION NODE ARGUMENT... for all slices at once; fails if one fails.
for_nodes() {
  local node pid status=0 pids=()
  if ((DRY_RUN || ${#NODES[@]} == 1)); then
    for node in "${NODES[@]}"; do "$1" "$node" "${@:2}" || return; done
    return
  fi
  for node in "${NODES[@]}"; do
    "$1" "$node" "${@:2}" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

on_all_hosts() { on_node "$1" all "${@:2}"; }

# copy_to NODE FOLDER PATH...: to all hosts of a slice.
copy_to() {
  local internal=()
  [[ -z ${FLAG[internal_ip]} ]] || internal=(--internal-ip)
  run gcloud compute tpus tpu-vm scp "${@:3}" "$1:$REMOTE/$2" --worker=all --recurse "${PLACE[@]}" --quiet "${internal[@]}"
}

# What pip is told: FILE[extras] or inranker_jax[extras] @ URL.
find_package() {
  local package=${FLAG[package]} path
  require package
  PACKAGE_FILE=""
  case $package in
    git+*) REQUIREMENT="inranker_jax[${FLAG[extras]}] @ $package" ;;
    *.whl | *.tar.gz)
      [[ -f $package ]] || die "--package=$package: no such file. Build one: pip wheel --no-deps --wheel-dir=dist ."
      PACKAGE_FILE=$(realpath "$package")
      REQUIREMENT="./$REMOTE/dist/${package##*/}[${FLAG[extras]}]"
      ;;
    *) die "--package=$package: expected git+https://...@TAG, or a .whl or .tar.gz file on this machine." ;;
  esac
  COPIES=()
  for path in "${LIST_copy[@]}"; do
    [[ -e $path ]] || die "--copy=$path: no such file or folder."
    COPIES+=("$(realpath "$path")")
  done
}

# The extra tpu brings what opens gs://; s3:// needs its own.
check_extras() {
  [[ " ${COMMAND[*]} ${LIST_env[*]}" != *s3://* || ,${FLAG[extras]}, == *,s3,* ]] ||
    die "an s3:// path, and no package that opens it: add --extras=${FLAG[extras]},s3."
}

setup() {
  find_package
  for_nodes on_all_hosts mkdir -p "$REMOTE/dist" "$REMOTE/work" || return
  for_nodes copy_to "" "$HERE/worker.sh" || return
  [[ -z $PACKAGE_FILE ]] || for_nodes copy_to dist/ "$PACKAGE_FILE" || return
  ((${#COPIES[@]} == 0)) || for_nodes copy_to work/ "${COPIES[@]}" || return
  for_nodes on_all_hosts bash "$REMOTE/worker.sh" install "${FLAG[python]}" "$REQUIREMENT"
}

start() { for_nodes on_all_hosts bash "$REMOTE/worker.sh" start "${LIST_env[@]}" -- "${COMMAND[@]}"; }

# The statuses of all hosts as one: running, lost, unreachable, or an exit status.
verdict() {
  local code first=0
  local -a codes
  mapfile -t codes < <(sed -n 's/^launch-status: [^ ]* //p' <<< "$1")
  local all=" ${codes[*]-} "
  if ((${#codes[@]} == 0)); then
    echo unreachable
  elif [[ $all == *" running "* ]]; then
    echo running
  elif [[ $all == *" lost "* || $all == *" none "* ]]; then
    echo lost
  elif [[ $all == *" 2 "* ]]; then
    echo 2 # the one with bad input leaves with 2, its peers with whatever losing it gives them
  elif [[ $all == *" 130 "* ]]; then
    echo 130
  else
    for code in "${codes[@]}"; do
      ((first != 0)) || first=$code
    done
    echo "$first"
  fi
}

FOLLOWER=""

# end_follower SECONDS: gives it so long to show the last lines.
end_follower() {
  local tenths=$(($1 * 10))
  [[ -n $FOLLOWER ]] || return 0
  while ((tenths-- > 0)) && kill -0 "$FOLLOWER" 2> /dev/null; do sleep 0.1; done
  # It may have ended by itself, with the run.
  kill -- "-$FOLLOWER" 2> /dev/null || true
  wait "$FOLLOWER" 2> /dev/null || true
  FOLLOWER=""
}

detached() {
  end_follower 0
  say "no longer following; ${FLAG[name]} goes on, and costs. See logs, stop and delete."
  exit 130
}

# Shows the log of the first host until all have ended; OUTCOME is the verdict.
follow() {
  local answer failures=0
  trap detached INT TERM
  set -m # a process group of its own, which can be ended as a whole: gcloud starts ssh
  on_node "${NODES[0]}" 0 bash "$REMOTE/worker.sh" log 20 follow &
  FOLLOWER=$!
  set +m
  while true; do
    if answer=$(for_nodes on_all_hosts bash "$REMOTE/worker.sh" wait 300 2>&1); then
      failures=0
      OUTCOME=$(verdict "$answer")
      [[ $OUTCOME == running ]] || break
    else
      failures=$((failures + 1))
      OUTCOME=unreachable
      say "not every host answered: ${answer//$'\n'/ }"
      look
      if [[ $STATE != ACTIVE ]] || ((failures == 5)); then break; fi
      sleep "${FLAG[poll_seconds]}"
    fi
  done
  end_follower 5
  trap - INT TERM
}

run_command() {
  require_command
  warn_without_bucket
  check_extras
  start || die "the run did not start on every host. Was it set up? See the messages above; setup may be repeated."
  if [[ -n ${FLAG[detach]} ]] || ((DRY_RUN)); then
    return
  fi
  follow
  case $OUTCOME in
    0) say "the command ended well. ${FLAG[name]} still costs: delete it when you need it no more." ;;
    unreachable | lost) say "the hosts are gone or were restarted: see status. resume goes on from the newest checkpoint." ;;
    *) say "the command ended with status $OUTCOME." ;;
  esac
  [[ $OUTCOME =~ ^[0-9]+$ ]] || exit "$GIVE_UP"
  exit "$OUTCOME"
}

logs() {
  local more=()
  [[ -z ${FLAG[follow]} ]] || more=(follow)
  on_node "${NODES[FLAG[slice]]}" "${FLAG[worker]}" bash "$REMOTE/worker.sh" log "${FLAG[lines]}" "${more[@]}"
}

status() {
  if ((DRY_RUN)); then
    run gcloud compute tpus queued-resources describe "${FLAG[name]}" "${PLACE[@]}" "--format=value(state.state)"
    for_nodes on_all_hosts bash "$REMOTE/worker.sh" wait 0
    return
  fi
  look
  echo "${FLAG[name]}: $STATE"
  [[ $STATE != FAILED ]] || queued describe "--format=value(state.failedData.error.message)"
  [[ $STATE != ACTIVE ]] || for_nodes on_all_hosts bash "$REMOTE/worker.sh" wait 0
}

stop() { for_nodes on_all_hosts bash "$REMOTE/worker.sh" signal INT; }

trace() { for_nodes on_all_hosts bash "$REMOTE/worker.sh" signal USR1; }

# ---- the loop -----------------------------------------------------------------------------------------------

RESTARTS=0
CRASHES=0
REPLACING=0

# count_restart REASON: notes one more, or gives up.
count_restart() {
  if ((RESTARTS >= FLAG[max_restarts])); then
    say "$1, and --max_restarts=${FLAG[max_restarts]} are used up. ${FLAG[name]} may still cost: see status and delete."
    exit "$GIVE_UP"
  fi
  RESTARTS=$((RESTARTS + 1))
  say "$1: restart $RESTARTS of ${FLAG[max_restarts]}"
}

# A spot node may be gone while its queued resource still counts as active.
node_preempted() {
  local node state
  for node in "${NODES[@]}"; do
    # A failed look is no proof: the next round looks again.
    state=$(gcloud compute tpus tpu-vm describe "$node" "${PLACE[@]}" "--format=value(state)" 2>&1) || state=unknown
    ! grep -Eqx 'PREEMPTED|TERMINATED' <<< "$state" || return 0
  done
  return 1
}

# Deletes what was preempted; the loop makes it anew when it is gone.
replace() {
  queued delete --force --quiet || say "gcloud could not delete ${FLAG[name]}; trying again."
  REPLACING=1
}

# One stretch of work on an active resource. Fails when the loop is to end.
work() {
  local began=$SECONDS status=0
  { setup && start; } || status=$?
  case $status in
    0) follow ;;
    2 | 3) OUTCOME=$status ;; # bad input; pip failed, which counts as a crash
    *) OUTCOME=unreachable ;;
  esac
  case $OUTCOME in
    0 | 2 | 130) return 1 ;;
    unreachable | lost | 143)
      look
      [[ $STATE == ACTIVE ]] || return 0 # the loop sees to it
      if node_preempted; then
        count_restart "a node was preempted"
        replace
        return
      fi
      [[ $OUTCOME != 143 ]] || OUTCOME=terminated
      count_restart "the run was $OUTCOME"
      ;;
    *)
      ((SECONDS - began < 3600)) || CRASHES=0
      CRASHES=$((CRASHES + 1))
      ((CRASHES <= FLAG[max_crashes])) || return 1
      ((status == 0)) || OUTCOME="$OUTCOME, in setup"
      count_restart "the command crashed with status $OUTCOME"
      ;;
  esac
  sleep "${FLAG[poll_seconds]}"
}

# make_missing SEEN: creates it, unless it was there and somebody else deleted it: that was meant.
make_missing() {
  (($1 == 0 || REPLACING)) || die "${FLAG[name]} was deleted by somebody else; it is not made anew. Run resume again if it should be."
  REPLACING=0
  make_resource
}

resume() {
  local last="" seen=0
  require_explicit_name resume
  require_command
  creation_arguments
  find_package
  warn_without_bucket
  check_extras
  if ((DRY_RUN)); then
    make_resource
    setup
    start
    return
  fi
  while true; do
    look
    [[ $STATE == "$last" ]] || say "${FLAG[name]} is $STATE"
    last=$STATE
    case $STATE in
      NONE) make_missing "$seen" ;;
      ACTIVE)
        seen=1
        work || break
        last=""
        continue
        ;;
      SUSPENDED | FAILED)
        [[ $STATE != FAILED ]] || say "$(queued describe "--format=value(state.failedData.error.message)")"
        count_restart "${FLAG[name]} is $STATE"
        replace
        ;;
      *) seen=1 ;;
    esac
    sleep "${FLAG[poll_seconds]}"
  done
  if [[ $OUTCOME == 0 && -n ${FLAG[delete_when_done]} ]]; then
    delete
    say "the command ended well, and ${FLAG[name]} is deleted."
  else
    say "the command ended with status $OUTCOME. ${FLAG[name]} still costs: delete it when you need it no more."
  fi
  exit "$OUTCOME"
}

main() {
  [[ ${1-} != -h && ${1-} != --help && $# != 0 ]] || { usage; exit $(($# == 0 ? 2 : 0)); }
  check_subcommand "$1" "${SUBCOMMANDS[@]}"
  declare_flags
  parse_flags "${@:2}"
  ((${#POSITIONAL[@]} == 0)) || die "unexpected argument '${POSITIONAL[0]}'. Flags are --name=VALUE; the command stands after --."
  check_flags
  case $1 in
    run) run_command ;;
    *) "$1" ;;
  esac
}

main "$@"
