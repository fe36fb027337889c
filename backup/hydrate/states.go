package hydrate

import "sync/atomic"

// state says where a unit's bytes are.
type state uint32

const (
	absent     state = iota // in the image only
	unverified              // in data, written by an earlier process
	present                 // in data
	isZero                  // only zeroes; takes no space
)

// states holds the state of each unit, two bits each.
type states []atomic.Uint32

func newStates(units int64) states { return make(states, (units+15)/16) }

func (s states) get(u int64) state { return state(s[u/16].Load() >> (u % 16 * 2) & 3) }

// swap changes a unit's state if it is as expected.
func (s states) swap(u int64, from, to state) bool {
	word, shift := &s[u/16], u%16*2
	for {
		old := word.Load()
		if state(old>>shift&3) != from {
			return false
		}
		if word.CompareAndSwap(old, old&^(3<<shift)|uint32(to)<<shift) {
			return true
		}
	}
}
