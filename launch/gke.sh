#!/usr/bin/env bash
# Runs a command on TPU or GPU nodes of a GKE cluster, as a JobSet or through XPK.
#
#   launch/gke.sh manifest --name=N --image=I --tpu=v5e --topology=4x4 -- python -m inranker_jax.train ...
#   launch/gke.sh apply    (the same)       applies it with kubectl; what is there already unchanged stays
#   launch/gke.sh xpk      --name=N --image=I --cluster=C --tpu_type=v5litepod-16 -- COMMAND...   (TPUs only)
#   launch/gke.sh logs     --name=N [--follow] [--all]
#   launch/gke.sh status   --name=N
#   launch/gke.sh delete   --name=N         deletes the JobSet; a node pool that scales to zero then costs nothing
#
# A preempted or failed pod restarts the whole JobSet, and the same command goes on from its newest checkpoint;
# status 2 (bad input) ends it. The cluster needs JobSet 0.6 or newer.
#
# Flags, and in brackets the variables that stand in for them:
#   --name=N [INRANKER_NAME]   JobSet or workload; delete takes it from the flag only
#   --image=I [INRANKER_IMAGE]   container image with the package, or with --install any with Python and pip
#   --install=REQUIREMENT   pip installs this first, such as 'inranker_jax[train,tpu] @ git+https://HOST/R@TAG'
#   --tpu=v4|v5e|v5p|v6e --topology=4x4   one slice; --chips_per_node=4   --slices=S (default 1) such slices
#   --gpu=nvidia-h100-80gb --nodes=2 --gpus_per_node=8   or GPU nodes (GKE's accelerator label)
#   --spot   nodes that may be taken away
#   --max_restarts=R   (default 50)   --grace=S   seconds from SIGTERM to SIGKILL (default 120)
#   --env=NAME=VALUE   variable for the command; may be repeated. On GPUs the driver's libraries are appended to the
#                      image's LD_LIBRARY_PATH (by its sh), unless you give that variable
#   --namespace=NS (default default)  --service_account=A  --queue=Q (Kueue's local queue)  --context=C (kubectl's)
#   --cluster=C --zone=Z --project=P [INRANKER_CLUSTER, INRANKER_ZONE, INRANKER_PROJECT]   for xpk
#   --tpu_type=T --priority=medium --xpk_arg=ARG   for xpk
#   --lines=L --follow --all   logs: how much (default 100), and of all pods instead of the first
#   --dry_run   print the commands (apply: and the manifest), touch nothing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SUBCOMMANDS=(manifest apply xpk logs status delete)
GROUP=jobset.sigs.k8s.io
PORT=8476
DRIVER=/usr/local/nvidia/lib64 # where GKE puts the libraries of the GPU's driver
LIST_env=() LIST_xpk_arg=()

declare_flags() {
  define value name "" INRANKER_NAME
  define value image "" INRANKER_IMAGE
  define value install
  define value tpu
  define value topology
  define value chips_per_node
  define value slices 1 INRANKER_SLICES
  define value gpu
  define value nodes 1
  define value gpus_per_node 8
  define switch spot
  define value max_restarts 50
  define value grace 120
  define list env
  define value namespace default
  define value service_account
  define value queue
  define value context
  define value cluster "" INRANKER_CLUSTER
  define value zone "" INRANKER_ZONE CLOUDSDK_COMPUTE_ZONE
  define value project "" INRANKER_PROJECT CLOUDSDK_CORE_PROJECT
  define value tpu_type
  define value priority medium
  define list xpk_arg
  define value lines 100
  define switch follow
  define switch all
  define switch dry_run
}

# A YAML string, also of words that bare would be none (true, null, on): double quotes and escapes as in JSON, which
# YAML reads too.
yaml() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//$'\r'/\\r}
  printf '"%s"' "$text"
}

# Kubernetes expands $(NAME) in commands and variables; a doubled dollar stands for one.
literal() { yaml "${1//\$/\$\$}"; }

