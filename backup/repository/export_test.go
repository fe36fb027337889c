package repository

// WriteObjects makes a writer store blocks through Kopia's object writer; it reports
// whether that is a change.
func (w *Writer) WriteObjects() bool {
	direct := w.contents != nil
	w.contents = nil
	return direct
}
