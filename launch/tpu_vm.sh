#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or many hosts, through preemptions.
#
#   BUCKET=my-bucket launch/tpu_vm.sh create     # ask for a slice and wait for it
#   BUCKET=my-bucket launch/tpu_vm.sh install    # the committed code and what it needs, on every host
#   BUCKET=my-bucket launch/tpu_vm.sh run        # start training in the background, on every host
#   BUCKET=my-bucket launch/tpu_vm.sh status     # of the slice, and of the training on each host
#   BUCKET=my-bucket launch/tpu_vm.sh logs       # follow host 0 (WORKER=2: another)
#   BUCKET=my-bucket launch/tpu_vm.sh resume     # make the slice anew if it is gone; run if nothing runs
#   BUCKET=my-bucket launch/tpu_vm.sh watch      # resume again and again until training is done
#   BUCKET=my-bucket launch/tpu_vm.sh delete
#
# launch/README.md has ACCELERATOR, RUNTIME and flags for each model and slice.
# DRY_RUN=1 prints every command and runs none; the slice then counts as gone.  Needs gcloud, logged in, with
# a project, and a bucket that the TPU's service account may write: runs and data lie in it, mounted at ~/gcs,
# so that they outlive the slice.  Checkpoints are folders that are renamed once complete: make the bucket
# with --enable-hierarchical-namespace --uniform-bucket-level-access, where that is one atomic step.
#
# Not run so far: no TPU was at hand.  The commands are checked against a stand-in for gcloud.
set -euo pipefail

: "${BUCKET:?set BUCKET to the name of a Cloud Storage bucket, without gs://}"
NAME=${NAME:-var-jax}                       # of the slice
ZONE=${ZONE:-us-west4-a}                    # one that has the accelerator
ACCELERATOR=${ACCELERATOR:-v5litepod-16}    # v5litepod-N, v6e-N, v5p-2N, v4-2N for N chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}     # v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base
SPOT=${SPOT:-1}                             # 1: cheap, may be taken away; 0: on demand
# shellcheck disable=SC2016 # expands over there
TRAIN_FLAGS=${TRAIN_FLAGS:-'--config=configs/var.py:d16 --workdir=$HOME/gcs/runs/d16 --config.data.dir=$HOME/gcs/data --config.tokenizer=$HOME/gcs/runs/tokenizer'}
WORKER=${WORKER:-0}                         # host whose log is followed
EVERY=${EVERY:-60}                          # seconds between two looks
MAX_FAILURES=${MAX_FAILURES:-5}             # ends of training soon after its start before `watch` gives up
DRY_RUN=${DRY_RUN:-0}

readonly QUEUED=(gcloud compute tpus queued-resources)
readonly VM=(gcloud compute tpus tpu-vm)
readonly UV=0.13.9 # from PyPI
exec 3>&1 # where dry runs print, also from within $(...)

say() { echo "tpu_vm.sh: $*" >&2; }

# Runs a command, or prints it in a form that can be pasted into a shell.
do_it() {
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "$@" >&3 && echo >&3
  else
    "$@"
  fi
}

on_all() { do_it "${VM[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# State of the request: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED (preempted), FAILED, ...; GONE.
slice_state() {
  if [[ $DRY_RUN == 1 ]]; then
    do_it "${QUEUED[@]}" describe "$NAME" --zone="$ZONE" '--format=value(state.state)'
    echo GONE
    return
  fi
  local listed
  # Two questions, so that trouble on the network is not taken for a slice that is gone.
  listed=$("${QUEUED[@]}" list --zone="$ZONE" --filter="name:$NAME" '--format=value(name.basename())') || return
  if grep -qxF "$NAME" <<< "$listed"; then
    "${QUEUED[@]}" describe "$NAME" --zone="$ZONE" '--format=value(state.state)'
  else
    echo GONE
  fi
}

# What is asked of each host; one line each: running, finished CODE, or idle.
# shellcheck disable=SC2016 # expands over there
readonly ASK='if ! flock -n ~/train.lock true; then echo running; elif test -e ~/train.rc; then echo finished $(cat ~/train.rc); else echo idle; fi'

# Of the training on all hosts: running, done, stopped, or unreachable.
training_state() {
  local said
  if ! said=$(on_all "$ASK"); then
    echo unreachable
  elif grep -q '^running' <<< "$said"; then
    echo running # and where a host has failed, the others notice and end within minutes
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
  # A folder of this user alone: at a fixed name in /tmp, others could put their code in its place.
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # this folder, not what the name holds later
  trap "rm -rf $(printf %q "$folder")" EXIT
  do_it git archive --format=tar.gz --output="$folder/var_jax.tar.gz" HEAD # what is committed, and nothing else
  do_it "${VM[@]}" scp "$folder/var_jax.tar.gz" "$NAME:" --zone="$ZONE" --worker=all
  # The images have Python 3.10, too old; uv brings its own.  The sources of gcsfuse are those of its manual.
  # shellcheck disable=SC2016 # expands over there
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
  # The hosts find each other by themselves.  The lock keeps a second start from disturbing the first.
  on_all "cd ~/var_jax && nohup flock -n ~/train.lock bash -c $(printf %q "$command") >> ~/train.log 2>&1 < /dev/null &
sleep 1"
}

status() {
  say "slice $NAME: $(slice_state)"
  on_all "hostname; $ASK; tail -n 1 ~/train.log"
}

logs() { do_it "${VM[@]}" ssh "$NAME" --zone="$ZONE" --worker="$WORKER" --command='tail -n 100 -F ~/train.log'; }

delete() { do_it "${QUEUED[@]}" delete "$NAME" --zone="$ZONE" --force --quiet; }

# Brings training back where it does not run.  The last line of its output is what it found.
resume() {
  local found
  found=$(slice_state)
  case $found in
    ACTIVE)
      found=$(training_state)
      [[ $found != stopped ]] || run
      ;;
    SUSPENDED | FAILED | GONE)
      say "slice $NAME is $found: making it anew"
      [[ $found == GONE ]] || delete
      create
      install
      run
      ;;
    *) say "slice $NAME is $found" ;; # on its way, or being taken away
  esac
  echo "$found"
}

watch() {
  local found failures=0 running=0
  while true; do
    # In a process of its own: what fails there, e.g. since the slice is being taken away, is tried again.
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
