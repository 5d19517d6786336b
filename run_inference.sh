#!/usr/bin/env bash
# Makes an image: run_inference.sh <sd3|sd3.5|demo> "prompt" [any flag of sd3_infer.py]
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)

usage() {
  cat >&2 <<TEXT
usage: run_inference.sh <sd3|sd3.5|demo> "prompt" [flags of sd3_infer.py]
       run_inference.sh <sd3|sd3.5|demo> -- "--a prompt that begins with dashes" [flags of sd3_infer.py]

environment (default):
  MODEL_DIR        folder of the models ($here/models)
  MODEL_FOLDER     folder of the text encoders and tokenizers (\$MODEL_DIR)
  SD3_MODEL_PATH   (\$MODEL_DIR/sd3_medium.safetensors, else an sd3_medium_incl_clips*.safetensors)
  SD35_MODEL_PATH  (\$MODEL_DIR/sd3.5_large.safetensors, else the sd3.5_medium or large_turbo file)
  SD3_SHIFT, SD35_SHIFT  (1.0, 3.0)
  VAE_PATH         a separate VAE file (\$MODEL_DIR/sd3_vae.safetensors if it exists)
  PYTHON           the Python to use (one that has the packages, else a .venv created on the first run)

all flags: python sd3_infer.py --help_all
TEXT
}

say() { printf '%s\n' "$*" >&2 || true; }

fail() {
  say "error: $*"
  exit 2
}

if [ $# -lt 1 ]; then
  usage
  exit 2
fi
case $1 in
  -h | -help | --help | help | --help_all | --help-all)
    usage
    exit 0
    ;;
esac
which=$1
shift
case $which in
  sd3 | sd3.5 | demo) ;;
  *) fail "$which: unknown model; must be sd3, sd3.5 or demo" ;;
esac
literal=
if [ "${1:-}" = "--" ]; then
  literal=yes
  shift
fi
if [ $# -lt 1 ] || { [ -z "$literal" ] && [[ $1 == --* ]]; }; then
  fail "the prompt is missing: run_inference.sh $which \"prompt\" [flags]; put -- before a prompt that begins with --"
fi
prompt=$1
shift

models=${MODEL_DIR:-$here/models}
arguments=()

# The first of these files in the models' folder that exists; if none does, the first, so that it is named as missing.
first_of() {
  local name file
  for name in "$@"; do
    file=$models/$name.safetensors
    if [ -f "$file" ]; then
      [ "$name" = "$1" ] || say "model: $file"
      printf '%s' "$file"
      return
    fi
  done
  printf '%s' "$models/$1.safetensors"
}

case $which in
  sd3)
    arguments+=(--model "${SD3_MODEL_PATH:-$(first_of sd3_medium sd3_medium_incl_clips{_t5xxlfp16,_t5xxlfp8,})}" --shift "${SD3_SHIFT:-1.0}")
    ;;
  sd3.5)
    arguments+=(--model "${SD35_MODEL_PATH:-$(first_of sd3.5_large sd3.5_medium sd3.5_medium_incl_clips_t5xxlfp8scaled sd3.5_large_turbo)}" --shift "${SD35_SHIFT:-3.0}")
    ;;
  demo)
    arguments+=(--model "$here/models/demo/demo.safetensors")
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

# Prints in one line why a Python cannot run sd3_infer.py; status 0 and no output if it can. Runs on any Python.
lacks() {
  "$1" - "$here/requirements.txt" 2>/dev/null <<'CODE'
import re, sys
if sys.version_info < (3, 10):
    print("is Python %d.%d; 3.10 or later is required" % sys.version_info[:2])
    sys.exit(1)
import importlib.metadata, importlib.util
imported = {"pillow": "PIL"}
def numbers(version):
    return [int(n) for n in re.match(r"[\d.]*", version).group().split(".") if n]
def below(a, b):
    length = max(len(a), len(b))
    return a + [0] * (length - len(a)) < b + [0] * (length - len(b))
missing, wrong = [], []
for line in open(sys.argv[1]):
    need = re.match(r"\s*([\w.-]+)\s*(.*)", line.split("#")[0])
    if not need:
        continue
    name, bounds = need.group(1), need.group(2).strip()
    if importlib.util.find_spec(imported.get(name, name)) is None:
        missing.append(name)
        continue
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue  # importable without package metadata: accept it
    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", bounds):
        if below(numbers(version), numbers(bound)) == (sign == ">="):
            wrong.append("%s is %s, %s is required" % (name, version, bounds))
            break
problems = (["lacks " + ", ".join(missing)] if missing else []) + wrong
print("; ".join(problems))
sys.exit(bool(problems))
CODE
}

venv=$here/.venv
half=$venv/.half-made # exists while packages are being installed

# One installation at a time. The lock is on descriptor 9, so it is released when this shell and its children end.
lock_venv() {
  { : >>"$here/.venv.lock"; } 2>/dev/null || fail "$here: cannot be written, so .venv cannot be created there; set PYTHON"
  exec 9>>"$here/.venv.lock"
  local take='import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1] == "now" else 0))'
  if ! python3 -c "$take" now 2>/dev/null; then
    say "another first run is installing into $venv; waiting for it"
    python3 -c "$take" wait 2>/dev/null || true # without lock support, do not wait
  fi
}

make_venv() {
  say "first run: installing the required packages into $venv"
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
    fail "Python 3.10 or later was not found; install it, or set PYTHON"
  fi
  local new=
  if [ -e "$half" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # missing, or left half-made by a kill
    if [ -e "$venv" ] && [ ! -d "$venv" ]; then
      fail "$venv: is not a folder; move it away, or set PYTHON"
    fi
    rm -rf -- "$venv"
    new=yes
    if ! python3 -m venv "$venv" >&2; then
      fail "could not create a virtual environment; install Python 3.10 or later with its venv module, or set PYTHON"
    fi
  fi
  : >"$half"
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.txt" >&2; then
    [ -n "$new" ] || rm -f -- "$half" # keep an environment that was there before
    fail "the packages of requirements.txt could not be installed; see the output above"
  fi
  rm -f -- "$half"
}

python=${PYTHON:-}
if [ -n "$python" ]; then
  [ ! -d "$python" ] || fail "PYTHON=$python: is a folder; give the program in it, such as $python/bin/python"
  command -v -- "$python" >/dev/null 2>&1 || fail "PYTHON=$python: not found or not executable"
  if ! why=$(lacks "$python"); then
    fail "PYTHON=$python: ${why:-does not work as a Python}; install with: $python -m pip install -r $here/requirements.txt"
  fi
else
  for candidate in python3 python "$venv/bin/python"; do
    if [ "$candidate" = "$venv/bin/python" ] && [ -e "$half" ]; then
      continue
    fi
    if command -v "$candidate" >/dev/null 2>&1 && lacks "$candidate" >/dev/null; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  lock_venv
  python=$venv/bin/python
  if [ -e "$half" ] || ! lacks "$python" >/dev/null; then # another run may have created it meanwhile
    make_venv
  fi
  exec 9>&-
fi

exec "$python" "$here/sd3_infer.py" "${arguments[@]}" --prompt="$prompt" "$@"
