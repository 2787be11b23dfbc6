package lab

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"vacate/internal/sys/process"
)

// repo is one place of the machine's configured package sources.
type repo struct{ uri, release, component string }

// debianRepos returns the machine's own sources of its own Debian release. apt
// reads them, in whatever format they are written.
func debianRepos(ctx context.Context) (codename string, repos []repo, err error) {
	if codename, err = debianCodename(); err != nil {
		return "", nil, err
	}
	out, err := output(exec.CommandContext(ctx, "apt-get", "indextargets", "--format",
		"$(REPO_URI)|$(RELEASE)|$(COMPONENT)", "Created-By: Packages"))
	if err != nil {
		return "", nil, err
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) == 3 && f[2] == "main" &&
			(f[1] == codename || strings.HasPrefix(f[1], codename+"-")) {
			repos = append(repos, repo{f[0], f[1], f[2]})
		}
	}
	if len(repos) == 0 {
		return "", nil, fmt.Errorf("apt has no sources of Debian %s: add them to /etc/apt",
			codename)
	}
	return codename, repos, nil
}

// suiteRepos returns where another of Debian's suites is: the mirror that has
// this machine's release has the others.
func suiteRepos(own string, repos []repo, suite string) ([]repo, error) {
	for _, r := range repos {
		if r.release == own {
			return []repo{{r.uri, suite, "main"}}, nil
		}
	}
	return nil, fmt.Errorf("apt has no source of Debian %s itself", own)
}

func debianCodename() (string, error) {
	f, err := os.Open("/etc/os-release")
	if err != nil {
		return "", err
	}
	defer f.Close()
	values := map[string]string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		k, v, _ := strings.Cut(lines.Text(), "=")
		values[k] = strings.Trim(v, `"'`)
	}
	if values["ID"] != "debian" || values["VERSION_CODENAME"] == "" {
		return "", fmt.Errorf("this machine runs %q: the lab fetches packages on Debian only",
			values["PRETTY_NAME"])
	}
	return values["VERSION_CODENAME"], nil
}

// keyring is where Debian's keys for all its releases are.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// privateApt is an apt with its own sources, state and cache under dir, which
// knows of no installed packages. The machine's own apt configuration applies
// as well (a proxy, say), but not its hooks.
type privateApt struct{ dir string }

func newPrivateApt(ctx context.Context, dir string, repos []repo) (*privateApt, error) {
	dir, err := filepath.Abs(dir) // apt runs in it
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	var sources strings.Builder
	signed := ""
	if _, err := os.Stat(keyring); err == nil {
		signed = "[signed-by=" + keyring + "] "
	}
	for _, r := range repos {
		fmt.Fprintf(&sources, "deb %s%s %s %s\n", signed, r.uri, r.release, r.component)
	}
	conf := fmt.Sprintf(`#clear APT::Update;
#clear DPkg;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi;
Dir::State "%[1]s/state";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s/cache";
Dir::Etc::SourceList "%[1]s/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
Acquire::PDiffs "false";
`, dir)
	for name, content := range map[string]string{"sources.list": sources.String(), "apt.conf": conf,
		"status": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	a := &privateApt{dir}
	// "any": without it a source that fails is only a warning.
	_, err = a.run(ctx, "apt-get", "update", "--error-on=any")
	return a, err
}

func (a *privateApt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name,
		append([]string{"-c", filepath.Join(a.dir, "apt.conf"), "-qq"}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.Dir = a.dir
	return output(cmd)
}

// unpacked downloads packages, and returns the directory in which they are unpacked.
func (a *privateApt) unpacked(ctx context.Context, packages []string) (string, error) {
	if _, err := a.run(ctx, "apt-get", append([]string{"download"}, packages...)...); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(a.dir, "*.deb"))
	if err != nil {
		return "", err
	}
	tree := filepath.Join(a.dir, "tree")
	return tree, unpack(ctx, debs, tree)
}

// depends returns what a package depends on, as far as it begins with prefix.
func (a *privateApt) depends(ctx context.Context, pkg, prefix string) ([]string, error) {
	out, err := a.run(ctx, "apt-cache", "depends", "--important", pkg)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok &&
			strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// unpack unpacks packages that apt has downloaded.
func unpack(ctx context.Context, debs []string, into string) error {
	for _, deb := range debs {
		if _, err := output(exec.CommandContext(ctx, "dpkg-deb", "-x", deb, into)); err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
		}
	}
	return nil
}

// output runs cmd, which ends when this process does. Its error has the end of what cmd wrote.
func output(cmd *exec.Cmd) ([]byte, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := process.StartBound(cmd, cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w%s", strings.Join(cmd.Args, " "), err,
			lastLines("its output", errs.String()+out.String()))
	}
	return out.Bytes(), nil
}

// lastLines returns the end of a text as a paragraph of an error, or nothing.
func lastLines(what, text string) string {
	text = strings.TrimSpace(text)
	if text == "" {
		return ""
	}
	lines := strings.Split(text, "\n")
	lines = lines[max(0, len(lines)-12):]
	for i, l := range lines {
		lines[i] = strings.Map(func(r rune) rune {
			if r < ' ' && r != '\t' || r == 0x7f {
				return -1
			}
			return r
		}, l[:min(len(l), 300)])
	}
	return "\n" + what + ":\n\t" + strings.Join(lines, "\n\t")
}
