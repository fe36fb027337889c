package csi

import "github.com/varve-io/varve/backup/cbt"

// VerdictReasons are the reasons that status codes turn into.
func VerdictReasons() []cbt.Reason {
	var all []cbt.Reason

	for _, v := range verdicts {
		if v.reason != "" {
			all = append(all, v.reason)
		}
	}
	return all
}
