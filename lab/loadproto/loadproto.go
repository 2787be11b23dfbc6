// Package loadproto is what the lab's guest load and the lab on the host share. That is the content
// of checked pages, and the lines that the load writes on its serial port.
//
// # Lines
//
// A line is printable ASCII, fields separated by one space, ended by '\n'. The
// last field is '*' and the CRC-32 (IEEE, 8 hex digits) of all that precedes
// the space before it. An eviction cuts one line in two, its halves written by
// two QEMUs; the CRC tells such halves from lines. Numbers are in base 36.
//
//	ready                                  process 1 waits for its parameters (CommandBegin)
//	hello VERSION PAGES WORKERS            all sets are written, work begins
//	r SEQ CLOCK OPS BAD TOUCHES TOUCHES    ten times a second
//	clocks TSC KVMCLOCK TICKS BACK ASYNC   with each r, by the bare guest alone
//	bad SET PAGE WORD WANT GOT             a word that is not what it should be
//	set SET PAGES BAD                      answer to "check", once per set
//	final PAGES BAD                        end of that answer
//	fail TEXT...                           the load cannot go on
//
// TOUCHES is "-" or SUM,MAX,I:N,I:N...: the slow first touches of pages since
// the line before (first TOUCHES), and once more those of the line before
// (second), so that one torn line loses none. I is a bin of the histogram and
// rises, N > 0 counts its touches.
//
// Parse takes exactly what Append writes and nothing else.
package loadproto

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strconv"
	"strings"
)

// Version of the protocol, said in Hello.
const Version = 1

// MaxLine bounds the length of a line in bytes, without its newline.
const MaxLine = 8192

// Commands the host writes, each ended by a newline.
const (
	// CommandBegin gives a guest that is ready what was not known when it booted: the time, in
	// nanoseconds since 1970, 64 bits of chance, and the parameters, each after a space.
	CommandBegin = "begin"
	// CommandCheck ends the work and has every page of every set checked.
	CommandCheck = "check"
	// CommandReboot reboots the guest; its load starts anew.
	CommandReboot = "reboot"
	// CommandPowerOff has the guest power itself off.
	CommandPowerOff = "poweroff"
	// CommandPanic has the guest tell QEMU that it panicked, by QEMU's device pvpanic.
	CommandPanic = "panic"
)

// Kinds of checked memory.
const (
	SetHot   = "hot"   // rewritten by the workers all the time
	SetIdle  = "idle"  // written once by the same process
	SetOther = "other" // written once by another process
	SetCache = "cache" // page cache of a disk
	SetFile  = "file"  // a file in the root file system, which is memory
)

func knownSet(s string) bool {
	switch s {
	case SetHot, SetIdle, SetOther, SetCache, SetFile:
		return true
	}
	return false
}

// A Message is one of Ready, Hello, Report, Clocks, BadWord, SetResult, Final and Fail.
type Message interface{ appendFields([]byte) []byte }

// Ready says that process 1 waits for CommandBegin.
type Ready struct{}

// Hello says that all sets are written and the work begins.
type Hello struct {
	Version, Pages, Workers uint64
}

// Report is one regular report. Clock is the guest's monotonic clock in
// nanoseconds, Ops the pages worked on and Bad the bad pages seen since Hello.
type Report struct {
	Seq, Clock, Ops, Bad uint64
	Touches, Before      Touches
}

// Clocks is what a guest without an operating system saw of its clocks and interrupts.
type Clocks struct {
	TSC      uint64 // nanoseconds since Hello
	KVMClock uint64 // nanoseconds; 0 if it has none
	Ticks    uint64 // of its timer, on the CPU that had the fewest; 100 a second at most
	Back     uint64 // how often the TSC or KVM's clock of a CPU went back
	Async    uint64 // asynchronous page faults waited out
}

// BadWord is a word whose value is wrong.
type BadWord struct {
	Set                   string
	Page, Word, Want, Got uint64
}

// SetResult is the result of a full check of one set.
type SetResult struct {
	Set        string
	Pages, Bad uint64
}

// Final ends the answer to CommandCheck with the sums over all sets. Bad
// includes pages found bad while working.
type Final struct{ Pages, Bad uint64 }

