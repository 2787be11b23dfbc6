package host

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/sys/process"
)

// What an operator is told depends on what can still come of an eviction: what cannot be undone is
// offered late.
func TestProspects(t *testing.T) {
	dir := t.TempDir()
	j, err := journal.Open(filepath.Join(dir, "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	const export, resume, discard = "export ID FILE", "decide ID resume-here", "decide ID discard"
	own, err := process.Find(os.Getpid()) // stands for the QEMU
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name     string
		role     journal.Role
		mark     evict.Mark
		kept     string
		fence    bool
		silent   time.Duration
		done     bool
		remedies []string
		says     []string
	}{
		{"just silent", journal.Source, evict.MarkMayRun, "", true, 5 * time.Second, false, nil,
			[]string{"may run on host hostb, which has not answered for 5 s", "goes on by itself"}},
		{"long silent", journal.Source, evict.MarkMayRun, "", false, 2 * time.Minute, false,
			[]string{export, resume, discard}, []string{"not answered for 120 s"}},
		{"can be fenced", journal.Source, evict.MarkMayRun, "", true, 2 * time.Minute, false,
			[]string{export, resume, resume + " --confirm web1 --fence", discard}, nil},
		{"lost, and dead", journal.Source, evict.MarkLost, "dead-there", true, 0, false,
			[]string{export, resume + " --confirm web1", discard},
			[]string{"runs no more on host hostb"}},
		{"lost, and perhaps alive", journal.Source, evict.MarkLost, "", false, 0, false,
			[]string{export, resume, discard}, []string{"may run on host hostb"}},
		{"not whole, and dead", journal.Source, evict.MarkLost, "given-back dead-there", true, 0,
			false, []string{discard + " --confirm web1"}, []string{"not whole"}},
		{"not whole", journal.Source, evict.MarkLost, "given-back", true, 0, false,
			[]string{discard}, []string{"not whole"}},
		{"cut off", journal.Destination, evict.MarkMayRun, "", false, 5 * time.Second, false, nil,
			[]string{"VM web1 runs on host hosta", "two copies run", "vacate status web1"}},
		{"long cut off", journal.Destination, evict.MarkMayRun, "", false, 2 * time.Minute, false,
			[]string{discard},
			[]string{
				"runs on host hosta, until it needs memory that only host hostb has, which has " +
					"not answered for 120 s"}},
		{"cut off, and it stands", journal.Destination, evict.MarkMayRun, "stands", false,
			5 * time.Second, false, nil,
			[]string{
				"stands on host hosta, and lacks memory that only host hostb has, which has not " +
					"answered for 5 s", "vacate status web1"}},
		{"out of the configuration", journal.Source, evict.MarkMayRun, "", false,
			5 * time.Second, false, nil,
			[]string{"may run on host hostb", "put [peers.hostb] back into the configuration"}},
		{"cut off, and out of the configuration", journal.Destination, evict.MarkMayRun, "",
			false, 5 * time.Second, false, nil,
			[]string{"that only host hostb has", "Host hostb is no peer of host hosta any more"}},
		{"not to be told", journal.Source, evict.MarkBegun, "", true, 0, false, nil, nil},
		{"about to be resumed here", journal.Source, evict.MarkResumedHere, "", true, 0, false, nil,
			[]string{"stands frozen until its QEMU can run it", "locks of its disks"}},
		{"resumed here", journal.Source, evict.MarkResumedHere, "", true, 0, true, nil,
			[]string{"hostb has not heard that yet"}},
		{"over", journal.Source, evict.MarkCompleted, "", true, 0, true, nil, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := &Host{started: time.Now(),
				config: Config{Name: "hosta", Peers: map[string]Peer{"hostb": {}}}}
			if test.fence {
				h.config.Peers["hostb"] = Peer{Fence: []string{"/bin/off", "{host}"}}
			}
			if strings.HasSuffix(test.name, "out of the configuration") {
				h.config.Peers = nil
			}
			entry, err := j.Create(journal.Record{ID: journal.NewID(), Role: test.role, VM: "web1",
				Peer: "hostb", Mark: string(evict.MarkBegun),
				PID: own.PID, StartTime: own.StartTime})
			if err != nil {
				t.Fatal(err)
			}
			for name := range strings.FieldsSeq(test.kept) {
				if err := entry.Keep(name, []byte("paused")); err != nil {
					// only stands has a content
					t.Fatal(err)
				}
			}
			if err := (record{entry}).Note(test.mark, "as the test has it"); err != nil {
				t.Fatal(err)
			}
			if test.done {
				if err := entry.Finish(string(test.mark), "", nil); err != nil {
					t.Fatal(err)
				}
			}
			v := h.newEviction(entry)
			if test.silent != 0 {
				v.alone = time.Now().Add(-test.silent)
			}
			advice, remedies := v.prospects()
			for i, r := range test.remedies {
				test.remedies[i] = "vacate " + strings.Replace(r, "ID", entry.ID().String(), 1)
			}
			if !slices.Equal(remedies, test.remedies) {
				t.Errorf("remedies %q, not %q", remedies, test.remedies)
			}
			for _, text := range test.says {
				if !strings.Contains(advice, text) {
					t.Errorf("nothing says %q: %q", text, advice)
				}
			}
			if test.says == nil && test.remedies == nil && advice != "" {
				t.Errorf("there is nothing to say: %q", advice)
			}
		})
	}
}

