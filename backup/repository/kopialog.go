package repository

import (
	"context"
	"log/slog"

	"github.com/kopia/kopia/repo/logging"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// kopiaLog passes Kopia's log to log, always at debug level: what matters is returned as
// an error.
func kopiaLog(log *slog.Logger) logging.LoggerFactory {
	if log == nil {
		return nil
	}
	return func(module string) logging.Logger {
		return zap.New(&slogCore{log: log.With("kopia", module)}).Sugar()
	}
}

// slogCore is a zapcore.Core over slog.
type slogCore struct{ log *slog.Logger }

var _ zapcore.Core = (*slogCore)(nil)

func (c *slogCore) Enabled(zapcore.Level) bool {
	return c.log.Enabled(context.Background(), slog.LevelDebug)
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: c.log.With(slogArgs(fields)...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.log.Debug(e.Message, append(slogArgs(fields), "severity", e.Level.String())...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func slogArgs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	args := make([]any, 0, 2*len(fields))
	for _, f := range fields {
		f.AddTo(enc)
	}
	for k, v := range enc.Fields {
		args = append(args, k, v)
	}
	return args
}