// Fail says why the load cannot go on.
type Fail struct{ Text string }

const (
	// SlowTouch is the shortest touch, in nanoseconds, that is counted.
	SlowTouch = 200_000
	// BinRatio is the ratio of the upper to the lower bound of a bin.
	BinRatio = 1.1
	// Bins is the number of bins; the last is open-ended (from 13 minutes).
	Bins = 160
)

// Touches is a histogram of slow first touches. Bin i counts those of
// SlowTouch*BinRatio^i up to SlowTouch*BinRatio^(i+1) nanoseconds. The zero
// value is empty.
type Touches struct {
	Sum, Max uint64 // nanoseconds
	Bins     [Bins]uint32
}

// Add counts a touch of ns nanoseconds, if it is slow enough to count.
func (t *Touches) Add(ns uint64) {
	if ns < SlowTouch {
		return
	}
	i := int(math.Log(float64(ns)/SlowTouch) / math.Log(BinRatio))
	t.Bins[min(i, Bins-1)]++
	t.Sum += ns
	t.Max = max(t.Max, ns)
}

// Merge adds what o counted.
func (t *Touches) Merge(o *Touches) {
	t.Sum += o.Sum
	t.Max = max(t.Max, o.Max)
	for i, n := range o.Bins {
		t.Bins[i] += n
	}
}

// Count returns how many touches t counts.
func (t *Touches) Count() uint64 {
	var n uint64
	for _, b := range t.Bins {
		n += uint64(b)
	}
	return n
}

// Quantile returns, in nanoseconds, a bound which the fraction q (0 to 1) of
// the touches did not exceed: the upper bound of a bin, or Max if that is
// less. It is 0 if t is empty.
func (t *Touches) Quantile(q float64) uint64 {
	count := t.Count()
	if count == 0 {
		return 0
	}
	rank := max(1, uint64(math.Ceil(q*float64(count))))
	var seen uint64
	for i, b := range t.Bins {
		if seen += uint64(b); seen >= rank && i < Bins-1 {
			return min(t.Max, uint64(SlowTouch*math.Pow(BinRatio, float64(i+1))))
		}
	}
	return t.Max
}

func (t *Touches) append(b []byte) []byte {
	if *t == (Touches{}) {
		return append(b, '-')
	}
	b = strconv.AppendUint(b, t.Sum, 36)
	b = append(b, ',')
	b = strconv.AppendUint(b, t.Max, 36)
	for i, n := range t.Bins {
		if n != 0 {
			b = append(b, ',')
			b = strconv.AppendUint(b, uint64(i), 36)
			b = append(b, ':')
			b = strconv.AppendUint(b, uint64(n), 36)
		}
	}
	return b
}

func appendNumbers(b []byte, ns ...uint64) []byte {
	for _, n := range ns {
		b = append(b, ' ')
		b = strconv.AppendUint(b, n, 36)
	}
	return b
}

func (m Ready) appendFields(b []byte) []byte { return append(b, "ready"...) }

func (m Hello) appendFields(b []byte) []byte {
	return appendNumbers(append(b, "hello"...), m.Version, m.Pages, m.Workers)
}

func (m Report) appendFields(b []byte) []byte {
	b = appendNumbers(append(b, 'r'), m.Seq, m.Clock, m.Ops, m.Bad)
	b = m.Touches.append(append(b, ' '))
	return m.Before.append(append(b, ' '))
}

func (m Clocks) appendFields(b []byte) []byte {
	return appendNumbers(append(b, "clocks"...), m.TSC, m.KVMClock, m.Ticks, m.Back, m.Async)
}

func (m BadWord) appendFields(b []byte) []byte {
	b = append(append(b, "bad "...), m.Set...)
	return appendNumbers(b, m.Page, m.Word, m.Want, m.Got)
}

func (m SetResult) appendFields(b []byte) []byte {
	b = append(append(b, "set "...), m.Set...)
	return appendNumbers(b, m.Pages, m.Bad)
}

func (m Final) appendFields(b []byte) []byte {
	return appendNumbers(append(b, "final"...), m.Pages, m.Bad)
}

