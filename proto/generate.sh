#!/usr/bin/env bash
# Generates the Python code of the wire contract from its .proto files.
#   proto/generate.sh            writes it beside the .proto files (it is committed)
#   proto/generate.sh --check    writes nothing; fails, showing the difference, where the committed code is not what would be written
# PYTHON names an interpreter that has grpcio-tools 1.71: newer ones write code that the oldest supported protobuf refuses.
# No *_pb2_grpc.py is made: client and server build their method tables from the descriptors.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv-proto/bin/python}
room=ome_tensor_proto/v1

case "${1:-}" in
  "" | --check) ;;
  *) echo "usage: proto/generate.sh [--check]" >&2; exit 2 ;;
esac

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
mkdir "$temporary/fresh" "$temporary/committed"
fresh=$temporary/fresh/$room
"$python" -m grpc_tools.protoc -Iproto --python_out="$temporary/fresh" --pyi_out="$temporary/fresh" proto/$room/*.proto

if [ "${1:-}" = --check ]; then
  # Generated files only, and all of them: one left over from a .proto file that is gone counts too.
  find proto/$room -maxdepth 1 -name '*_pb2.py*' -exec cp {} "$temporary/committed" \;
  if ! diff -ru "$temporary/committed" "$fresh"; then
    echo "generate.sh: the generated code is not what the .proto files say: run 'make proto' and commit" >&2
    exit 1
  fi
else
  # Only now, with every file generated, do the old ones go.
  rm -f proto/$room/*_pb2.py proto/$room/*_pb2.pyi
  cp "$fresh"/*_pb2.py "$fresh"/*_pb2.pyi proto/$room/
fi
