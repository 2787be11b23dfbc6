package process

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// PeerOf returns the process at the other end of a unix socket, and its user. For a client it is
// the process that called listen(2). It may have ended since.
func PeerOf(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if credErr != nil {
		return nil, os.NewSyscallError("getsockopt SO_PEERCRED", credErr)
	}
	return cred, nil
}

// Connected reports whether the process has a connection to a unix socket that listens by the name
// path. Another process may have made the connection, and passed it on.
func (p Process) Connected(path string) (bool, error) {
	return p.hasSocket(func(fd int) bool {
		return nameOf(unix.Getpeername(fd)) == path
	})
}

// Listens reports whether the process has a unix socket in a directory of any name, with the name
// file there. The process may know the directory by another name than this one does.
func (p Process) Listens(file string) (bool, error) {
	return p.hasSocket(func(fd int) bool {
		is, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		return err == nil && is != 0 && filepath.Base(nameOf(unix.Getsockname(fd))) == file
	})
}

// nameOf returns the name of a unix socket; empty if it has none.
func nameOf(address unix.Sockaddr, err error) string {
	if n, ok := address.(*unix.SockaddrUnix); ok && err == nil {
		return n.Name
	}
	return ""
}

// hasSocket reports whether is says of a socket of the process that it is one.
func (p Process) hasSocket(is func(fd int) bool) (bool, error) {
	pidfd, err := p.Open()
	if err != nil {
		return false, err
	}
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", p.PID)
	files, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, f := range files {
		what, err := os.Readlink(filepath.Join(dir, f.Name()))
		number, numErr := strconv.Atoi(f.Name())
		if err != nil || numErr != nil || !strings.HasPrefix(what, "socket:") {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed since
		} else if err != nil {
			return false, os.NewSyscallError("pidfd_getfd", err)
		}
		found := is(fd)
		unix.Close(fd)
		if found {
			return true, nil
		}
	}
	return false, nil
}
