package linux

import (
	"testing"
	"time"
)

func TestAttach(t *testing.T) {
	forKernels(t, func(t *testing.T, kernel string) {
		m := boot(t, spec{kernel: kernel, mib: 384, cpus: 2})
		began := time.Now()
		g, err := Attach(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("linux %s attached in %v", g.Release(), time.Since(began))
		for _, name := range []string{"init_task", "mem_section", "node_data"} {
			if va, ok := g.symbol(name); !ok || va>>63 == 0 {
				t.Errorf("symbol %s: %#x, %v", name, va, ok)
			}
		}
		// The first task is the idle task of CPU 0, whatever the kernel.
		comm, err := g.types.field("task_struct", "comm")
		if err != nil {
			t.Fatal(err)
		}
		task, _ := g.symbol("init_task")
		name := make([]byte, comm.size)
		if err := g.read(name, task+comm.offset); err != nil ||
			string(name[:9]) != "swapper/0" && string(name[:8]) != "swapper\x00" {
			t.Errorf("init_task is %q: %v", name, err)
		}
		m.stop(t)
		began = time.Now()
		if err := g.Revalidate(t.Context()); err != nil {
			t.Error(err)
		}
		t.Logf("revalidated in %v", time.Since(began))

		f := m.dump(t)
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		c, err := OpenCore(f, st.Size())
		if err != nil {
			t.Fatal(err)
		}
		g2, err := Attach(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if g2.Release() != g.Release() || g2.noteAddr != g.noteAddr {
			t.Errorf("core file has linux %s, note at %#x; the guest %s, at %#x", g2.Release(),
				g2.noteAddr, g.Release(), g.noteAddr)
		}

		// The guest stands, so both must see the same.
		live, err1 := g.Survey(t.Context())
		dead, err2 := g2.Survey(t.Context())
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if live.Free != dead.Free || live.Skippable != dead.Skippable || live.Skippable == 0 {
			t.Errorf("free %d, skippable %d; from the core file %d, %d", live.Free, live.Skippable,
				dead.Free, dead.Skippable)
		}
		for i, p := range live.Pages {
			if i < len(dead.Pages) && p.Kind != dead.Pages[i].Kind {
				t.Fatalf("page %#x is %v; from the core file %v", i, p, dead.Pages[i])
			}
		}
	})
}
