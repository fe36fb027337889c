#!/usr/bin/env bash
# Runs the cluster's tests in CI where that can be done in time: always if the
# cluster's parts are built, else if VARVE_CI_DEADLINE (seconds since 1970) leaves
# enough for a cold build. VARVE_E2E_COLD and VARVE_E2E_WARM are how many seconds
# build and tests, and tests alone, are taken to need.
set -uo pipefail
cd "$(dirname "$0")/../.."
cold=${VARVE_E2E_COLD:-3000} warm=${VARVE_E2E_WARM:-2400}
skip() {
	echo "e2e: skipped: $*"
	echo "e2e: 0 passed, 0 failed, 1 skipped"
	exit 0
}
[ "$(id -u)" -eq 0 ] || skip "the cluster needs root"
need=$warm state=warm
if ! (cd e2e && CGO_ENABLED=0 go run ./cluster/cmd/e2e-cluster warm 2>/dev/null); then
	need=$cold state=cold
fi
if [ -n "${VARVE_CI_DEADLINE:-}" ]; then
	left=$((VARVE_CI_DEADLINE - $(date +%s)))
	[ "$left" -ge "$need" ] || skip "$left s are left, and with a $state build cache it takes about $need s"
fi
# A new share of the longest test each day; docs/e2e.md has more.
export VARVE_E2E_KILLS=${VARVE_E2E_KILLS:-2}
exec make e2e
