package churn

import (
	"bytes"
	"io"
	"os"
	"regexp"
	"strings"
)

// console is the guest's console, as QEMU writes it to a file.
type console struct {
	name string
	at   int64
	rest []byte
}

// alarming is what a kernel says whose memory is not whole, and hardly ever else.
var alarming = regexp.MustCompile(
	`(?i)\bBUG\b|WARNING:|\boops\b|bad page|bad swap|bad rss|bad pte|corrupt|list_(add|del)|panic|` +
		`general protection|unable to handle|invalid opcode|double fault|stack guard|segfault|trap(s:|ped)|` +
		`EXT4-fs (error|warning)|I/O error|checksum|slab|red ?zone|freelist|refcount_t|usercopy|cut here|tainted|` +
		`VFS:.*(err|bad)|virtio.*(id|err)|unexpected|use-after-free|protection fault`)

// harmless are lines of a healthy guest that look alarming.
var harmless = regexp.MustCompile(
	`Kernel command line|Command line:|SLUB: HWalign|oom|OOM|slab_unreclaimable|slab_reclaimable|Unreclaimable slab|` +
		`slub_debug|Spectre|Speculative|printk|\] +(rcu|random|clocksource|tsc)|Tainted: G +(T|I|S)? *[0-9]|mem auto-init|virtio_blk|kernel memory protection|` +
		`integrity|x86/fpu|\bDMI\b|Freeing`)

// read returns the alarming lines since the last read.
func (c *console) read() []string {
	f, err := os.Open(c.name)
	if err != nil {
		return nil
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() < c.at {
		c.at, c.rest = 0, nil
	}
	b, _ := io.ReadAll(io.NewSectionReader(f, c.at, 1<<20))
	c.at += int64(len(b))
	c.rest = append(c.rest, b...)
	var found []string
	for {
		line, rest, ok := bytes.Cut(c.rest, []byte("\n"))
		if !ok {
			break
		}
		c.rest = rest
		if alarming.Match(line) && !harmless.Match(line) {
			found = append(found, strings.TrimSpace(string(line[:min(len(line), 300)])))
		}
	}
	c.rest = c.rest[max(0, len(c.rest)-4096):]
	return found
}

// last returns the end of the console.
func (c *console) last() string {
	b, _ := os.ReadFile(c.name)
	return string(b[max(0, len(b)-1500):])
}
