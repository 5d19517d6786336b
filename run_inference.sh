#!/usr/bin/env bash
# Makes a picture: run_inference.sh <sd3|sd3.5|demo> "prompt" [any flag of sd3_infer.py]
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)

usage() {
  cat >&2 <<TEXT
usage: run_inference.sh <sd3|sd3.5|demo> "prompt" [flags of sd3_infer.py]

environment (default):
  MODEL_DIR        folder of the models ($here/models)
  MODEL_FOLDER     folder of the text encoders and tokenizers (\$MODEL_DIR)
  SD3_MODEL_PATH   (\$MODEL_DIR/sd3_medium.safetensors)    SD3_SHIFT   (1.0)
  SD35_MODEL_PATH  (\$MODEL_DIR/sd3.5_large.safetensors)   SD35_SHIFT  (3.0)
  VAE_PATH         a VAE of its own (\$MODEL_DIR/sd3_vae.safetensors where that exists)
  PYTHON           the Python to use (one with the packages, else a .venv that is made on the first run)
TEXT
}

say() { printf '%s\n' "$*" >&2; }

if [ $# -lt 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
  usage
  [ $# -ge 1 ] && exit 0 || exit 2
fi
which=$1
if [ $# -lt 2 ] || [[ $2 == --* ]]; then
  say "error: the prompt is missing: run_inference.sh $which \"prompt\" [flags]"
  exit 2
fi
prompt=$2
shift 2

models=${MODEL_DIR:-$here/models}
arguments=()
case $which in
  sd3)
    arguments+=(--model "${SD3_MODEL_PATH:-$models/sd3_medium.safetensors}" --shift "${SD3_SHIFT:-1.0}")
    ;;
  sd3.5)
    arguments+=(--model "${SD35_MODEL_PATH:-$models/sd3.5_large.safetensors}" --shift "${SD35_SHIFT:-3.0}")
    ;;
  demo)
    arguments+=(--model "$here/models/demo/demo.safetensors")
    ;;
  *)
    say "error: $which: unknown model; must be sd3, sd3.5 or demo"
    exit 2
    ;;
esac
if [ "$which" != demo ]; then
  arguments+=(--model_folder "${MODEL_FOLDER:-$models}")
  if [ -n "${VAE_PATH:-}" ]; then
    arguments+=(--vae "$VAE_PATH")
  elif [ -e "$models/sd3_vae.safetensors" ]; then
    arguments+=(--vae "$models/sd3_vae.safetensors")
  fi
fi

has_packages() {
  "$1" - 2>/dev/null <<'CODE'
import importlib.util, sys
names = "torch safetensors tokenizers huggingface_hub sentencepiece numpy PIL fire tqdm".split()
sys.exit(not all(importlib.util.find_spec(name) for name in names))
CODE
}

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python "$here/.venv/bin/python"; do
    if command -v "$candidate" >/dev/null 2>&1 && has_packages "$candidate"; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  say "first run: installing what is needed into $here/.venv (once)"
  if [ ! -x "$here/.venv/bin/python" ] && ! python3 -m venv "$here/.venv" >&2; then
    say "error: no virtual environment could be made; install Python 3.10 or later with its venv module, or set PYTHON"
    exit 2
  fi
  python=$here/.venv/bin/python
  if ! "$python" -m pip install --disable-pip-version-check -r "$here/requirements.txt" >&2; then
    say "error: the packages of requirements.txt could not be installed; see above"
    exit 2
  fi
fi

exec "$python" "$here/sd3_infer.py" "${arguments[@]}" --prompt="$prompt" "$@"
