package disks

import "time"

// SetLate ends quick looks when late receives.
func (s *Disks) SetLate(late <-chan time.Time) { s.late = func() <-chan time.Time { return late } }

// Age moves the last use far into the past.
func (d *Disk) Age() { d.used.Store(time.Now().Add(-2 * IdleTime).UnixNano()) }

// Open returns the number of open disks.
func (s *Disks) Open() (n int) {
	s.each(func(*Disk) { n++ })
	return n
}
