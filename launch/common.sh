# shellcheck shell=bash
# What the launch scripts share: flags, quoting, dry runs, errors. Sourced, never run.

if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
  echo "error: bash $BASH_VERSION is too old: 4.4 or newer is needed (on a Mac: brew install bash)." >&2
  exit 2
fi

PROGRAM=${0##*/}
DRY_RUN=0
declare -A FLAG=()        # values by name
declare -A FLAG_KIND=()   # value, switch or list
declare -A FLAG_SOURCE=() # flag, environment or default
POSITIONAL=()             # arguments that are no flags
COMMAND=()                # what stands after --

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# One line: what is wrong, what was expected, what to do. Status 2 says "bad input" everywhere in this project.
die() {
  say "error: $*"
  exit 2
}

# Quotes words so that any POSIX shell reads back exactly these. printf %q and @Q would write $'...' for a line
# break, which dash, the /bin/sh of many containers, takes literally.
quote() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${line# }"
}

# Runs a command, or prints it under --dry_run.
run() {
  if ((DRY_RUN)); then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# need PROGRAM REMEDY: a dry run needs no programs, it only prints their commands.
need() {
  ((DRY_RUN)) || command -v "$1" > /dev/null || die "$1 is not on the PATH. $2"
}

# define KIND NAME [DEFAULT [VARIABLE...]]: declares a flag, and the variables that may stand in for it.
define() {
  local kind=$1 name=$2 default=${3-} variable
  FLAG_KIND[$name]=$kind
  FLAG[$name]=$default
  FLAG_SOURCE[$name]=default
  [[ $kind != list ]] || declare -ga "LIST_$name=()"
  for variable in "${@:4}"; do
    if [[ -n ${!variable-} ]]; then
      FLAG[$name]=${!variable}
      FLAG_SOURCE[$name]=environment
      return
    fi
  done
}

# Levenshtein's distance between two short names.
distance() {
  local a=$1 b=$2 i j previous current best
  local -a row=()
  for ((j = 0; j <= ${#b}; j++)); do row[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    previous=${row[0]}
    row[0]=$i
    for ((j = 1; j <= ${#b}; j++)); do
      current=${row[j]}
      best=$previous
      [[ ${a:i-1:1} == "${b:j-1:1}" ]] || best=$((best + 1))
      ((current + 1 >= best)) || best=$((current + 1))
      ((row[j - 1] + 1 >= best)) || best=$((row[j - 1] + 1))
      row[j]=$best
      previous=$current
    done
  done
  echo "${row[${#b}]}"
}

# did_you_mean NAME OPTION...: " Did you mean OPTION?" for the closest, or nothing.
did_you_mean() {
  local name=$1 option best="" least=3 d
  for option in "${@:2}"; do
    d=$(distance "$name" "$option")
    if ((d < least)); then
      least=$d
      best=$option
    fi
  done
  [[ -z $best ]] || printf ' Did you mean %s?' "$best"
}

# Reads --name=value, --name value (one that begins with -- only after =), --switch and what follows --. Dashes inside a name count as underscores.
parse_flags() {
  local name value given
  while (($#)); do
    case $1 in
      --)
        shift
        COMMAND=("$@")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --*)
        given=${1%%=*}
        name=${given#--}
        name=${name//-/_}
        [[ -n ${FLAG_KIND[$name]-} ]] ||
          die "unknown flag $given.$(did_you_mean "$name" "${!FLAG_KIND[@]}") See --help."
        if [[ ${FLAG_KIND[$name]} == switch ]]; then
          [[ $1 != *=* ]] || die "$given is a switch and takes no value. Give it alone, or leave it out."
          value=1
        elif [[ $1 == *=* ]]; then
          value=${1#*=}
        else
          (($# > 1)) && [[ $2 != -- ]] || die "$given needs a value: $given=VALUE."
          # Else a forgotten value would swallow the next flag, and without its --dry_run a delete deletes.
          [[ $2 != --* && $2 != -h ]] || die "$given needs a value, and $2 looks like a flag: write $given=VALUE, with = if it begins with dashes."
          value=$2
          shift
        fi
        if [[ ${FLAG_KIND[$name]} == list ]]; then
          local -n list="LIST_$name"
          list+=("$value")
        fi
        FLAG[$name]=$value
        FLAG_SOURCE[$name]=flag
        ;;
      *) POSITIONAL+=("$1") ;;
    esac
    shift
  done
}

# require NAME...: these flags must have a value.
require() {
  local name
  for name in "$@"; do
    [[ -n ${FLAG[$name]} ]] || die "--$name is missing: give --$name=VALUE (see --help)."
  done
}

# What deletes or replaces takes its name from the command line only: a variable left over from another session
# must not choose the victim.
require_explicit_name() {
  [[ ${FLAG_SOURCE[name]} == flag && -n ${FLAG[name]} ]] ||
    die "$1 deletes things, so it takes their name from the command line only: give --name=NAME."
}

# check_name LABEL VALUE: names of cloud resources and of Kubernetes objects.
check_name() {
  [[ $2 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#2} -le 63 ]] ||
    die "--$1=$2: expected small letters, digits and dashes, beginning with a letter, 63 at most."
}

# check_whole NAME [LEAST [MOST]]: a whole number.
check_whole() {
  local value=${FLAG[$1]} least=${2:-0} most=${3-}
  if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < least || 10#$value > ${most:-999999999})); then
    die "--$1=$value: expected a whole number of at least $least${most:+ and at most $most}."
  fi
  FLAG[$1]=$((10#$value))
}

# check_variables NAME=VALUE...: environment variables that are handed on.
check_variables() {
  local pair
  for pair in "$@"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env=$pair: expected --env=NAME=VALUE."
  done
}

require_command() {
  ((${#COMMAND[@]})) ||
    die "no command: end the line with -- COMMAND, such as -- python -m inranker_jax.train --gin_file=FILE."
}

# What a host writes on its own disk goes with the host. A gin file may name a bucket, so this is a warning only.
warn_without_bucket() {
  [[ "${COMMAND[*]}" == *[gs][s3]://* ]] ||
    say "warning: no gs:// or s3:// path in the command. Unless a gin file names one, checkpoints stay on the hosts and are lost with them."
}

# subcommand NAME EXPECTED...: the name must be one of those.
check_subcommand() {
  local name=$1 option
  for option in "${@:2}"; do
    [[ $name != "$option" ]] || return 0
  done
  die "unknown subcommand '$name'.$(did_you_mean "$name" "${@:2}") Expected one of: ${*:2}."
}

# The comment at the top of the script is its help.
usage() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$0"; }
