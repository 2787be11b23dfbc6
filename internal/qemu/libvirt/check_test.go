package libvirt

import (
	"errors"
	"os"
	"strings"
	"testing"
)

var policy = Policy{
	Emulators: []string{"/usr/bin/qemu-system-x86_64"},
	Paths:     []string{"/srv/vms", "/srv/iso", "/dev/mapper", "rbd:vms"},
	Networks:  []string{"default", "br0", "user"},
}

func readRich(t testing.TB) string {
	b, err := os.ReadFile("testdata/rich.xml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// What libvirt describes to another host is taken, and written anew so that it reads the same
// again.
func TestCheck(t *testing.T) {
	lab, err := os.ReadFile("testdata/lab.xml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := policy.Check(string(lab)); err != nil {
		t.Error(err)
	}
	// QEMU's own network lets the guest reach what listens on this host alone.
	less := policy
	less.Networks = []string{"default", "br0"}
	if _, err := less.Check(string(lab)); err == nil ||
		!strings.Contains(err.Error(), `the network "user"`) {
		t.Error(err)
	}
	c, err := policy.Check(readRich(t))
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "rich" || c.UUID.String() != "6c1bc1f3-76f4-4b85-a4d8-2b2a7c2b4d11" {
		t.Errorf("%q %v", c.Name, c.UUID)
	}
	again, err := policy.Check(c.XML)
	if err != nil || again != c {
		t.Errorf("read again: %v\n%s", err, c.XML)
	}
	for _, keep := range []string{
		"http://libosinfo.org/xmlns/libvirt/domain/1.0",
		`<source protocol="rbd" name="vms/rich-data">`,
		"<loader readonly=\"yes\"", `pinned="no"`} {
		if !strings.Contains(c.XML, keep) {
			t.Errorf("it has no %s any more", keep)
		}
	}
}

// hostile is one thing that a hostile peer would have this host do.
type hostile struct{ name, replaced, by, says string }

// readHostile reads testdata/hostile.txt, and adds what is too long for a file.
func readHostile(t testing.TB) (list []hostile) {
	b, err := os.ReadFile("testdata/hostile.txt")
	if err != nil {
		t.Fatal(err)
	}
	for i, block := range strings.Split(strings.TrimSpace(string(b)), "\n\n") {
		if i == 0 {
			continue // what the file is
		}
		l := strings.Split(block, "\n")
		if len(l) != 4 {
			t.Fatalf("%q has not 4 lines", l)
		}
		list = append(list, hostile{l[0], l[1], strings.TrimSuffix(l[2], "(nothing)"), l[3]})
	}
	const child = "<iothreads>1</iothreads>"
	return append(list,
		hostile{"deep", child, strings.Repeat("<cputune>", 100), "deep"},
		hostile{"wide", child, strings.Repeat("<iothreads/>", 30_000), "more than 20000 elements"},
		hostile{"attributes", child, "<iothreads " + manyAttributes(100) + "/>", "100 attributes"},
		hostile{"large", child, strings.Repeat(" ", 2<<20), "at most 1048576"},
		hostile{"NUL", "<name>rich", "<name>rich\x00", "not UTF-8"},
	)
}

func TestHostile(t *testing.T) {
	text := readRich(t)
	for _, h := range readHostile(t) {
		t.Run(h.name, func(t *testing.T) {
			changed := strings.Replace(text, h.replaced, h.by, 1)
			if changed == text {
				t.Fatalf("the description has no %s", h.replaced)
			}
			_, err := policy.Check(changed)
			if !errors.Is(err, ErrXML) || !strings.Contains(err.Error(), h.says) {
				t.Errorf("%v\ndoes not say: %s", err, h.says)
			}
		})
	}
}

func manyAttributes(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(" a" + strings.Repeat("b", i) + "='x'")
	}
	return b.String()
}

// Whatever is taken reads the same when it is read again, and a policy that allows nothing takes
// nothing that names a file.
func FuzzCheck(f *testing.F) {
	rich := readRich(f)
	f.Add(rich)
	for _, h := range readHostile(f) {
		if len(h.by) < 1000 {
			f.Add(strings.Replace(rich, h.replaced, h.by, 1))
		}
	}
	b, err := os.ReadFile("testdata/lab.xml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(b))
	f.Fuzz(func(t *testing.T, text string) {
		c, err := policy.Check(text)
		if err != nil {
			return
		}
		again, err := policy.Check(c.XML)
		if err != nil || again != c {
			t.Fatalf("%v\n%s\nbecame\n%s", err, c.XML, again.XML)
		}
		if strings.Contains(c.XML, "<!") || strings.Contains(c.XML, "<?") {
			t.Fatal(c.XML)
		}
	})
}
