#!/usr/bin/env bash
# A real Ray cluster of several nodes (raylets) on this machine, on loopback, with token authentication. For tests and for trying things.
#
#   cluster/local_cluster.sh start [--folder DIR] [--workers N] [--cpus C] [--gpus G] [--memory BYTES] [--object-store BYTES]
#                                  [--port P] [--dashboard-port P] [--client-port P]
#   cluster/local_cluster.sh stop  [--folder DIR]
#   cluster/local_cluster.sh env   [--folder DIR]     what a shell needs to reach it: eval "$(cluster/local_cluster.sh env)"
#
# --cpus, --gpus and --memory are what each node offers, the head too; what the machine really has does not matter.
# DIR (default: /tmp/chatray-cluster, a short path, since sockets' names are limited) holds the token, the process ids and Ray's files.
# RAY names the ray command (default: the one on the path). Nothing but this cluster's processes is ever stopped.
set -euo pipefail

verb=${1:-}
[[ $# -gt 0 ]] && shift
folder=/tmp/chatray-cluster workers=1 cpus=2 gpus=0 memory=4000000000 store=100000000 port=6379 dashboard=8265 client=10001
while [[ $# -gt 0 ]]; do
  [[ $# -ge 2 ]] || { echo "local_cluster.sh: $1 needs a value" >&2; exit 2; }
  case $1 in
    --folder) folder=$2 ;;
    --workers) workers=$2 ;;
    --cpus) cpus=$2 ;;
    --gpus) gpus=$2 ;;
    --memory) memory=$2 ;;
    --object-store) store=$2 ;;
    --port) port=$2 ;;
    --dashboard-port) dashboard=$2 ;;
    --client-port) client=$2 ;;
    *) echo "local_cluster.sh: $1: no such option" >&2; exit 2 ;;
  esac
  shift 2
done
ray=${RAY:-ray}
NET=127.0.0 # each node has a loopback address of its own; 127.0.0.1 itself Ray would replace by the machine's outer one
LIMIT=120 # seconds for a node to start, and for all to end

# Ids of this cluster's processes. Its folder stands in the command line of most, and in the environment of all.
ours() {
  local process
  for process in /proc/[0-9]*; do
    [[ ${process#/proc/} != "$$" ]] || continue
    if tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qxF "CHATRAY_CLUSTER=$folder" ||
      tr '\0' '\n' 2>/dev/null <"$process/cmdline" | grep -qF "$folder/ray/"; then
      echo "${process#/proc/}"
    fi
  done
}

stop() {
  [[ -d $folder ]] || return 0
  local pid waited=0
  # The nodes' own `ray start` end all they started; then whatever is left.
  while read -r pid; do kill -TERM "$pid" 2>/dev/null || true; done < <(tac "$folder/pids" 2>/dev/null || true)
  while [[ -n $(ours) && $waited -lt 10 ]]; do sleep 1; waited=$((waited + 1)); done
  while [[ -n $(ours) && $waited -lt $LIMIT ]]; do
    for pid in $(ours); do kill -KILL "$pid" 2>/dev/null || true; done
    sleep 1
    waited=$((waited + 1))
  done
  rm -rf "$folder"
}

# start_node NAME IP WORDS...: a node in the background, and wait until its `ray start` says that it runs.
start_node() {
  local name=$1 ip=$2 log=$folder/$1.log waited=0
  shift 2
  : >"$log"
  setsid "$ray" start "$@" --node-ip-address="$ip" --temp-dir="$folder/ray" --num-cpus="$cpus" --num-gpus="$gpus" \
    --memory="$memory" --object-store-memory="$store" --disable-usage-stats --block >"$log" 2>&1 </dev/null &
  echo $! >>"$folder/pids"
  until grep -q "Ray runtime started" "$log"; do
    if ! kill -0 $! 2>/dev/null || [[ $waited -ge $((LIMIT * 5)) ]]; then
      echo "local_cluster.sh: node $name did not start:" >&2
      tail -n 20 "$log" >&2
      stop
      exit 1
    fi
    sleep 0.2
    waited=$((waited + 1))
  done
}

start() {
  [[ -e $folder ]] && { echo "local_cluster.sh: $folder is there already; stop that cluster first, or choose another --folder" >&2; exit 2; }
  command -v "$ray" >/dev/null || { echo "local_cluster.sh: no command $ray; activate the environment, or set RAY" >&2; exit 2; }
  (umask 077 && mkdir -p "$folder" && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/token")
  export CHATRAY_CLUSTER=$folder RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN
  PATH=$(dirname "$(command -v "$ray")"):$PATH # a job's `python` is the one that Ray runs on
  export PATH
  echo "http://127.0.0.1:$dashboard" >"$folder/address"
  start_node head "$NET.2" --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --dashboard-agent-listen-port=0 \
    --ray-client-server-port="$client" --min-worker-port=0 --max-worker-port=0
  local number
  for ((number = 1; number <= workers; number++)); do
    start_node "worker$number" "$NET.$((number + 2))" --address="$NET.2:$port" --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0
  done
  show
}

show() {
  [[ -f $folder/address ]] || { echo "local_cluster.sh: no cluster in $folder" >&2; exit 1; }
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token CHATRAY_ADDRESS=$(cat "$folder/address")"
}

case $verb in
  start) start ;;
  stop) stop ;;
  env) show ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
