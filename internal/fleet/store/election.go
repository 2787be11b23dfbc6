package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const (
	// leaseTime is how long a leader that is out of reach stays the leader. Hosts go on by
	// themselves meanwhile, so there is no hurry: a member that is slow for some seconds should not
	// lose it, and neither should one that waits for etcd to elect (see package member).
	leaseTime = 20 * time.Second
	// whoTime is how long etcd may take to say who leads.
	whoTime = 5 * time.Second
	// leaveTime is how long a member that ends tries to make room for the next one.
	leaveTime = 3 * time.Second

	candidates = root + "leader/"
)

// Candidacy is one member's part in elections.
type Candidacy struct {
	Term
	session *concurrency.Session
}

// errOverslept: etcd has not heard of a candidate for as long as its lease is.
var errOverslept = errors.New("the lease of this candidate ran out while it waited")

// Campaign returns when this member leads. me is what others are told of it, and no other member
// has the same. The term's epoch is the create revision of its key: a later leader's is higher.
func (s *Store) Campaign(ctx context.Context, me string) (_ *Candidacy, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("stand for election as the fleet's leader: %w", err)
		}
	}()
	if err := s.withdraw(ctx, me); err != nil {
		return nil, err
	}
	asking, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	lease, err := s.client.Grant(asking, int64(leaseTime.Seconds()))
	if err != nil {
		return nil, err
	}
	session, err := concurrency.NewSession(s.client, concurrency.WithLease(lease.ID),
		concurrency.WithContext(context.WithoutCancel(ctx)))
	if err != nil {
		return nil, err
	}
	c := &Candidacy{session: session}
	defer func() {
		if err != nil {
			c.Leave(ctx)
		}
	}()
	// Others wait for each candidate that stood before them, so one without a lease must not stand.
	waiting, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer context.AfterFunc(session.Ctx(), func() { stop(errOverslept) })()
	key := fmt.Sprintf("%s%x", candidates, lease.ID)
	r, err := s.client.Put(waiting, key, me, clientv3.WithLease(lease.ID))
	if err == nil {
		err = s.await(waiting, r.Header.Revision)
	}
	if waiting.Err() != nil {
		err = context.Cause(waiting)
	}
	if err != nil {
		return nil, err
	}
	c.Term = Term{key, r.Header.Revision, s.number(r.Header.Revision)}
	s.wrote(r.Header.Revision)
	return c, nil
}

// await returns when all who stood for election before a revision are gone.
func (s *Store) await(ctx context.Context, revision int64) error {
	last := append(clientv3.WithLastCreate(), clientv3.WithMaxCreateRev(revision-1))
	for {
		r, err := s.client.Get(ctx, candidates, last...)
		if err != nil || len(r.Kvs) == 0 {
			return err
		}
		if err := s.gone(ctx, string(r.Kvs[0].Key), r.Header.Revision); err != nil {
			return err
		}
	}
}

// gone returns when a key that was there at a revision has been deleted.
func (s *Store) gone(ctx context.Context, key string, revision int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for r := range s.client.Watch(ctx, key, clientv3.WithRev(revision), clientv3.WithFilterPut()) {
		if err := r.Err(); err != nil {
			return err
		}
		if len(r.Events) > 0 {
			return nil
		}
	}
	return errors.New("etcd has ended a watch")
}

// withdraw ends what this member has begun and not ended: as another process, or when etcd did not
// answer. Else the fleet would have no leader until that lease has run out, which starts anew each
// time that etcd elects.
func (s *Store) withdraw(ctx context.Context, me string) error {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	r, err := s.client.Get(ctx, candidates, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range r.Kvs {
		if string(kv.Value) != me {
			continue
		}
		if _, err := s.client.Delete(ctx, string(kv.Key)); err != nil {
			return err
		}
	}
	return nil
}

// Over is closed when the lease is lost. Until this member notices, another may lead already.
func (c *Candidacy) Over() <-chan struct{} { return c.session.Done() }

// Leave ends the term, so that another member need not wait for the lease. A member that ends, as
// ctx says, does not try for long.
func (c *Candidacy) Leave(ctx context.Context) {
	c.session.Orphan()
	limit := leaseTime
	if ctx.Err() != nil {
		limit = leaveTime
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	c.session.Client().Revoke(ctx, c.session.Lease()) // without etcd it runs out
}

// Leader is what the member that leads has said of itself; empty if none does. It is what this
// member of etcd knows, and may be old. Asking the others takes seconds where machines are busy,
// and those who ask need a member that leads: they see for themselves whether it does.
func (s *Store) Leader(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, whoTime)
	defer cancel()
	r, err := s.client.Get(ctx, candidates,
		append(clientv3.WithFirstCreate(), clientv3.WithSerializable())...)
	if err != nil {
		return "", fmt.Errorf("ask the fleet's store who leads: %w", err)
	}
	if len(r.Kvs) == 0 || len(r.Kvs[0].Value) > maxText {
		return "", nil
	}
	return string(r.Kvs[0].Value), nil
}
