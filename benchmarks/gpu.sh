#!/usr/bin/env bash
# Works through the cells below on this machine's GPU, most important first, from the bare source tree:
#
#     benchmarks/gpu.sh [OUT]
#
# Every result is written as it comes. At LIMIT seconds (default 540) it stops; called again with the same OUT it goes on
# with what is missing. Results grow side by side, so a cell that was cut short loses the sides of one sitting only.
# The report is made afterwards, where matplotlib is: python -m benchmarks --report-only --out OUT
#
#     DEVICE=cpu CELLS=my_cells.txt   the same elsewhere, and with other cells (rehearsal: benchmarks/cells_tiny.txt)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
limit=${LIMIT:-540}
cells=${CELLS:-benchmarks/cells_gpu.txt}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}

mkdir -p "$out"
failed=0
while read -r line; do
  case $line in '' | '#'*) continue ;; esac
  # A cell cut short by the clock would be lost work: begin none with less than 20 s left.
  left=$((limit - SECONDS))
  if [ "$left" -lt "${LEAST:-20}" ]; then
    echo "gpu.sh: stopped after $SECONDS s; call it again to go on" >&2
    exit 0
  fi
  # INT, so that the workers end with the command.
  # shellcheck disable=SC2086
  timeout --signal=INT --kill-after=20 "$left" "${PYTHON:-python3}" -m benchmarks --device "${DEVICE:-gpu}" --no-report \
    --out "$out" $line < /dev/null
  code=$?
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    echo "gpu.sh: stopped after $SECONDS s; call it again to go on" >&2
    exit 0
  elif [ "$code" -ne 0 ]; then
    echo "gpu.sh: failed ($code): $line" >&2
    failed=1
  fi
done < "$cells"
echo "gpu.sh: all cells are done after $SECONDS s" >&2
exit "$failed"
