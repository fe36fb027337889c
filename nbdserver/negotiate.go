package nbdserver

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/varve-io/varve/nbdserver/proto"
)

const (
	// maxOptionData is the longest option read into memory; longer ones are
	// skipped and refused.
	maxOptionData = 256 << 10
	// maxOptionSkip is the longest option skipped to stay in step; a longer
	// one ends the connection.
	maxOptionSkip = 32 << 20
	// maxOptions bounds the options of one negotiation. A client that asks about each of many
	// exports needs one or two for each.
	maxOptions = 1 << 20
)

// negotiator is the handshake of one connection.
type negotiator struct {
	*conn
	bw    *bufio.Writer
	fixed bool
	opt   proto.Option
}

// negotiate runs the handshake until transmission begins (nil) or the
// connection is to be closed (an error).
func (c *conn) negotiate() error {
	n := &negotiator{conn: c, bw: bufio.NewWriterSize(c.nc, 8<<10)}
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[0:], proto.MagicInit)
	binary.BigEndian.PutUint64(hello[8:], proto.MagicOption)
	binary.BigEndian.PutUint16(hello[16:], proto.FlagFixedNewstyle|proto.FlagNoZeroes)
	if _, err := n.nc.Write(hello[:]); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(n.br, flags[:]); err != nil {
		return err
	}
	f := binary.BigEndian.Uint32(flags[:])
	if f&^(proto.FlagCFixedNewstyle|proto.FlagCNoZeroes) != 0 {
		return fmt.Errorf("client sent unknown handshake flags %#x", f)
	}
	n.fixed = f&proto.FlagCFixedNewstyle != 0
	n.noZeroes = f&proto.FlagCNoZeroes != 0
	for range maxOptions {
		ready, err := n.option()
		if err != nil {
			_ = n.bw.Flush()
			return err
		}
		if err := n.bw.Flush(); err != nil {
			return err
		}
		if ready {
			return nil
		}
	}
	return errors.New("client negotiates without end")
}

// option reads and answers one option; true starts transmission.
func (n *negotiator) option() (bool, error) {
	var h [proto.OptionHeaderSize]byte
	if _, err := io.ReadFull(n.br, h[:]); err != nil {
		return false, err
	}
	if m := binary.BigEndian.Uint64(h[0:]); m != proto.MagicOption {
		return false, fmt.Errorf("client sent option magic %#x", m)
	}
	n.opt = proto.Option(binary.BigEndian.Uint32(h[8:]))
	length := binary.BigEndian.Uint32(h[12:])

	if n.opt == proto.OptExportName {
		return n.exportName(length)
	}
	if !n.fixed {
		return false, errors.New("client uses options without fixed newstyle")
	}
	if length > maxOptionData {
		if length > maxOptionSkip {
			return false, fmt.Errorf("client sent an option of %d bytes", length)
		}
		if err := n.skip(length); err != nil {
			return false, err
		}
		return false, n.refuse(n.orTLS(proto.RepErrTooBig), "option too long")
	}
	switch n.opt {
	case proto.OptInfo, proto.OptGo, proto.OptListMetaContext, proto.OptSetMetaContext:
		// Grows with what arrives, not with what the client claims.
		var data bytes.Buffer
		if _, err := io.CopyN(&data, n.br, int64(length)); err != nil {
			return false, err
		}
		return n.dataOption(data.Bytes())
	}
	if err := n.skip(length); err != nil {
		return false, err
	}
	return n.plainOption(length)
}

func (n *negotiator) skip(length uint32) error {
	_, err := io.CopyN(io.Discard, n.br, int64(length))
	return err
}

// needsTLS reports whether the client must start TLS before anything else.
func (n *negotiator) needsTLS() bool {
	return n.srv.cfg.TLS != nil && !n.client.TLS && !(n.srv.cfg.PlainLocal && n.local)
}

// orTLS hides a reply from a client that must start TLS first.
func (n *negotiator) orTLS(r proto.Reply) proto.Reply {
	if n.needsTLS() {
		return proto.RepErrTLSRequired
	}
	return r
}

// plainOption answers options without data; length is the length of the data that came.
func (n *negotiator) plainOption(length uint32) (bool, error) {
	if n.opt == proto.OptAbort {
		if err := n.reply(proto.RepAck, nil); err != nil {
			return false, err
		}
		return false, errDone
	}
	if n.closing.Load() {
		return false, n.refuse(proto.RepErrShutdown, "server is shutting down")
	}
	if n.opt == proto.OptStartTLS {
		return false, n.optStartTLS(length)
	}
	if n.needsTLS() {
		return false, n.refuse(proto.RepErrTLSRequired, "use TLS")
	}
	switch n.opt {
	case proto.OptList, proto.OptStructuredReply, proto.OptExtendedHeaders:
		if length != 0 {
			return false, n.refuse(proto.RepErrInvalid, "option takes no data")
		}
	}
	switch n.opt {
	case proto.OptList:
		return false, n.list()
	case proto.OptStructuredReply:
		if n.style == styleExtended {
			return false, n.refuse(proto.RepErrExtHeaderReqd, "extended headers are in use already")
		}
		n.style = styleStructured
		return false, n.reply(proto.RepAck, nil)
	case proto.OptExtendedHeaders:
		n.style = styleExtended
		return false, n.reply(proto.RepAck, nil)
	}
	return false, n.refuse(proto.RepErrUnsup, "unknown option")
}

