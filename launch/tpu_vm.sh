#!/usr/bin/env bash
# Train on a Cloud TPU slice of one or many hosts, resuming after preemptions.
#
#   BUCKET=my-bucket launch/tpu_vm.sh create     # request a slice and wait for it
#   BUCKET=my-bucket launch/tpu_vm.sh install    # install the committed code and its dependencies on every host
#   BUCKET=my-bucket launch/tpu_vm.sh run        # start training in the background on every host
#   BUCKET=my-bucket launch/tpu_vm.sh status     # show the state of the slice, and of training on each host
#   BUCKET=my-bucket launch/tpu_vm.sh logs       # follow the log of host 0 (WORKER=2: of host 2)
#   BUCKET=my-bucket launch/tpu_vm.sh resume     # recreate the slice if gone; start training if stopped
#   BUCKET=my-bucket launch/tpu_vm.sh watch      # repeat `resume` until training is done
#   BUCKET=my-bucket launch/tpu_vm.sh delete     # delete the slice
#
# launch/README.md lists ACCELERATOR, RUNTIME and flags for each model and slice.
# DRY_RUN=1 prints every command and runs none, as if the slice were gone.  Needs gcloud, logged in, with a
# project, and a bucket that the TPU's service account may write: runs and data are in it, mounted at ~/gcs, so
# that they outlive the slice.  Complete checkpoints are renamed folders: create the bucket with
# --enable-hierarchical-namespace --uniform-bucket-level-access, so that a rename is atomic.
#
# Not run on a TPU slice.  The commands are tested with a fake gcloud.
set -euo pipefail

: "${BUCKET:?set BUCKET to the name of a Cloud Storage bucket, without gs://}"
NAME=${NAME:-var-jax}                       # name of the slice
ZONE=${ZONE:-us-west4-a}                    # must offer the accelerator
ACCELERATOR=${ACCELERATOR:-v5litepod-16}    # v5litepod-N, v6e-N, v5p-2N, v4-2N for N chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}     # v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base
SPOT=${SPOT:-1}                             # 1: spot (cheap, preemptible); 0: on demand
# shellcheck disable=SC2016 # expands on the host
TRAIN_FLAGS=${TRAIN_FLAGS:-'--config=configs/var.py:d16 --workdir=$HOME/gcs/runs/d16 --config.data.dir=$HOME/gcs/data --config.tokenizer=$HOME/gcs/runs/tokenizer'}
WORKER=${WORKER:-0}                         # host whose log is followed
EVERY=${EVERY:-60}                          # seconds between checks
MAX_FAILURES=${MAX_FAILURES:-5}             # failures soon after a start before `watch` gives up
DRY_RUN=${DRY_RUN:-0}

readonly QUEUED=(gcloud compute tpus queued-resources)
readonly VM=(gcloud compute tpus tpu-vm)
readonly UV=0.13.9 # from PyPI
exec 3>&1 # output of dry runs, also from within $(...)

say() { echo "tpu_vm.sh: $*" >&2; }

# Run a command, or print it quoted for a shell.
do_it() {
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "$@" >&3 && echo >&3
  else
    "$@"
  fi
}

on_all() { do_it "${VM[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# Print the request's state: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED (preempted), FAILED, ... or GONE.
slice_state() {
  if [[ $DRY_RUN == 1 ]]; then
    do_it "${QUEUED[@]}" describe "$NAME" --zone="$ZONE" '--format=value(state.state)'
    echo GONE
    return
  fi
  local listed
  # Two requests, so that a network error is not taken for a slice that is gone.
  listed=$("${QUEUED[@]}" list --zone="$ZONE" --filter="name:$NAME" '--format=value(name.basename())') || return
  if grep -qxF "$NAME" <<< "$listed"; then
    "${QUEUED[@]}" describe "$NAME" --zone="$ZONE" '--format=value(state.state)'
  else
    echo GONE
  fi
}

# Command that prints the state of training on a host: running, finished CODE, or idle.
# shellcheck disable=SC2016 # expands on the host
readonly ASK='if ! flock -n ~/train.lock true; then echo running; elif test -e ~/train.rc; then echo finished $(cat ~/train.rc); else echo idle; fi'

# Print the state of training on all hosts: running, done, stopped, or unreachable.
training_state() {
  local said
  if ! said=$(on_all "$ASK"); then
    echo unreachable
  elif grep -q '^running' <<< "$said"; then
    echo running # if a host has failed, the others detect it and exit within minutes
  elif grep -q '^finished' <<< "$said" && ! grep -Evq '^finished 0$' <<< "$said"; then
    echo "done"
  else
    echo stopped
  fi
}

create() {
  local spot=()
  [[ $SPOT == 1 ]] && spot=(--spot)
  do_it "${QUEUED[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" --scopes=https://www.googleapis.com/auth/cloud-platform "${spot[@]}"
  await_slice
}

await_slice() {
  local state
  [[ $DRY_RUN == 1 ]] && return
  until state=$(slice_state) && [[ $state == ACTIVE ]]; do
    case $state in
      FAILED | SUSPENDED | GONE) say "the request for $NAME ended as $state" && return 1 ;;
    esac
    say "$NAME is ${state:-unknown}, looking again in $EVERY s"
    sleep "$EVERY"
  done
}

