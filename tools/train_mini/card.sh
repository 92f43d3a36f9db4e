#!/usr/bin/env bash
# Everything on a card that is rented for a quarter of an hour, unattended:
#   OUT=results tools/train_mini/card.sh ASSETS TEACHER [WHEELS] [more options of `train_mini all`, such as --tiny]
# The training runs in a session of its own, in $RUN, so that it outlives a call that is cut off; a second call with the
# same arguments follows the same run. Every call copies what there is to $OUT: at most eight files of 15 MiB.
# MINUTES of training and figures (12), start-up of the machine not counted; SECONDS_HERE that one call stays (560).
set -u
ASSETS=$(realpath "$1") TEACHER=$(realpath "$2")
shift 2
if [ $# -gt 0 ] && [ -d "$1" ]; then WHEELS=$(realpath "$1"); shift; fi
HERE=$(cd "$(dirname "$0")/../.." && pwd)
RUN=${RUN:-/tmp/train_mini_run} OUT=$(realpath -m "${OUT:?expected OUT, the folder for results, got none}")
PYTHON=${PYTHON:-python3}
mkdir -p "$RUN" "$OUT"
if [ -n "${WHEELS:-}" ] && [ ! -e "$RUN/site/done" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$RUN/site" "$WHEELS"/*.whl &&
    touch "$RUN/site/done" || echo "some wheels were not installed; going on with what is there"
fi
export PYTHONPATH="$HERE/tools:$HERE/src:$RUN/site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
cd "$HERE" || exit
alive() { [ -e "$RUN/pid" ] && grep -qvs ') Z ' "/proc/$(cat "$RUN/pid")/stat"; } # Z: killed, and nobody asked why
if [ ! -e "$RUN/finished" ] && ! alive; then
  setsid "$PYTHON" -m train_mini all --out "$RUN" --assets "$ASSETS" --teacher "$TEACHER" \
    --minutes "${MINUTES:-12}" "$@" >>"$RUN/output" 2>&1 </dev/null &
  echo $! >"$RUN/pid"
fi
"$PYTHON" -m train_mini follow --out "$RUN" --results "$OUT" --pid "$(cat "$RUN/pid")" --seconds "${SECONDS_HERE:-560}" \
  $([[ " $* " == *" --tiny "* ]] && echo --tiny)
tail -n 40 "$RUN/output" | cut -c1-300
