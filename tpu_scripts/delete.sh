#!/usr/bin/env bash
# Deletes the TPU and its request, so that they cost nothing more. What lies in the bucket stays.
# Usage: delete.sh [--yes] [--settings=FILE] [--dry_run]
#   --yes  does not ask.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
yes=false
read_flags "yes" "$@"
read_settings

if ! $yes && ! $dry_run; then
  read -r -p "Delete $NAME in $ZONE of $PROJECT, with any run on it? [y/N] " answer || answer=
  [[ $answer == y ]] || fail "$NAME was not deleted"
fi
# Both are looked for, whatever PROVISIONING says now: nothing may be left that costs money.
for kind in queued-resources tpu-vm; do
  state=$(describe "$kind" "$([[ $kind == tpu-vm ]] && echo state || echo state.state)")
  [[ $state == ABSENT ]] && continue
  force=()
  [[ $kind == queued-resources ]] && force=(--force)
  retry call gcloud compute tpus "$kind" delete "$NAME" "${where[@]}" ${force[@]+"${force[@]}"} --quiet ||
    fail "$NAME may still be there and cost money: look at it in the Google Cloud console"
done
$dry_run || echo "$NAME is deleted"
