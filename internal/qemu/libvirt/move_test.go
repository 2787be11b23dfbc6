package libvirt

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// mover moves a domain by the calls that an eviction makes, and as little else as will do: pages
// that the twin asks for come first, all others in order, through QEMU's stream.
type mover struct {
	*rig
	flags    Flags
	inactive string
	anchorA  *Conn // begins at A, and is not used any more
	anchorB  *Conn // the same at B
	cookie   []byte
	xml      string
	q        *qmp.Client
	mem      *guestmem.Memory
	conn     net.Conn // to the twin
	replies  *migstream.ReturnReader
	ended    chan error // of the return path
	loaded   chan struct{}

	mu   sync.Mutex // guards what follows
	w    *bufio.Writer
	sent map[string][]bool // by block
}

const section = 0x7ffffff0

func (m *mover) say(what string, since time.Time) {
	m.Logf("%-28s %5d ms", what, time.Since(since).Milliseconds())
}

func (m *mover) send(items ...migstream.Item) {
	m.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	var b []byte
	for _, i := range items {
		b = i.Append(b)
	}
	if _, err := m.w.Write(b); err != nil {
		m.Error(err)
	}
	if err := m.w.Flush(); err != nil {
		m.Error(err)
	}
}

// prepare has the domain's job at A, and a twin at B that has taken the head.
func (r *rig) prepare(flags Flags) *mover {
	r.Helper()
	m := &mover{
		rig:    r,
		flags:  flags,
		sent:   map[string][]bool{},
		ended:  make(chan error, 1),
		loaded: make(chan struct{}),

		anchorA: r.dial(r.h.A),
		anchorB: r.dial(r.h.B),
	}
	var err error
	m.inactive, err = r.a.XML(r.ctx, r.domain, Inactive)
	r.check(err)
	at := time.Now()
	m.cookie, m.xml, err = m.anchorA.Begin(r.ctx, r.domain, flags|ChangeProtection)
	r.check(err)
	m.say("begin", at)
	p := Policy{
		Emulators: []string{r.lab.VM.Spec.QEMU.Path},
		Paths:     []string{r.l.Dir(), "/run/libvirt/lab", "/var/log/libvirt/lab"},
		Networks:  []string{"user"},
	}
	checked, err := p.Check(m.xml)
	r.check(err)
	if checked.Name != "web1" || checked.UUID != r.domain.UUID {
		r.Errorf("the description is of %q, %v", checked.Name, checked.UUID)
	}
	plain, err := PlainCookie(m.cookie)
	r.check(err)

	// The source's facts.
	m.q = r.monitor(r.a, r.domain)
	m.mem, err = guestmem.Attach(r.ctx, m.q)
	r.check(err)
	r.Cleanup(func() { m.mem.Close() })
	machine, err := m.q.QueryMachine(r.ctx)
	r.check(err)

	at = time.Now()
	uri, socket := r.b.ListenPath("test")
	_, err = m.anchorB.Prepare(r.ctx, "web1", checked.XML, uri, plain, flags)
	r.check(err)
	m.say("prepare", at)
	m.conn, err = net.Dial("unix", socket)
	r.check(err)
	r.Cleanup(func() { m.conn.Close() })
	m.w = bufio.NewWriterSize(m.conn, 1<<20)
	sizes := uint64(0)
	var list []migstream.Block
	for _, b := range m.mem.Blocks() {
		sizes |= b.PageSize
		list = append(list, migstream.Block{Name: b.Name, Length: b.Size, PageSize: b.PageSize})
		m.sent[b.Name] = make([]bool, (b.Size+4095)/4096)
	}
	m.send(
		migstream.Header{},
		migstream.Configuration{Machine: machine},
		migstream.Command{ID: migstream.CmdOpenReturnPath},
		migstream.PingCommand(1),
		migstream.AdviseCommand(sizes),
		migstream.SectionStart{
			ID:      section,
			Name:    "ram",
			Version: migstream.RAMVersion,
		},
		migstream.MemSize{Blocks: list},
		migstream.EOS{},
		migstream.Footer{ID: section},
	)
	m.replies = migstream.NewReturnReader(m.conn, 1<<20)
	if msg, err := m.replies.Next(); err != nil || msg.Type != migstream.MsgPong || msg.Value != 1 {
		r.Fatalf("%+v, %v", msg, err)
	}
	twin, err := r.b.Find(r.ctx, "web1")
	r.check(err)
	process, err := r.b.Process(twin)
	r.check(err)
	at = time.Now()
	extents := make([]guestmem.Extent, len(list))
	for i, b := range m.mem.Blocks() {
		extents[i] = guestmem.Extent{
			Name:     b.Name,
			Size:     b.Size,
			Total:    b.Total,
			PageSize: b.PageSize,
		}
	}
	found, err := guestmem.Find(r.ctx, process.PID, extents)
	r.check(err)
	m.say(fmt.Sprintf("find %d blocks of the twin", len(found)), at)
	r.Logf("b before the freeze: %v", r.virsh(r.h.B, "domstate", "--reason", "web1"))
	return m
}