func (m Fail) appendFields(b []byte) []byte {
	b = append(b, "fail "...)
	for _, c := range []byte(m.Text[:min(len(m.Text), 1000)]) {
		if c < ' ' || c > '~' {
			c = '?'
		}
		b = append(b, c)
	}
	return b
}

// Append appends m as a line, newline included.
func Append(b []byte, m Message) []byte {
	start := len(b)
	b = m.appendFields(b)
	return fmt.Appendf(b, " *%08x\n", crc32.ChecksumIEEE(b[start:]))
}

var errTorn = errors.New("torn or foreign line: its checksum does not match")

// Parse reads one line, without its newline.
func Parse(line []byte) (Message, error) {
	if len(line) > MaxLine {
		return nil, fmt.Errorf("line of %d bytes: more than %d", len(line), MaxLine)
	}
	at := bytes.LastIndexByte(line, ' ')
	if at < 0 || string(line[at:]) != fmt.Sprintf(" *%08x", crc32.ChecksumIEEE(line[:at])) {
		return nil, errTorn
	}
	m, err := parseFields(string(line[:at]))
	if err != nil {
		return nil, fmt.Errorf("report line: %w", err)
	}
	if !bytes.Equal(m.appendFields(nil), line[:at]) {
		return nil, errors.New("report line: not in its one proper form")
	}
	return m, nil
}

func parseFields(s string) (Message, error) {
	kind, rest, _ := strings.Cut(s, " ")
	if kind == "fail" {
		return Fail{rest}, nil
	}
	if s == "ready" {
		return Ready{}, nil
	}
	p := fields{rest: strings.Split(rest, " ")}
	var m Message
	switch kind {
	case "hello":
		m = Hello{p.number(), p.number(), p.number()}
	case "r":
		m = Report{p.number(), p.number(), p.number(), p.number(), p.touches(), p.touches()}
	case "clocks":
		m = Clocks{p.number(), p.number(), p.number(), p.number(), p.number()}
	case "bad":
		m = BadWord{p.set(), p.number(), p.number(), p.number(), p.number()}
	case "set":
		m = SetResult{p.set(), p.number(), p.number()}
	case "final":
		m = Final{p.number(), p.number()}
	default:
		return nil, fmt.Errorf("unknown kind %.20q", kind)
	}
	if p.err == nil && len(p.rest) != 0 {
		p.err = fmt.Errorf("%d fields too many", len(p.rest))
	}
	return m, p.err
}

// fields takes fields one by one; after the first error it returns zeroes.
type fields struct {
	rest []string
	err  error
}

func (p *fields) next() string {
	if len(p.rest) == 0 {
		p.fail(errors.New("a field is missing"))
		return ""
	}
	f := p.rest[0]
	p.rest = p.rest[1:]
	return f
}

func (p *fields) fail(err error) {
	if p.err == nil {
		p.err = err
	}
}

func (p *fields) parse(s string, bits int) uint64 {
	n, err := strconv.ParseUint(s, 36, bits)
	if err != nil {
		p.fail(fmt.Errorf("number %.20q: %w", s, errors.Unwrap(err)))
		return 0
	}
	return n
}

func (p *fields) number() uint64 { return p.parse(p.next(), 64) }

func (p *fields) set() string {
	s := p.next()
	if !knownSet(s) {
		p.fail(fmt.Errorf("unknown set %.20q", s))
	}
	return s
}

func (p *fields) touches() (t Touches) {
	s := p.next()
	if s == "-" {
		return t
	}
	sum, s, _ := strings.Cut(s, ",")
	top, s, more := strings.Cut(s, ",")
	t.Sum, t.Max = p.parse(sum, 64), p.parse(top, 64)
	for more {
		var bin string
		bin, s, more = strings.Cut(s, ",")
		index, count, _ := strings.Cut(bin, ":")
		i := p.parse(index, 64)
		if i >= Bins {
			p.fail(fmt.Errorf("bin %d of %d", i, Bins))
			return Touches{}
		}
		t.Bins[i] = uint32(p.parse(count, 32))
	}
	return t
}
