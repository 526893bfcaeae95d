#!/usr/bin/env bash
# Shows what the hosts log, from their last 50 lines on, until the run has ended.
# Usage: follow.sh [--worker=N] [--settings=FILE] [--dry_run]
#   --worker=N  only host N; 0 is the one that prints progress.
# Exit codes: the run's own (0 complete, 2 bad input, 75 stopped and saved, ...), or 69 if the TPU is gone.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
worker=all
read_flags "worker=" "$@"
[[ $worker =~ ^(all|[0-9]+)$ ]] || fail "--worker=$worker: give the number of a host" 2
read_settings

follow "$worker" ""
explain
exit "$code"
