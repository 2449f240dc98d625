#!/usr/bin/env bash
# Runs a command on GPU nodes of a Slurm cluster.
#
#   launch/slurm.sh submit --name=N --nodes=2 --gpus_per_node=8 --time=24:00:00 -- python -m inranker_jax.train ...
#   launch/slurm.sh script (the same)   prints the batch script
#   launch/slurm.sh status --name=N
#   launch/slurm.sh logs   --name=N [--follow]
#   launch/slurm.sh cancel --name=N     ends the job for good
#
# Two minutes before the time limit, and on preemption, all processes get SIGTERM: they save and leave, the job is
# queued again, and the same command goes on from its newest checkpoint. Status 2 (bad input) ends it. A job of
# that name that waits or runs already is not submitted twice.
#
# Flags, and in brackets the variables that stand in for them:
#   --name=N [INRANKER_NAME]   the job's name; cancel takes it from the flag only
#   --nodes=N (default 1)  --gpus_per_node=G (default 8)
#   --tasks=node|gpu   one process a node with all its GPUs (default), or one a GPU
#   --time=LIMIT  --partition=P  --account=A  --qos=Q  --cpus_per_task=C  (Slurm's own defaults)
#   --sbatch_arg=ARG   another line of #SBATCH, such as --sbatch_arg=--constraint=h100; may be repeated
#   --venv=DIR         virtual environment that is activated first
#   --prologue=LINE    line of shell before the command, such as --prologue='module load cuda'; may be repeated
#   --env=NAME=VALUE   variable for the command; may be repeated
#   --log_dir=DIR      logs and the script (default slurm_logs); it must be seen by all nodes
#   --max_restarts=R   times that the job may be queued again (default 50)
#   --lines=L --follow   logs: how much (default 100), and go on
#   --dry_run          print the script and the commands, touch nothing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SUBCOMMANDS=(submit script status logs cancel)
LIST_env=() LIST_sbatch_arg=() LIST_prologue=()

declare_flags() {
  define value name "" INRANKER_NAME
  define value nodes 1
  define value gpus_per_node 8
  define value tasks node
  define value time
  define value partition
  define value account
  define value qos
  define value cpus_per_task
  define list sbatch_arg
  define value venv
  define list prologue
  define list env
  define value log_dir slurm_logs
  define value max_restarts 50
  define value lines 100
  define switch follow
  define switch dry_run
}

# A value of an #SBATCH line: Slurm reads double quotes there.
directive() {
  if [[ $2 =~ [[:space:]] ]]; then printf '#SBATCH --%s="%s"\n' "$1" "$2"; else printf '#SBATCH --%s=%s\n' "$1" "$2"; fi
}

check_directives() {
  local value
  for value in "${FLAG[time]}" "${FLAG[partition]}" "${FLAG[account]}" "${FLAG[qos]}" "${LIST_sbatch_arg[@]}" "$LOG_DIR"; do
    [[ $value != *[$'\n"\\']* ]] || die "${value@Q}: a line of #SBATCH holds no quote, backslash or line break."
  done
  value=${FLAG[time]}
  [[ -z $value || $value =~ ^[0-9]+(:[0-9]+){0,2}$ || $value =~ ^[0-9]+-[0-9]+(:[0-9]+){0,2}$ || $value == UNLIMITED ]] ||
    die "--time=$value: expected Slurm's MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS or DAYS-HOURS:MINUTES:SECONDS."
  for value in "${LIST_sbatch_arg[@]}"; do
    [[ $value == --* ]] || die "--sbatch_arg=$value: expected a flag of sbatch, such as --sbatch_arg=--constraint=h100."
  done
}

directives() {
  local name value tasks=1
  [[ ${FLAG[tasks]} == node ]] || tasks=${FLAG[gpus_per_node]}
  directive job-name "${FLAG[name]}"
  directive nodes "${FLAG[nodes]}"
  directive ntasks-per-node "$tasks"
  directive gpus-per-node "${FLAG[gpus_per_node]}"
  for name in time partition account qos cpus_per_task; do
    [[ -z ${FLAG[$name]} ]] || directive "${name//_/-}" "${FLAG[$name]}"
  done
  directive output "${LOG_DIR//%/%%}/%x_%j.log" # Slurm fills in %x and %j, and reads %% as a percent sign
  printf '#SBATCH --open-mode=append\n#SBATCH --requeue\n#SBATCH --signal=TERM@120\n'
  for value in "${LIST_sbatch_arg[@]}"; do printf '#SBATCH %s\n' "$value"; done
}

