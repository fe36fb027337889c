#!/usr/bin/env bash
# Installs what boots a virtual machine with a kernel NBD client (needs root).
set -euo pipefail
missing=()
for p in qemu-system-x86 nbd-client; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
