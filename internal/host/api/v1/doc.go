// Package hostv1 is the API of a host's daemon, as messages and a Connect service. All but this
// file is generated from host.proto, which tells what everything means, by make generate.
package hostv1