// freeze pauses the domain at A and has the twin load its devices.
func (m *mover) freeze() {
	m.Helper()
	at := time.Now()
	m.check(m.a.Suspend(m.ctx, m.domain))
	m.say("suspend", at)
	p, err := m.a.Process(m.domain)
	m.check(err)
	theirs, ours, err := Directory(p.PID)
	m.check(err)
	at = time.Now()
	m.check(
		m.q.Run(
			m.ctx,
			"xen-save-devices-state",
			map[string]any{"filename": theirs + "/vacate", "live": true},
			nil,
		),
	)
	m.say("save", at)
	saved, err := os.ReadFile(ours + "/vacate")
	m.check(err)
	m.check(os.Remove(ours + "/vacate"))
	if s, err := m.a.State(m.ctx, m.domain); err != nil || s != (State{Paused, PausedMigration}) {
		m.Errorf("frozen: %v, %v", s, err)
	}
	load, err := migstream.Package(saved, 3)
	m.check(err)
	name := m.mem.Blocks()[0]
	at = time.Now()
	m.send(migstream.DiscardCommand(name.Name, []migstream.Range{{Start: 0, Length: name.Size}}))
	m.send(load)
	go m.serve()
	select {
	case <-m.loaded:
	case err := <-m.ended:
		m.Fatal("the twin's return path ended:", err)
	case <-m.ctx.Done():
		m.Fatal("the twin does not load the devices")
	}
	m.say("load", at)
	m.Logf("b, loaded: %v", m.virsh(m.h.B, "domstate", "--reason", "web1"))
}

// serve answers the twin.
func (m *mover) serve() {
	for {
		msg, err := m.replies.Next()
		if err != nil {
			m.ended <- err
			return
		}
		switch msg.Type {
		case migstream.MsgPong:
			if msg.Value == 3 {
				close(m.loaded)
			}
		case migstream.MsgReqPages, migstream.MsgReqPagesID:
			for at := msg.Start; at < msg.Start+uint64(msg.Length); at += 4096 {
				m.page(msg.Block, at)
			}
		case migstream.MsgShut:
			if msg.Value != 0 {
				m.Errorf("the twin's migration ended with status %d", msg.Value)
			}
			m.ended <- nil
			return
		}
	}
}

// page sends a page once.
func (m *mover) page(block string, offset uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sent[block][offset/4096] {
		return
	}
	m.sent[block][offset/4096] = true
	i := slices.IndexFunc(m.mem.Blocks(), func(b guestmem.Block) bool { return b.Name == block })
	data := make([]byte, 4096)
	if err := m.mem.Read(data, i, offset); err != nil {
		m.Error(err)
	}
	page := migstream.Page{Block: block, Offset: offset, Data: data}
	if guestmem.IsZero(data) {
		page.Data = nil
	}
	var b []byte
	for _, item := range []migstream.Item{
		migstream.SectionPart{ID: section}, page, migstream.EOS{}, migstream.Footer{ID: section},
	} {
		b = item.Append(b)
	}
	if _, err := m.w.Write(b); err != nil {
		m.Error(err)
	}
	if err := m.w.Flush(); err != nil {
		m.Error(err)
	}
}

// firstReport waits until the guest reports from b.
func (r *rig) firstReport() *lab.VM {
	r.Helper()
	vm, err := r.lab.Came(r.ctx)
	r.check(err)
	before := len(vm.Guest.Samples())
	for len(vm.Guest.Samples()) == before {
		time.Sleep(10 * time.Millisecond)
	}
	return vm
}

// push sends all pages, and ends the stream.
func (m *mover) push() {
	for _, b := range m.mem.Blocks() {
		for offset := uint64(0); offset < b.Size; offset += 4096 {
			m.page(b.Name, offset)
		}
	}
	m.send(
		migstream.SectionEnd{ID: section},
		migstream.EOS{},
		migstream.Footer{ID: section},
		migstream.EOF{},
	)
}

