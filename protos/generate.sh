#!/usr/bin/env bash
# Makes Python code and types of the .proto files, and checks what is committed. Called by the Makefile with
# PYTHON naming the virtual environment's interpreter.
#   generate.sh write      format the .proto files and write the package gen/rmem anew
#   generate.sh check      buf lint and format, buf breaking against baseline.binpb, gen/rmem up to date
#   generate.sh baseline   make baseline.binpb, the image that `check` compares with
set -euo pipefail

python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
bin=$(dirname "$python")
protos=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Google's common protos in protos/.deps, where buf and protoc look
deps() {
    local installed version fresh
    { read -r version; read -r installed; } < <("$python" -c '
import google.rpc, importlib.metadata
print(importlib.metadata.version("googleapis-common-protos"))
print(list(google.rpc.__path__)[0].removesuffix("/google/rpc"))')
    [ "$(cat "$protos/.deps/VERSION" 2>/dev/null)" != "$version" ] || return 0
    fresh=$(mktemp -d)
    (cd "$installed" && find google/{api,longrunning,rpc,type} -name '*.proto' -exec cp --parents {} "$fresh" \;)
    # shipped under another name than the one its descriptor is registered by
    mv "$fresh/google/longrunning/operations_proto.proto" "$fresh/google/longrunning/operations.proto"
    echo "$version" >"$fresh/VERSION"
    rm -rf "$protos/.deps"
    mv "$fresh" "$protos/.deps"
}

# the package `rmem` in a fresh folder, which $fresh names and which is gone when we are
code() {
    local files
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    mapfile -t files < <(cd "$protos" && find rmem -name '*.proto' | LC_ALL=C sort)
    (cd "$protos" && "$python" -m grpc_tools.protoc -I . -I .deps \
        --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
        --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
        --python_out="$fresh" --grpc_python_out="$fresh" \
        --mypy_out=quiet:"$fresh" --mypy_grpc_out=quiet:"$fresh" "${files[@]}")
    find "$fresh/rmem" -type d -exec touch {}/__init__.py \;
    touch "$fresh/rmem/py.typed"
}

write() {
    cd "$protos"
    "$bin/buf" format --write . --path rmem
    code
    mkdir -p gen/rmem
    (cd gen && find rmem -name __pycache__ -prune -o -type f -print) | while read -r file; do
        [ -e "$fresh/$file" ] || rm "gen/$file" # of a .proto that was renamed or removed
    done
    cp -r "$fresh/rmem" gen/
    find gen -type d -empty -delete
}

check() {
    cd "$protos"
    "$bin/buf" format --diff --exit-code . --path rmem
    "$bin/buf" lint . --path rmem
    if [ -e baseline.binpb ]; then
        "$bin/buf" breaking . --path rmem --against baseline.binpb
    fi
    code
    diff -r -x __pycache__ "$fresh/rmem" gen/rmem || {
        echo 'protos/gen differs from what the .proto files give: run make protos' >&2
        return 1
    }
}

baseline() {
    cd "$protos"
    "$bin/buf" build . --path rmem --exclude-source-info -o baseline.binpb
}

case ${1:-} in
write | check | baseline)
    if [ -z "$(find "$protos/rmem" -name '*.proto' 2>/dev/null | head -n 1)" ]; then
        echo 'no .proto files yet: nothing to do'
        exit 0
    fi
    deps
    "$1"
    ;;
*)
    sed -n '2,/^set/{/^#/p}' "${BASH_SOURCE[0]}" >&2
    exit 64
    ;;
esac
