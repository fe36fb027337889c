package stream

import (
	_ "embed"
	"fmt"
	"strings"
	"time"
)

// The parts of the programs that are the same for all commands.
var (
	//go:embed dump.sh
	dumpBody string
	//go:embed feed.sh
	feedBody string
)

// endOfProgram is the line after the last of a program.
const endOfProgram = "# varve: end of the program"

// Bootstrap is the command that the application's container runs. It reads the program from standard
// input, so that the hook's command is in no argument list, no request's URL and no audit log.
var Bootstrap = []string{"sh", "-c", `p=
while IFS= read -r l && [ "$l" != "` + endOfProgram + `" ]; do p="$p$l
"; done
[ "$l" = "` + endOfProgram + `" ] || exit 126
eval "$p"`}

// times of a program and its client.
type times struct {
	// silence is how long the program hears nothing from its client before it ends the command; the
	// client writes a line each beat.
	silence, beat time.Duration
	// pace is how often the program checks whether its time is over.
	pace time.Duration
	// grace is how long an exec may take to end after the program's last line.
	grace time.Duration
}

var usual = times{silence: time.Minute, beat: 5 * time.Second, pace: 5 * time.Second, grace: 15 * time.Second}

// text is a program as a shell reads it from its standard input.
func (t times) text(body, nonce, command string, limit time.Duration) string {
	var b strings.Builder
	set := func(name, value string) {
		fmt.Fprintf(&b, "%s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
	}
	seconds := func(d time.Duration) string { return fmt.Sprint(max(int64((d+time.Second-1)/time.Second), 1)) }
	set("nonce", nonce)
	set("command", command)
	set("limit", seconds(limit))
	set("silence", seconds(t.silence))
	set("pace", seconds(t.pace))
	b.WriteString(body)
	b.WriteString(endOfProgram + "\n")
	return b.String()
}
