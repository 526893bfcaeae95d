#!/usr/bin/env bash
# Asks for the TPU of the settings file and waits until it is ready.
# Usage: create.sh [--settings=FILE] [--dry_run]
# Exit codes: 0 ready, 1 failed, 2 a mistake in the settings, 3 still waiting after WAIT_HOURS.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
read_flags "" "$@"
read_settings

state=$(tpu_state)
if [[ $state == UNKNOWN ]]; then
  fail "gcloud does not say whether $NAME exists"
elif [[ $state == ABSENT ]] || $dry_run; then
  echo "asking for $NAME: $ACCELERATOR, $PROVISIONING, in $ZONE"
  image=(--accelerator-type="$ACCELERATOR")
  case $PROVISIONING in
    queued) image+=(--runtime-version="$RUNTIME_VERSION" --node-id="$NAME") ;;
    spot) image+=(--runtime-version="$RUNTIME_VERSION" --node-id="$NAME" --spot) ;;
    on-demand) image+=(--version="$RUNTIME_VERSION") ;;
  esac
  kind=queued-resources
  [[ $PROVISIONING == on-demand ]] && kind=tpu-vm
  call gcloud compute tpus "$kind" create "$NAME" "${where[@]}" "${image[@]}" --quiet ||
    fail "$NAME could not be created: gcloud says why above"
  state=CREATED
else
  echo "$NAME exists already"
fi

deadline=$((SECONDS + WAIT_HOURS * 3600))
shown=
while ! $dry_run; do
  [[ $state == CREATED ]] && state=$(tpu_state)
  [[ $state == "$shown" ]] || echo "$(date +%H:%M:%S) $NAME is $state"
  shown=$state
  if [[ $state == READY ]]; then
    exit 0
  elif [[ $state != ABSENT ]] && ! is_coming "$state"; then
    fail "$NAME is $state and will not become ready: run delete.sh, then create.sh again"
  elif ((SECONDS >= deadline)); then
    fail "$NAME is still $state after $WAIT_HOURS hours: create.sh waits on, delete.sh withdraws the request" 3
  fi
  pause 1
  state=$(tpu_state)
done
