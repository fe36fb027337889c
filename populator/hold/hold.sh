# The program that holds an application still in its pod, from before the cut of a snapshot until
# after it. POSIX sh with sleep; it is run with dash and BusyBox in hold's tests.
#
# Set before it: nonce, limit and silence (seconds), and either freeze, thaw and check, which
# are commands, or session, a command that reads statements from its standard input, with the
# statements begin, prove (in which %s is the challenge) and end. If again is set, it only thaws, once, what
# another program began; status is then that of the freeze command, if it failed. The freezer then runs
# the thaw command, and a watcher, in the keeper's place, kills it when the client is gone.
#
#   top -+- left -+- relay    lines of the client, from fd 4       \
#        |        +- ticker   a line each second                    > pipe > keeper [> session]
#        |        `- freezer  the freeze command, and how it ended /
#        +- keeper   decides by these lines, and thaws
#        `- around   waits for the session, which holds locks that end with it
#
# Any one process may be killed. If top is, the keeper notices at the next tick; if the keeper is,
# top notices and thaws. Without the relay the keeper reads nothing and thaws; without the ticker
# it reads the clock at each line of the client. Lines for the client begin with the nonce; all
# others are output of the commands.
# The program's standard error stays open, as fd 9: containerd ends the standard input of an exec
# as soon as one of its outputs is closed.
#
# The container's first process may be PostgreSQL, which inherits processes whose parents ended. It
# treats one that ends by a signal, or with a status above 1, as a crash, and ends all sessions.
# So a process that is killed here has a parent that waits for it; one that may be orphaned ends with 0.
exec 3>&1 4<&0 </dev/null
trap '' HUP INT TERM PIPE
me=$$
say() { printf '%s %s\n' "$nonce" "$*" >&3; } 2>/dev/null

# stat sets state, parent and born of top, from proc(5).
stat() {
	line=
	IFS= read -r line 2>/dev/null <"/proc/$me/stat" || return 1
	set -f
	# shellcheck disable=SC2086 # split on purpose
	set -- ${line##*) }
	set +f
	state=$1 parent=$2 born=${20:-}
}

# alive checks that top runs, with the same parent as before.
alive() {
	if [ -z "$born0" ]; then
		kill -0 "$me" 2>/dev/null
	else
		stat && [ "$state" != Z ] && [ "$state" != X ] && [ "$parent" = "$parent0" ] && [ "$born" = "$born0" ]
	fi
}
born= parent= state=
stat || :
born0=$born parent0=$parent

# now sets clock, in seconds.
ticks=0
now() {
	if IFS=' ' read -r clock rest 2>/dev/null </proc/uptime; then clock=${clock%%.*}; else clock=$ticks; fi
}

# run runs a command without the files of the program, and sets out to its output.
run() {
	out=$(
		trap - HUP INT TERM PIPE
		exec </dev/null 2>&1 3>&- 4<&- 5>&- 9>&-
		exec sh -c "$1"
	)
}

relay() {
	while IFS= read -r line <&4; do
		printf 'c %s\n' "$line" || exit
	done
	printf 'e\n'
} 2>/dev/null 3>&- 9>&-

ticker() {
	while sleep 1; do printf 't\n' || exit; done
} 2>/dev/null 3>&- 4<&- 9>&-

# freezer freezes. If it cannot report that, it thaws: no other process will.
freezer() {
	exec 5>&1
	out=$(
		trap - HUP INT TERM PIPE
		exec 2>&1 3>&- 4<&- 9>&-
		# shellcheck disable=SC2016 # the inner shell's
		body='printf "p %s\n" "$$" >&5 || exit 126; exec 5>&-; exec sh -c "$0"'
		if command -v setsid >/dev/null 2>&1; then exec setsid sh -c "$body" "$freeze"; fi
		exec sh -c "$body" "$freeze"
	)
	rc=$?
	[ -z "$out" ] || printf '%.2000s\n' "$out" >&3
	printf 'f %s\n' "$rc" || [ -n "$again" ] || undo
} 2>/dev/null

# undo thaws. Perhaps nothing is frozen.
undo() {
	try=1
	until run "$thaw"; do
		[ "$try" -lt 5 ] || return 1
		try=$((try + 1))
		sleep 1
	done
}

# end9 kills a process group, or the process.
end9() { [ -z "$1" ] || kill -9 "-$1" || kill -9 "$1"; } 2>/dev/null

keeper() {
	frozen='' why='' pids='' fpid=''
	now
	began=$clock heard=$clock
	if [ -n "$session" ]; then
		printf '%s\n' "$begin" || why=session
		frozen=yes
	fi
	while [ -z "$why" ]; do
		IFS= read -r event || { why=left; break; }
		[ "$event" != t ] || ticks=$((ticks + 1))
		now
		case $event in
		t) alive || why=orphan ;;
		e) why=eof ;;
		'k '*) pids=${event#k } ;;
		'p '*) fpid=${event#p } ;;
		'f 0')
			frozen=yes
			say ready
			;;
		'f '*)
			frozen=yes why=freeze
			export freeze_failed="${event#f }" # for the thaw command
			say "failed the freeze command ended with status ${event#f }"
			;;
		'c beat')
			heard=$clock
			[ -z "$session" ] || printf '\n' || why=session
			;;
		'c prove '*)
			heard=$clock
			challenge=${event#c prove }
			case $challenge in
			'' | *[!0-9a-f]*) ;;
			*)
				if [ -n "$session" ]; then
					# shellcheck disable=SC2059 # it is one
					printf "$prove\\n" "$challenge" || why=session
				elif [ -n "$frozen" ]; then
					proof "$challenge" &
				fi
				;;
			esac
			;;
		'c thaw') why=asked ;;
		esac
		[ -n "$why" ] || [ $((clock - began)) -lt "$limit" ] || why=limit
		[ -n "$why" ] || [ $((clock - heard)) -lt "$silence" ] || why=silence
	done
	say "thawing $why"
	if [ -n "$session" ]; then
		[ "$why" = session ] || printf '%s\n' "$end"
		exec >&- 3>&- # the session reads its end
		# shellcheck disable=SC2086 # two
		[ -z "$pids" ] || kill -9 $pids
		case $why in
		asked | orphan) ;;
		*)
			# It may wait for a lock and read nothing.
			sleep 5
			if alive; then kill -TERM "$me"; fi
			;;
		esac
		exit 0
	fi
	[ -n "$frozen" ] || end9 "$fpid"
	code=0
	if undo; then say "thawed $why"; else
		code=4
		printf '%.2000s\n' "$out" >&3
		say "stuck the thaw command failed"
	fi
	# shellcheck disable=SC2086 # two
	[ -z "$pids" ] || kill -9 $pids
	[ -n "$frozen" ] || code=3
	alive || code=0
	exit "$code"
} 2>/dev/null

