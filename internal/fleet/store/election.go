package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// leaseTime is how long a leader that is out of reach stays the leader. Hosts go on by themselves
// meanwhile, so there is no hurry: a member that is slow for some seconds should not lose it.
const leaseTime = 10 * time.Second

// Candidacy is one member's part in elections.
type Candidacy struct {
	Term
	session  *concurrency.Session
	election *concurrency.Election
}

// Campaign returns when this member leads. me is what others are told of it. The term's epoch is
// the create revision of its key: a later leader's is higher.
func (s *Store) Campaign(ctx context.Context, me string) (*Candidacy, error) {
	session, err := concurrency.NewSession(s.client,
		concurrency.WithTTL(int(leaseTime.Seconds())), concurrency.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("stand for election as the fleet's leader: %w", err)
	}
	c := &Candidacy{session: session, election: concurrency.NewElection(session, root+"leader")}
	if err := c.election.Campaign(ctx, me); err != nil {
		c.Leave()
		return nil, fmt.Errorf("stand for election as the fleet's leader: %w", err)
	}
	select {
	case <-session.Done():
		return nil, errors.New("the lease of this candidate ran out while it waited")
	default:
	}
	c.Term = Term{c.election.Key(), c.election.Rev(), s.number(c.election.Rev())}
	s.wrote(c.election.Rev())
	return c, nil
}

// Over is closed when the lease is lost. Until this member notices, another may lead already.
func (c *Candidacy) Over() <-chan struct{} { return c.session.Done() }

// Leave ends the term, so that another member need not wait for the lease.
func (c *Candidacy) Leave() {
	c.session.Close() // which revokes the lease; without etcd it runs out
}

// Leader is what the member that leads has said of itself; empty if none does.
func (s *Store) Leader(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	r, err := s.client.Get(ctx, root+"leader/", clientv3.WithFirstCreate()...)
	if err != nil {
		return "", fmt.Errorf("ask the fleet's store who leads: %w", err)
	}
	if len(r.Kvs) == 0 || len(r.Kvs[0].Value) > maxText {
		return "", nil
	}
	return string(r.Kvs[0].Value), nil
}
