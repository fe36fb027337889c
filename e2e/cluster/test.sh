#!/usr/bin/env bash
# Runs the tests that stand on package framework, and those of the cluster itself, in clusters brought up
# for them, and takes those down. RUN chooses tests by regexp, which then share one cluster
# (the one that is up, if there is one). Counts what was skipped and why.
#
# All tests take three clusters beside each other: in two of them are those of the cluster itself, and those of
# package kubernetes that need a cluster to themselves, because they kill the controller or a node. Those mostly
# wait, one after the other.
#
# test.sh prepare builds the image and the tests: a cluster is not kept up while a
# compiler runs. test.sh run runs them.
#
# What passed and did not change is not run again, as with "go test": those of the cluster itself for a week, those of
# Varve for the day, which chooses a part of them. All are run with RUN and with VARVE_E2E_KILLS=all.
set -uo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0
# Those packages need a cluster; one at a time, as they share it.
mapfile -t packages < <(go list -f '{{range .XTestImports}}{{if eq . "github.com/varve-io/varve/e2e/framework"}}{{$.ImportPath}}{{end}}{{end}}{{range .TestImports}}{{if eq . "github.com/varve-io/varve/e2e/framework"}}{{$.ImportPath}}{{end}}{{end}}' ./... | sort -u)
packages=(./cluster/... ./csidriver/... "${packages[@]}")
built=$PWD/../bin/e2e
case "${1:-}" in
prepare)
	VERSION=e2e make --no-print-directory -C .. image IMAGE=localhost/varve:e2e COMPRESS=false || exit 1
	rm -rf "$built" && mkdir -p "$built" && go vet "${packages[@]}" || exit 1
	# Linked once, for all clusters.
	go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{.Dir}}{{end}}' "${packages[@]}" |
		while read -r package dir; do
			go test -c -vet=off -ldflags '-s -w -buildid=' -o "$built/${package//\//+}" "$package" && echo "$package $dir" >>"$built/some" || exit 1
		done && mv "$built/some" "$built/packages"
	exit
	;;
run) ;;
*)
	echo "test.sh: prepare or run?" >&2
	exit 2
	;;
esac
export VARVE_E2E_IMAGE=localhost/varve:e2e VARVE_E2E_KILLS=${VARVE_E2E_KILLS:-all} VARVE_E2E_UP=1
logs=$(mktemp -d)
said=$(mktemp) # what failed tests said
own=() # run directories of the clusters brought up here, "" for the usual one

# in_cluster RUNDIR COMMAND... is for the cluster in a run directory.
in_cluster() {
	local run=$1
	shift
	if [ -n "$run" ]; then export VARVE_E2E_RUN=$run; fi
	"$@"
}
e2e_cluster() { (in_cluster "$1" go run ./cluster/cmd/e2e-cluster "${@:2}"); }
finish() {
	rc=$?
	for run in "${own[@]}"; do e2e_cluster "$run" down || rc=1; done
	rm -rf "$logs" "$said" "${own[@]}"
	exit $rc
}
trap finish EXIT
trap 'exit 130' INT TERM

# ready RUNDIR has a cluster with the image up. A failure is noted with what failed tests said.
ready() {
	if ! e2e_cluster "$1" exec true 2>/dev/null; then
		own+=("$1")
		e2e_cluster "$1" up
	fi && e2e_cluster "$1" image ../bin/image/varve.tar && return
	echo "--- the cluster ${1:-of the usual directory} did not come up" >>"$said"
	return 1
}

# What the tests depend on besides their own binary. Varve is in those of package kubernetes only.
kept="" cluster="" varve=""
if [ -z "${RUN:-}" ] && [ "$VARVE_E2E_KILLS" != all ] && git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
	kept=${CACHE:?names the directory of built tools}/cluster-tests
	mkdir -p "$kept"
	find "$kept" -type f -mtime +7 -delete
	inputs() { (cd .. && scripts/test-inputs.sh "$@" ':!*_test.go') || exit 1; }
	cluster=$(inputs e2e/e2e.mk e2e/go.mod e2e/go.sum e2e/cluster e2e/csidriver e2e/framework e2e/csi) || exit
	varve=$(inputs e2e deploy docs README.md && sha256sum <../bin/image/varve && date -u +%F && env | grep ^VARVE_E2E_ | sort) || exit
