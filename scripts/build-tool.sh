#!/usr/bin/env bash
# build-tool.sh MODULE VERSION PACKAGE OUTPUT
# Builds a command of a module at a fixed version, out of a throw-away module of
# its own, so that its needs stay out of ours. Nothing is done if OUTPUT exists.
set -euo pipefail
module=$1 version=$2 package=$3 output=$4
[ -x "$output" ] && exit 0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
go mod init tool.invalid >/dev/null 2>&1
echo "building $package $version"
GOFLAGS= go get -tool "$package@$version" >/dev/null 2>get.log || { cat get.log >&2; exit 1; }
CGO_ENABLED=0 go build -o "$output.tmp" "$package"
mv "$output.tmp" "$output"
