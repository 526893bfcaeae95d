#!/usr/bin/env bash
# Installs Python, JAX for TPUs and dro_jax on every host of the TPU. Run it again after changing the code.
# Usage: setup.sh [--settings=FILE] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
read_flags "" "$@"
read_settings
check_source

files=("$here/host.sh")
install="bash dro_jax_run/host.sh install"
if [[ -d $SOURCE ]]; then
  folder=${XDG_CACHE_HOME:-$HOME/.cache}/dro_jax/$NAME
  call mkdir -p "$folder"
  call tar -C "$SOURCE" --exclude=__pycache__ -czf "$folder/source.tar.gz" \
    setup.py pyproject.toml README.md dro_jax gin_configs
  files+=("$folder/source.tar.gz")
  install+=" ./source[tpu] source.tar.gz"
else
  install+=" $(printf %q "$SOURCE")"
fi

retry on_hosts "mkdir -p dro_jax_run" || fail "no host of $NAME answers: is it ready (create.sh)?"
retry call gcloud compute tpus tpu-vm scp "${files[@]}" "$NAME:dro_jax_run/" "${where[@]}" --worker=all --quiet ||
  fail "the files could not be copied to $NAME"
retry on_hosts "$install" || fail "dro_jax could not be installed on every host: the lines above say why"
$dry_run || echo "every host of $NAME is set up"