# check_text WORD...: what a YAML string cannot hold.
check_text() {
  local word
  for word in "$@"; do
    [[ ! ${word//[$'\n\t\r']/} =~ [[:cntrl:]] ]] || die "control character in ${word@Q}: a manifest cannot hold it."
  done
}

# Sets HOSTS (pods a job), RESOURCE, CHIPS (a pod) and SELECTOR from --tpu or --gpu.
find_shape() {
  if [[ -n ${FLAG[tpu]} && -n ${FLAG[gpu]} ]]; then die "--tpu and --gpu: give one of them."; fi
  if [[ -n ${FLAG[tpu]} ]]; then
    tpu_shape
  elif [[ -n ${FLAG[gpu]} ]]; then
    check_whole nodes 1
    check_whole gpus_per_node 1
    ((FLAG[slices] == 1)) || die "--slices is for TPUs. Give --nodes=N."
    HOSTS=${FLAG[nodes]} CHIPS=${FLAG[gpus_per_node]} RESOURCE=nvidia.com/gpu
    SELECTOR=("cloud.google.com/gke-accelerator: $(yaml "${FLAG[gpu]}")")
  else
    die "no accelerator: give --tpu=v5e --topology=4x4, or --gpu=nvidia-h100-80gb --nodes=2."
  fi
  [[ -z ${FLAG[spot]} ]] || SELECTOR+=('cloud.google.com/gke-spot: "true"')
}

tpu_shape() {
  local kind shape=${FLAG[topology]} chips=1 side dimensions=3
  case ${FLAG[tpu]} in
    v4) kind=tpu-v4-podslice ;;
    v5e) kind=tpu-v5-lite-podslice dimensions=2 ;;
    v5p) kind=tpu-v5p-slice ;;
    v6e) kind=tpu-v6e-slice dimensions=2 ;;
    *) die "--tpu=${FLAG[tpu]}: expected v4, v5e, v5p or v6e." ;;
  esac
  require topology
  local -a sides
  IFS=x read -r -a sides <<< "$shape"
  if [[ ! $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || ((${#sides[@]} != dimensions)); then
    die "--topology=$shape: ${FLAG[tpu]} has $dimensions dimensions, such as $( ((dimensions == 2)) && echo 4x4 || echo 2x2x4)."
  fi
  for side in "${sides[@]}"; do chips=$((chips * side)); done
  [[ -n ${FLAG[chips_per_node]} ]] || FLAG[chips_per_node]=$((chips < 4 ? chips : 4))
  check_whole chips_per_node 1
  ((chips % FLAG[chips_per_node] == 0)) ||
    die "--topology=$shape has $chips chips, which nodes of --chips_per_node=${FLAG[chips_per_node]} do not divide."
  HOSTS=$((chips / FLAG[chips_per_node])) CHIPS=${FLAG[chips_per_node]} RESOURCE=google.com/tpu
  SELECTOR=("cloud.google.com/gke-tpu-accelerator: $(yaml "$kind")" "cloud.google.com/gke-tpu-topology: $(yaml "$shape")")
}

# The words of the container's command, one a line.
command_lines() {
  local word
  local -a words=("${COMMAND[@]}")
  if [[ -n ${FLAG[install]} ]]; then
    # shellcheck disable=SC2016 # the container's shell expands it
    words=(sh -c 'python -m pip install --quiet "$0" && exec "$@"' "${FLAG[install]}" "${COMMAND[@]}")
  fi
  # What the image sets itself is known in the container only: env could replace it, not add to it. A variable given
  # by --env stands as it is, and then the image needs no shell.
  if [[ $RESOURCE == nvidia.com/gpu && " ${LIST_env[*]%%=*} " != *" LD_LIBRARY_PATH "* ]]; then
    # shellcheck disable=SC2016 # the container's shell expands it
    words=(sh -c 'export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$0" && exec "$@"' "$DRIVER" "${words[@]}")
  fi
  for word in "${words[@]}"; do printf '                    - %s\n' "$(literal "$word")"; done
}

env_lines() {
  local pair given=" ${LIST_env[*]%%=*} " ids=0 i
  if [[ $RESOURCE == nvidia.com/gpu ]]; then
    for ((i = 1; i < CHIPS; i++)); do ids+=",$i"; done
    # Pods find each other through JobSet's headless service, NAME; TPU hosts are told by GKE itself.
    # With its local devices told, JAX does not ask Kubernetes for a cluster.
    local -a own=(
      "JAX_COORDINATOR_ADDRESS=${FLAG[name]}-workers-0-0.${FLAG[name]}:$PORT"
      "JAX_NUM_PROCESSES=$HOSTS"
      "JAX_LOCAL_DEVICE_IDS=$ids"
    )
    for pair in "${own[@]}"; do
      [[ $given == *" ${pair%%=*} "* ]] || env_line "$pair"
    done
    printf '                    - name: JAX_PROCESS_ID\n                      valueFrom:\n'
    printf '                        fieldRef:\n'
    printf "                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']\n"
  fi
  env_line PYTHONUNBUFFERED=1
  for pair in "${LIST_env[@]}"; do env_line "$pair"; done
}

env_line() { printf '                    - name: %s\n                      value: %s\n' "$(yaml "${1%%=*}")" "$(literal "${1#*=}")"; }

selector_lines() { printf '                %s\n' "${SELECTOR[@]}"; }

toleration_lines() {
  printf '                - {key: %s, operator: Exists, effect: NoSchedule}\n' "$RESOURCE"
  [[ -z ${FLAG[spot]} ]] ||
    printf '                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}\n'
}

pod_lines() {
  [[ -z ${FLAG[service_account]} ]] || printf '              serviceAccountName: %s\n' "$(yaml "${FLAG[service_account]}")"
  if [[ $RESOURCE == google.com/tpu ]]; then
    printf '              hostNetwork: true\n              dnsPolicy: ClusterFirstWithHostNet\n'
  fi
}

metadata_lines() {
  [[ -z ${FLAG[queue]} ]] || printf '  labels:\n    kueue.x-k8s.io/queue-name: %s\n' "$(yaml "${FLAG[queue]}")"
  if [[ $RESOURCE == google.com/tpu ]]; then
    printf '  annotations: # one slice, one node pool\n    alpha.%s/exclusive-topology: cloud.google.com/gke-nodepool\n' "$GROUP"
  fi
}

manifest() {
  require image
  require_command
  check_whole slices 1
  check_whole max_restarts
  check_whole grace 1
  check_variables "${LIST_env[@]}"
  check_text "${COMMAND[@]}" "${LIST_env[@]}" "${FLAG[image]}" "${FLAG[install]}" "${FLAG[gpu]}" "${FLAG[queue]}" "${FLAG[service_account]}"
  find_shape
  # A pod's name is NAME-workers-J-I-xxxxx, and a host name has 63 characters.
  ((${#FLAG[name]} <= 40)) || die "--name=${FLAG[name]}: 40 characters at most, as pods' names are made of it."
  warn_without_bucket
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "${FLAG[name]}")
  namespace: $(yaml "${FLAG[namespace]}")
$(metadata_lines)
spec:
  failurePolicy:
    maxRestarts: ${FLAG[max_restarts]}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: ${FLAG[slices]}
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          completionMode: Indexed
          backoffLimit: 0 # one failed pod fails the job, and JobSet restarts all of them together
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: main
                  operator: In
                  values: [2, 130] # bad input, and stopped by Ctrl-C
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: ${FLAG[grace]}
$(pod_lines)
              nodeSelector:
$(selector_lines)
              tolerations:
$(toleration_lines)
              containers:
                - name: main
                  image: $(yaml "${FLAG[image]}")
                  command:
$(command_lines)
                  env:
$(env_lines)
                  ports:
                    - containerPort: $PORT
                  resources:
                    limits:
                      $RESOURCE: $CHIPS
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
              volumes:
                - name: shared-memory
                  emptyDir: {medium: Memory}
YAML
}

kube() {
  local context=()
  [[ -z ${FLAG[context]} ]] || context=("--context=${FLAG[context]}")
  run kubectl "${context[@]}" "--namespace=${FLAG[namespace]}" "$@"
}

apply() {
  local text answer ended
  text=$(manifest) || exit
  if ((DRY_RUN)); then
    printf '%s\n' "$text"
    kube apply -f -
  elif answer=$(kube apply -f - 2>&1 <<< "$text"); then
    say "$answer. See status and logs."
    ended=$(kube get jobset "${FLAG[name]}" -o 'jsonpath={.status.terminalState}' 2> /dev/null) || ended=""
    [[ -z $ended ]] || say "warning: JobSet ${FLAG[name]} has ended ($ended), so nothing runs. Delete it, then apply it again."
  elif [[ $answer == *immutable* ]]; then
    die "JobSet ${FLAG[name]} exists with other settings, which Kubernetes cannot change. Delete it first, or choose another --name."
  else
    die "kubectl could not apply it: ${answer//$'\n'/ }"
  fi
}

xpk_place() {
  PLACE=("--cluster=${FLAG[cluster]}" "--zone=${FLAG[zone]}" "--project=${FLAG[project]}")
}

xpk_create() {
  require image cluster zone project tpu_type
  check_whole slices 1
  check_whole max_restarts
  check_whole grace 1
  check_variables "${LIST_env[@]}"
  require_command
  [[ -z ${FLAG[install]} ]] || die "--install is for manifest and apply. With xpk give an image that has the package."
  need xpk "Install it: pip install xpk"
  xpk_place
  local text variable known
  # Its shell starts the command in the background of a loop: only with exec does SIGTERM reach the command itself.
  text="exec $(quote "${COMMAND[@]}")"
  [[ $text != *$'\n'* ]] || die "xpk cannot pass on a line break. Use manifest or apply."
  if ((!DRY_RUN)); then
    known=$(xpk workload list "${PLACE[@]}" "--filter-by-job=${FLAG[name]}" 2>&1) ||
      die "xpk could not list the workloads of ${FLAG[cluster]}: ${known##*$'\n'}"
    if grep -q "^${FLAG[name]}[[:space:]]" <<< "$known"; then
      say "workload ${FLAG[name]} exists already in ${FLAG[cluster]}."
      return
    fi
  fi
  warn_without_bucket
  local -a more=()
  for variable in "${LIST_env[@]}"; do more+=("--env=$variable"); done
  [[ -z ${FLAG[spot]} ]] || more+=(--spot)
  run xpk workload create "--workload=${FLAG[name]}" "${PLACE[@]}" "--tpu-type=${FLAG[tpu_type]}" \
    "--num-slices=${FLAG[slices]}" "--docker-image=${FLAG[image]}" "--priority=${FLAG[priority]}" \
    "--max-restarts=${FLAG[max_restarts]}" "--termination-grace-period-seconds=${FLAG[grace]}" \
    "${more[@]}" "${LIST_xpk_arg[@]}" "--command=$text"
}

logs() {
  local selector="$GROUP/jobset-name=${FLAG[name]}" more=()
  check_whole lines
  if [[ -n ${FLAG[all]} ]]; then
    more=(--prefix --max-log-requests=1000)
  else
    selector+=",$GROUP/job-index=0,batch.kubernetes.io/job-completion-index=0"
  fi
  [[ -z ${FLAG[follow]} ]] || more+=(--follow)
  kube logs "--selector=$selector" "--tail=${FLAG[lines]}" "${more[@]}"
}

status() {
  kube get "jobset/${FLAG[name]}"
  kube get pods "--selector=$GROUP/jobset-name=${FLAG[name]}" --output=wide
}

delete() {
  kube delete "jobset/${FLAG[name]}" --ignore-not-found
}

main() {
  [[ ${1-} != -h && ${1-} != --help && $# != 0 ]] || { usage; exit $(($# == 0 ? 2 : 0)); }
  check_subcommand "$1" "${SUBCOMMANDS[@]}"
  declare_flags
  parse_flags "${@:2}"
  DRY_RUN=${FLAG[dry_run]:-0}
  ((${#POSITIONAL[@]} == 0)) || die "unexpected argument '${POSITIONAL[0]}'. Flags are --name=VALUE; the command stands after --."
  # In every subcommand: kubectl would read a name such as --all as a flag, and x,y!=z as more of a selector.
  [[ $1 != delete ]] || require_explicit_name delete
  require name
  check_name name "${FLAG[name]}"
  check_name namespace "${FLAG[namespace]}"
  case $1 in
    manifest) ;;
    xpk) ;;
    *) need kubectl "Install it, and get the cluster's credentials: gcloud container clusters get-credentials" ;;
  esac
  case $1 in
    xpk) xpk_create ;;
    *) "$1" ;;
  esac
}

main "$@"
