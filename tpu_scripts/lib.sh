# shellcheck shell=bash
# What the scripts beside this file share: flags, settings, and how they speak to gcloud.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
settings=$here/settings.env
dry_run=false
poll=${DRO_JAX_POLL_SECONDS:-30}
most_restarts=5
# Command substitutions cannot swallow what a dry run prints here.
exec 3>&1

fail() { # MESSAGE [EXIT_CODE]
  echo "$(basename "$0"): $1" >&2
  exit "${2:-1}"
}

pause() { # PERIODS
  local i
  for ((i = 0; i < $1; i++)); do sleep "$poll"; done
}

read_flags() { # NAMES FLAG...: sets the variable of each flag; a name that ends in = takes a value
  local flag key allowed=" settings= dry_run $1 "
  shift
  for flag; do
    if [[ $flag == --help ]]; then
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exit 0
    fi
    key=${flag#--}
    [[ $flag == *=* ]] && key=${key%%=*}=
    [[ $flag == --* && $allowed == *" $key "* ]] || fail "$flag: no such flag; --help lists them" 2
    if [[ $flag == *=* ]]; then printf -v "${key%=}" %s "${flag#*=}"; else printf -v "$key" true; fi
  done
}

read_settings() {
  local line more key
  local known=(PROJECT ZONE NAME ACCELERATOR RUNTIME_VERSION PROVISIONING WAIT_HOURS SOURCE MODEL_DIR TRAIN_FLAGS)
  # The environment must not fill gaps in the file.
  unset "${known[@]}"
  [[ -f $settings && -r $settings ]] || fail "$settings: no such file" 2
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'}
    while [[ $line == *\\ ]] && IFS= read -r more; do line=${line%\\}${more%$'\r'}; done
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    key=${line%%=*}
    [[ $line == *=* && " ${known[*]} " == *" $key "* ]] ||
      fail "$settings: $key is not a setting; there are ${known[*]}" 2
    printf -v "$key" %s "${line#*=}"
  done <"$settings"
  for key in "${known[@]}"; do [[ -n ${!key:-} ]] || fail "$settings: $key is not set" 2; done
  for key in PROJECT ZONE NAME ACCELERATOR RUNTIME_VERSION; do
    [[ ${!key} =~ ^[a-z][a-z0-9.:-]*$ ]] ||
      fail "$settings: $key is ${!key}: give lower-case letters, digits and dashes, without quotes" 2
  done
  [[ $PROVISIONING =~ ^(queued|spot|on-demand)$ ]] ||
    fail "$settings: PROVISIONING is $PROVISIONING: give queued, spot or on-demand" 2
  [[ $WAIT_HOURS =~ ^(0|[1-9][0-9]*)$ ]] || fail "$settings: WAIT_HOURS is $WAIT_HOURS: give a whole number" 2
  [[ $MODEL_DIR =~ ^gs://[a-z0-9][^[:space:]\'\"]*$ ]] ||
    fail "$settings: MODEL_DIR is $MODEL_DIR: give gs://bucket/folder; the hosts share no disk, and theirs go with the TPU" 2
  MODEL_DIR=${MODEL_DIR%/}
  if [[ $TRAIN_FLAGS != --* || $TRAIN_FLAGS == *gin.MODEL_DIR* ]] || ! bash -n <<<": $TRAIN_FLAGS" 2>/dev/null; then
    fail "$settings: TRAIN_FLAGS is $TRAIN_FLAGS: give the flags of \`dro_jax train\`, quoted as in a shell, without MODEL_DIR" 2
  fi
  where=(--project="$PROJECT" --zone="$ZONE")
}

check_source() {
  [[ -f $SOURCE/setup.py || (! -e $SOURCE && $SOURCE == dro_jax*) ]] ||
    fail "$settings: SOURCE is $SOURCE: give a folder with setup.py, or what pip takes, as in dro_jax[tpu] @ git+https://..." 2
}

call() { # COMMAND...: runs it, or with --dry_run prints it
  local line
  if $dry_run; then
    printf -v line ' %q' "$@"
    echo "${line:1}" >&3
  else
    "$@" </dev/null
  fi
}

retry() { # COMMAND...: up to five times, waiting longer each time
  local attempt code
  for ((attempt = 1; ; attempt++)); do
    code=0
    "$@" || code=$?
    # 1 and 255 are gcloud's own failures (no connection, not ready); most others come from the command on the host.
    if [[ $code != 1 && $code != 255 ]] || ((attempt == 5)); then return "$code"; fi
    echo "attempt $attempt of 5 failed, trying again" >&2
    pause $((2 ** (attempt - 1)))
  done
}

on_hosts() { # COMMAND: in a shell on every host
  call gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --quiet \
    --ssh-flag=-oServerAliveInterval=30 --command="$1"
}

describe() { # KIND FIELD: its state; ABSENT if there is none, UNKNOWN if gcloud does not say
  local answer errors
  errors=$(mktemp)
  if answer=$(call gcloud compute tpus "$1" describe "$NAME" "${where[@]}" --format="value($2)" 2>"$errors"); then
    echo "$answer"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

tpu_state() { # READY when it can be used
  local state
  if [[ $PROVISIONING != on-demand ]]; then
    state=$(describe queued-resources state.state)
    if [[ $state != ACTIVE ]] && ! $dry_run; then
      echo "$state"
      return
    fi
  fi
  state=$(describe tpu-vm state)
  # A request whose TPU has gone is not the same as no request.
  [[ $state == ABSENT && $PROVISIONING != on-demand ]] && state=ACTIVE_WITHOUT_TPU
  echo "$state"
}

is_coming() { # STATE: it may become READY by waiting
  [[ $1 =~ ^(CREATING|ACCEPTED|WAITING_FOR_RESOURCES|PROVISIONING|STARTING|RESTARTING|REIMAGING|REPAIRING|UNKNOWN)$ ]]
}

judge() { # REPORT of the hosts: sets outcome and code
  local codes
  codes=$(sed -n 's/^status [^ ]* [0-9]* exit \([^ ]*\).*/\1/p' <<<"$1" | sort -u)
  code=0
  if grep -q '^status .* running$' <<<"$1"; then
    outcome=running
  elif grep -q '^status .* none$' <<<"$1"; then
    outcome=none code=1
  elif [[ $codes == 0 ]]; then
    outcome=finished
  elif grep -qx 2 <<<"$codes"; then
    outcome=mistake code=2
  else
    outcome=failed
    if grep -q '^status .* stopped$' <<<"$1"; then outcome=stopped; fi
    code=$(grep -vx 0 <<<"$codes" | head -n 1)
    if [[ $code == died ]]; then code=1; fi
  fi
}

follow() { # WORKER SEEN: prints what the hosts log until the run has ended; sets outcome and code
  local report state worker=$1 seen=$2 misses=0
  outcome=finished code=0
  if $dry_run; then
    on_hosts "bash dro_jax_run/host.sh report $seen"
    return
  fi
  while :; do
    # What has been seen goes with each question, so that a dropped connection loses no line.
    if report=$(on_hosts "bash dro_jax_run/host.sh report $seen" 2>/dev/null) && [[ $report == *"status "* ]]; then
      misses=0
      if [[ $worker == all ]]; then
        sed '/^status /d' <<<"$report"
      else
        grep -q "^status w-$worker " <<<"$report" || fail "$NAME has no worker $worker" 2
        sed -n "s/^w-$worker| //p" <<<"$report"
      fi
      judge "$report"
      [[ $outcome == running ]] || return 0
      seen=$(sed -n 's/^status \([^ ]*\) \([0-9]*\) .*/\1=\2/p' <<<"$report" | tr '\n' ' ')
    else
      state=$(tpu_state)
      echo "no answer from the hosts; $NAME is $state" >&2
      # Where gcloud does not answer either, the fault is on our side and the run goes on without us.
      [[ $state == UNKNOWN ]] || misses=$((misses + 1))
      if ((misses == 10)) || { [[ $state != READY ]] && ! is_coming "$state"; }; then
        outcome=lost code=69
        return 0
      fi
    fi
    pause 1
  done
}

explain() { # what follow found
  $dry_run && return
  case $outcome in
    finished) echo "The run is complete: $MODEL_DIR" ;;
    mistake) echo "The run ended with exit code 2, bad input: the line above says what to put right." >&2 ;;
    stopped) echo "The run was stopped (exit code $code); launch.sh goes on from its last checkpoint." >&2 ;;
    failed) echo "The run ended with exit code $code." >&2 ;;
    lost) echo "$NAME is gone or does not answer." >&2 ;;
    none) echo "Nothing has been launched on $NAME: run launch.sh." >&2 ;;
  esac
}

newest_checkpoint() { # its step, 0 if there is none
  local folders
  case $MODEL_DIR in
    gs://*) folders=$(call gcloud storage ls "$MODEL_DIR/" 2>/dev/null) || true ;;
    *) folders=$(ls -d "$MODEL_DIR"/*/ 2>/dev/null) || true ;;
  esac
  sed -n 's|.*/checkpoint_\([0-9]*\)/$|\1|p' <<<"$folders" | sort -n | tail -n 1 | grep . || echo 0
}

may_restart() { # fails after five restarts in a row without a new checkpoint
  local now
  now=$(newest_checkpoint)
  if ((now > newest)); then newest=$now restarts=0; fi
  restarts=$((restarts + 1))
  ((restarts <= most_restarts))
}
