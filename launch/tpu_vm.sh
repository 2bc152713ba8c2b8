#!/usr/bin/env bash
# Creates, sets up, trains on and deletes TPU VMs, as a queued resource with gcloud, on all workers of all slices.
#   NAME=prior ZONE=us-west4-a TYPE=v5litepod-256 BUCKET=my-bucket launch/tpu_vm.sh up --config ... --workdir runs/prior
#
# up       create, wait, copy, install, train        keep    up, repeated after each preemption until training ends
# status   state of the machines, end of the log     logs    follow the log of worker 0
# stop     save and stop the training                delete  delete the machines (they cost until then)
# Variables: NAME, ZONE, TYPE; SLICES (1), SPOT=1, PROJECT, BUCKET (mounted as runs/ on every host), RESTARTS (10),
# RUNTIME (the machine's software), PRINT=1 (print the commands only). Each action can be run again.
set -euo pipefail
cd "$(dirname "$0")/.."

action=${1:-}
(($# == 0)) || shift
: "${NAME:?must be the name of the machines}" "${ZONE:?must be their zone}"
: "${TYPE:?must be the slice, such as v5litepod-256}"
slices=${SLICES:-1}
where=("--zone=$ZONE")
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")
tpus=(gcloud compute tpus queued-resources)
archive=${TMPDIR:-/tmp}/hybridgen-$NAME.tar.gz

quoted() { # the words, quoted for a shell
  local word
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s' " "${word//\'/\'\\\'\'}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
}
run() {
  if [[ -n ${PRINT:-} ]]; then
    local line
    line=$(quoted "$@")
    echo "${line% }"
  else
    "$@"
  fi
}
everywhere() { run "${tpus[@]}" ssh "$NAME" "${where[@]}" --node=all --worker=all "--command=$1"; }
first() { run "${tpus[@]}" ssh "$NAME" "${where[@]}" --node=0 --worker=0 "--command=$1"; }
state() { "${tpus[@]}" describe "$NAME" "${where[@]}" '--format=value(state.state)'; }

create() {
  local runtime nodes=("--node-id=$NAME") spot=()
  case $TYPE in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    *) runtime=v2-alpha-tpu${TYPE%%-*} ;;
  esac
  ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$NAME")
  [[ -z ${SPOT:-} ]] || spot=(--spot)
  run "${tpus[@]}" create "$NAME" "${where[@]}" "--accelerator-type=$TYPE" "--runtime-version=${RUNTIME:-$runtime}" \
    "${nodes[@]}" "${spot[@]}"
}

await() { # waits until the machines are active; they may be queued for days
  local now words
  if [[ -n ${PRINT:-} ]]; then
    words=$(quoted "${tpus[@]}" describe "$NAME" "${where[@]}" '--format=value(state.state)')
    echo "until [ \"\$(${words% })\" = ACTIVE ]; do sleep 30; done"
    return
  fi
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: $NAME is $now" >&2
        return 1
        ;;
    esac
    echo "$NAME is $now; checking again in 30 s"
    sleep 30
  done
  [[ $now == ACTIVE ]]
}

copy() { # the working tree, with uncommitted changes
  run bash -c 'git ls-files -z --cached --others --exclude-standard | tar --create --gzip --null --files-from=- --file="$1"' \
    bash "$archive" &&
    run "${tpus[@]}" scp "$archive" "$NAME:hybridgen.tar.gz" "${where[@]}" --node=all --worker=all
}

install() { # uv installs its own Python: that of the machine may be too old
  local mount=''
  if [[ -n ${BUCKET:-} ]]; then
    mount=" && mkdir -p -m 700 runs && { mountpoint -q runs || gcsfuse --implicit-dirs --file-mode=600 --dir-mode=700"
    mount+=" $(quoted "$BUCKET")runs; }"
  fi
  everywhere "mkdir -p hybridgen && cd hybridgen && tar -xzf ../hybridgen.tar.gz && python3 -m pip install -q --user uv \
&& python3 -m uv venv -q --allow-existing --python 3.12 .venv && python3 -m uv pip install -q --python .venv/bin/python \
-e '.[tpu]'$mount"
}

train() { # continues when the connection ends; writes its exit code to train.code at the end
  local words
  words="launch/local.sh --restarts=${RESTARTS:-10} -- $(quoted "$@" --distributed)"
  everywhere "cd hybridgen && rm -f train.code && { setsid bash -c $(quoted "trap : TERM; ${words% }; echo \$? >train.code") \
</dev/null >train.log 2>&1 & echo \$! >train.pid; }"
}

up() {
  create && await && copy && install && train "$@"
}

keep() {
  local now code
  if [[ -n ${PRINT:-} ]]; then
    up "$@"
    echo "# repeat from the next line on whenever the machines are no longer ACTIVE and train.code does not exist:"
    run "${tpus[@]}" delete "$NAME" "${where[@]}" --force --quiet
    return
  fi
  [[ $(state 2>/dev/null) == ACTIVE ]] || up "$@"
  while sleep "${EVERY:-60}"; do
    now=$(state) || continue # a failed query is not a preemption
    case $now in
      ACTIVE)
        code=$(first 'cat hybridgen/train.code 2>/dev/null || true') || continue
        [[ -z $code ]] || return "$code"
        ;;
      SUSPENDING | SUSPENDED | FAILED)
        echo "$NAME is $now: restarting from the newest checkpoint"
        "${tpus[@]}" delete "$NAME" "${where[@]}" --force --quiet
        up "$@" || true # tried again if it was preempted during the setup
        ;;
    esac
  done
}

[[ -n ${PRINT:-} ]] || command -v gcloud >/dev/null || {
  echo "error: gcloud is not installed, or not in PATH" >&2
  exit 2
}
case $action in
  up | keep | create | copy | install | train) "$action" "$@" ;;
  wait) await ;;
  status)
    run "${tpus[@]}" describe "$NAME" "${where[@]}"
    first 'tail -n 3 hybridgen/train.log; cat hybridgen/train.code 2>/dev/null'
    ;;
  logs) first 'tail -n 100 -F hybridgen/train.log' ;;
  stop) everywhere "kill -s TERM -- \"-\$(cat hybridgen/train.pid)\"" ;;
  delete) run "${tpus[@]}" delete "$NAME" "${where[@]}" --force --quiet ;;
  *)
    echo "error: unknown action '$action'; the actions are up, keep, create, wait, copy, install, train, status, logs, stop, delete" >&2
    exit 2
    ;;
esac
