package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	lp "vacate/lab/loadproto"
)

// otherArg is the first argument of another process; its number of pages, the
// number of its first page and the seed follow.
const otherArg = "other"

// otherTick is how often another process wakes for nothing, as idle programs
// do: their runtimes have timers.
const otherTick = 4 * time.Second

// What another process is told on its standard input, a line each. It answers
// a number of pages to grow by with "ready", checkWord with its check's lines.
const checkWord = "check"

// otherProcess is the parent's end of another process.
type otherProcess struct {
	pages int
	in    io.Writer
	out   *bufio.Reader
}

func startOther(seed uint64, first, n int) (*otherProcess, error) {
	cmd := exec.Command("/init", otherArg, strconv.Itoa(n), strconv.Itoa(first),
		strconv.FormatUint(seed, 10))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start another process: %w", err)
	}
	return &otherProcess{n, in, bufio.NewReader(out)}, nil
}

func (o *otherProcess) size() int { return o.pages }

func (o *otherProcess) grow(n int) error {
	if _, err := fmt.Fprintln(o.in, n); err != nil {
		return fmt.Errorf("another process is gone: %w", err)
	}
	if line, err := o.out.ReadString('\n'); err != nil || line != "ready\n" {
		return fmt.Errorf("another process said %q: %v; give the guest more memory", line, err)
	}
	return nil
}

func (o *otherProcess) check(bad *badSink) (lp.SetResult, error) {
	if _, err := fmt.Fprintln(o.in, checkWord); err != nil {
		return lp.SetResult{}, fmt.Errorf("another process is gone: %w", err)
	}
	for {
		line, err := o.out.ReadSlice('\n')
		if err != nil {
			return lp.SetResult{}, fmt.Errorf("another process is gone: %w", err)
		}
		m, err := lp.Parse(line[:len(line)-1])
		if err != nil {
			return lp.SetResult{}, fmt.Errorf("another process: %w", err)
		}
		switch m := m.(type) {
		case lp.BadWord:
			if bad.pages.Load() < reportedBad {
				bad.words <- m
			}
			bad.pages.Add(1)
		case lp.SetResult:
			// Only the first bad words were sent, one each.
			if m.Bad > reportedBad {
				bad.pages.Add(m.Bad - reportedBad)
			}
			return m, nil
		default:
			return lp.SetResult{}, fmt.Errorf("another process said %T", m)
		}
	}
}

// other is the main function of another process. It returns only what it
// cannot go on with.
func other(args []string) error {
	if len(args) != 3 {
		return errors.New("want pages, the first page's number and the seed")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	first, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	seed, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return err
	}
	s, err := newStill(lp.SetOther, seed, first, n)
	if err != nil {
		return err
	}
	go func() {
		for range time.Tick(otherTick) {
		}
	}()
	ask := bufio.NewReader(os.Stdin)
	for {
		line, err := ask.ReadString('\n')
		if err != nil {
			return err
		}
		if err := s.obey(strings.TrimSpace(line)); err != nil {
			return err
		}
	}
}

func (s *still) obey(line string) error {
	if line != checkWord {
		n, err := strconv.Atoi(line)
		if err != nil || n < 0 || n > len(s.pages)-s.grown {
			return fmt.Errorf("told %q", line)
		}
		if err := s.grow(n); err != nil {
			return err
		}
		_, err = fmt.Println("ready")
		return err
	}
	bad := &badSink{words: make(chan lp.BadWord, reportedBad)}
	r, err := s.check(bad)
	if err != nil {
		return err
	}
	close(bad.words)
	var out []byte
	for w := range bad.words {
		out = lp.Append(out, w)
	}
	_, err = os.Stdout.Write(lp.Append(out, r))
	return err
}