script() {
  local pair ids=0 i
  printf '#!/usr/bin/env bash\n'
  directives
  printf 'set -uo pipefail\n'
  printf "ended=''\ntrap 'ended=1' TERM\n"
  if [[ ${FLAG[tasks]} == node ]]; then
    # JAX takes a Slurm task for one device unless it is told.
    for ((i = 1; i < FLAG[gpus_per_node]; i++)); do ids+=",$i"; done
    printf 'export JAX_LOCAL_DEVICE_IDS=%s\n' "$ids"
  fi
  printf 'export PYTHONUNBUFFERED=1\n'
  for pair in "${LIST_env[@]}"; do printf 'export %s=%s\n' "${pair%%=*}" "$(quote "${pair#*=}")"; done
  for pair in "${LIST_prologue[@]}"; do printf '%s || exit\n' "$pair"; done
  [[ -z ${FLAG[venv]} ]] || printf 'source %s || exit\n' "$(quote "${FLAG[venv]}/bin/activate")"
  # Not --kill-on-bad-exit: the first process to leave after a signal must not end those that are still saving. A
  # crash ends the others by JAX's heartbeat; --wait is for what hangs even so.
  printf 'srun --kill-on-bad-exit=0 --wait=600 --label%s %s\n' \
    "${FLAG[cpus_per_task]:+ --cpus-per-task=${FLAG[cpus_per_task]}}" "$(quote "${COMMAND[@]}")"
  cat << EPILOGUE
status=\$?
echo "launch: the command ended with status \$status"
case \$status in 0 | 2 | 130) exit "\$status" ;; esac
# Before the time limit only the processes get SIGTERM. Where this shell got it too, Slurm is ending the job itself,
# cancelled or preempted, and queues it again or not; a job that leaves first counts as failed instead.
if [[ -n \$ended ]]; then
  echo "launch: Slurm is ending this job"
  sleep 600
  exit "\$status"
fi
restarts=\${SLURM_RESTART_COUNT:-0}
if ((restarts >= ${FLAG[max_restarts]})); then
  echo "launch: --max_restarts=${FLAG[max_restarts]} are used up"
  exit "\$status"
fi
echo "launch: queued again, restart \$((restarts + 1)) of ${FLAG[max_restarts]}"
scontrol requeue "\$SLURM_JOB_ID" || exit "\$status"
sleep 60 # Slurm ends this job now
EPILOGUE
}

prepare() {
  local flag
  require_command
  for flag in nodes gpus_per_node; do check_whole "$flag" 1; done
  check_whole max_restarts
  [[ -z ${FLAG[cpus_per_task]} ]] || check_whole cpus_per_task 1
  [[ ${FLAG[tasks]} == node || ${FLAG[tasks]} == gpu ]] || die "--tasks=${FLAG[tasks]}: expected node or gpu."
  check_variables "${LIST_env[@]}"
  check_directives
}

# Ids and states of the jobs of that name.
queued() { squeue "--user=$(id -un)" --noheader "--name=${FLAG[name]}" "--format=%i %T"; }

submit() {
  local known file="$LOG_DIR/${FLAG[name]}.sbatch"
  prepare
  if ((DRY_RUN)); then
    script
    run sbatch "$file"
    return
  fi
  need sbatch "Run this on a login node of the cluster."
  [[ -z ${FLAG[venv]} || -f ${FLAG[venv]}/bin/activate ]] ||
    die "--venv=${FLAG[venv]}: no bin/activate in it. Give a virtual environment that all nodes see, or --prologue."
  known=$(queued) || die "squeue failed. Run this on a login node of the cluster."
  if [[ -n $known ]]; then
    say "job ${FLAG[name]} is there already: ${known//$'\n'/, }. See status, or cancel it first."
    return
  fi
  mkdir -p "$LOG_DIR" || die "--log_dir=$LOG_DIR: cannot make this folder."
  script > "$file"
  sbatch "$file"
  say "script: $file; log: $LOG_DIR/${FLAG[name]}_JOBID.log"
}

status() {
  need squeue "Run this on a login node of the cluster."
  run squeue "--user=$(id -un)" "--name=${FLAG[name]}"
}

logs() {
  local more=() newest
  check_whole lines
  [[ -z ${FLAG[follow]} ]] || more=(-F)
  # shellcheck disable=SC2012 # job ids are plain numbers
  newest=$(ls -t "$LOG_DIR/${FLAG[name]}"_[0-9]*.log 2> /dev/null | head -n 1) || true
  ((!DRY_RUN)) || newest=${newest:-$LOG_DIR/${FLAG[name]}_JOBID.log}
  [[ -n $newest ]] || die "no $LOG_DIR/${FLAG[name]}_JOBID.log yet. Has the job begun? See status; or give --log_dir."
  run tail -n "${FLAG[lines]}" "${more[@]}" "$newest"
}

cancel() {
  require_explicit_name cancel
  need scancel "Run this on a login node of the cluster."
  run scancel "--user=$(id -un)" "--name=${FLAG[name]}"
}

main() {
  [[ ${1-} != -h && ${1-} != --help && $# != 0 ]] || { usage; exit $(($# == 0 ? 2 : 0)); }
  check_subcommand "$1" "${SUBCOMMANDS[@]}"
  declare_flags
  parse_flags "${@:2}"
  DRY_RUN=${FLAG[dry_run]:-0}
  LOG_DIR=$(realpath -m "${FLAG[log_dir]}")
  ((${#POSITIONAL[@]} == 0)) || die "unexpected argument '${POSITIONAL[0]}'. Flags are --name=VALUE; the command stands after --."
  require name
  check_name name "${FLAG[name]}"
  case $1 in
    script)
      prepare
      script
      ;;
    *) "$1" ;;
  esac
}

main "$@"
