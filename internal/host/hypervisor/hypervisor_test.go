package hypervisor

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	web, err := os.ReadFile("testdata/web1.toml")
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(text), mode),
			os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("web1.toml", string(web), 0o644)
	write("web0.toml", string(web), 0o600)
	write(".web2.toml", "an editor's", 0o644)
	write("README", "not a VM", 0o644)
	list, err := Load(dir)
	if err != nil || len(list) != 2 || list[0].Name != "web0" || list[1].Name != "web1" {
		t.Fatalf("%+v, %v", list, err)
	}
	want := VM{
		Name: "web1",
		Command: []string{
			"/usr/bin/qemu-system-x86_64", "-machine", "pc-q35-7.2,accel=kvm", "-smp", "2", "-m",
			"4G", "-name", "web1",
			"-blockdev", `{"driver": "file", "filename": "/shared/web1.raw", "node-name": "disk"}`,
			"-qmp", "unix:/run/vacate/web1.qmp,server=on,wait=off", "{incoming}", "-nodefaults",
		},
		QMP: "/run/vacate/web1.qmp", User: "qemu", Log: "/var/log/vacate/web1.log",
		Env: map[string]string{"LANG": "C.UTF-8"}, StartTimeout: usualStart,
	}
	if d := cmp.Diff(want, list[1], cmpopts.IgnoreUnexported(VM{})); d != "" {
		t.Error(d)
	}
	args := list[1].Args(true)
	if i := slices.Index(args, "-S"); i < 0 ||
		!slices.Equal(args[i:], []string{"-S", "-incoming", "defer", "-nodefaults"}) ||
		slices.Contains(args, incoming) {
		t.Errorf("%q", args)
	}
	if args := list[1].Args(false); slices.Contains(args, "-S") ||
		slices.Contains(args, incoming) || args[len(args)-1] != "-nodefaults" {
		t.Errorf("%q", args)
	}

	// What is wrong takes nothing else with it.
	write("open.toml", string(web), 0o666)
	write("bad name.toml", string(web), 0o644)
	write("web2.toml", strings.Replace(string(web), `qmp = "/run/vacate/{name}.qmp"`,
		`qmp = "/run/vacate/web1.qmp"`, 1), 0o644)
	if err := os.Symlink("web1.toml", filepath.Join(dir, "link.toml")); err != nil {
		t.Fatal(err)
	}
	list, err = Load(dir)
	if len(list) != 2 || err == nil {
		t.Fatalf("%+v, %v", list, err)
	}
	for _, say := range []string{"chmod go-w", "bad name", "is that of web1 already",
		"symbolic link"} {
		if !strings.Contains(err.Error(), say) {
			t.Errorf("%v\ndoes not say: %s", err, say)
		}
	}
	if _, err := Find(dir, "web9"); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	if _, err := Find(dir, "../web1"); err == nil || errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	if list, err := Load(filepath.Join(dir, "none")); list != nil || err != nil {
		t.Errorf("%v, %v", list, err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(dir, "web1"); err == nil ||
		!strings.Contains(err.Error(), "can be written by others") {
		t.Error(err)
	}
}

// Labels are for rules of a fleet, whose selectors must be able to name them.
func TestLabels(t *testing.T) {
	const rest = "command = [\"/bin/qemu\", \"-qmp\", \"unix:{qmp}\"]\nqmp = \"/run/x\"\n"
	for text, say := range map[string]string{
		rest: "", "labels = { app = \"db\", tier = \"prod\" }\n" + rest: "",
		"labels = { name = \"x\" }\n" + rest:        "labels: label \"name\"",
		"labels = { app = \"two words\" }\n" + rest: "labels: label app",
	} {
		vm, err := parse("web1", text)
		if say == "" && (err != nil || strings.Contains(text, "app") && vm.Labels["app"] != "db") ||
			say != "" && (err == nil || !strings.Contains(err.Error(), say)) {
			t.Errorf("%s: %v, %v; want %q", text, vm.Labels, err, say)
		}
	}
}

func TestForeignOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give a file away")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "vm.toml")
	if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Chown(path, 65534, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(dir, "vm"); err == nil || !strings.Contains(err.Error(), "chown root") {
		t.Error(err)
	}
}

func TestParse(t *testing.T) {
	for _, c := range []struct{ text, say string }{
		{``, "qmp is missing"},
		{`qmp = "/q"`, "command is missing"},
		{"qmp = \"/q\"\ncomand = []", `unknown key "comand"`},
		{"qmp = \"/q\"\n[env]\nA = 1", "incompatible types"},
		{"qmp = \"/q\"\ncommand = 1", "incompatible types"},
		{`qmp = "q"`, "absolute path"},
		{`start_timeout = "10ms"`, "start_timeout = \"10ms\": want 1s to 1h0m0s"},
		{`start_timeout = "2h"`, "want 1s to 1h0m0s"},
		{`qmp = "/` + strings.Repeat("q", 107) + `"`, "at most 107 bytes"},
		{`qmp = "/a,b"`, "comma"},
		{"qmp = \"/q\"\nlog = \"l\"", "log"},
		{"qmp = \"/q\"\nuser = \"a\\u0000\"", "NUL"},
		{"qmp = \"/q\"\nenv = {\"A=B\" = \"C\"}", "name of a variable"},
		{"qmp = \"/q\"\ncommand = [\"qemu\", \"{qmp}\"]", "absolute path of a QEMU"},
		{"qmp = \"/q\"\ncommand = [\"/qemu\"]", "does not have the QMP socket"},
		{"qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\", \"-incoming\", \"defer\"]",
			"leave that to"},
		{"qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\", \"-daemonize\"]", "leave it out"},
		{"qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\", \"{incoming}\", \"{incoming}\"]", "twice"},
		{"qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\", \"a{incoming}\"]",
			"an argument of its own"},
		{"qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\", \"{incomming}\"]",
			"there is no {incomming}, only {name}, {qmp} and {incoming}"},
		{"qmp = \"\xff\"", "not UTF-8"},
	} {
		if vm, err := parse("vm", c.text); err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s\nis %+v, %v; want %s", c.text, vm, err, c.say)
		}
	}
	if _, err := parse("vm", "qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\", "+
		`'{"driver": "file", "a": {}}'`+"]"); err != nil {
		t.Errorf("JSON: %v", err)
	}
	trusting, err := parse("vm",
		"qmp = \"/q\"\ncommand = [\"/qemu\", \"-qmp\", \"unix:/q\"]\ntrust_disks = [\"data\", "+
			"\"cd\"]")
	if err != nil || !slices.Equal(trusting.TrustDisks, []string{"data", "cd"}) {
		t.Errorf("%+v, %v", trusting, err)
	}
	vm, err := parse("vm", "qmp = \"/q\"\ncommand = [\"/qemu\", \"-qmp\", \"unix:/q\"]")
	if err != nil || vm.Log != "/q.log" ||
		!slices.Equal(vm.Args(true),
			[]string{"/qemu", "-qmp", "unix:/q", "-S", "-incoming", "defer"}) {
		t.Errorf("%+v, %v", vm, err)
	}
	for _, name := range []string{"", ".", "..", "-x", "a/b", "a b", "é", strings.Repeat("a", 65)} {
		if CheckName(name) == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	web, err := os.ReadFile("testdata/web1.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add("web1", string(web))
	f.Add("vm", "qmp = \"/q\"\ncommand = [\"/qemu\", \"{qmp}\"]")
	f.Fuzz(func(t *testing.T, name, text string) {
		vm, err := parse(name, text)
		if err != nil {
			return
		}
		args := vm.Args(true)
		if !filepath.IsAbs(args[0]) || !filepath.IsAbs(vm.QMP) || !filepath.IsAbs(vm.Log) ||
			vm.Name != name {
			t.Fatalf("%+v", vm)
		}
		if i := slices.Index(args, "-incoming"); i < 0 || args[i+1] != "defer" ||
			slices.Contains(args[i+1:], "-incoming") {
			t.Fatalf("%q", args)
		}
	})
}
