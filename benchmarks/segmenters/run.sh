#!/usr/bin/env bash
# Train StarDist 2D and Cellpose from scratch on a training set of evaluate.py practise, and score them on test images.
#
#   benchmarks/segmenters/run.sh TRAINING_SET TEST_FOLDER OUTPUT [stardist|cellpose]
#
# TRAINING_SET and TEST_FOLDER hold images/ and instances/. Each tool gets an environment of its own in
# ENVIRONMENTS (default: .segmenters). Run it for training_sets/real and for training_sets/real_and_synthetic with the same
# STEPS and SEED, and compare. FLAGS go to the training script (--no-stretch, --bf16). Minutes to hours on a CPU.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
train=$1 test=$2 output=$3 tools=${4:-"stardist cellpose"}
environments=${ENVIRONMENTS:-.segmenters}
python=${PYTHON:-python3}
for tool in $tools; do
    environment=$environments/$tool
    if [ ! -e "$environment/ready" ]; then
        "$python" -m venv "$environment"
        "$environment/bin/pip" install -q -r "$here/requirements-$tool.txt"
        touch "$environment/ready"
    fi
    "$environment/bin/python" "$here/train_$tool.py" "$train" "$test" "$output/$tool" \
        --steps "${STEPS:-2000}" --seed "${SEED:-0}" ${FLAGS:-}
    "$python" "$here/score.py" "$test" "$output/$tool"
done
