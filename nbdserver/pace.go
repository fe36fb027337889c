package nbdserver

import "time"

// pace is how long the server still waits for one client. Waiting uses it up, and bytes that
// move restore it, at the slowest rate that a client may have: a client that moves nothing is
// dropped after the stall timeout, and one that is slower than the rate a little later. Not
// safe for concurrent use.
type pace struct {
	left, most time.Duration
	rate       int64 // bytes a second
}

func (s *Server) newPace() pace {
	return pace{left: s.cfg.StallTimeout, most: s.cfg.StallTimeout, rate: s.cfg.MinRate}
}

// deadline returns when waiting that begins now must end.
func (p *pace) deadline(now time.Time) time.Time { return now.Add(max(p.left, 0)) }

// moved records that n bytes moved after some waiting.
func (p *pace) moved(n int, waited time.Duration) {
	earned := time.Duration(float64(n) / float64(p.rate) * float64(time.Second))
	p.left = min(p.left-waited+earned, p.most)
}
