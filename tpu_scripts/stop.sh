#!/usr/bin/env bash
# Asks the run to save and stop, and waits until it has, 15 minutes at most. The TPU stays, and costs money: delete.sh.
# Usage: stop.sh [--settings=FILE] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
read_flags "" "$@"
read_settings

for ((i = 0; i < 30; i++)); do
  report=$(retry on_hosts "bash dro_jax_run/host.sh stop") || fail "the hosts of $NAME do not answer or are not set up"
  judge "$report"
  $dry_run && exit 0
  if [[ $outcome != running ]]; then
    explain
    exit 0
  fi
  ((i > 0)) || echo "waiting for the run to save"
  pause 1
done
fail "the run has not stopped; delete.sh ends it, back to its last checkpoint"
