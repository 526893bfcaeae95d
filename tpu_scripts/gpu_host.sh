#!/usr/bin/env bash
# Trains on the machine it runs on, on all its GPUs: installs this checkout in ~/dro_jax_run, starts `dro_jax train`, and
# starts it again when it crashes. Ctrl-C or SIGTERM saves and stops; the same command goes on.
# Usage: gpu_host.sh MODEL_DIR FLAG...    with the flags of `dro_jax train`
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
[[ $# -ge 2 && $1 != -* && $1 != *\'* ]] || fail "give MODEL_DIR and then the flags of \`dro_jax train\`" 2
MODEL_DIR=${1%/}
shift

bash "$here/host.sh" install "$(dirname "$here")[cuda]"
newest=$(newest_checkpoint)
restarts=0
training=
trap '[[ -z $training ]] || kill -TERM "$training"' INT TERM HUP
while :; do
  # In a session of its own Ctrl-C does not reach it, and it gets one SIGTERM from the trap.
  setsid "$HOME/dro_jax_run/venv/bin/dro_jax" train "$@" --gin.MODEL_DIR="'$MODEL_DIR'" &
  training=$!
  code=0
  wait "$training" || code=$?
  # A signal ends the wait, not the training.
  while kill -0 "$training" 2>/dev/null; do
    code=0
    wait "$training" || code=$?
  done
  case $code in 0 | 2 | 75 | 130) exit "$code" ;; esac
  may_restart || fail "exit code $code; giving up: $most_restarts restarts in a row without a new checkpoint in $MODEL_DIR"
  echo "exit code $code; restart $restarts, from step $newest" >&2
  pause "$restarts"
done