// Of an eviction whose record is damaged nobody knows where the VM is, so nothing is said of it but
// that, whatever is asked for.
func TestDamagedIsNotGuessedAt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j, err := journal.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := j.Create(journal.Record{ID: journal.NewID(), Role: journal.Source, VM: "web1",
		Peer: "hostb", Mark: string(evict.MarkMayRun)})
	if err != nil {
		t.Fatal(err)
	}
	j.Close()
	log := filepath.Join(dir, entry.ID().String(), "log")
	if err := os.WriteFile(log, []byte("not a journal"), 0o600); err != nil {
		t.Fatal(err)
	}
	if j, err = journal.Open(dir); err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	h := &Host{started: time.Now(), config: Config{Name: "hosta"}}
	v := h.newEviction(j.Find(entry.ID()))
	for _, says := range []string{v.undecidable(), v.unabortable()} {
		if !strings.Contains(says, "damaged") || strings.Contains(says, "runs on") {
			t.Errorf("it is said of a damaged eviction: %s", says)
		}
	}
}

// A refusal stays one when a daemon reads it again, beside roll-backs with the same mark.
func TestRefusalIsReadAgain(t *testing.T) {
	for outcome, report := range map[string]string{"refused": `{"outcome":"refused"}`,
		"aborted": `{"outcome":"aborted"}`} {
		h, _ := measured(t)
		h.log = slog.New(slog.DiscardHandler)
		entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Source,
			VM: "web1", Peer: "hostb", Mark: string(evict.MarkBegun)})
		if err != nil {
			t.Fatal(err)
		}
		v := h.newEviction(entry)
		v.finish(evict.MarkRolledBack, evict.State(outcome), errors.New("why"), []byte(report))
		again := h.newEviction(entry)
		if v.outcome != outcome || again.outcome != outcome || again.reason != "why" {
			t.Errorf("%s was %q, and is %q after a restart, as %q", outcome, v.outcome,
				again.outcome, again.reason)
		}
		if says := again.undecidable(); !strings.Contains(says, "has ended: "+outcome) {
			t.Errorf("%s: %s", outcome, says)
		}
	}
}

// While a twin is starting, nobody is told that the VM may run there.
func TestAbortOfStartingTwin(t *testing.T) {
	h, _ := measured(t)
	entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Destination,
		VM: "web1", Peer: "hosta", Mark: string(evict.MarkAccepted)})
	if err != nil {
		t.Fatal(err)
	}
	says := h.newEviction(entry).unabortable()
	for _, want := range []string{"VM web1 runs on host hosta", "just starting",
		"`vacate abort " + entry.ID().String()[:8] + "` on host hosta"} {
		if !strings.Contains(says, want) {
			t.Errorf("nothing says %q: %s", want, says)
		}
	}
	if strings.Contains(says, "may run") {
		t.Error(says)
	}
}
