#!/usr/bin/env bash
# Creates the TPU, sets it up, launches the run and follows it; when the TPU is taken away or the run crashes, deletes the
# TPU and begins again, and the run goes on from its last checkpoint. Ends when the run is complete, at bad input (exit
# code 2), after stop.sh, or after five restarts in a row without a new checkpoint, and then deletes the TPU. Run it
# where it can stay, in tmux on a small virtual machine for example; after Ctrl-C the same command takes up the run again.
# Usage: run_until_finished.sh [--keep] [--settings=FILE] [--dry_run]
#   --keep  leaves the TPU at the end.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
keep=false
read_flags "keep" "$@"
read_settings
check_source
trap 'fail "interrupted; the TPU and the run are left as they are: run this again, or stop.sh and delete.sh" 130' INT TERM

step() { # SCRIPT FLAG...
  local dry=()
  $dry_run && dry=(--dry_run)
  "$here/$1.sh" --settings="$settings" ${dry[@]+"${dry[@]}"} "${@:2}"
}

end() { # EXIT_CODE
  $keep || step delete --yes || true
  exit "$1"
}

is_going() {
  local report
  [[ $(tpu_state) == READY ]] || $dry_run || return 1
  # Installing under a run that goes on would break it, so one lost connection is no answer.
  report=$(retry on_hosts "bash dro_jax_run/host.sh report") || return 1
  judge "$report"
  [[ $outcome == running ]]
}

newest=$(newest_checkpoint)
restarts=0
while :; do
  if is_going; then
    echo "taking up the run that is going on $NAME"
    follow all ""
  else
    outcome=unstarted code=0
    step create || code=$?
    ((code != 3)) || end 1
    if ((code == 0)) && step setup && step launch --detach; then follow all all=0; fi
  fi
  explain
  case $outcome in finished | mistake | stopped) end "$code" ;; esac

  if ! may_restart; then
    echo "giving up: $most_restarts restarts in a row without a new checkpoint in $MODEL_DIR" >&2
    end 1
  fi
  echo "restart $restarts, from step $newest"
  until [[ $(tpu_state) != UNKNOWN ]]; do pause 1; done
  step delete --yes || true
  pause "$restarts"
done
