#!/usr/bin/env bash
# What launch.sh does on each host of a slice. Untested on a chip.
set -euo pipefail
cd ~

running() {
  [[ -e run.pid && $(ps -o stat= -p "$(cat run.pid)") == [!Z]* ]]
}

install() {
  local keys=/usr/share/keyrings/cloud.google.asc
  local packages=https://packages.cloud.google.com/apt
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$keys" >/dev/null
    echo "deb [signed-by=$keys] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update
    sudo apt-get install -y gcsfuse
  fi
  # The system's Python may be older than what jax needs; uv brings one.
  if ! [[ -x .local/bin/uv ]]; then
    curl -fsSL https://astral.sh/uv/install.sh | sh
  fi
  if ! [[ -x env/bin/python ]]; then
    .local/bin/uv venv --python 3.12 env
  fi
  .local/bin/uv pip install --python env/bin/python './checkout[train]' 'jax[tpu]'
  touch installed
}

# start BUCKET COMMAND...
start() {
  if running; then
    echo "running"
    return
  fi
  if ! mountpoint -q bucket; then
    mkdir -p bucket
    # Nothing is remembered of what other hosts may have changed meanwhile.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 "$1" bucket
  fi
  shift
  PATH="$HOME/env/bin:$PATH" nohup "$@" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
  echo "started"
}

# SIGTERM on every host: the run saves a checkpoint at a common step, and ends.
stop() {
  if running; then
    kill -TERM "$(cat run.pid)"
  fi
  for _ in {1..600}; do
    running || break
    sleep 1
  done
  if running; then
    kill -KILL "$(cat run.pid)"
    sleep 1
  fi
  status
}

status() {
  if ! [[ -e installed ]]; then
    echo "absent"
  elif running; then
    echo "running"
  else
    echo "stopped"
  fi
}

case ${1:-} in
install | start | stop | status) "$@" ;;
log) tail -n 20 run.log ;;
*)
  echo "worker.sh: got '${1:-}', expected install, start, stop, status or log" >&2
  exit 2
  ;;
esac
