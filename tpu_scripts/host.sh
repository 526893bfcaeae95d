#!/usr/bin/env bash
# Works on one host: installs dro_jax there, and starts, reports and stops its part of a run, in ~/dro_jax_run.
# setup.sh copies it to the hosts of a TPU, where the other scripts call it over ssh.
set -euo pipefail
mkdir -p "$HOME/dro_jax_run"
cd "$HOME/dro_jax_run"
PATH=$PWD/venv/bin:$HOME/.local/bin:$PATH

label=$(hostname)
[[ $label == *-w-* ]] && label=w-${label##*-w-}

status() { # running, none, or exit CODE
  local pid alive=false
  [[ -e started ]] || { echo none && return; }
  read -r pid _ <started
  kill -0 "$pid" 2>/dev/null && alive=true
  if [[ -e exit_code ]]; then
    echo "exit $(cat exit_code)$([[ -e stopped ]] && echo " stopped")"
  elif $alive; then
    echo running
  else
    echo "exit died"
  fi
}

case $1 in
  install) # SPEC [ARCHIVE]: what pip takes, and the archive that holds it
    # A second attempt, after a dropped connection, waits for the first.
    exec 9>install.lock
    flock 9
    if [[ $(status) == running ]]; then
      echo "$label: a run is going: stop.sh first" >&2
      exit 3
    fi
    if [[ -n ${3:-} ]]; then
      rm -rf source
      mkdir source
      tar -xzf "$3" -C source
    fi
    # The TPU images' own Python is too old.
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    if [[ ! -x venv/bin/pip ]]; then
      rm -rf venv
      uv venv --quiet --seed --python 3.12 venv
    fi
    # Without this pip takes other code of the same version for what is there.
    venv/bin/pip uninstall --quiet --yes dro_jax
    venv/bin/pip install --quiet "$2"
    echo "$label| $(dro_jax --version)"
    ;;
  start) # ID COMMAND...
    id=$2
    shift 2
    if [[ -e started && $(cut -d' ' -f2 started) == "$id" ]]; then exit 0; fi
    if [[ $(status) == running ]]; then
      echo "$label: a run is going already" >&2
      exit 3
    fi
    rm -f exit_code stopped
    setsid nohup bash host.sh run "$@" >/dev/null 2>&1 </dev/null &
    echo "$! $id" >started
    ;;
  run) # COMMAND...
    shift
    code=0
    PYTHONUNBUFFERED=1 "$@" >log 2>&1 || code=$?
    echo "$code" >exit_code.new
    mv exit_code.new exit_code
    # setup.sh may have replaced this file in the meantime: read no further.
    exit
    ;;
  report) # HOST=LINES...: the lines of the log after these, the last 50 for a host that is not named, and the status
    # Before the log, or a run that ends just now would keep its last lines.
    status=$(status)
    lines=0
    if [[ -e log ]]; then lines=$(wc -l <log); fi
    from=$((lines > 50 ? lines - 50 : 0))
    for pair in "${@:2}"; do
      if [[ ${pair%=*} == "$label" || ${pair%=*} == all ]]; then from=${pair#*=}; fi
    done
    if ((from < lines)); then sed -n "$((from + 1)),${lines}s/^/$label| /p" log; fi
    echo "status $label $lines $status"
    ;;
  stop)
    if [[ $(status) == running ]]; then
      touch stopped
      pkill -TERM --parent "$(cut -d' ' -f1 started)" || true
    fi
    echo "status $label 0 $(status)"
    ;;
  *)
    echo "host.sh: $1: give install, start, report or stop" >&2
    exit 2
    ;;
esac
