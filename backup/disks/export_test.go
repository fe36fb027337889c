package disks

import (
	"context"
	"time"
)

// SetLate ends quick looks when late receives.
func (s *Disks) SetLate(late <-chan time.Time) { s.late = func() <-chan time.Time { return late } }

// Age moves the last use far into the past.
func (d *Disk) Age() { d.used.Store(time.Now().Add(-2 * IdleTime).UnixNano()) }

// Open returns the number of open disks.
func (s *Disks) Open() (n int) {
	s.each(func(*Disk) { n++ })
	return n
}

// SetAgain lets leases be tried again when again receives.
func (s *Disks) SetAgain(again <-chan time.Time) {
	s.again = func(int) <-chan time.Time { return again }
}

// ReleaseIfIdle is what ReleaseIdle does with a disk that it found idle.
func (d *Disk) ReleaseIfIdle(ctx context.Context) { d.releaseIfIdle(ctx) }