install() {
  local there folder
  # A private folder: at a fixed path in /tmp, other users could replace the code.
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # expand now, not at exit
  trap "rm -rf $(printf %q "$folder")" EXIT
  do_it git archive --format=tar.gz --output="$folder/var_jax.tar.gz" HEAD # committed files only
  do_it "${VM[@]}" scp "$folder/var_jax.tar.gz" "$NAME:" --zone="$ZONE" --worker=all
  # The images have Python 3.10, which is too old; uv installs its own.  gcsfuse is installed as in its manual.
  # shellcheck disable=SC2016 # expands on the host
  there='set -eu
mkdir -p ~/var_jax ~/gcs
tar -xzf ~/var_jax.tar.gz -C ~/var_jax
test -x ~/.local/bin/uv || python3 -m pip install --user --quiet uv=='$UV'
test -x ~/venv/bin/python || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e "$HOME/var_jax[tpu]"
if ! command -v gcsfuse > /dev/null; then
  curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
fi
mountpoint -q ~/gcs || gcsfuse --implicit-dirs '$(printf %q "$BUCKET")' ~/gcs'
  on_all "$there"
}

run() {
  local command="rm -f ~/train.rc; \$HOME/venv/bin/python train.py $TRAIN_FLAGS; echo \$? > ~/train.rc"
  # JAX discovers the other hosts by itself.  The lock prevents a second start while training runs.
  on_all "cd ~/var_jax && nohup flock -n ~/train.lock bash -c $(printf %q "$command") >> ~/train.log 2>&1 < /dev/null &
sleep 1"
}

status() {
  say "slice $NAME: $(slice_state)"
  on_all "hostname; $ASK; tail -n 1 ~/train.log"
}

logs() { do_it "${VM[@]}" ssh "$NAME" --zone="$ZONE" --worker="$WORKER" --command='tail -n 100 -F ~/train.log'; }

delete() { do_it "${QUEUED[@]}" delete "$NAME" --zone="$ZONE" --force --quiet; }

# Restart training if it is not running.  The last line of output is the state before the restart.
resume() {
  local found
  found=$(slice_state)
  case $found in
    ACTIVE)
      found=$(training_state)
      [[ $found != stopped ]] || run
      ;;
    SUSPENDED | FAILED | GONE)
      say "slice $NAME is $found: recreating it"
      [[ $found == GONE ]] || delete
      create
      install
      run
      ;;
    *) say "slice $NAME is $found" ;; # being created, or being deleted
  esac
  echo "$found"
}

watch() {
  local found failures=0 running=0
  while true; do
    # In a separate process, so that a failure there (e.g. the slice is being preempted) is retried.
    found=$("$0" resume | tee /dev/fd/3 | tail -n 1) || found=trouble
    case $found in
      "done") say "training is done; the slice is deleted with: $0 delete" && return ;;
      running) running=$((running + 1)) ;;
      stopped)
        failures=$((running < 10 ? failures + 1 : 1)) running=0
        if ((failures >= MAX_FAILURES)); then
          say "training ended $failures times soon after its start, which is no preemption: see the logs"
          return 1
        fi
        ;;
      SUSPENDED | FAILED | GONE) failures=0 running=0 ;;
    esac
    [[ $DRY_RUN == 1 ]] && return
    say "found $found; looking again in $EVERY s"
    sleep "$EVERY"
  done
}

case ${1:-} in
  create | install | run | status | logs | resume | watch | delete) "$1" ;;
  *)
    sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    say "unknown subcommand '${1:-}'"
    exit 2
    ;;
esac
