#!/usr/bin/env bash
# All tests of the main module, then those of e2e beside real peers. The race detector
# runs where there are goroutines: everywhere but in the packages of SERIAL, whose tests
# are of one goroutine but for those named after concurrency, which get it, and in the
# tests of LARGE, which do what smaller tests that get it do, hundreds of times or with
# large disks (docs/design/test-costs.md). VARVE_RACE=all has it everywhere, and takes
# no result from go's cache.
# Prints the 40 slowest tests, those that were skipped and why, and the totals.
set -uo pipefail
: "${CACHE:?names the directory of built tools}" "${TAGS:?has the build tags}" "${GOTESTSUM:?names the gotestsum binary}"
# As root the tests get a mount namespace of their own: what they mount is not seen by kubelets and
# containers on the same machine, which hold mounts busy while they look at them. In it all checkouts have
# one name, since go's test cache compares the names of files that tests open.
if [ "$(id -u)" = 0 ] && [ -z "${TEST_APART:-}" ]; then
	mkdir -p "$CACHE/checkout"
	TEST_APART=1 exec unshare --mount --propagation slave bash -c \
		'mount --make-rshared / && mount --bind . "$CACHE/checkout" && cd "$CACHE/checkout" && exec scripts/test.sh "$@"' - "$@"
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
SERIAL='/(docs|api/v1alpha1|internal/(probe|bytesize|extsort|secret)|fusefs/diskfs(/.*)?|backup/(cbt|source)|nbdserver/(proto|nbdmetrics)|populator/(claims|metrics|mover|policies|replace|report|restores|step|storekeeper|unbound|watch))$'
CONCURRENT='Concurren|Parallel|Race'
# Without "Test", each the whole name.
LARGE='Memory|DeltaRestore|LostMetadataPack|ParentPrunedDuringBackup|RepairIndex|GarbageReusedDuringCollection|BackupDuringCollection'
LARGE+='|RestoreResumes|ResumeFindsWhatWasChangedMeanwhile|InterruptedCompareLeavesNoJournal|RefusedRestoreLeavesTarget'
LARGE+='|DeltaRefusesTargetThatIsNotTheBase|(Backup|Group|Stream|Maintenance)WithFailingStorage|RunsGoOnFromPacks|RunThatStoodStill'
LARGE+='|Frames|LostIndexBlob|LostIndexAfterMaintenance|RepairAcceptsLoss|SpotCheckIsBounded|SparseFile|SparseBlocks'
LARGE+='|SpotCheckDecodesAnIndexOnce|FilesAsTheKernelShowsThem'
# Packages whose tests take longest.
LONG='/(backup|cmd/varve|fusefs|backup/disks?|nbdserver|populator/hold)$'

# run NAME INPUTS ARGUMENTS... runs "go test" and keeps what it says in $out/NAME.json.
run() {
	local name=$1 inputs=$2
	shift 2
	"$GOTESTSUM" --format pkgname --format-hide-empty-pkg --hide-summary=skipped --jsonfile "$out/$name.json" -- \
		-exec "$cpu inputs-$inputs" "$@" && return
	touch "$out/failed"
}
# run_in DIRECTORY NAME INPUTS ARGUMENTS... does so for another module.
run_in() { (cd "$1" && run "${@:2}") || touch "$out/failed"; }
export TEST_CPU=$out/cpu
: >"$TEST_CPU"

# What did not change is not tested again: go takes results from its cache, for which nothing may differ between two
# runs that is the same in truth. So what tests are given by name is named after its content, and lies where the next
# checkout finds it.
kept=$CACHE/tests
mkdir -p "$kept"
find "$kept" -mindepth 1 -maxdepth 1 -mtime +7 -exec rm -r {} +
# keep FILE moves a file to a place named after its content, and prints it.
keep() {
	local sum
	sum=$(sha256sum "$1" | cut -c1-32)
	mkdir -p "$kept/$sum"
	touch "$kept/$sum"
	mv -f "$1" "$kept/$sum/"
	echo "$kept/$sum/${1##*/}"
}
cp scripts/test-cpu.sh "$out/"
cpu=$(keep "$out/test-cpu.sh") || exit 1
again=() here="" peers="" chart=""
if [ "${VARVE_RACE:-}" = all ] || ! git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
	again=(-count=1) # other seeds, other schedules
