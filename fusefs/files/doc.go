// Package files reads files of recovery points without mounting them: it finds the file
// system that a path lies in, follows a file through the points of a volume, and
// compares two points. Package browse reads within one file system.
package files
