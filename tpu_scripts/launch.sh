#!/usr/bin/env bash
# Starts the training on all hosts of the TPU and follows it. The run does not need this connection: Ctrl-C or a closed
# laptop only ends the following, and follow.sh takes it up again.
# Usage: launch.sh [--detach] [--settings=FILE] [--dry_run]
#   --detach  starts the run and returns.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
detach=false
read_flags "detach" "$@"
read_settings

report=$(retry on_hosts "bash dro_jax_run/host.sh report") || fail "the hosts of $NAME do not answer or are not set up: run setup.sh"
judge "$report"
[[ $outcome != running ]] || fail "a run is going on $NAME: follow.sh shows it, stop.sh stops it" 2
# The id makes a second attempt, after a dropped connection, leave the hosts alone that have started.
retry on_hosts "bash dro_jax_run/host.sh start $(date +%s)-$$ dro_jax train --multihost $TRAIN_FLAGS --gin.MODEL_DIR=\"'$MODEL_DIR'\"" ||
  fail "the run could not be started on every host of $NAME: run stop.sh, then launch.sh again"
$detach && exit 0
follow all all=0
explain
exit "$code"
