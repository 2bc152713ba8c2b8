#!/usr/bin/env bash
# A workload on a cluster created with xpk. Arguments are the trainer's.
#   NAME=prior CLUSTER=mine ZONE=us-west4-a TYPE=v5litepod-256 IMAGE=... launch/xpk.sh --config ... --workdir ...
# Variables: NAME, CLUSTER, ZONE, TYPE, IMAGE; SLICES (1), PROJECT, RESTARTS (10), PRINT=1 (print the command only).
set -euo pipefail

: "${NAME:?must be the name of the workload}" "${CLUSTER:?must be the cluster}" "${ZONE:?must be its zone}"
: "${TYPE:?must be the slice, such as v5litepod-256}" "${IMAGE:?must be the container image of launch/Dockerfile}"

quoted() { # the words, quoted for a shell
  local word
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s' " "${word//\'/\'\\\'\'}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
}

# local.sh restarts after a crash inside the container, but not after exit code 2; xpk restarts after a preemption
inside=$(quoted launch/local.sh "--restarts=${RESTARTS:-10}" -- "$@" --distributed)
words=(xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--zone=$ZONE" "--tpu-type=$TYPE"
  "--num-slices=${SLICES:-1}" "--docker-image=$IMAGE" --max-restarts=1000 --termination-grace-period-seconds=300
  "--command=${inside% }")
[[ -z ${PROJECT:-} ]] || words+=("--project=$PROJECT")

if [[ -n ${PRINT:-} ]]; then
  line=$(quoted "${words[@]}")
  echo "${line% }"
else
  exec "${words[@]}"
fi
