module github.com/varve-io/varve

go 1.26

require (
	github.com/kopia/kopia v0.23.1
	github.com/spf13/cobra v1.10.2
	golang.org/x/sync v0.21.0
	golang.org/x/sys v0.47.0
)

require github.com/pojntfx/go-nbd v0.3.2 // indirect