func (n *negotiator) optStartTLS(length uint32) error {
	switch {
	case length != 0:
		return n.refuse(proto.RepErrInvalid, "STARTTLS takes no data")
	case n.client.TLS:
		return n.refuse(proto.RepErrInvalid, "TLS is in use already")
	case n.srv.cfg.TLS == nil:
		return n.refuse(proto.RepErrPolicy, "this server has no TLS certificate")
	}
	if err := n.reply(proto.RepAck, nil); err != nil {
		return err
	}
	if err := n.bw.Flush(); err != nil {
		return err
	}
	if err := n.startTLS(); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	n.bw.Reset(n.nc)
	return nil
}

// list answers OPT_LIST, streaming: the catalogue may be long.
func (n *negotiator) list() error {
	var werr error
	var buf []byte
	err := n.srv.cfg.Catalog.List(n.ctx, n.client, func(l Listing) bool {
		if len(l.Name) > proto.MaxString {
			return true // no client could ask for it
		}
		buf = binary.BigEndian.AppendUint32(buf[:0], uint32(len(l.Name)))
		buf = append(buf, l.Name...)
		buf = append(buf, cutString(l.Description)...)
		werr = n.reply(proto.RepServer, buf)
		return werr == nil
	})
	if werr != nil {
		return werr
	}
	if err != nil {
		n.log.Warn("cannot list exports", "err", err)
		return n.refuse(proto.RepErrPlatform, "cannot list the exports: "+err.Error())
	}
	return n.reply(proto.RepAck, nil)
}

// exportName answers OPT_EXPORT_NAME, which can be refused only by closing.
func (n *negotiator) exportName(length uint32) (bool, error) {
	if length > proto.MaxString {
		return false, fmt.Errorf("client asks for an export name of %d bytes", length)
	}
	name := make([]byte, length)
	if _, err := io.ReadFull(n.br, name); err != nil {
		return false, err
	}
	switch {
	case n.needsTLS():
		return false, errors.New("client must use TLS")
	case n.style == styleExtended:
		return false, errors.New("client used EXPORT_NAME after extended headers")
	case n.closing.Load():
		return false, errDone
	}
	o, err := n.use(string(name))
	if err == nil {
		err = n.stay(o, string(name))
	}
	if err != nil {
		return false, fmt.Errorf("open export %q: %w", name, err)
	}
	reply := make([]byte, 10+124)
	binary.BigEndian.PutUint64(reply, uint64(o.Size()))
	binary.BigEndian.PutUint16(reply[8:], uint16(n.transmissionFlags(o, string(name))))
	if n.noZeroes {
		reply = reply[:10]
	}
	n.enter(o, string(name))
	_, err = n.bw.Write(reply)
	return err == nil, err
}

// dataOption answers options whose data begins with an export name.
func (n *negotiator) dataOption(data []byte) (bool, error) {
	if n.opt == proto.OptSetMetaContext {
		n.contexts, n.contextsFor = nil, "" // also if it fails
	}
	switch {
	case n.closing.Load():
		return false, n.refuse(proto.RepErrShutdown, "server is shutting down")
	case n.needsTLS():
		return false, n.refuse(proto.RepErrTLSRequired, "use TLS")
	}
	name, rest, ok := cutLengthString(data)
	if !ok {
		return false, n.refuse(proto.RepErrInvalid, "export name is longer than the option or than 4096 bytes")
	}
	if n.opt == proto.OptListMetaContext || n.opt == proto.OptSetMetaContext {
		return false, n.metaContext(name, rest)
	}
	return n.info(name, rest)
}

// info answers OPT_INFO and OPT_GO.
func (n *negotiator) info(name string, rest []byte) (bool, error) {
	if len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return false, n.refuse(proto.RepErrInvalid, "list of information requests does not fit the option")
	}
	o, err := n.use(name)
	if err == nil && n.opt == proto.OptGo {
		err = n.stay(o, name)
	}
	if err != nil {
		return false, n.refuseOpen(name, err)
	}
	info := make([]byte, 0, 64)
	info = binary.BigEndian.AppendUint16(info, proto.InfoExport)
	info = binary.BigEndian.AppendUint64(info, uint64(o.Size()))
	info = binary.BigEndian.AppendUint16(info, uint16(n.transmissionFlags(o, name)))
	if err := n.reply(proto.RepInfo, info); err != nil {
		return false, err
	}
	var sent uint64 // each type is sent once
	for req := rest[2:]; len(req) > 0; req = req[2:] {
		t := binary.BigEndian.Uint16(req)
		if t == proto.InfoExport || t > 63 || sent&(1<<t) != 0 {
			continue
		}
		sent |= 1 << t
		info = binary.BigEndian.AppendUint16(info[:0], t)
		switch t {
		case proto.InfoName:
			info = append(info, cutString(o.Name)...)
		case proto.InfoDescription:
			if o.Description == "" {
				continue
			}
			info = append(info, cutString(o.Description)...)
		case proto.InfoBlockSize:
			lo, pref := blockSizes(o)
			info = binary.BigEndian.AppendUint32(info, lo)
			info = binary.BigEndian.AppendUint32(info, pref)
			info = binary.BigEndian.AppendUint32(info, proto.MaxPayload)
		default:
			continue
		}
		if err := n.reply(proto.RepInfo, info); err != nil {
			return false, err
		}
	}
	if n.opt == proto.OptGo {
		n.enter(o, name)
	}
	return n.opt == proto.OptGo, n.reply(proto.RepAck, nil)
}

