package hold

import (
	_ "embed"
	"fmt"
	"strings"
	"time"
)

// body is the common part of all programs.
//
//go:embed hold.sh
var body string

// endOfProgram is the line after the last of a program.
const endOfProgram = "# varve: end of the program"

// Bootstrap is the command that a container runs. It reads the program from standard input, so
// that neither the program nor the commands of a hook are in an argument list, in a request's URL
// or in an audit log. The program reads the rest of the input.
var Bootstrap = []string{"sh", "-c", `exec 9>&2 2>&1
p=
while IFS= read -r l && [ "$l" != "` + endOfProgram + `" ]; do p="$p$l
"; done
[ "$l" = "` + endOfProgram + `" ] || exit 126
eval "$p"`}

// Program holds one application still. Either Freeze or Session is set.
type Program struct {
	// Freeze, Thaw and Check are shell commands. Thaw may run twice, and after a Freeze that
	// has not ended or failed, whose status is then in freeze_failed; it fails only if the
	// application may still be frozen. Check
	// fails if the application is no longer frozen; if empty, the program only checks that it
	// was not told to thaw and has not thawed.
	Freeze, Thaw, Check string

	// Session is a shell command that reads statements and holds locks that end with it. Begin
	// acquires them, then prints Ready of the nonce as a line. Prove, in which %s is the
	// challenge, prints Held of the nonce and the challenge. After End the command exits.
	Session           string
	Begin, Prove, End string

	// Limit is how long the application may be held, from the start of the freeze.
	Limit time.Duration

	// again says that it only thaws what another process of it began. status is that of the freeze
	// command, if it failed.
	again  bool
	status string
}

// defaultSilence is how long a program waits for a line from its client before it thaws. The client
// writes one each defaultBeat.
const (
	defaultSilence = 15 * time.Second
	defaultBeat    = 3 * time.Second
)

// The words that a program prints, after its nonce and a space.
const (
	sayFreezing = "freezing" // the freeze command is about to begin
	sayReady    = "ready"    // it holds
	sayHeld     = "held"     // and held after the challenge that follows
	sayFailed   = "failed"   // to freeze, and why
	sayLost     = "lost"     // the check failed
	sayThawing  = "thawing"  // and why
	sayThawed   = "thawed"   // the command succeeded
	sayStuck    = "stuck"    // the command failed, so that the application may still be frozen
	sayEnded    = "ended"    // the session, and its exit status
	sayNote     = "note"     // a name, and a text in base64
)

// saysStatus is followed by the status of the freeze command, after sayFailed.
const saysStatus = "the freeze command ended with status "

// text returns the program as a shell reads it from standard input.
func (p Program) text(nonce string, silence time.Duration) string {
	var b strings.Builder
	set := func(name, value string) {
		fmt.Fprintf(&b, "%s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
	}
	seconds := func(d time.Duration) string { return fmt.Sprint(max(int64((d+time.Second-1)/time.Second), 1)) }
	set("nonce", nonce)
	set("limit", seconds(p.Limit))
	set("silence", seconds(silence))
	set("freeze", p.Freeze)
	set("thaw", p.Thaw)
	set("check", p.Check)
	set("session", p.Session)
	again := ""
	if p.again {
		again = "yes"
	}
	set("again", again)
	set("status", p.status)
	fill := strings.NewReplacer("@nonce@", nonce, "@limit@", seconds(p.Limit))
	set("begin", fill.Replace(p.Begin))
	set("prove", fill.Replace(p.Prove))
	set("end", fill.Replace(p.End))
	b.WriteString(body)
	b.WriteString(endOfProgram + "\n")
	return b.String()
}