# watcher waits for the thaw of what another program began. It kills that when the client is gone, which
# may begin it again: a late thaw would end what another hold has frozen.
watcher() {
	pids='' fpid='' over='' code=4
	now
	heard=$clock
	while [ -z "$over" ] || [ -z "$fpid" ]; do # the freezer's process is known at once
		IFS= read -r event || break
		[ "$event" != t ] || ticks=$((ticks + 1))
		now
		case $event in
		t) alive || over=yes ;;
		e) over=yes ;;
		'c '*) heard=$clock ;;
		'k '*) pids=${event#k } ;;
		'p '*) fpid=${event#p } ;;
		'f 0')
			say "thawed again"
			code=0
			break
			;;
		'f '*)
			say "stuck the thaw command failed"
			break
			;;
		esac
		[ $((clock - heard)) -lt "$silence" ] || over=yes
	done
	[ -z "$over" ] || end9 "$fpid"
	# shellcheck disable=SC2086 # two
	[ -z "$pids" ] || kill -9 $pids
	alive || code=0
	exit "$code"
} 2>/dev/null

# proof reports how the check ended.
proof() {
	if [ -z "$check" ] || run "$check"; then say "held $1"; else
		printf '%.2000s\n' "$out" >&3
		say "lost the check command failed"
	fi
}

# left waits for its processes. The ticker ends after the keeper.
left() {
	relay &
	relayed=$!
	ticker &
	ticked=$!
	printf 'k %s %s\n' "$relayed" "$ticked"
	[ -n "$session" ] || freezer
	wait "$ticked"
	kill -9 "$relayed"
	wait
	exit 0
} 2>/dev/null

# around runs the session, and kills it at SIGTERM.
around() {
	trap - HUP INT TERM PIPE
	exec 1>&3 2>&3 3>&- 4<&- 9>&- 5<&0 </dev/null
	sh -c "$session" <&5 5<&- &
	inner=$!
	exec 5<&-
	trap 'kill -9 "$inner"' TERM
	trap '' HUP INT PIPE
	wait "$inner"
	code=$?
	[ "$code" -le 128 ] || { wait "$inner"; code=$?; }
	alive || code=0
	exit "$code"
}

command -v sleep >/dev/null 2>&1 || {
	say "failed there is no sleep command in the container"
	exit 127
}
if [ -n "$again" ]; then
	[ -z "$status" ] || export freeze_failed="$status" # for the thaw command
	freeze=$thaw
	left | watcher 4<&- &
	last=$!
	exec 4<&-
	wait "$last"
	code=$?
	wait
	exit "$code"
fi
if [ -n "$session" ]; then
	left | keeper 4<&- | around &
	last=$!
	exec 4<&-
	trap 'kill -TERM "$last"' TERM
	wait "$last"
	code=$?
	[ "$code" -le 128 ] || { wait "$last"; code=$?; }
	say "ended $code"
	exit "$code"
fi
say freezing
left | keeper 4<&- &
last=$!
exec 4<&-
wait "$last"
code=$?
wait
case $code in 0 | 4) ;; *)
	# The keeper was killed, or ended before the freeze command.
	if undo; then say "thawed keeper $code"; else say "stuck the thaw command failed"; fi
	;;
esac
exit "$code"