fi
# result PACKAGE ARGUMENTS... prints the file in which the output of these tests is, if they passed.
result() {
	local package=$1 on=$cluster
	[[ $package != */kubernetes ]] || on="$cluster $varve"
	[ -z "$kept" ] || echo "$kept/$({ echo "$on" "$@" && sha256sum <"$built/${package//\//+}"; } | sha256sum | cut -c1-32)"
}

# matching PATTERN prints the packages that match, or those that do not match !PATTERN, with their directories.
matching() {
	local package dir unlike=0
	[ "$1" = "${1#!}" ] || unlike=1
	while read -r package dir; do
		[[ $package =~ ${1#!} ]]
		[ $? -ne $unlike ] || echo "$package $dir"
	done <"$built/packages"
}
# known PATTERN ARGUMENTS... reports whether all results are known.
known() {
	local pattern=$1 package passed
	shift
	while read -r package _; do
		passed=$(result "$package" "$@")
		[ -n "$passed" ] && [ -e "$passed" ] || return
	done < <(matching "$pattern")
}

# each PATTERN ARGUMENTS... runs the tests of the packages that match, one after the other.
each() {
	local pattern=$1 package dir rc=0 from ran=0 passed new
	shift
	while read -r package dir <&3; do
		from=$SECONDS ran=1
		passed=$(result "$package" "$@")
		new=${passed:+$passed.$$}
		if [ -n "$passed" ] && [ -e "$passed" ]; then
			cat "$passed"
			echo "ok $package passed on $(date -r "$passed" '+%-d %B'); nothing that it depends on has changed"
		elif (cd "$dir" && "$built/${package//\//+}" -test.v -test.paniconexit0 -test.parallel 5 -test.timeout 90m "$@") | tee "${new:-/dev/null}"; then
			[ -z "$passed" ] || mv "$new" "$passed"
			echo "ok $package $((SECONDS - from)) s"
		else
			[ -z "$passed" ] || rm -f "$new"
			echo "FAIL $package $((SECONDS - from)) s"
			rc=1
		fi
	done 3< <(matching "$pattern")
	[ $ran -eq 1 ] || echo "FAIL: no package matches $pattern; make e2e-prepare builds them"
	[ $ran -eq 1 ] && return $rc
}

# tests NAME RUNDIR PATTERN ARGUMENTS... runs tests in a cluster and keeps what they say in $logs/NAME.
# They wait for the cluster more than they work: more at once than there are processors.
tests() {
	local name=$1 run=$2
	shift 2
	known "$@" || ready "$run" || return
	(in_cluster "$run" each "$@" 2>&1) | tee "$logs/$name" |
		grep --line-buffered -E '^(ok|FAIL|panic:)|^ *--- (FAIL|PASS)'
	[ "${PIPESTATUS[0]}" -eq 0 ] && return
	{
		echo "--- what failed said ($name):"
		awk -f cluster/failed.awk "$logs/$name" "$logs/$name"
	} >>"$said"
}

if [ -n "${RUN:-}" ]; then
	tests chosen "" . -test.run "$RUN"
else
	mapfile -t alone <kubernetes/alone.txt
	# any TEST... prints a regexp of tests.
	any() { (IFS='|' && echo "^($*)\$"); }
	# Short paths: that of a socket has 107 bytes at most.
	for _ in second third; do
		run=$(mktemp -d /var/tmp/e2e.XXXX) || exit
		own+=("$run")
	done
	half=$((${#alone[@]} / 2))
	# Each group ends with a file of its own: one that dies in between has not passed.
	{
		tests framework "${own[0]}" '/framework$'
		tests faults "${own[0]}" '/kubernetes$' -test.run "$(any "${alone[@]::half}")"
		touch "$logs/ended.second"
	} &
	{
		tests others "${own[1]}" '!/(kubernetes|framework)$'
		tests alone "${own[1]}" '/kubernetes$' -test.run "$(any "${alone[@]:half}")"
		touch "$logs/ended.third"
	} &
	tests together "" '/kubernetes$' -test.skip "$(any "${alone[@]}")" -test.parallel 6
	wait
	for group in second third; do
		[ -e "$logs/ended.$group" ] || echo "--- the tests in the $group cluster did not come to their end" >>"$said"
	done
fi
passed=$(cat "$logs"/* | grep -cE '^ *--- PASS')
failed=$(cat "$logs"/* | grep -cE '^ *--- FAIL')
skipped=$(cat "$logs"/* | grep -cE '^ *--- SKIP')
cat "$logs"/* | grep -A3 -E '^ *--- SKIP'
cat "$said"
echo "e2e: $passed passed, $failed failed, $skipped skipped"
[ ! -s "$said" ]