// blockSizes returns the minimum and preferred block size in the protocol's limits: powers of
// two, at most 64 KiB and at least 512 respectively.
func blockSizes(o *Opened) (lo, pref uint32) {
	lo, pref = o.MinimumBlock, o.PreferredBlock
	if lo == 0 || lo&(lo-1) != 0 || lo > 1<<16 || o.Size()%int64(lo) != 0 {
		lo = 1
	}
	if pref < 512 || pref < lo || pref&(pref-1) != 0 || pref > proto.MaxPayload {
		pref = max(4096, lo)
	}
	return lo, pref
}

// transmissionFlags returns what the export can do for this client.
func (n *negotiator) transmissionFlags(o *Opened, name string) proto.TransmissionFlags {
	f := proto.FlagHasFlags | proto.FlagSendCache
	// The Linux kernel, which has simple replies only, resends unanswered requests of a lost
	// connection on any other: for a writable export it gets just one, so that the server
	// knows which connection the next one replaces.
	if o.writer() == nil || n.style != styleSimple {
		f |= proto.FlagCanMultiConn
	}
	if o.writer() == nil {
		f |= proto.FlagReadOnly
	} else {
		f |= proto.FlagSendFlush | proto.FlagSendFUA | proto.FlagSendTrim |
			proto.FlagSendWriteZeroes | proto.FlagSendFastZero
	}
	if n.style != styleSimple {
		f |= proto.FlagSendDF
	}
	if n.style == styleExtended && len(n.contexts) > 0 && n.contextsFor == name {
		f |= proto.FlagBlockStatusPayload
	}
	return f
}

// stay opens what a client that stays with an export needs.
func (n *negotiator) stay(o *Opened, name string) error {
	var contexts []string
	if n.contextsFor == name && n.style != styleSimple {
		for _, s := range n.contexts {
			contexts = append(contexts, s.name)
		}
	}
	return n.excused(func() error {
		if err := o.begin(n.ctx, contexts); err != nil {
			return err
		}
		n.join()
		return n.succeed(o)
	})
}

// enter prepares transmission.
func (n *negotiator) enter(o *Opened, name string) {
	if n.contextsFor != name || n.style == styleSimple {
		n.contexts = nil
	}
	n.flags = n.transmissionFlags(o, name)
	n.size = o.Size()
	n.writer = o.writer()
	n.lender, _ = o.Export.(Lender)
	n.stat, _ = o.Export.(Statuser)
	n.log = n.log.With("export", o.Name)
	if n.size%512 != 0 {
		n.log.Warn("export size is no multiple of 512: a Linux kernel client loses the tail", "size", n.size)
	}
}

// refuseOpen answers a name that could not be opened.
func (n *negotiator) refuseOpen(name string, err error) error {
	if errors.Is(err, ErrUnknownExport) {
		return n.refuse(proto.RepErrUnknown, "no such export: "+name)
	}
	n.log.Warn("cannot open export", "export", name, "err", err)
	return n.refuse(proto.RepErrPlatform, "cannot open "+name+": "+err.Error())
}

// reply sends one answer to the current option.
func (n *negotiator) reply(r proto.Reply, data []byte) error {
	var h [proto.OptionReplyHeaderSize]byte
	binary.BigEndian.PutUint64(h[0:], proto.MagicOptionReply)
	binary.BigEndian.PutUint32(h[8:], uint32(n.opt))
	binary.BigEndian.PutUint32(h[12:], uint32(r))
	binary.BigEndian.PutUint32(h[16:], uint32(len(data)))
	if _, err := n.bw.Write(h[:]); err != nil {
		return err
	}
	_, err := n.bw.Write(data)
	return err
}

func (n *negotiator) refuse(r proto.Reply, text string) error {
	return n.reply(r, []byte(cutString(text)))
}

// cutLengthString reads a 32-bit length and that many bytes from data.
func cutLengthString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	l := binary.BigEndian.Uint32(data)
	if l > proto.MaxString || int(l) > len(data)-4 {
		return "", nil, false
	}
	return string(data[4 : 4+l]), data[4+l:], true
}

// cutString makes text fit the protocol: valid UTF-8, no NUL, at most 4096
// bytes.
func cutString(s string) string {
	if len(s) > proto.MaxString {
		s = s[:proto.MaxString]
		for len(s) > 0 && !utf8.ValidString(s[max(0, len(s)-4):]) && !utf8.RuneStart(s[len(s)-1]) {
			s = s[:len(s)-1]
		}
	}
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "")
}
