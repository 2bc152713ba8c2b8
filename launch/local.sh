#!/usr/bin/env bash
# Trains on one machine with all its devices: a CPU, GPUs, or a host of a TPU pod. Sets the environment and XLA flags.
#   launch/local.sh --config configs/ar/raster.py:tiny --workdir runs/prior
#   launch/local.sh --restarts 10 -- --config ... --workdir ...                  # restart after a crash
#   launch/local.sh --processes 2 -- --config ... --workdir ...                  # two processes, one training
#
# --processes N  number of processes that train together over 127.0.0.1; they share the GPUs evenly
# --restarts N   restarts in a row, each within ten minutes of the last (10 with --processes, otherwise no supervision)
# --grace S      seconds between TERM and KILL for the other processes when one has died (20)
# --chip NAME    row of the table of XLA flags in hybridgen/launch.py, auto or none (auto)
# Other arguments, optionally after --, are the trainer's. Exit codes 0 (done), 2 (bad input) and 130 (stopped after
# saving) are passed on; any other code terminates and restarts all processes, from the newest valid checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'local.sh: %s\n' "$*" >&2; }
refuse() {
  printf 'error: local.sh: %s\n' "$*" >&2
  exit 2
}

processes="" restarts="" grace=20 chip=auto
while (($#)); do
  case $1 in
    --processes=* | --restarts=* | --grace=* | --chip=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --processes | --restarts | --grace | --chip)
      (($# > 1)) || refuse "$1 needs a value"
      [[ $1 == --chip || $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || refuse "$1 takes a number, not '$2'"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --) shift && break ;;
    *) break ;;
  esac
done
[[ $processes != 0 ]] || refuse "--processes is 0, but must be at least 1"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi

# the compile cache makes restarts fast; JAX executes what it contains, so only its owner may write to it
cache="${XDG_CACHE_HOME:-$HOME/.cache}/hybridgen"
(umask 077 && mkdir -p "$cache")
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$cache}"

# GPU: use 90 % of the memory (JAX's default is 75 %)
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

# TPU: its driver locks memory; raise the soft limit of containers to the hard limit
ulimit -S -l "$(ulimit -H -l)" 2>/dev/null || true

if [[ $chip != none ]]; then
  flags=$("$PYTHON" -m hybridgen.launch --flags "$chip") || {
    code=$?
    ((code == 2)) || say "is hybridgen installed in $PYTHON? Set PYTHON=.../bin/python to use another one"
    exit "$code"
  }
  eval "$flags"
fi

if [[ -z $processes && -z $restarts ]]; then
  exec "$PYTHON" -m hybridgen.train "$@"
fi

# ---- the supervisor

set -m # a process group per process: its children can be killed, and Ctrl-C reaches it once, through this script
restarts=${restarts:-10}
healthy=600 # seconds after which a run resets the count of restarts
pids=() prefixes=() asked=0
exec {idle}<> <(:) # never has data: to pause without starting a process

tie=()                                        # if setpriv exists: the trainers stop if this shell is killed
if setpriv --pdeathsig TERM true 2>/dev/null; then
  tie=(setpriv --pdeathsig TERM)
fi

pause() { read -rt "$1" -u "$idle" || true; }
send() { # SIGNAL PID, or -GROUP; ignores processes that have ended
  kill -s "$1" -- "$2" 2>/dev/null || true
}
forward() {
  asked=1
  local pid
  for pid in "${pids[@]}"; do send "$1" "$pid"; done
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

prefix() { # prefixes the lines of process $1; ends with its last writer and ignores signals for the trainers
  trap '' INT TERM HUP
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

free_port() { # below the range of ephemeral ports
  local port
  while port=$((20000 + RANDOM % 12000)); do
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

gpus=()
if [[ -n $processes ]]; then
  if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] && command -v nvidia-smi >/dev/null; then
    CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)
  fi
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
  ((${#gpus[@]} % processes == 0)) || refuse "${#gpus[@]} GPUs do not divide over $processes processes"
fi

start() { # INDEX PORT ARGUMENTS...
  local index=$1 port=$2 share out
  shift 2
  if [[ -z $processes ]]; then
    "${tie[@]}" "$PYTHON" -m hybridgen.train "$@" </dev/null {idle}>&- &
  else
    share=$((${#gpus[@]} / processes))
    if ((share)); then
      CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:index * share:share}")
      export CUDA_VISIBLE_DEVICES
    fi
    exec {out}> >(prefix "$index")
    prefixes+=("$!")
    "${tie[@]}" "$PYTHON" -m hybridgen.train "$@" --coordinator "127.0.0.1:$port" --num-processes "$processes" \
      --process-id "$index" </dev/null >&"$out" 2>&1 {out}>&- {idle}>&- &
  fi
  pids[index]=$!
  [[ -z $processes ]] || exec {out}>&-
}

round() { # runs all processes once; sets code, in this precedence: 2, a crash, 130, 0
  local index port pid ended=0 crashed=0 term_at=0 kill_at=0 told=0
  code=0
  port=$(free_port)
  for ((index = 0; index < ${processes:-1}; index++)); do start "$index" "$port" "$@"; done
  ((!asked)) || forward TERM # the signal came while they were started
  while ((${#pids[@]})); do
    for index in "${!pids[@]}"; do
      pid=${pids[index]}
      ! kill -0 "$pid" 2>/dev/null || continue
      ended=0
      { wait "$pid" || ended=$?; } 2>/dev/null
      unset "pids[index]"
      send KILL "-$pid" # its workers
      if ((asked && ended == 143)); then ended=130; fi # TERM came before its handler was set: nothing to save yet
      case $ended in
        0) ;;
        130) ((code)) || code=130 ;;
        2) code=2 crashed=1 ;;
        *)
          if ((!crashed)); then
            code=$ended crashed=1
            say "process $index exited with code $ended"
          fi
          ;;
      esac
      # the remaining processes are stuck in a collective, or about to finish too
      ((kill_at)) || term_at=$((SECONDS + grace)) kill_at=$((SECONDS + 2 * grace))
      if ((crashed && term_at > SECONDS)); then term_at=$SECONDS kill_at=$((SECONDS + grace)); fi
    done
    if ((kill_at && SECONDS >= term_at && !told)); then
      told=1
      for pid in "${pids[@]}"; do send TERM "$pid"; done
    fi
    if ((kill_at && SECONDS >= kill_at)); then
      ((code && code != 130)) || code=137 # one finished, but the others did not
      for pid in "${pids[@]}"; do send KILL "-$pid"; done
    fi
    ((${#pids[@]} == 0)) || pause 0.2
  done
}

attempt=0
while :; do
  began=$SECONDS
  round "$@"
  case $code in 0 | 2 | 130) break ;; esac
  ((!asked)) || break
  if ((SECONDS - began >= healthy)); then attempt=0; fi
  if ((attempt >= restarts)); then
    say "exit code $code; no restart left of $restarts"
    break
  fi
  wait_s=$((attempt < 5 ? 1 << attempt : 30))
  attempt=$((attempt + 1))
  say "restart $attempt of $restarts in $wait_s s"
  for ((tick = 0; tick < wait_s * 5 && !asked; tick++)); do pause 0.2; done
  if ((asked)); then
    code=130
    break
  fi
done
for ((tick = 0; tick < 20; tick++)); do # wait for their last lines
  kill -0 "${prefixes[@]}" 2>/dev/null || break
  pause 0.1
done
exit "$code"
