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
  SD3_MODEL_PATH   (\$MODEL_DIR/sd3_medium.safetensors)    SD3_SHIFT   (1.0)
  SD35_MODEL_PATH  (\$MODEL_DIR/sd3.5_large.safetensors)   SD35_SHIFT  (3.0)
  VAE_PATH         a VAE of its own (\$MODEL_DIR/sd3_vae.safetensors where that exists)
  PYTHON           the Python to use (one with the packages, else a .venv that is made on the first run)
TEXT
}

say() { printf '%s\n' "$*" >&2 || true; }

fail() {
  say "error: $*"
  exit 2
}

if [ $# -lt 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ] || [ "$1" = "-help" ] || [ "$1" = "help" ]; then
  usage
  [ $# -ge 1 ] && exit 0 || exit 2
fi
which=$1
shift
literal=
if [ "${1:-}" = "--" ]; then
  literal=yes
  shift
fi
if [ $# -lt 1 ] || { [ -z "$literal" ] && [[ $1 == --* ]]; }; then
  fail "the prompt is missing: run_inference.sh $which \"prompt\" [flags]; one that begins with -- goes behind a -- of its own"
fi
prompt=$1
shift

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
    fail "$which: unknown model; must be sd3, sd3.5 or demo"
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

# What keeps a Python from running sd3_infer.py, in one line; nothing, and status 0, where it can. Any Python reads it.
lacks() {
  "$1" - "$here/requirements.txt" 2>/dev/null <<'CODE'
import re, sys
if sys.version_info < (3, 10):
    print("is Python %d.%d; 3.10 or later is needed" % sys.version_info[:2])
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
        continue  # it can be imported; how it was installed is its own business
    for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", bounds):
        if below(numbers(version), numbers(bound)) == (sign == ">="):
            wrong.append("%s is %s, %s is needed" % (name, version, bounds))
            break
told = (["lacks " + ", ".join(missing)] if missing else []) + wrong
print("; ".join(told))
sys.exit(bool(told))
CODE
}

venv=$here/.venv
half=$venv/.half-made # there while the packages are being installed

# One at a time: the lock is of this shell's descriptor 9, so it ends with this shell and with what it started.
lock_venv() {
  { : >>"$here/.venv.lock"; } 2>/dev/null || fail "$here: cannot be written, so no .venv can be made there; set PYTHON"
  exec 9>>"$here/.venv.lock"
  local take='import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1] == "now" else 0))'
  if ! python3 -c "$take" now 2>/dev/null; then
    say "another first run is installing into $venv; waiting for it"
    python3 -c "$take" wait 2>/dev/null || true # where there are no such locks, there is no waiting
  fi
}

make_venv() {
  say "first run: installing what is needed into $venv (once)"
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
    fail "there is no python3 of version 3.10 or later; install one, or set PYTHON"
  fi
  local new=
  if [ -e "$half" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # none, or one that a kill left
    if [ -e "$venv" ] && [ ! -d "$venv" ]; then
      fail "$venv: is not a folder; move it away, or set PYTHON"
    fi
    rm -rf -- "$venv"
    new=yes
    if ! python3 -m venv "$venv" >&2; then
      fail "no virtual environment could be made; install Python 3.10 or later with its venv module, or set PYTHON"
    fi
  fi
  : >"$half"
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.txt" >&2; then
    [ -n "$new" ] || rm -f -- "$half" # somebody else's environment is not thrown away
    fail "the packages of requirements.txt could not be installed; see above"
  fi
  rm -f -- "$half"
}

python=${PYTHON:-}
if [ -n "$python" ]; then
  [ ! -d "$python" ] || fail "PYTHON=$python: is a folder; name the program in it, such as $python/bin/python"
  command -v -- "$python" >/dev/null 2>&1 || fail "PYTHON=$python: no such program, or it may not be run"
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
  if [ -e "$half" ] || ! lacks "$python" >/dev/null; then # another run may have made it meanwhile
    make_venv
  fi
  exec 9>&-
fi

exec "$python" "$here/sd3_infer.py" "${arguments[@]}" --prompt="$prompt" "$@"