else
	scripts/test-dates.sh || exit 1
	# Go looks at files that tests open, but not at those that they give to programs, nor at any
	# outside of the module: e2e and e2e/chart are modules of their own.
	here=$(scripts/test-inputs.sh '*/testdata/*') && peers=$(scripts/test-inputs.sh '*/testdata/*' e2e scripts ':!*.go') &&
		chart=$(scripts/test-inputs.sh deploy e2e/chart ':!*.go') || exit 1
fi

# One varve for all tests that run the program. That of VARVE_QUICK derives the keys of new
# repositories at once: it serves tests that run hundreds of short commands and no stock Kopia, which
# could not open them. The derivation is two thirds of such a command's time.
CGO_ENABLED=0 go build -buildvcs=false -o "$out/varve" ./cmd/varve || exit 1
CGO_ENABLED=0 go build -buildvcs=false -tags "$TAGS,testing" -o "$out/varve-quick" ./cmd/varve || exit 1
VARVE=$(keep "$out/varve") && VARVE_QUICK=$(keep "$out/varve-quick") || exit 1
export VARVE VARVE_QUICK

# The tag "testing" is Kopia's own: repositories that tests make derive their key from the
# password at once, which otherwise takes seconds each under the race detector. Lint has
# run vet with all of its checks.
common=(-vet=off -tags "$TAGS,testing" -timeout 40m)
mapfile -t serial < <(go list ./... | grep -E "$SERIAL")
# Those that take longest begin first.
mapfile -t others < <(go list ./... | grep -vE "$SERIAL" | awk -v long="$LONG" '{ print ($0 ~ long ? 0 : 1), $0 }' | sort -s -n -k1,1 | cut -d' ' -f2)
# having PATTERN PACKAGE... prints the packages that have a test of this name.
having() {
	local pattern=$1 package dir
	shift
	go list -f '{{.ImportPath}} {{.Dir}}' "$@" |
		while read -r package dir; do ! grep -qsE "^func $pattern" "$dir"/*_test.go || echo "$package"; done
}
# The kernel's client, in a virtual machine, has a target of its own: make e2e-nbd.
peers() {
	export CGO_ENABLED=0
	run_in e2e peers "$peers" "${again[@]}" -p 2 -timeout 40m -skip '^TestKernel' ./kopia/... ./faults/... ./nbd/... ./bench/...
	run_in e2e/chart chart "$chart" "${again[@]}" ./...
}

# Tests wait for disks and processes as well: more packages at once than processors. The race
# detector's tests are half of all, and the others run beside them.
if [ "${VARVE_RACE:-}" = all ]; then
	run all "$here" "${again[@]}" -race -p 3 "${common[@]}" ./...
	peers
else
	# Of the model's steps only some: most of them follow below.
	VARVE_MODEL_STEPS=${VARVE_MODEL_STEPS:-300} run concurrent "$here" "${again[@]}" -race -p 3 "${common[@]}" -skip "^Test($LARGE)\$" "${others[@]}" &
	# Beside stock Kopia tests wait for whole minutes: they begin while there is work for the processors.
	(peers)
	# Without C, as varve itself, whose libraries are compiled already.
	CGO_ENABLED=0 run serial "$here" "${again[@]}" -p 2 "${common[@]}" "${serial[@]}"
	mapfile -t large < <(having "Test($LARGE)[(]" "${others[@]}")
	CGO_ENABLED=0 run unraced "$here" "${again[@]}" -p 2 "${common[@]}" -run "^Test($LARGE|Model)\$" "${large[@]}"
	mapfile -t tested < <(having "Test.*($CONCURRENT)" "${serial[@]}")
	run readers "$here" "${again[@]}" -race -p 2 "${common[@]}" -run "$CONCURRENT" "${tested[@]}"
	wait
fi
cat "$out"/*.json >"$out/all"
[ -z "${VARVE_TEST_JSON:-}" ] || cp "$out/all" "$VARVE_TEST_JSON"
scripts/test-report.sh "$out/all"
echo "--- processor time of the packages that took most, in seconds:"
sort -rn "$TEST_CPU" | sed "s#$PWD/##" | head -n 15
[ ! -e "$out/failed" ]
