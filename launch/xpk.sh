#!/usr/bin/env bash
# A workload on a cluster that xpk made. Arguments are the trainer's.
#   NAME=prior CLUSTER=mine ZONE=us-west4-a TYPE=v5litepod-256 IMAGE=... launch/xpk.sh --config ... --workdir ...
# Variables: NAME, CLUSTER, ZONE, TYPE, IMAGE; SLICES (1), PROJECT, RESTARTS (10), PRINT=1 (the command, nothing is run).
set -euo pipefail

: "${NAME:?is the name of the workload}" "${CLUSTER:?is the cluster}" "${ZONE:?is its zone}"
: "${TYPE:?is the slice, such as v5litepod-256}" "${IMAGE:?is the container image, built with launch/Dockerfile}"

quoted() { # the words as a shell reads them back
  local word
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s' " "${word//\'/\'\\\'\'}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
}

# a crash is started again inside the container, where exit code 2 is not; xpk starts again what was preempted
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
