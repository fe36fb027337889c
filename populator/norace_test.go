//go:build !race

package populator_test

const raceDetector = false