// commit has B run the domain, sends all memory, and ends both sides.
func (m *mover) commit() {
	m.Helper()
	at := time.Now()
	type answer struct {
		d   Domain
		err error
	}
	finished := make(chan answer, 1)
	go func() {
		d, err := m.b.Finish(m.ctx, "web1", nil, m.flags, false)
		finished <- answer{d, err}
	}()
	m.firstReport()
	m.say("commit to the first report", at)
	m.Logf("b, running: %v", m.virsh(m.h.B, "domstate", "--reason", "web1"))
	m.push()
	m.say("push", at)
	if err := <-m.ended; err != nil {
		m.Fatal("the twin's return path:", err)
	}
	a := <-finished
	m.check(a.err)
	m.say("finish", at)
	at = time.Now()
	m.check(m.a.Confirm(m.ctx, m.domain, nil, m.flags|ChangeProtection, false))
	m.say("confirm", at)
}

// rollBack ends the twin and has A run the domain again.
func (m *mover) rollBack() {
	m.Helper()
	at := time.Now()
	_, err := m.b.Finish(m.ctx, "web1", nil, m.flags, true)
	m.say("finish(canceled)", at)
	m.check(err)
	at = time.Now()
	m.check(m.a.Confirm(m.ctx, m.domain, nil, m.flags|ChangeProtection, true))
	m.say("confirm(canceled)", at)
	if s, err := m.a.State(m.ctx, m.domain); err != nil || s.State != Running {
		m.Errorf("rolled back: %v, %v", s, err)
	}
	m.Logf("a, rolled back: %v", m.virsh(m.h.A, "domstate", "--reason", "web1"))
	if out := m.virsh(m.h.B, "list", "--all", "--name"); out != "" {
		m.Errorf("b still has %q", out)
	}
	if now, err := m.a.XML(m.ctx, m.domain, Inactive); err != nil || now != m.inactive {
		m.Errorf("the inactive description is\n%s, %v\nand was\n%s", now, err, m.inactive)
	}
}

// A domain is moved by the calls of this package, under load, after it was rolled back at two
// moments: no page of its memory is bad, and both libvirts say what they would after a migration of
// their own, which is possible afterwards.
func TestMove(t *testing.T) {
	spec := small
	spec.Devices = lab.Full
	r := newRig(t, libvirtlab.Spec{VM: spec, Domain: tagged})
	const flags = MigrateLive | Postcopy | PersistDest | UndefineSource | Unsafe
	r.virsh(r.h.A, "autostart", "web1")

	m := r.prepare(flags)
	m.rollBack()
	m = r.prepare(flags)
	m.freeze()
	m.rollBack()
	r.check(r.lab.VM.Guest.WaitOps(r.ctx, 100))

	m = r.prepare(flags)
	m.freeze()
	m.commit()
	if out := r.virsh(r.h.A, "list", "--all", "--name"); out != "" {
		t.Errorf("a still has %q", out)
	}
	if !strings.HasPrefix(r.virsh(r.h.B, "domstate", "--reason", "web1"), "running") {
		t.Error(r.virsh(r.h.B, "domstate", "--reason", "web1"))
	}
	twin, err := r.b.Find(r.ctx, "web1")
	r.check(err)
	info, err := r.b.Info(r.ctx, twin)
	r.check(err)
	t.Logf("at b: %+v (%v)", info, info.State)
	if !info.Persistent {
		t.Errorf("%+v", info)
	}
	if m, err := r.b.Metadata(r.ctx, twin); err != nil ||
		m != (Metadata{Pinned: true, Priority: 3}) {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err = r.b.Define(r.ctx, m.inactive); err != nil {
		t.Error(err)
	}
	if now, err := r.b.XML(r.ctx, twin, Inactive); err != nil || now != m.inactive {
		t.Errorf("the inactive description is\n%s, %v\nand was\n%s", now, err, m.inactive)
	}

	// libvirt's own migration takes it back, while the guest stands: see libvirtlab's TestMigrate.
	vm, err := r.lab.Came(r.ctx)
	r.check(err)
	r.check(vm.Guest.WaitOps(r.ctx, 100))
	labtest.MustCheck(t, vm)
	r.virsh(
		r.h.B,
		"migrate",
		"--unsafe",
		"--persistent",
		"--undefinesource",
		"--migrateuri",
		"unix://"+filepath.Join(r.l.RunDir(), "back.sock"),
		"web1",
		r.h.A.URI,
	)
	if s := r.virsh(r.h.A, "domstate", "--reason", "web1"); !strings.HasPrefix(s, "running") {
		t.Error(s)
	}
}
